"""Training of the latent model: codebook start, label dropout, and both networks through the command, resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ptq_exp import train_embedded
from ptq_exp.embedded import digits
from ptq_exp.embedded.digits import Digits
from ptq_exp.embedded.networks import build_autoencoder, build_latent_unet
from ptq_exp.embedded.weights_file import WEIGHTS
from ptq_exp.lightning.training_latent import AutoencoderTraining, LatentDenoiserTraining, codes_used


def test_the_codebook_starts_at_latents_so_that_codes_are_used():
    images = digits("train", 32).images[:96]
    torch.manual_seed(0)
    module = AutoencoderTraining(build_autoencoder(), images, seed=0, lr=1e-3, total_steps=10, ema_decay=0.9)
    before = codes_used(module.network, images)
    module._start_codebook()
    codes = module.network.quantize.embedding.weight
    assert codes_used(module.network, images) > max(200, before)
    assert torch.equal(codes, module.ema.module.quantize.embedding.weight)


def test_labels_are_dropped_at_the_asked_rate_and_by_the_step_alone():
    seen = []

    class Denoiser(torch.nn.Module):
        class_embedding = torch.nn.Embedding(11, 1)

        def forward(self, x, t, y):
            seen.append(y)
            return x

    module = LatentDenoiserTraining(
        Denoiser(), torch.linspace(0.99, 0.01, 1000), label_dropout=0.25, seed=0, lr=1e-3, total_steps=2, ema_decay=0.9
    )
    module.report_loss = lambda loss: loss
    batch = torch.zeros(2000, 3, 2, 2), torch.arange(2000) % 10
    module.training_step(batch), module.training_step(batch)
    assert torch.equal(seen[0], seen[1])
    dropped = seen[0] == 10
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert torch.equal(seen[0][~dropped], batch[1][~dropped])


@pytest.fixture
def few_digits(monkeypatch):
    def few(split="all", size=16):
        return Digits(*(part[:130] for part in digits(split, size)))

    monkeypatch.setattr(train_embedded, "digits", few)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def train(network, folder, out, steps):
    train_embedded.main([network, "--steps", str(steps), "--work", str(folder), "--out", str(out)])


@pytest.mark.parametrize("network, name", [("autoencoder", "digits_vq"), ("latent_unet", "digits_latent_unet")])
def test_a_training_in_two_parts_ends_as_one_in_a_single_part(few_digits, tmp_path, network, name, capsys):
    """Checkpoints come every two epochs of two batches: the second part starts at step 4."""
    weights = []
    for part, steps in (("whole", [6]), ("parts", [4, 6])):
        out = tmp_path / part / "out"
        out.mkdir(parents=True)
        for file in ("digits_vq.safetensors", "digits_vq.json"):
            shutil.copy(WEIGHTS / file, out)
        for n in steps:
            train(network, tmp_path / part, out, n)
        weights.append(load_file(out / f"{name}.safetensors"))
        assert json.loads((out / f"{name}.json").read_text())["steps"] == 6
    # the learning rate of the first four steps is the same: warm-up
    assert weights[0].keys() == weights[1].keys()
    prefixes = {key.split(".")[0] for key in weights[0]}
    assert prefixes >= ({"encoder", "decoder", "quantize"} if network == "autoencoder" else {"unet", "class_embedding"})
    if network == "latent_unet":
        assert set(weights[0]) == set(build_latent_unet().state_dict())
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
