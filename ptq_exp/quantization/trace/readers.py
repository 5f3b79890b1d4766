"""Layers that read the same tensor: engines quantize it once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ptq_exp.quantization.trace.evaluate import evaluate
from ptq_exp.quantization.trace.provenance import watching


def sharing(network: nn.Module, example_inputs: tuple, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the layers `names`, those together that read the same tensor, such as q, k and v of an attention.

    Args:
        example_inputs: arguments of one sample, see `evaluate`.

    Returns:
        Groups in the order of their first names; a layer that reads nothing that another one reads is alone.
    """
    group = {name: name for name in names}
    readers: dict[tuple, str] = {}
    alive: list[Tensor] = []  # memory is not given to another tensor while this one runs

    def read(name: str, x: Tensor) -> None:
        alive.append(x)
        # values that were changed in place are others
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        first, own = group[readers.setdefault(key, name)], group[name]
        if first != own:
            group.update({other: first for other, its in group.items() if its == own})

    with watching(network) as watch:
        for name in names:
            watch(network.get_submodule(name), before=lambda x, name=name: read(name, x))
        evaluate(network, example_inputs)
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(group[name], []).append(name)
    return [tuple(found) for found in together.values()]
