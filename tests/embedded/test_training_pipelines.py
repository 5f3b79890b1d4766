"""Training of the embedded pipelines: targets, prompts left out, and the command, resumed bit for bit."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from ptq_exp.cli import train_embedded
from ptq_exp.embedded.attributes import slant
from ptq_exp.embedded.digits import Digits, digits
from ptq_exp.embedded.pipeline_networks import build_kl_autoencoder, build_tokenizer
from ptq_exp.embedded.pipelines import NETWORKS, velocity_scheduler
from ptq_exp.embedded.prompts import HELD_OUT, asked
from ptq_exp.embedded.training import pipelines
from ptq_exp.embedded.training.pipeline_modules import FlowTraining, KLAutoencoderTraining, VelocityTraining
from ptq_exp.embedded.weights_file import WEIGHTS
from ptq_exp.evaluation.images import to_uint8

SETTINGS = {"seed": 0, "lr": 1e-3, "total_steps": 4, "ema_decay": 0.9}


class Spy(torch.nn.Module):
    """Keeps what it is called with and answers `answer(x, t)`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x, t, ids, *length):
        self.calls.append((x, t, ids, *length))
        return self.answer(x, t)


def loss_of(module, images=64):
    module.report_loss = lambda loss: loss
    ids = torch.arange(3).expand(images, 3)[..., None]
    return float(module.training_step((torch.full((images, 4, 2, 2), 0.5), ids)))


def test_the_target_of_digits_text_is_v():
    scheduler = velocity_scheduler()

    def exact(x, t):
        """All latents are 0.5: eps and with it v follow from x_t; at the last time x_t is eps."""
        alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (x - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * 0.5

    module = VelocityTraining(Spy(exact), scheduler, **SETTINGS)
    assert loss_of(module) < 1e-8
    times = module.network.calls[0][1]
    assert times.dtype == torch.int64 and int(times.min()) >= 0 and 984 <= int(times.max()) <= 999
    assert float(scheduler.alphas_cumprod[-1]) == 0


def test_the_target_of_digits_flow_is_the_velocity_of_its_scheduler():
    module = FlowTraining(Spy(lambda x, t: (x - 0.5) / (t.view(-1, 1, 1, 1) / 1000)), **SETTINGS)
    assert loss_of(module, 512) < 1e-6
    x, t, _, length = module.network.calls[0]
    assert length in FlowTraining.LENGTHS
    sigma = t / 1000
    # logit-normal: half below 0.5, and 68 % within one standard deviation of it
    assert float(sigma.median()) == pytest.approx(0.5, abs=0.01)
    assert float((sigma.logit().abs() < 1).float().mean()) == pytest.approx(0.683, abs=0.01)
    # one Euler step of the scheduler from there to sigma 0 gives the latents back
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[float(sigma[0])])
    velocity = module.network.answer(x[:1], t[:1])
    ended = scheduler.step(velocity, scheduler.timesteps[0], x[:1]).prev_sample
    torch.testing.assert_close(ended, torch.full_like(ended, 0.5), atol=1e-5, rtol=0)


def test_prompts_are_shortened_and_emptied_at_their_rates():
    module = FlowTraining(Spy(lambda x, t: x), short=0.3, empty=0.1, **SETTINGS)
    ids = torch.arange(3).expand(4000, 3)[..., None]
    rows = module.choose_prompts(ids, torch.Generator().manual_seed(0)).flatten()
    again = module.choose_prompts(ids, torch.Generator().manual_seed(0)).flatten()
    assert torch.equal(rows, again)
    assert (torch.bincount(rows) / 4000).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.02)


def test_held_out_combinations_are_not_in_the_data():
    data = Digits(*(part[:60] for part in digits("all", 32)))
    vae = build_kl_autoencoder().eval()
    latents, texts = pipelines.prompted_latents(vae, data)
    assert 240 < len(latents) < 300 and latents.shape[1:] == (4, 8, 8) and len(texts) == 3 * len(latents)
    # sheared copies of a digit have other words than the digit
    assert len({asked(text) for text in texts[::3]}) > 40
    whole, short, empty = texts[0::3], texts[1::3], texts[2::3]
    assert not HELD_OUT & {asked(text) for text in whole} and set(empty) == {""}
    for text, shortened in zip(whole, short, strict=True):
        assert asked(text)._replace(slant=None) == asked(shortened)


