"""The experiments that README and docs start from nothing: which jobs of their commands are run, and on which model."""

import re
from pathlib import Path

from guide_text import PAGES, commands, jobs, tool

from ptq_exp.cli.arguments import spelt_out
from ptq_exp.storage.plain_json import read_json

TEXTS = {"top": (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), **PAGES}
SIZES = ("sampler.steps", "evaluation.n_samples", "evaluation.batch_size", "evaluation.eps_error_samples", "seed",
         "calibration.n_samples", "reconstruction.iterations", "reconstruction.batch_size")
"""Settings of a command that are sizes; of the seeds one will do."""
PUBLISHED = ("evaluation", "evaluation.reference", "model.images.path", "model.ema", "quantization.keep_fp")
"""Settings of commands for a published model that belong to its files and layers."""
TINY = (
    "reconstruction.iterations=1", "evaluation.n_samples=6", "evaluation.batch_size=6", "evaluation.fid_resamples=2",
)
QUICK_GAINS = ("bits.gain_samples=2", "bits.gain_steps=2")
"""Of bits that are chosen by what each step gains."""


def shrunk(arguments: list[str]) -> list[str]:
    """The overrides of a command without sizes; a published model becomes an embedded one."""
    kept = [argument for argument in arguments if argument.partition("=")[0] not in SIZES]
    text = " ".join(arguments)
    if "ldm4" not in text and not re.search(r"model=dd[ip]m_", text):
        return kept
    kept = [one for one in kept if one.partition("=")[0] not in (*PUBLISHED, "model", "model.checkpoint")]
    return [*kept, "model=digits_ldm" if "ldm4" in text else "model=digits"]


def runs() -> list[tuple[str, tuple[str, ...]]]:
    """(page, job) of all commands that start experiments from nothing, each job once."""
    chosen: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}
    seen: set[str] = set()
    for page, text in TEXTS.items():
        for words in commands(text, {}):
            given = [word for word in spelt_out(words[3:]) if not word.startswith(("-", "hydra"))]
            named = any(override.startswith(("quantized=", "sweep.resume=")) for override in given)
            if tool(words) or named or "=" not in " ".join(given):
                continue
            of_command = [tuple(job) for job in jobs(["-m", *shrunk(given)])]
            for n, job in enumerate(of_command):
                methods = {override for override in job if "." not in override.partition("=")[0]}
                if n == 0 or not seen.issuperset(methods):
                    chosen.setdefault(tuple(sorted(job)), (page, job))
                    seen |= methods
    return list(chosen.values())


def is_plain(job: tuple[str, ...]) -> bool:
    """Whether it is an experiment file as it stands, on the default model."""
    return len(job) <= 2 and job[0].startswith("+experiment=") and job[1:] in ((), ("model=digits",))


def run_as_it_stands(job: tuple[str, ...], command) -> Path:
    """Run a job in small, with the default logger, by the fixture `command`; it must end well. Returns its folder."""
    own = ["evaluation=paired"] if "model=diffusers" in job else []
    if any(override.startswith("bits.schedule=") for override in job):
        own.append("sampler.steps=20")  # a width for each of them
    bits = [override for override in job if override.startswith("bits=")]
    if bits == ["bits=step_budget"] or (not bits and any(override.endswith("_mp") for override in job)):
        own += QUICK_GAINS
    folder = command(*job, *own, *TINY)
    assert_recorded(folder)
    return folder


def assert_recorded(folder: Path) -> None:
    """Check that a run with the default logger is finished, and that it and W&B lack nothing."""
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["config"]["logger"]["mode"] == "offline"
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    (log,) = folder.glob("*.log")
    said = log.read_text(encoding="utf-8")
    assert "W&B lacks" not in said and "was not made" not in said
