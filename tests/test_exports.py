"""What a package says it exports is there."""

from importlib import import_module
from pathlib import Path

import pytest

import ptq_exp

ROOT = Path(ptq_exp.__file__).parent
EXPORTING = sorted(
    ".".join(("ptq_exp", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py") if "\n__all__" in path.read_text()
)


@pytest.mark.parametrize("module", EXPORTING)
def test_every_exported_name_exists(module):
    package = import_module(module)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_the_python_interface_is_there():
    assert {"load_model", "load_quantized", "sample", "MODELS"} <= set(dir(ptq_exp))
    assert [name for name in dir(ptq_exp) if not hasattr(ptq_exp, name)] == []
