"""The forecast of a network in files: its first blocks are timed, all others count in proportion."""

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.experiment import experiment
from ptq_exp.experiment.experiment import forecast_experiment
from ptq_exp.experiment.forecast import first_blocks, saving, seconds, speeds
from ptq_exp.experiment.forecast.first_blocks import FirstBlocks
from ptq_exp.experiment.forecast.probe import Line
from ptq_exp.experiment.stage import Stages
from ptq_exp.quantization import Report
from ptq_exp.quantization.offload import weight_bytes
from ptq_exp.settings.compose import composed_from

LAYERS = 4


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(LAYERS)])
        self.called = Counter()
        for name, module in self.named_modules():
            module.register_forward_hook(lambda *_, name=name: self.called.update([name]))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def first(chain, monkeypatch, patience):
    monkeypatch.setattr(first_blocks, "BUDGET", patience)
    found = FirstBlocks(chain, ("blocks.*",), lambda: chain(torch.ones(1, 3)))
    chain.called.clear()
    return found


def test_measurements_end_behind_the_blocks_that_a_second_reaches(monkeypatch):
    chain = Chain()
    some = first(chain, monkeypatch, 0.0)
    assert some.names == ["blocks.0"]
    some.run(chain, lambda: chain(torch.ones(2, 3)))
    assert chain.called == Counter({"enter": 1, "blocks.0": 1, "blocks.0.0": 1, "blocks.0.1": 1})
    assert [name for name, _ in some.part(chain).named_modules() if name.count(".") == 1] == ["blocks.0"]
    names = ("enter", "leave", "blocks.0", "blocks.0.0", "blocks.1.0", "blocks.3")
    assert [name for name in names if some.hold(name)] == ["blocks.0", "blocks.0.0"]
    assert [name for name in names if some.behind(name)] == ["blocks.1.0", "blocks.3"]
    # 72 of the parameters of each block, 32 and 27 at the ends
    assert some.share(chain, None) == pytest.approx(72 / (4 * 72 + 32 + 27))

    every = first(chain, monkeypatch, 60.0)
    assert every.names == [f"blocks.{n}" for n in range(LAYERS)]
    assert every.share(chain, None) == pytest.approx(4 * 72 / (4 * 72 + 32 + 27))
    with pytest.raises(ConfigError, match="layers"):
        FirstBlocks(chain, ("layers.*",), lambda: chain(torch.ones(1, 3)))


def test_weights_of_the_last_of_them_stand_for_all(monkeypatch):
    chain, asked = Chain(), []
    found = first(chain, monkeypatch, 0.0)
    work = lambda block: (asked.append(block), 7.0)[1]  # noqa: E731
    assert found.in_proportion(chain, work) == pytest.approx(7.0 * (4 * 72 + 32 + 27) / 72)
    assert asked == [chain.blocks[0]]


def test_a_block_is_saved_with_its_own_operations(monkeypatch, tmp_path):
    """And not with those of a block whose name begins as its own does."""
    saved = []
    monkeypatch.setattr(saving, "save_quantized", lambda place, block, rules, report, about: saved.append(report))
    monkeypatch.setattr(saving, "read_description", lambda place: None)
    names = ("enter", "blocks.1", "blocks.1.0", "blocks.10", "blocks.10.0", "again.blocks.1.0")
    report = Report(tuple(SimpleNamespace(name=name) for name in names), 0)
    found = SimpleNamespace(names=["blocks.1"], in_proportion=lambda network, work: work(network))
    saving.saving_seconds(found, nn.ModuleDict({"blocks": nn.ModuleDict({"1": nn.ReLU()})}), report, tmp_path)
    assert saved and {tuple(row.name for row in each.rows) for each in saved} == {("blocks.1", "blocks.1.0")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=LAYERS, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10,
    )
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    path = tmp_path_factory.mktemp("dit")
    DiTPipeline(transformer, AutoencoderKL(**small), DDIMScheduler()).save_pretrained(path)
    return path


def settings(folder, tmp_path, *overrides):
    return composed_from([
        "model=diffusers", f"model.checkpoint={folder}", "trainer.max_memory_gb=1e-7", "metric=minmax", "logger=none",
        "trainer.progress_bar=false", "trainer.accelerator=cpu", "sampler.steps=2", "evaluation.n_samples=3",
        "evaluation.batch_size=3", "evaluation.eps_error_samples=3", "calibration.n_samples=24",
        "calibration.batch_size=6", f"cache_dir={tmp_path}/cache", *overrides,
    ])


def test_weights_that_would_be_converted_are_refused_where_there_is_no_room(folder, tmp_path):
    message = (
        r"model.dtype=bfloat16: the weights in .*transformer are float32, and converted they would take .* GB, more "
        r"than trainer.max_memory_gb=1e-07: set model.dtype=float32"
    )
    with pytest.raises(ConfigError, match=message):
        forecast_experiment(settings(folder, tmp_path, "model.dtype=bfloat16"), tmp_path)
    assert forecast_experiment(settings(folder, tmp_path, "model.dtype=bfloat16", "trainer.max_memory_gb=1"), tmp_path)


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_first_blocks_give_the_same_forecast_as_all_of_them(folder, tmp_path, monkeypatch, caplog, patience):
    """Where each measured block takes a second, whatever is measured."""
    monkeypatch.setattr(first_blocks, "BUDGET", patience)
    caplog.set_level("INFO", "ptq_exp")
    found: list[speeds.Speeds] = []

    def line(work, n, device, passing=0.0, before=None):
        work(n)
        (known,) = found
        return Line(0.0, float(len(known.first.names)), 1.0)

    class Known(speeds.Speeds):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(speeds, "line", line)
    monkeypatch.setattr("ptq_exp.experiment.forecast.make.Speeds", Known)
    made = forecast_experiment(settings(folder, tmp_path, "bits=w4a8", "reconstruction=gptq"), tmp_path)
    assert made, caplog.text
    names = found[0].first.names
    macs = {row.name: row.macs for row in found[0].placed.report.rows}
    inside = sum(count for name, count in macs.items() if any(name.startswith(f"{block}.") for block in names))
    each = len(names) * sum(macs.values()) / inside  # seconds of an evaluation
    # full precision and quantized, 2 steps, 3 samples
    assert inside and made.seconds["eps_error"] == pytest.approx(2 * 2 * 3 * each)
    assert made.seconds["reconstruct"] > 24 * 2 * each and made.seconds["save_quantized"] > 0
    assert len(names) == (1 if patience == 0 else LAYERS)


