"""What the blocks of a network have answered, batch by batch, on disk: one block needs to be in memory at a time.

When a block's turn comes, the network runs on each batch as it always does, but the blocks before answer from disk.
What stands between blocks is computed again. The numbers are those of one forward over all blocks, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization.offload.mapped import strides_of_clone
from ptq_exp.quantization.trace.answering import answering
from ptq_exp.quantization.trace.evaluate import Ended, evaluate, tensors_in
from ptq_exp.storage.atomic import atomic_path

_DONE = "done"


class Answers:
    """The answers of blocks of one network to one sequence of batches.

    Args:
        folder: must belong to this computation alone; a killed one finds the answers of finished blocks again.
        readers: of each block the last one that reads its answers, see `last_readers`: then they are deleted.
    """

    def __init__(self, folder: Path, readers: Mapping[str, str | None]) -> None:
        self.folder, self.readers, self.number = folder, readers, 0

    def has(self, name: str) -> bool:
        """Whether the block `name` has answered all batches."""
        return (self.folder / name / _DONE).exists()

    def finish(self, name: str) -> None:
        """Note that the block `name` has answered all batches, and delete what it was the last one to read."""
        with atomic_path(self.folder / name / _DONE) as temporary:
            temporary.touch()
        for other in (block for block, reader in self.readers.items() if reader == name != block and self.has(block)):
            for path in sorted((self.folder / other).glob("*.safetensors")):
                with safe_open(path, "pt") as stored:
                    about = stored.metadata()
                with atomic_path(path) as temporary:
                    save_file({}, temporary, about)

    @torch.no_grad()
    def run(self, network: nn.Module, name: str | None, number: int, batch: Sequence[Any]) -> None:
        """Run `network` on a batch as far as its block `name`, and keep what that answers; None = to the end.

        Args:
            number: of the batch.

        Raises:
            QuantizationError: the block answers something else than tensors, in tuples, lists or dictionaries.
        """
        self.number = number
        with ExitStack() as stack:
            stack.enter_context(self._answering(network))
            if name is not None:
                hook = partial(self._keep, name)
                stack.enter_context(network.get_submodule(name).register_forward_hook(hook))
            with suppress(Ended):
                evaluate(network.forward, batch)

    def before(self, network: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches one by one; until the next one, blocks that have answered do so from disk."""
        with self._answering(network):
            for self.number, batch in enumerate(batches):
                yield batch

    def _answering(self, network: nn.Module) -> AbstractContextManager[None]:
        return answering(network, [name for name in self.readers if self.has(name)], self._answer)

    def _path(self, name: str) -> Path:
        return self.folder / name / f"{self.number:06d}.safetensors"

    def _keep(self, name: str, _: nn.Module, args: tuple, output: Any) -> None:
        leaves, structure = pytree.tree_flatten(output)
        tensors = {str(n): leaf.detach().cpu().clone().contiguous()
                   for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        entries = [
            [leaf.shape, strides_of_clone(leaf), str(leaf.dtype).removeprefix("torch.")]
            if isinstance(leaf, Tensor) else [leaf]
            for leaf in leaves
        ]
        try:
            about = {"structure": pytree.treespec_dumps(structure), "leaves": json.dumps(entries)}
        except (NotImplementedError, TypeError) as error:
            raise QuantizationError(
                f"{name} returns a {type(output).__name__}, which cannot be kept on disk: leave out "
                "trainer.max_memory_gb, or name other blocks"
            ) from error
        with atomic_path(self._path(name)) as temporary:
            save_file(tensors, temporary, about)
        raise Ended

    def _answer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what the block `name` answered to the batch that runs.

        Asked with another number of rows, it is asked for the first one, repeated: `reconstruction.capture` does so to
        find out which arguments have rows.
        """
        given = tensors_in((args, kwargs))[0]
        with safe_open(self._path(name), "pt") as stored:
            about, there = stored.metadata(), set(stored.keys())
            leaves = []
            for n, entry in enumerate(json.loads(about["leaves"])):
                if len(entry) == 1:
                    leaves.append(entry[0])
                else:
                    leaves.append(_laid_out(*entry, stored.get_tensor(str(n)) if str(n) in there else None))
        rows = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor)), None)
        if len(given) != rows:
            leaves = [leaf[:1].expand(len(given), *leaf.shape[1:]).contiguous() if isinstance(leaf, Tensor) else leaf
                      for leaf in leaves]
        leaves = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(given.device), leaves)
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(about["structure"]))


def _laid_out(shape: Sequence[int], strides: Sequence[int], kind: str, values: Tensor | None) -> Tensor:
    """Return what was answered, in new memory and with its strides: as it was computed.

    None = it is deleted, as nobody reads it; whoever did would find NaN.
    """
    dtype = getattr(torch, kind)
    if values is None:
        return torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype).expand(shape)
    return torch.empty_strided(shape, strides, dtype=dtype).copy_(values)
