"""Every command of README and docs, run as it stands: default logger, default settings, small sizes and networks.

Of a sweep those jobs run that have a method (an experiment, a metric, ...) which no command before has had, and at
least one. Published models are replaced by the embedded one of their kind, for want of their weights, and that by fewer
layers of the same kinds.
"""

import itertools
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DConditionModel, UNet2DModel
from guide_text import PAGES, commands, jobs, tool
from torch import nn

from ptq_exp.cli.arguments import spelt_out
from ptq_exp.diffusion import ClassConditionalUNet
from ptq_exp.embedded import latent, load
from ptq_exp.quantization.ranges import search
from ptq_exp.storage.plain_json import read_json

TEXTS = {"top": (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), **PAGES}
SIZES = ("sampler.steps", "evaluation.n_samples", "evaluation.batch_size", "evaluation.eps_error_samples", "seed",
         "calibration.n_samples", "reconstruction.iterations", "reconstruction.batch_size")  # fmt: skip
"""Settings of a command that are sizes; of the seeds one will do."""
PUBLISHED = ("evaluation", "evaluation.reference", "model.images.path", "model.ema", "quantization.keep_fp")
"""Settings of commands for a published model that belong to its files and layers."""
TINY = ("reconstruction.iterations=1", "evaluation.n_samples=6", "evaluation.batch_size=6")


def shrunk(arguments: list[str]) -> list[str]:
    """The overrides of a command without sizes; a published model becomes an embedded one."""
    kept = [argument for argument in arguments if argument.partition("=")[0] not in SIZES]
    text = " ".join(arguments)
    if "ldm4" not in text and not re.search(r"model=dd[ip]m_", text):
        return kept
    kept = [one for one in kept if one.partition("=")[0] not in (*PUBLISHED, "model", "model.checkpoint")]
    return [*kept, "model=digits_ldm" if "ldm4" in text else "model=digits"]


def runs() -> list[tuple[str, ...]]:
    """The jobs to run of all commands that start experiments from nothing."""
    chosen: dict[tuple[str, ...], tuple[str, ...]] = {}
    seen: set[str] = set()
    for text in TEXTS.values():
        for words in commands(text, {}):
            given = [word for word in spelt_out(words[3:]) if not word.startswith(("-", "hydra"))]
            named = any(override.startswith(("quantized=", "sweep.resume=")) for override in given)
            if words[:3] != ["python", "-m", "ptq_exp"] or tool(words) or named or "=" not in " ".join(given):
                continue
            of_command = [tuple(job) for job in jobs(["-m", *shrunk(given)])]
            for n, job in enumerate(of_command):
                methods = {override for override in job if "." not in override.partition("=")[0]}
                if n == 0 or not seen.issuperset(methods):
                    chosen.setdefault(tuple(sorted(job)), job)
                    seen |= methods
    return list(chosen.values())


RUNS = runs()


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """The embedded networks with fewer levels and layers, random weights; first stage and classifier as they are."""

    def pixels():
        return UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16, norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip

    def latents():
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2, block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=8, cross_attention_dim=32, attention_head_dim=2,
        )  # fmt: skip
        return ClassConditionalUNet(unet, nn.Embedding(11, 32))

    for name in ("BUDGET", "COARSE_BUDGET", "ENDS_BUDGET"):
        monkeypatch.setattr(search, name, 1)  # as few candidate ranges as it tries
    for module, name, build in [(load, "build_unet", pixels), (latent, "build_latent_unet", latents)]:
        read = module.load_weights

        def small(network, path, build=build, read=read):
            return read(network, path) if type(network) is not type(build()) else "small"

        def seeded(build=build):
            torch.manual_seed(0)
            return build()

        monkeypatch.setattr(module, name, seeded)
        monkeypatch.setattr(module, "load_weights", small)


@pytest.fixture(scope="module")
def files(guide_folder):
    """What the guide's commands for one's own model and statistics read."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler(100)).save_pretrained(guide_folder / "my_folder")
    return guide_folder


def test_there_are_as_many_as_the_guide_has():
    assert len(RUNS) > 50
    assert {"+experiment=ptqd_mp", "+experiment=ndtc_w8a8"} <= set(itertools.chain(*RUNS))


@pytest.mark.parametrize("job", RUNS, ids=[" ".join(job)[:80] for job in RUNS])
def test_it_ends_well_with_the_default_logger(job, command, files, monkeypatch):
    monkeypatch.chdir(files)
    if "my_weights.pt" in " ".join(job) or "one_slope.npz" in " ".join(job):
        pytest.skip("run with its files in test_guide_python")
    own = ["evaluation=paired"] if "model=diffusers" in job else []
    if any(override.startswith("bits.schedule=") for override in job):
        own.append("sampler.steps=20")  # a width for each of them
    folder = command(*job, *own, *TINY)
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["config"]["logger"]["mode"] == "offline"
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    (log,) = folder.glob("*.log")
    assert "W&B lacks" not in log.read_text(encoding="utf-8") and "was not made" not in log.read_text(encoding="utf-8")


def test_a_saved_model_is_evaluated_with_the_default_logger(command, files, monkeypatch):
    monkeypatch.chdir(files)
    first = command("+experiment=ndtc_w4a8", *TINY)
    folder = command("+experiment=evaluate", f"quantized={first}", "seed=1", *TINY)
    assert read_json(folder / "results.json")["status"] == "finished"
    (log,) = folder.glob("*.log")
    assert "W&B lacks" not in log.read_text(encoding="utf-8")
