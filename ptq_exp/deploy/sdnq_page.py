"""README.md of a folder for sdnq: how it is loaded, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_PAGE = """# {model}, quantized, for sdnq

{what} of `{model}`, quantized after training, with integers and scales in the layout of
[sdnq](https://github.com/Disty0/sdnq) (`pip install sdnq`):

```python
import sdnq, torch
from diffusers import {loader}

{name} = {loader}.from_pretrained("FOLDER", torch_dtype=torch.{dtype})
```

| weights | layers |
| --- | ---: |
{types}

Nothing was quantized again: with sdnq's own arithmetic the weights are at most {distance:.2g} (relative, in
`{worst}`) from those of the saved model.{plain}

sdnq computes in floating point, or quantizes activations itself (`use_quantized_matmul`).{left_out}
`export.json` has the layers by name, versions and the digest of the full-precision model.
"""


def page(about: Mapping[str, Any]) -> str:
    """Write the text of the page, from the content of export.json."""
    worst = max(about["distance"], key=lambda name: about["distance"][name])
    reasons = Counter(about["plain"].values())
    plain = "".join(f"\n* {n}: {reason}" for reason, n in reasons.items())
    left_out = f" Not in the folder, but part of the saved model: {', '.join(about['left_out'])}."
    return _PAGE.format(
        model=about["model"], dtype=about["dtype"], distance=about["distance"][worst], worst=worst,
        what=f"The pipeline, with the network `{about['component']}`" if about["pipeline"] else "The network",
        name="pipe" if about["pipeline"] else "network",
        loader="DiffusionPipeline" if about["pipeline"] else about["class"],
        types="\n".join(f"| {kind} | {n} |" for kind, n in about["types"].items()),
        plain=f"\n\nQuantized weights without a layout there are plain {about['dtype']}, of the same values:\n{plain}"
        if plain else "", left_out=left_out if about["left_out"] else "",
    )
