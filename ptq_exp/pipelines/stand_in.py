"""Another module in the place of a pipeline's component, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def standing_in(pipeline: Any, name: str, component: nn.Module) -> Iterator[None]:
    """While in force, `pipeline` has `component` in the place of its component `name`."""
    before = getattr(pipeline, name)
    setattr(pipeline, name, component)
    try:
        yield
    finally:
        setattr(pipeline, name, before)
