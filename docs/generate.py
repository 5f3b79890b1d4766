"""Write docs/settings.md and docs/outputs.md from the code: python docs/generate.py (a test says when it is due)."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ptq_exp.results.layout import LAYOUT
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.field import Setting, setting_of
from ptq_exp.settings.schema import ExperimentConfig, SweepConfig

DOCS = Path(__file__).parent
WORDS = {int: "int", float: "float", str: "text", bool: "bool", type(None): "null", Any: "any"}
INTRODUCTION = """# Settings

Every setting: its type, its valid values, the default that `conf/config.yaml` composes, and what it is for. On the
command line a setting is `section.name=value`, such as `sampler.steps=50`; a group, `sampler=pndm` or `bits=w4a8`,
sets a whole section, and the files in `conf/` hold the groups' choices. What is misspelt, of another type or out of
bounds ends in one line and exit code 1.

This page is written by `python docs/generate.py` from `ptq_exp/settings/`; edit the sentences there.
"""

OUTPUTS = """# What a run leaves

*Made from `ptq_exp/results/layout.py`; a test keeps both equal.*

| file | content |
| --- | --- |
| `results.json` | all numbers, rewritten whole after every stage; see below |
| `samples.npz` | `arr_0`: images uint8 [N, H, W, C], `arr_1`: classes [N], as ADM reads them; replace, never edit |
| `pairs.npz` | each score of pairs for every image [N], the `worst` pairs by PSNR and their full-precision images |
| `quantization.json` | every layer, its bits or why it has none; every range, of more than 4096 a summary |
| `quantized/` | the saved model, see [saving and loading](saved_models.md) |
| `bit_schedule.json`, `noise_statistics.npz` | bits of each step, statistics of the noise; where there are any |
| `reconstruction.json` | every block of a reconstruction: errors before and after |
| `runtime.json` | what executes each operation: `int8` or `float`, kernel, MACs, reason; where an engine was measured |
| `allocation.npz` | `error` of each group of layers at each candidate [G, C, steps], costs, the choice; `bits=auto` |
| `analysis.npz` | activation ranges per step and sensitivity of layers, with `analysis.active` |
| `grid.png`, `eps_error.png`, `bit_schedule.png`, `noise.png`, `report.html` | to look at |
| `<name>.log`, `.hydra/`, `wandb/` | log, settings as Hydra composed them, W&B run |

## results.json

`[S]`: one number for each sampling step, noisiest first. `*`: any name.
"""


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        defaults = cast(dict[str, Any], OmegaConf.to_container(compose("config"), resolve=True))
    return "\n".join([INTRODUCTION, *_section("", ExperimentConfig, defaults),
                      *_section("sweep", SweepConfig, defaults["sweep"])]) + "\n"


def _section(name: str, schema: type, defaults: dict[str, Any]) -> list[str]:
    """Return heading, first paragraph and table of a section, then those of the sections in it."""
    hints = typing.get_type_hints(schema)
    purpose = (schema.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
    lines = [f"## `{name}`" if name else "## Without a section", "", purpose]
    lines += ["", "| setting | type | valid | default | meaning |", "| --- | --- | --- | --- | --- |"]
    inner = []
    for entry in fields(schema):
        key, hint = f"{name}.{entry.name}" if name else entry.name, hints[entry.name]
        if isinstance(hint, type) and is_dataclass(hint):
            inner += _section(key, hint, defaults[entry.name])
            continue
        known, default = setting_of(entry), defaults.get(entry.name, _default(entry))
        cells = [f"`{key}`", _type(hint), _valid(known, hint), _value(default), known.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, "", *inner]


def _default(entry: Field[Any]) -> Any:
    """Return the default of the schema, for a setting that only some files of a group have."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _type(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {_type(typing.get_args(hint)[0])}"
    return WORDS.get(hint, "mapping")


def _valid(known: Setting, hint: Any) -> str:
    if words := known.valid_words():
        return ", ".join(f"`{word}`" for word in words)
    return "`true`, `false`" if hint is bool else known.bounds()


def _value(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value, ensure_ascii=False)}`"


def outputs_page() -> str:
    """Return the text of docs/outputs.md: the files of a run folder, and all entries of results.json."""
    rows = [f"| `{e.key}` | {e.meaning} | {e.unit} | {e.when or 'all'} | `{e.where}` |" for e in LAYOUT]
    head = ["| entry | meaning | unit | in | computed by (below `ptq_exp`) |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([OUTPUTS, *head, *rows, ""])


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(settings_page())
    (DOCS / "outputs.md").write_text(outputs_page())
