"""Progress bars that are written twice a second at most, and hardly ever where nobody watches a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

WATCHED, LOGGED = 0.5, 30.0
"""Seconds from one look of a bar to the next, on a terminal or in a notebook, and in a file."""


class Bar(tqdm):
    """`tqdm`, however often it is told to show itself; what is done is always shown."""

    def __init__(self, *args: Any, file: Any = None, **settings: Any) -> None:
        stream = file or sys.stderr
        watched = "ipykernel" in sys.modules or (hasattr(stream, "isatty") and stream.isatty())
        self._pace = WATCHED if watched else LOGGED
        self._shown = float("-inf") if watched else time.monotonic()
        super().__init__(*args, file=file, mininterval=self._pace, maxinterval=2 * self._pace, **settings)

    def refresh(self, *args: Any, **named: Any) -> bool | None:
        """Show the bar, if it is time to."""
        done, now = self.total is not None and self.n >= self.total, time.monotonic()
        if not done and now < self._shown + 0.9 * self._pace:  # tqdm has waited by a clock of its own
            return None
        self._shown = now
        return super().refresh(*args, **named)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, by way of `Bar`."""

    def init_predict_tqdm(self) -> Bar:
        """Make the bar of `Trainer.predict`."""
        return self._bar(self.predict_description)

    def init_train_tqdm(self) -> Bar:
        """Make the bar of `Trainer.fit`."""
        return self._bar(self.train_description)

    def _bar(self, title: str) -> Bar:
        return Bar(
            desc=title, disable=self.is_disabled, leave=True, dynamic_ncols=True, file=sys.stdout, smoothing=0,
            bar_format=self.BAR_FORMAT,
        )
