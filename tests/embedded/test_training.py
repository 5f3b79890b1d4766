"""Training of the embedded networks: schedule, EMA, the losses' pairing, and resuming bit for bit."""

import copy
import hashlib
import json

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ptq_exp.cli import train_embedded
from ptq_exp.embedded import digits, digits_model
from ptq_exp.embedded.digits import Digits
from ptq_exp.embedded.training import modules as training
from ptq_exp.embedded.training.modules import ClassifierTraining, DenoiserTraining, EMATraining, warmup_stable_decay


def test_learning_rate_by_hand():
    factors = [warmup_stable_decay(step, warmup=4, total=20, decay_share=0.5) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[11:20] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert factors[20] == 0.01


def test_losses_by_tenth_by_hand():
    assert train_embedded.losses_by_tenth([float(i) for i in range(20)]) == [0.5 + 2 * i for i in range(10)]
    # a training of three steps has three losses, not seven more of zero
    assert train_embedded.losses_by_tenth([3.0, 2.0, 1.0]) == [3.0, 2.0, 1.0]


class Line(EMATraining):
    """One weight that is pulled to 1."""

    def training_step(self, batch):
        return self.report_loss((self.network(batch[0]) - 1).square().mean())


def test_ema_follows_the_weights_by_its_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    module = Line(network, seed=0, lr=0.1, total_steps=1000, ema_decay=0.75)
    seen = []

    class Record(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(network.weight.item())

    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Record()],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=1))
    assert len(seen) == 4 and seen[0] > 0 and seen == sorted(seen)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    assert float(module.ema.module.weight) == pytest.approx(average, rel=1e-6)
    assert len(module.loss_history) == 4


class Exact(nn.Module):
    """Knows that all images are 0: eps = x_t / sqrt(1 - alpha_bar)."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.alphas_cumprod, self.times = alphas_cumprod, []

    def forward(self, x, t):
        self.times.append(t)
        level = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return type("Output", (), {"sample": x / (1 - level).sqrt()})


def denoiser_training(images=64):
    alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    module = DenoiserTraining(
        Exact(alphas_cumprod), alphas_cumprod, seed=0, lr=1e-3, total_steps=10, ema_decay=0.9
    )
    module.log = lambda *args, **kwargs: None
    return module, (torch.zeros(images, 1, 4, 4), torch.zeros(images))


def test_the_noised_image_its_time_and_its_noise_belong_together():
    module, batch = denoiser_training()
    assert float(module.training_step(batch)) < 1e-10
    times = module.network.times[0]
    # one time in each 64th of the schedule, cut to an integer
    first = torch.arange(65) * 1000 / 64
    assert (times >= first[:-1].floor()).all() and (times < first[1:]).all()


def test_times_stay_inside_the_schedule_at_the_largest_draw(monkeypatch):
    module, batch = denoiser_training()
    monkeypatch.setattr(torch, "rand", lambda n, **kwargs: torch.full((n,), 1 - 2**-24))
    module.training_step(batch)
    assert int(module.network.times[0].max()) == 999


def test_augmentation_depends_on_the_generator_and_keeps_digits_readable():
    images = digits().images[:64]
    first = training._random_affine(images, torch.Generator().manual_seed(0))
    again = training._random_affine(images, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    other = training._random_affine(images, torch.Generator().manual_seed(1))
    assert not torch.equal(first, other)
    assert first.shape == images.shape and float(first.min()) >= -1 and float(first.max()) <= 1
    # paper comes in at the edges, ink stays: shifts of 1.5 pixels correlate with the original
    blank = training._random_affine(torch.full_like(images, -1), torch.Generator().manual_seed(0))
    assert float((blank + 1).abs().max()) < 1e-6
    pairs = torch.stack([first.flatten(1), images.flatten(1)], 1)
    assert min(float(torch.corrcoef(pair)[0, 1]) for pair in pairs) > 0.3


@pytest.fixture
def few_digits(monkeypatch):
    """Three batches of 64 an epoch."""

    def few(split="all"):
        images, labels = digits(split)
        return Digits(images[:200], labels[:200])

    monkeypatch.setattr(train_embedded, "digits", few)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def train(network, folder, steps):
    train_embedded.main([network, "--steps", str(steps), "--work", str(folder), "--out", str(folder / "out")])
    card = json.loads((folder / "out" / f"digits_{network}.json").read_text())
    weights = folder / "out" / f"digits_{network}.safetensors"
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    return card, load_file(weights)


def test_an_interrupted_training_continues_bit_for_bit(few_digits, monkeypatch, tmp_path, capsys):
    """Ten steps of three epochs and a bit; the interruption comes in the third, after the checkpoint of the second."""
    card, weights = train("classifier", tmp_path / "whole", 10)
    assert card["steps"] == 10 and len(card["loss_by_tenth"]) == 10

    step = ClassifierTraining.training_step
    taken = []

    def interrupted(self, batch):
        if self.global_step == 8:
            raise KeyError("power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTraining, "training_step", interrupted)
        with pytest.raises(KeyError, match="power cut"):
            train("classifier", tmp_path / "parts", 10)
    assert not (tmp_path / "parts" / "out").exists()

    def counted(self, batch):
        taken.append(self.global_step)
        return step(self, batch)

    monkeypatch.setattr(ClassifierTraining, "training_step", counted)
    resumed_card, resumed = train("classifier", tmp_path / "parts", 10)
    assert taken == [6, 7, 8, 9]
    assert resumed_card["loss_by_tenth"] == card["loss_by_tenth"]
    assert resumed_card["held_out_accuracy"] == card["held_out_accuracy"]
    assert weights.keys() == resumed.keys()
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name
    assert [path.name for path in (tmp_path / "parts" / "classifier").glob("last*")] == ["last.ckpt"]

    # a finished training is exported again, not continued
    again_card, again = train("classifier", tmp_path / "parts", 10)
    assert len(taken) == 4 and again_card["steps"] == 10
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_the_trained_unet_is_a_checkpoint_of_the_model(few_digits, tmp_path, capsys):
    card, weights = train("unet", tmp_path, 1)
    assert card["steps"] == 1 and "held_out_accuracy" not in card and len(card["loss_by_tenth"]) == 1
    # an untrained network's output is small: the loss is that of the answer 0
    assert card["loss_by_tenth"][0] == pytest.approx(1, abs=0.3)
    model = digits_model(checkpoint=str(tmp_path / "out" / "digits_unet.safetensors"))
    assert model.digest == card["sha256"]
    assert torch.equal(copy.copy(model.denoiser.unet.conv_in.weight), weights["conv_in.weight"])
