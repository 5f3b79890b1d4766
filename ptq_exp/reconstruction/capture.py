"""What enters and leaves one block when a network runs over the calibration set: its real arguments, and its output.

The forward ends where the block begins (or ends), and captured rows go to memory or, beyond a limit, to files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_exp.diffusion.call import on_device, to_device
from ptq_exp.errors import PTQError, QuantizationError
from ptq_exp.quantization import of_samples
from ptq_exp.quantization.trace.evaluate import Ended, evaluate
from ptq_exp.reconstruction.copies import Batch, Rows


@dataclass
class Arena:
    """Room for captured rows: `limit` bytes of memory, beyond them files in `folder`, which it owns.

    `used` bytes are those of one block's rows, `reserved` bytes stay when these go.
    """

    limit: float
    folder: Path
    used: int = 0
    reserved: int = 0
    files: list[Path] = field(default_factory=list)

    def has_room(self, rows: int, like: Iterable[Tensor]) -> bool:
        """Whether tensors [rows, ...] like all of these fit into what is left of the memory."""
        size = sum(rows * tensor[0].numel() * tensor.element_size() for tensor in like)
        return self.used + self.reserved + size <= self.limit

    def reserve(self, size: int) -> bool:
        """Count `size` bytes of memory (negative: give back) that outlive the block, if less than half is then so.

        Returns:
            Whether there is room.
        """
        if self.reserved + size > self.limit / 2:
            return False
        self.reserved += size
        return True

    def allocate(self, rows: int, like: Tensor) -> Tensor:
        """Return an uninitialised CPU tensor [rows, *like.shape[1:]] of the type of `like`.

        Raises:
            PTQError: the file cannot be made.
        """
        shape = (rows, *like.shape[1:])
        size = math.prod(shape) * like.element_size()
        if self.used + self.reserved + size <= self.limit:
            self.used += size
            return torch.empty(shape, dtype=like.dtype)
        path = self.folder / f"{len(self.files):03d}.bin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a killed run
            self.files.append(path)
            return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)
        except (OSError, RuntimeError) as error:
            raise PTQError(
                f"cannot write {path}: {error}; free space there or raise reconstruction.cache_gb"
            ) from error

    def clear(self) -> None:
        """Forget a block's rows; files go, and their space with the last tensor that maps them."""
        for path in self.files:
            path.unlink(missing_ok=True)
        self.files, self.used = [], 0


@dataclass
class Calls:
    """The calls of one block over N rows (samples), without gradients.

    Attributes:
        tensors: the tensors among the arguments that have a row for each sample, each [N, ...].
        structure: how positional and keyword arguments are made of tensors and `constants`.
        constants: everything else, tables of positions included, the same in all calls; a mark in a tensor's place.
        output: [N, ...], or None where it was not asked for.
        step_rows: row of the activation ranges that each sample uses, int64 [N]; None = the one that is in force.
    """

    tensors: list[Tensor]
    structure: Any
    constants: list[Any]
    output: Tensor | None = None
    step_rows: Tensor | None = None

    @classmethod
    def of(
        cls, args: tuple, kwargs: dict[str, Any], output: Tensor | None = None, *, step_rows: Tensor | None = None,
        shared: Collection[int] = (),
    ) -> Calls:
        """One call whose tensors hold all rows already, but for the leaves `shared`, which are constants."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        rows = [isinstance(leaf, Tensor) and place not in shared for place, leaf in enumerate(leaves)]
        tensors = [leaf for leaf, has_rows in zip(leaves, rows, strict=True) if has_rows]
        constants = [_TENSOR if has_rows else leaf for leaf, has_rows in zip(leaves, rows, strict=True)]
        return cls(tensors, structure, constants, output, step_rows)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def rows(self, index: Tensor | slice, device: torch.device) -> list[Tensor]:
        """Return the rows `index` of the argument tensors, on `device`."""
        return [to_device(tensor[index], device) for tensor in self.tensors]

    def ranges_of(self, module: nn.Module, index: Tensor | slice) -> AbstractContextManager[None]:
        """Inside, `module` runs on the rows `index`, each with the activation ranges of its own sampling step."""
        return of_samples(module, None if self.step_rows is None else self.step_rows[index])

    def all_tensors(self) -> list[Tensor]:
        """Arguments, and the output where there is one."""
        return self.tensors if self.output is None else [*self.tensors, self.output]

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) of a call with these argument tensors."""
        given = iter(tensors)
        leaves = [next(given) if constant is _TENSOR else constant for constant in self.constants]
        return pytree.tree_unflatten(leaves, self.structure)


