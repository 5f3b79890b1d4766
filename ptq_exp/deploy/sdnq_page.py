"""README.md of a folder for sdnq: how it is loaded, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_PAGE = """# {model}, quantized, for sdnq

{what} of `{model}`, quantized after training, with integers and scales in the layout of
[sdnq](https://github.com/Disty0/sdnq) (`pip install sdnq`):

```python
{program}
```

| weights | layers |
| --- | ---: |
{types}

Nothing was quantized again: with sdnq's own arithmetic the weights are at most {distance:.2g} (relative, in
`{worst}`) from those of the saved model.{plain}

sdnq computes in floating point, or quantizes activations itself (`use_quantized_matmul`).{left_out}
`export.json` has the layers by name, versions and the digest of the full-precision model.
"""
_PIPELINE = """\
import sdnq, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.{dtype}{absent})"""
_PIPELINE_16 = """\
import sdnq, torch
from diffusers import DiffusionPipeline

# from_pretrained alone would round the scales of weights to {dtype}
network = sdnq.load_sdnq_model("FOLDER/{component}", dtype=torch.{dtype})
pipe = DiffusionPipeline.from_pretrained(
    "FOLDER", {component}=network, torch_dtype=torch.{dtype}{absent}
)"""
_NETWORK = """\
import sdnq, torch
from diffusers import {cls}

network = {cls}.from_pretrained("FOLDER", torch_dtype=torch.{dtype})"""
_NETWORK_16 = """\
import sdnq, torch

# from_pretrained of diffusers would round the scales of weights to {dtype}
network = sdnq.load_sdnq_model("FOLDER", dtype=torch.{dtype})"""


def page(about: Mapping[str, Any]) -> str:
    """Write the text of the page, from the content of export.json."""
    dtype, component = about["dtype"], about["component"]
    short = dtype in ("float16", "bfloat16")
    program = (_PIPELINE_16 if short else _PIPELINE) if component else (_NETWORK_16 if short else _NETWORK)
    absent = "".join(f", {name}=None" for name in about["absent"])  # it has to be said
    worst = max(about["distance"], key=lambda name: about["distance"][name])
    reasons = "".join(f"\n* {n}: {reason}" for reason, n in Counter(about["plain"].values()).items())
    plain = f"\n\nQuantized weights without a layout there are plain {dtype}, of the same values:\n{reasons}"
    left_out = f" Not in the folder, but part of the saved model: {', '.join(about['left_out'])}."
    return _PAGE.format(
        model=about["model"], what=f"The pipeline, with the network `{component}`," if component else "The network",
        program=program.format(dtype=dtype, component=component, cls=about["class"], absent=absent),
        types="\n".join(f"| {kind} | {n} |" for kind, n in about["types"].items()),
        distance=about["distance"][worst], worst=worst, plain=plain if reasons else "",
        left_out=left_out if about["left_out"] else "",
    )
