"""Training of the latent model: codebook start, label dropout, and both networks through the command, resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ptq_exp.cli import train_embedded
from ptq_exp.embedded import digits
from ptq_exp.embedded.digits import Digits
from ptq_exp.embedded.networks import build_autoencoder, build_dit, build_latent_unet
from ptq_exp.embedded.training.latent_modules import AutoencoderTraining, LatentDenoiserTraining, codes_used
from ptq_exp.embedded.weights_file import WEIGHTS


def test_the_codebook_starts_at_latents_so_that_codes_are_used():
    images = digits("train", 32).images[:96]
    torch.manual_seed(0)
    module = AutoencoderTraining(build_autoencoder(), images, seed=0, lr=1e-3, total_steps=10, ema_decay=0.9)
    before = codes_used(module.network, images)
    module._start_codebook()
    codes = module.network.quantize.embedding.weight
    assert codes_used(module.network, images) > max(200, before)
    assert torch.equal(codes, module.ema.module.quantize.embedding.weight)


class Mean(torch.nn.Module):
    """An autoencoder with two codes, whose latents are the image, thrice."""

    def __init__(self):
        super().__init__()
        self.quantize = torch.nn.Module()
        self.quantize.embedding = torch.nn.Embedding(2, 3)

    def encode(self, images):
        return type("Encoded", (), {"latents": images.expand(-1, 3, -1, -1)})


def test_the_codebook_starts_at_the_clusters_by_hand():
    images = torch.cat([torch.full((6, 1, 2, 2), -0.5), torch.full((3, 1, 2, 2), 0.75)])
    module = AutoencoderTraining(Mean(), images, seed=0, lr=1e-3, total_steps=10, ema_decay=0.9)
    module._start_codebook()
    for network in (module.network, module.ema.module):
        found = network.quantize.embedding.weight.sort(dim=0).values
        torch.testing.assert_close(found, torch.tensor([[-0.5] * 3, [0.75] * 3]))


def test_labels_are_dropped_at_the_asked_rate_and_by_the_step_alone():
    seen = []

    class Denoiser(torch.nn.Module):
        weight = torch.nn.Parameter(torch.zeros(1))

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


FILES = {"autoencoder": "digits_vq", "latent_unet": "digits_latent_unet", "dit": "digits_dit"}


def train(network, folder, steps):
    """Card and weights; checkpoints come every two epochs of two batches."""
    arguments = [network, "--steps", str(steps), "--work", str(folder), "--out", str(folder / "out"), "--samples", "10"]
    train_embedded.main(arguments)
    card = json.loads((folder / "out" / f"{FILES[network]}.json").read_text())
    assert card["steps"] == steps
    return card, load_file(folder / "out" / f"{FILES[network]}.safetensors")


def train_in_two_parts(network, module_class, folder, monkeypatch):
    """As `train` for six steps, cut off in the last one, after the checkpoint of the fourth, and run again."""
    step, taken = module_class.training_step, []

    def interrupted(self, batch):
        if self.global_step == 5:
            raise KeyError("power cut")
        return step(self, batch)

    def counted(self, batch):
        taken.append(self.global_step)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module_class, "training_step", interrupted)
        with pytest.raises(KeyError, match="power cut"):
            train(network, folder, 6)
        patch.setattr(module_class, "training_step", counted)
        result = train(network, folder, 6)
    assert taken == [4, 5]
    return result


@pytest.mark.parametrize(
    "network, module_class",
    [("autoencoder", AutoencoderTraining), ("latent_unet", LatentDenoiserTraining), ("dit", LatentDenoiserTraining)],
)
def test_an_interrupted_training_continues_bit_for_bit(
    few_digits, monkeypatch, tmp_path, network, module_class, capsys
):
    for part in ("whole", "parts"):
        (tmp_path / part / "out").mkdir(parents=True)
        for file in ("digits_vq.safetensors", "digits_vq.json"):
            shutil.copy(WEIGHTS / file, tmp_path / part / "out")
    card, weights = train(network, tmp_path / "whole", 6)
    again_card, again = train_in_two_parts(network, module_class, tmp_path / "parts", monkeypatch)
    del card["minutes_of_last_session"], again_card["minutes_of_last_session"]
    assert card.pop("sha256") == again_card.pop("sha256") and card == again_card
    assert weights.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in weights.items())
    if network == "autoencoder":
        assert card["scaling_factor"] > 0 and 0 < card["codes_used"] <= 256
    else:
        build = {"latent_unet": build_latent_unet, "dit": build_dit}[network]
        assert set(weights) == set(build().state_dict())
        assert card["samples"] == 10 and 0 <= card["label_agreement"] <= 1 <= card["inception_score"] <= 10