_TENSOR = object()


def capture(
    network: nn.Module, name: str, batches: Iterable[Batch], rows: int, arena: Arena, *, output: bool,
    device: torch.device, step_rows: Tensor | None = None,
) -> Calls:
    """Run `network` on all `batches` as far as its module `name`, and keep what enters it (and leaves it: `output`).

    Args:
        batches: calls of [n, ...]; in all `rows` of them.
        step_rows: see `Calls`; a network without quantizers does not care.

    Raises:
        QuantizationError: an argument's first dimension is not that of the batch, or the module's output is not what
            `output_of` takes.
    """
    calls: Calls | None = None
    start, shared, put = 0, frozenset(), Rows(device)
    for batch in batches:
        n = len(batch[0])
        inputs = on_device(batch, device)
        with of_samples(network, None if step_rows is None else step_rows[start : start + n]):
            call = _call(network, name, inputs, output)
        if calls is None and _lacking_rows(Calls.of(*call).tensors, n):
            fewer = torch.zeros(1 if n > 1 else 2, dtype=torch.long, device=device)  # the first sample, of one twice
            others = pytree.tree_map_only(Tensor, lambda tensor, fewer=fewer: tensor[fewer], inputs)
            with of_samples(network, None if step_rows is None else step_rows[fewer.cpu()]):
                shared = _same_in_both(call, _call(network, name, others, output=False))
        found = Calls.of(*call, shared=shared)
        _check_rows(name, found.tensors, n)
        if calls is None:
            room = [arena.allocate(rows, tensor) for tensor in found.tensors]
            leaving = arena.allocate(rows, found.output) if output else None
            calls = replace(found, tensors=room, output=leaving, step_rows=step_rows)
        put.put([whole[start : start + n] for whole in calls.all_tensors()], found.all_tensors())
        start += n
    put.finish()
    return calls


def output_of(output: Any, name: str) -> Tensor:
    """Return the output of the module `name` as one tensor.

    It is one itself, or the only one in a tuple or dataclass, or several streams of tokens [N, T, C] of one width, as
    joint blocks of SD3 and FLUX return them: these stand behind each other, [N, T1 + T2, C].

    Raises:
        QuantizationError: there is none, or several of other shapes.
    """
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, dict) else list(output)
    found = [value for value in values if isinstance(value, Tensor)]
    if len(found) > 1 and {(value.ndim, len(value), value.shape[-1]) for value in found} == {
        (3, len(found[0]), found[0].shape[-1])
    }:
        return torch.cat(found, 1)
    if len(found) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in found)
        raise QuantizationError(
            f"{name} returns {len(found)} tensors ({shapes}), a block must return one, or streams of tokens of one "
            "width: set reconstruction.granularity=layer"
        )
    return found[0]


@torch.no_grad()
def _call(network: nn.Module, name: str, inputs: Batch, output: bool) -> tuple[tuple, dict, Tensor | None]:
    """Arguments of the module `name` (and its output) when `network` runs on `inputs`."""
    held: list = []

    def before(_, args: tuple, kwargs: dict) -> None:
        if not output:
            held.append((args, kwargs))
            raise Ended
        held.append(pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs)))  # the block may work in place

    def after(_, args: tuple, kwargs: dict, result: Any) -> None:
        held.append(output_of(result, name))
        raise Ended

    module = network.get_submodule(name)
    with (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
        suppress(Ended),
    ):
        # not network(...): a compiled one would be compiled again because of the hooks
        evaluate(network.forward, inputs)
    args, kwargs = held[0]
    return args, kwargs, held[1] if output else None


def _same_in_both(call: tuple, other: tuple) -> frozenset[int]:
    """Places among the leaves of the arguments of tensors that two calls share, such as tables of positions."""
    leaves, others = (pytree.tree_flatten(arguments[:2])[0] for arguments in (call, other))
    return frozenset(
        place for place, (a, b) in enumerate(zip(leaves, others, strict=True))
        if isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    )


def _lacking_rows(tensors: list[Tensor], n: int) -> list[list[int]]:
    return [list(t.shape) for t in tensors if t.ndim == 0 or len(t) != n]


def _check_rows(name: str, tensors: list[Tensor], n: int) -> None:
    wrong = _lacking_rows(tensors, n)
    if wrong or not tensors:
        raise QuantizationError(
            f"{name} is called with tensors of the shapes {wrong}, a block needs one row for each of {n} samples in "
            "all: choose other blocks, or reconstruction=adaround"
        )