def test_weights_that_are_read_from_files_are_no_memory_of_each_sample(tmp_path, monkeypatch):
    """Else a batch would seem to take the weights as often as it has samples, and runs that fit would be refused."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10,
    )
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    DiTPipeline(transformer, AutoencoderKL(**small), DDIMScheduler()).save_pretrained(tmp_path / "dit")
    block = weight_bytes(transformer.transformer_blocks[0])
    assert block > 15e6
    monkeypatch.setattr(speeds, "line", partial(speeds.line, budget=0.0))  # as where one evaluation takes a second
    needs = {}
    monkeypatch.setattr("ptq_exp.experiment.forecast.make._check", lambda found, device: needs.update(found))
    assert forecast_experiment(settings(tmp_path / "dit", tmp_path, "bits=w8a8"), tmp_path)
    drawing = ("drawing images", "drawing quantized images", "finding ranges")
    assert {stage: needs[stage].each < block / 2 for stage in drawing} == dict.fromkeys(drawing, True)
    assert [needs[stage].fixed for stage in drawing] == [0.0, 2 * block, 2 * block]


@pytest.mark.parametrize(("room", "gone"), [(0.0, True), (1e15, False), (None, False)])
def test_weights_are_timed_from_the_disk_where_those_of_the_run_come_from_there(
    folder, tmp_path, monkeypatch, room, gone
):
    """As memory does not hold both networks; what a batch needs is never refused here."""
    evicted = []
    monkeypatch.setattr(first_blocks, "evict", evicted.append)
    monkeypatch.setattr(speeds, "available_memory", lambda: room)
    assert forecast_experiment(settings(folder, tmp_path, "bits=w8a8"), tmp_path)
    layers = [module for module in evicted if hasattr(module, "weight_quantizer")]
    # each weight that is timed, all that are rounded, and the network each time that it is evaluated
    assert (len(layers) > 1 and len(evicted) > len(layers) + 8) if gone else evicted == []


@pytest.mark.usefixtures("small_networks")
def test_a_transform_that_works_in_later_blocks_alone_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(first_blocks, "BUDGET", 0.0)
    caplog.set_level("INFO", "ptq_exp")
    unet = composed_from([
        "model=digits", "trainer.max_memory_gb=1e-7", "metric=minmax", "logger=none", "trainer.progress_bar=false",
        "trainer.accelerator=cpu", "sampler.steps=2", "evaluation=paired", "evaluation.n_samples=2", "bits=w8a8",
        "calibration.n_samples=4", f"cache_dir={tmp_path}/cache", "quantization.transforms=[smooth]",
    ])
    assert forecast_experiment(unet, tmp_path) is None
    assert "no forecast: smooth works in none of the first blocks" in caplog.text
    unet.quantization = replace(unet.quantization, transforms=("rotate",))  # looks at no data
    assert forecast_experiment(unet, tmp_path).seconds["quantize"] > 0


def test_an_engine_is_said_not_to_be_measured(folder, tmp_path, caplog):
    caplog.set_level("INFO", "ptq_exp")
    assert forecast_experiment(settings(folder, tmp_path, "bits=w8a8", "runtime.compare=torch"), tmp_path) is None
    assert "no forecast: an engine of a network in files is not measured" in caplog.text


def test_the_traces_that_are_counted_are_those_that_are_made(folder, tmp_path, monkeypatch):
    stage, rows = ["none"], {name: 0 for name in ("none", *seconds._TRACES)}
    forward, called = BasicTransformerBlock.forward, Stages.__call__

    def counting(self, hidden_states, *args, **kwargs):
        if stage[0] in rows and len(hidden_states) <= 2:
            rows[stage[0]] += 1
        return forward(self, hidden_states, *args, **kwargs)

    def staged(self, name, *args, **kwargs):
        stage[0] = name
        try:
            return called(self, name, *args, **kwargs)
        finally:
            stage[0] = "none"

    monkeypatch.setattr(BasicTransformerBlock, "forward", counting)
    monkeypatch.setattr(Stages, "__call__", staged)
    run = settings(folder, tmp_path, "bits=w4a8", "reconstruction=brecq", "reconstruction.iterations=1",
                   "reconstruction.batch_size=8")
    results = experiment.run_experiment(run, tmp_path / "run")
    rows["quantize"] -= 2 * LAYERS  # which place quantizers
    assert {name: rows[name] / LAYERS for name in seconds._TRACES} == seconds._TRACES
    assert results["forecast"]["seconds"]["reconstruct"] > 0 and results["forecast"]["taken"]["ratio"] > 0
