"""Turns of timing: every way once in each, medians and ratios over turns, and a budget that ends between turns."""

import pytest

from ptq_exp.runtime.timing import Times, interleaved, ratio


class Clock:
    """A clock that only the ways themselves move on."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def way(self, name, *seconds):
        left = list(seconds)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_ways_take_turns_and_the_first_call_does_not_count():
    clock = Clock()
    ways = {"slow": clock.way("slow", 9.0, 0.3, 0.5, 0.4), "fast": clock.way("fast", 5.0, 0.1, 0.2, 0.1)}
    times = interleaved(ways, 3, clock=clock)
    assert clock.calls == ["slow", "fast"] * 2 + ["fast", "slow"] + ["slow", "fast"]  # every other turn backwards
    assert times["slow"].ms == pytest.approx((300, 500, 400)) and times["slow"].median == pytest.approx(400)
    assert ratio(times, "slow", "fast") == pytest.approx(3)  # of 3, 2.5 and 4
    assert ratio(times, "slow", "none") is None


def test_a_budget_ends_between_turns_after_the_first():
    clock = Clock()
    times = interleaved({"a": clock.way("a", 1.0), "b": clock.way("b", 2.0)}, 10, budget=5.0, clock=clock)
    assert [len(found.ms) for found in times.values()] == [2, 2]
    assert len(interleaved({"a": clock.way("a", 1.0)}, 10, budget=0.0, clock=clock)["a"].ms) == 1


def test_the_median_of_an_even_number_of_turns():
    assert Times((1.0, 2.0, 4.0, 9.0)).median == 3.0
