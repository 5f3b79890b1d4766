"""`python -m ptq_exp bench quantized=PATH`: time a saved model on engines, beside full precision and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptq_exp.cli.commands import parser_of
from ptq_exp.deploy.load import load_quantized
from ptq_exp.deploy.measure import call_of, engines, execution_entry, networks, timed, times_entry
from ptq_exp.deploy.quantized_model import QuantizedModel
from ptq_exp.errors import ConfigError, command_line
from ptq_exp.reports.runtime import markdown
from ptq_exp.runtime.base import takes
from ptq_exp.runtime.memory import peak_bytes
from ptq_exp.settings.overrides import unquoted
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.paths import with_home
from ptq_exp.storage.plain_json import write_json

_HELP = """
Settings (KEY=VALUE):
  quantized=PATH     folder of a run, or its sub-folder quantized; needed
  runtime=all        an engine, or all that there are
  threads=1,2        CPU threads, one after the other (default: as many as torch takes)
  batch=8            images of one evaluation of the network, twice as many samples with guidance
  repeats=5          turns; each way is timed once in each, the medians are shown
  memory=true        also the peak memory of a process that evaluates the network and does nothing else
  checkpoint=PATH    the full-precision weights, where they are no longer where the model was made
  json=FILE          write all numbers there, too
  cache_dir=PATH     where compiled models are kept (default: not at all)

Milliseconds are of one evaluation of the network. "engine f32" and "engine bf16" are the full-precision network on the
same engine; ratios are medians over turns. Other load on the machine is the largest error.

examples:
  python -m ptq_exp bench quantized=runs/ndtc_w8a8/<time> runtime=openvino threads=1,2
  python -m ptq_exp bench quantized=runs/ndtc_w8a8/<time> batch=64 memory=true json=bench.json
"""
_DEFAULTS = {
    "quantized": None, "runtime": "all", "threads": None, "batch": "8", "repeats": "5", "memory": "false",
    "checkpoint": None, "json": None, "cache_dir": None,
}


def main(argv: Sequence[str]) -> None:
    """Entry point; exit code 1 and one line on standard error for anything the user can mend."""
    parser = parser_of("bench", __doc__, _HELP)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    with command_line():
        given = settings_of(parser.parse_args(argv).settings)
        found = bench(given)
        print(markdown(found))
        if given["json"] is not None:
            write_json(Path(given["json"]), found)


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE words.

    Raises:
        ConfigError: a key is unknown or given twice, a value is none of the valid ones, or `quantized` is missing.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in _DEFAULTS or key in given:
            why = "is given twice" if key in given else f"choose from {', '.join(f'{name}=' for name in _DEFAULTS)}"
            raise ConfigError(f"{word}: {why}")
        given[key] = unquoted(value)
    given = _DEFAULTS | given
    if not given["quantized"]:
        raise ConfigError("bench needs quantized=PATH: a run folder, or its sub-folder quantized")
    for key in ("quantized", "checkpoint", "json", "cache_dir"):
        given[key] = given[key] and with_home(given[key], key)
    if given["memory"] not in ("true", "false"):
        raise ConfigError(f"memory={given['memory']}: choose true or false")
    counts = {key: [_count(key, text) for text in str(given[key]).split(",")] for key in ("batch", "repeats")}
    for key, values in counts.items():
        if len(values) != 1:
            raise ConfigError(f"{key}={given[key]}: choose one number")
    threads = given["threads"]
    return given | {
        "memory": given["memory"] == "true", "batch": counts["batch"][0], "repeats": counts["repeats"][0],
        "threads": [torch.get_num_threads()] if threads is None else
                   [_count("threads", text) for text in str(threads).strip("[]").split(",")],
        "runtime": engines(given["runtime"]),
    }


def _count(key: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 4096:
        raise ConfigError(f"{key}={text}: choose 1..4096")
    return value


def bench(given: dict[str, Any]) -> dict[str, Any]:
    """Time a saved model as the settings say; one row for each engine and number of threads.

    Raises:
        PTQError: there is no saved model, or no engine can execute it.
    """
    simulated = load_quantized(given["quantized"], given["checkpoint"])
    cache = None if given["cache_dir"] is None else ArtifactCache(given["cache_dir"])
    before, rows = torch.get_num_threads(), []
    try:
        for name in given["runtime"]:
            options = {"cache": cache} if takes(name, "cache") else {}
            rows += [_row(simulated.on(name, options), n, given) for n in given["threads"]]
    finally:
        torch.set_num_threads(before)
    return {
        "network": simulated.model.name, "parameters": sum(p.numel() for p in simulated.network.parameters()),
        "batch": given["batch"], "rows": rows,
    }


def _row(quantized: QuantizedModel, threads: int, given: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(threads)  # engines take as many
    found, call = networks(quantized, mixed=True), call_of(quantized, given["batch"])
    times = timed(found, call, given["repeats"])
    row = execution_entry(quantized.runtime) | times_entry(
        times, quantized.runtime.name, given["batch"], len(quantized.grid)
    )
    if given["memory"]:
        row["peak_bytes"] = peak_bytes(found, call)
    return row
