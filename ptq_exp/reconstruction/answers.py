"""What the blocks that have had their turn answer to the calibration batches: nobody computes it again.

When inputs are captured for the next block, those before it answer from memory, and what stands between blocks is
computed. The numbers are those of a forward through all of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ptq_exp.quantization.trace.answering import answering
from ptq_exp.quantization.trace.evaluate import tensors_in
from ptq_exp.reconstruction.capture import Arena
from ptq_exp.reconstruction.copies import Batch


class BlockAnswers:
    """The answers of the finished blocks of one network to one sequence of batches, in memory; GPUs compute theirs.

    Blocks whose answers find no room are computed each time.

    Args:
        network: whose blocks change no more once they are finished.
        arena: room for the answers.
    """

    def __init__(self, network: nn.Module, arena: Arena) -> None:
        self.network, self.arena = network, arena
        self._answers: dict[str, list[Any]] = {}
        self._without_room: set[str] = set()

    def before(self, batches: Iterable[Batch], finished: Iterable[str]) -> Iterator[Batch]:
        """Yield the batches one by one; until the next one, the blocks `finished` answer from memory if they can.

        Those that have not answered yet compute their answer, which is kept.
        """
        if next(self.network.parameters()).device.type != "cpu":
            yield from batches
            return
        names = [name for name in finished if name not in self._without_room]
        known = [name for name in names if name in self._answers]
        fresh = {name: [] for name in names if name not in self._answers}
        with ExitStack() as stack:
            number = self._number = -1
            stack.enter_context(answering(self.network, known, self._answer))
            for name in fresh:
                module = self.network.get_submodule(name)
                keep = partial(self._keep, fresh, name)
                stack.enter_context(module.register_forward_hook(keep, with_kwargs=True))
            for number, batch in enumerate(batches):
                self._number, self._rows = number, len(batch[0])
                yield batch
        whole = {name: answers for name, answers in fresh.items() if len(answers) == number + 1}
        self._answers |= whole
        self._without_room |= {name for name in fresh if name not in whole}

    def _keep(
        self, fresh: dict[str, list[Any]], name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """Keep the first answer of a block to each batch, while there is room."""
        answers = fresh[name]
        if len(answers) != self._number or any(
            tensor.ndim == 0 or len(tensor) != self._rows for tensor in tensors_in((args, kwargs, output))
        ):
            return
        if self.arena.reserve(_bytes(output)):
            # later functions may work in place
            answers.append(pytree.tree_map_only(Tensor, Tensor.clone, output))
        else:
            self.arena.reserve(-sum(map(_bytes, answers)))
            answers.clear()

    def _answer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what the block `name` answered to the batch that runs.

        Asked with another number of rows, it is asked for the first one, repeated: `capture` does so to find out which
        arguments have rows.
        """
        rows = len(tensors_in((args, kwargs))[0])

        def copied(kept: Tensor) -> Tensor:
            return kept.clone() if len(kept) == rows else kept[:1].repeat(rows, *[1] * (kept.ndim - 1))

        return pytree.tree_map_only(Tensor, copied, self._answers[name][self._number])


def _bytes(answer: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(answer))
