"""YAML read by libyaml, as OmegaConf would read it in Python: a quarter of the time of composing settings.

Its errors are worded otherwise, so that it is no choice for files that are malformed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml


def use_quick_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """OmegaConf derives its loader from this class each time that it reads a file."""
    monkeypatch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@contextmanager
def quick_yaml() -> Iterator[None]:
    """The same for a block of lines."""
    with pytest.MonkeyPatch.context() as patch:
        use_quick_yaml(patch)
        yield
