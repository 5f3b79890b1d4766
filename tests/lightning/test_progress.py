"""How often a progress bar is written: by a clock that the test moves on, to a terminal and to a file."""

import io

import pytest

from ptq_exp.lightning import progress
from ptq_exp.lightning.progress import LOGGED, WATCHED, Bar, ProgressBar


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def looks(stream):
    return stream.getvalue().count("\r")


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def refreshed(clock, stream, seconds, times):
    """Refresh a bar `times` times, evenly over so many seconds; returns how often it was written."""
    with Bar(total=2 * times, file=stream) as bar:
        for n in range(times):
            clock.now += seconds / times
            bar.n = n
            bar.refresh()
        found = looks(stream)
        bar.n = bar.total
        bar.refresh()
        assert looks(stream) == found + 1  # the end is always shown
    return found


def test_a_terminal_sees_two_looks_a_second(clock):
    assert 18 <= refreshed(clock, Terminal(), 10.0, 400) <= 23  # the first at once
    assert refreshed(clock, Terminal(), 10.0, 5) == 6  # never more than it is told


def test_a_file_sees_one_in_half_a_minute(clock):
    assert refreshed(clock, io.StringIO(), 10.0, 400) == 0
    assert 3 <= refreshed(clock, io.StringIO(), 4 * LOGGED, 400) <= 4
    assert LOGGED > WATCHED


def test_lightnings_bars_are_these(monkeypatch):
    callback = ProgressBar()
    monkeypatch.setattr(ProgressBar, "is_disabled", True)
    assert type(callback.init_predict_tqdm()) is type(callback.init_train_tqdm()) is Bar