def test_shearing_adds_to_the_slant():
    images = digits("all", 32).images[:50]
    before = slant(to_uint8(images))
    for by in pipelines.SHEARS:
        added = slant(to_uint8(pipelines.sheared(images, by))) - before
        assert added == pytest.approx(by, abs=0.02)  # a scan may lose ink at the edge
    torch.testing.assert_close(pipelines.sheared(images, 0.0), images, atol=1e-5, rtol=0)


def test_the_autoencoder_starts_from_the_trained_one():
    started = pipelines._started_autoencoder(WEIGHTS).state_dict()
    trained = load_file(WEIGHTS / "digits_vq.safetensors")
    same = [name for name, value in trained.items() if name in started and torch.equal(value, started[name])]
    new = set(started) - set(same)
    assert {name.split(".")[1] for name in new} == {"conv_out", "conv_in", "weight", "bias"}
    assert new == {
        "encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight",
        "quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias",
    }


@pytest.fixture
def few_digits(monkeypatch):
    """One batch of 64 images or two of 32, and short prompts."""
    monkeypatch.setattr(pipelines, "SHEARS", (0.0,))
    monkeypatch.setattr(FlowTraining, "LENGTHS", (12, 13, 14, 15, 16))
    monkeypatch.setattr(
        pipelines, "digits", lambda split="all", size=16: Digits(*(part[:80] for part in digits(split, size)))
    )
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


MODULES = {"kl_autoencoder": KLAutoencoderTraining, "digits_text": VelocityTraining, "digits_flow": FlowTraining}


def train(network, folder, steps):
    """Card and weights; checkpoints come every two epochs of one or two batches."""
    out = folder / "out"
    if not out.exists():
        torch.manual_seed(0)
        build_kl_autoencoder().save_pretrained(out / "digits_text" / "vae")
        (out / "digits_vq.safetensors").symlink_to(WEIGHTS / "digits_vq.safetensors")
    arguments = [network, "--steps", str(steps), "--work", str(folder), "--out", str(out), "--samples", "10"]
    train_embedded.main(arguments)
    card = json.loads((out / f"{network.replace('kl_autoencoder', 'digits_kl')}.json").read_text())
    assert card["steps"] == steps
    inside = out / ("digits_text/vae" if network == "kl_autoencoder" else network)
    return card, {f"{path.parent.name}.{key}": value for path in sorted(inside.rglob("*.safetensors"))
                  for key, value in load_file(path).items()}


@pytest.mark.parametrize("network", list(MODULES))
def test_an_interrupted_training_continues_bit_for_bit(few_digits, monkeypatch, tmp_path, network, capsys):
    """Six steps, cut off in the last one, after the checkpoint of the fourth, and run again."""
    monkeypatch.setattr(pipelines, "prompt_quality", lambda *arguments: {})  # 20 steps of an untrained network
    card, weights = train(network, tmp_path / "whole", 6)
    step, taken = MODULES[network].training_step, []

    def interrupted(self, batch):
        if self.global_step == 5:
            raise KeyError("power cut")
        return step(self, batch)

    def counted(self, batch):
        taken.append(self.global_step)
        return step(self, batch)

    monkeypatch.setattr(MODULES[network], "training_step", interrupted)
    with pytest.raises(KeyError, match="power cut"):
        train(network, tmp_path / "parts", 6)
    monkeypatch.setattr(MODULES[network], "training_step", counted)
    again_card, again = train(network, tmp_path / "parts", 6)
    assert taken == [4, 5]
    del card["minutes_of_last_session"], again_card["minutes_of_last_session"]
    assert card == again_card and len(card["loss_by_tenth"]) == 6
    assert weights.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in weights.items())
    if network in NETWORKS:
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "parts" / "out" / network)
        assert pipe.tokenizer("a seven").input_ids == build_tokenizer()("a seven").input_ids


def test_the_command_writes_into_the_package():
    """The default of --out holds the weights that the package loads."""
    assert train_embedded.WEIGHTS == WEIGHTS and (train_embedded.WEIGHTS / "digits_vq.safetensors").exists()
