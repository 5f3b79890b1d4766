"""Rows that come from a device lie in their places when all are finished, and nobody waits before the next ones."""

import torch

from ptq_exp.diffusion.call import on_device
from ptq_exp.reconstruction.copies import Rows


class Slow:
    """Copies as a GPU makes them: complete when somebody has waited for them."""

    def __init__(self):
        self.waited = []

    def __call__(self, values):
        number, copies = len(self.waited), [torch.full_like(value, torch.nan) for value in values]
        self.waited.append(False)

        def wait():
            self.waited[number] = True
            for copy, value in zip(copies, values, strict=True):
                copy.copy_(value)

        return copies, wait


def test_rows_arrive_one_turn_later_and_all_at_the_end():
    slow, wanted, place = Slow(), torch.randn(6, 3), torch.zeros(6, 3)
    rows = Rows(torch.device("cpu"), slow)
    for start in (0, 2, 4):
        rows.put([place[start : start + 2]], [wanted[start : start + 2]])
        assert slow.waited == [True] * (start // 2) + [False]  # the last ones are under way
    assert torch.equal(place[:4], wanted[:4]) and not place[4:].any()
    rows.finish()
    rows.finish()
    assert torch.equal(place, wanted)


def test_on_the_cpu_rows_are_there_at_once():
    place, rows = torch.zeros(2, dtype=torch.bfloat16), Rows(torch.device("cpu"))
    rows.put([place], [torch.tensor([1.5, 2.0], dtype=torch.bfloat16)])
    assert place.tolist() == [1.5, 2.0]
    x = torch.ones(2)
    assert on_device((x, {"y": (x, 3)}), torch.device("cpu"))[1]["y"][0] is x  # nothing is copied
