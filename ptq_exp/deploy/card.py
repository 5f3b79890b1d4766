"""The model card of a saved quantized model: README.md with the front matter that model hubs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptq_exp.evaluation.scores import SCORES
from ptq_exp.quantization.widths import at_least
from ptq_exp.storage.atomic import atomic_path

_CARD = """---
library_name: {library}
tags:
- diffusion
- quantization
- post-training-quantization
- {bits_name}
---

# {model}, {title}

{what}, quantized after training. Files{where}: `{file}` (packed
integers, ranges, all other parameters), `quantization.json` (rules, ranges, bits of every layer, recipe){others}.

| | |
| --- | --- |
| bits of weights / activations | {weight} / {activation} |
| bits of the softmax map / first and last layer / their inputs | {softmax} / {first_last} / {boundary} |
| coverage (MACs with both operands quantized), conv + linear / everything | {coverage} |
| bit operations, FP32 over these, conv + linear / everything | {bops} |
| size | {size:.3f} MB, FP32 {fp32:.3f} MB |

## Measured

{metrics}

{spec}
{executed}
## How it was made

```bash
{command}
```

From weights of `{model}` with the digest `{digest}`; calibration {calibration}, range search by {metric},
{sampler}, ptq-exp {version}.

## How to load it

{loading}
"""
_MODEL = """```python
import ptq_exp
quantized = ptq_exp.load_quantized("PATH"{checkpoint})  # PATH: this folder
images = ptq_exp.sample(quantized, 16, seed=0)  # uint8 [16, H, W, C]
```

Drawn and scored again: `python -m ptq_exp +experiment=evaluate quantized=PATH`."""
_PIPELINE = """```python
import ptq_exp  # diffusers knows the format afterwards
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("PATH"{dtype})  # PATH: this folder; used as the original pipeline
quantized = ptq_exp.load_quantized("PATH")  # the same with its report; quantized.pipeline, quantized.sample(16)
```

Drawn and scored again: `python -m ptq_exp +experiment=evaluate quantized=PATH model=pipeline`."""


def write_card(folder: Path, description: dict[str, Any], results: dict[str, Any], command: str) -> None:
    """Write README.md beside the saved model in `folder`.

    Args:
        description: the content of its quantization.json.
        results: the content of results.json of its run.
        command: that made the run.
    """
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card(description, results, command), encoding="utf-8")


def card(description: dict[str, Any], results: dict[str, Any], command: str) -> str:
    """Return the text of the card, from the content of quantization.json and results.json."""
    settings, totals = description["settings"], description["totals"]
    bits, sampler, model = settings["bits"], settings["sampler"], description["model"]
    measured = results["metrics"]
    scored = [f"| {score.description or score.heading} | {measured[key]:.4g} |" for key, score in SCORES.items()
              if key in measured]
    spec = results["metric_spec"]
    beside = [entry["file"] for key in ("bit_schedule", "noise_statistics", "arguments")
              if (entry := description.get(key))]
    activation = "/".join(map(str, description["activation_widths"]))
    checkpoint = settings["model"]["checkpoint"] if model["first_stage"] else None  # else the folder is complete
    if checkpoint is not None and Path(checkpoint).exists():  # no repository id, which is the same everywhere
        checkpoint = Path(checkpoint).name
    checkpoint = "" if checkpoint is None else f', checkpoint="{checkpoint}"'
    kinds = {
        "library": "ptq-exp", "what": f"The noise estimator of the diffusion model `{model['name']}`", "where": "",
        "loading": _MODEL.format(checkpoint=checkpoint),
    } if description.get("pipeline") is None else _of_pipeline(description)
    return _CARD.format(
        **kinds, file=description["file"]["name"],
        bits_name=bits["name"], title=bits["name"].upper(), model=model["name"], digest=model["digest"],
        others="".join(f", `{name}`" for name in beside), weight=bits["weight"], softmax=bits["softmax"],
        activation=activation + (", chosen for each sampling step" if "/" in activation else ""),
        first_last=at_least(bits["weight"], bits["first_last"]), boundary=bits["boundary"],
        coverage=_both(totals["coverage"], "{:.2%}"), bops=_both(totals["bops_reduction"], "{:.1f}"),
        size=description["file"]["bytes"] / 1e6, fp32=totals["fp32_bytes"] / 1e6,
        metrics="\n".join(["| metric | value |", "| --- | ---: |", *scored]),
        spec=f"{spec['n_samples']} images, seed {spec['seed']}, extractor {spec['extractor']} "
        f"({spec['preprocessing']}), reference {spec['reference']}.",
        executed=_executed(results.get("runtime")), command=command,
        calibration=settings["calibration"]["name"], metric=settings["metric"]["name"],
        sampler=f"{sampler['solver']} with {sampler['steps']} steps, eta {sampler['eta']:g}, guidance scale "
        f"{description['grid']['guidance_scale']:g}",
        version=description["ptq_exp"],
    )


def _of_pipeline(description: dict[str, Any]) -> dict[str, str]:
    """Return what the card says otherwise of a pipeline."""
    pipeline, dtype = description["pipeline"]["dict"], description["network"]["dtype"]
    return {
        "library": "diffusers", "what": f"The `{pipeline['component']}` of a `{pipeline['class']}`",
        "where": f" in `{pipeline['component']}/`",
        "loading": _PIPELINE.format(dtype="" if dtype == "float32" else f", torch_dtype=torch.{dtype}"),
    }


def _executed(entry: dict[str, Any] | None) -> str:
    """Lay out how an engine executes the model; nothing where none was measured."""
    if not entry or "ms_per_evaluation" not in entry:
        return ""
    engine, ms = entry["engine"], entry["ms_per_evaluation"]
    lines = [f"| {name.replace('_', ' ')} | {ms[name]:.1f} | {entry['ms_per_image'][name]:.1f} |" for name in ms]
    psnr = f", images {entry['psnr']:.1f} dB from the simulation's" if "psnr" in entry else ""
    return "\n".join([
        "", f"Executed by {engine} {entry['version']} with {entry['threads']} threads, {entry['batch_size']} images "
        f"per evaluation: {entry['int8_share']:.2%} of the MACs of its layers as 8-bit integers{psnr}.", "",
        "| | ms per evaluation | ms per image |", "| --- | ---: | ---: |", *lines, "",
    ])


def _both(values: dict[str, float | None], form: str) -> str:
    found = [values[scope] for scope in ("conv_linear", "everything")]
    return " / ".join("unknown" if value is None else form.format(value) for value in found)
