"""The layering of the package, read from its import statements.

Rows are listed from the ground up; a row may import only the rows named with it. Frameworks that own the
program's configuration or flow stay in the rows at the end.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ptq_exp

# may be imported anywhere; they import nothing of ours but each other
FOUNDATION = {"errors", "files", "finite", "npz", "parts", "paths"}
ALGORITHMS = {"quantization", "diffusion", "calibration", "reconstruction", "correction"}
ALLOWED = {
    "quantization": set(),
    "diffusion": set(),
    "calibration": {"diffusion"},
    "reconstruction": {"quantization", "calibration"},
    "correction": {"quantization", "diffusion", "calibration"},
    "evaluation": set(),
    "embedded": {"diffusion", "evaluation"},
    "deploy": ALGORITHMS | {"evaluation", "embedded"},
    "lightning": ALGORITHMS | {"evaluation", "embedded", "deploy"},
    "tracking": {"evaluation"},
    "search": {"tracking", "config", "overrides"},
    "reporting": {"tracking"},
    "cli": {"tracking", "config", "overrides"},
}
HYDRA = {"hydra", "omegaconf"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
FRAMEWORKS = HYDRA | LIGHTNING | {"wandb"}
MAY_USE = {"lightning": LIGHTNING, "tracking": LIGHTNING | {"wandb"}}
ENTRY_PACKAGES = {"sweep"}  # no row: around the command, as the entry modules
ENTRY_MODULES_WITH_FRAMEWORKS = ENTRY_PACKAGES | {
    "experiment", "config", "overrides", "composition", "cli", "__main__", "train_embedded", "table",
}  # fmt: skip


def imports(module: str, source: str, is_package: bool) -> set[str]:
    """Dotted names that `source` imports anywhere; relative names are resolved, `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What module `ptq_exp.x.y` may not import, one line each."""
    row = module.split(".")[1] if "." in module else "__init__"
    problems = []
    for name in sorted(imports(module, source, is_package)):
        parts = name.split(".")
        if parts[0] in FRAMEWORKS and not _may_use(row, parts[0]):
            problems.append(f"{module} imports the framework {name}")
        elif parts[0] == "ptq_exp" and not _may_import(row, parts[1] if len(parts) > 1 else ""):
            problems.append(f"{module} imports {name}, which is no row below it")
    return problems


def _may_use(row: str, framework: str) -> bool:
    return row in ENTRY_MODULES_WITH_FRAMEWORKS or framework in MAY_USE.get(row, ())


def _may_import(row: str, target: str) -> bool:
    if row in FOUNDATION:
        return target in FOUNDATION
    if row in ALLOWED:
        return target in ALLOWED[row] | FOUNDATION | {row, "__version__"}
    return True  # an entry module


def package_modules() -> list[tuple[str, str, bool]]:
    root = Path(ptq_exp.__file__).parent
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        modules.append((".".join(parts[:-1] if is_package else parts), path.read_text(), is_package))
    return modules


def test_every_import_follows_the_table():
    modules = package_modules()
    assert len(modules) > 20
    assert [problem for module in modules for problem in violations(*module)] == []


def test_every_package_has_a_row():
    root = Path(ptq_exp.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    assert packages - set(ALLOWED) - ENTRY_PACKAGES == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ptq_exp.quantization.layers", "from ptq_exp.diffusion import TimeGrid"),
        ("ptq_exp.quantization.layers", "def f():\n    import ptq_exp.diffusion.sampler"),
        ("ptq_exp.quantization.layers", "from ..diffusion import TimeGrid"),
        ("ptq_exp.quantization.layers", "from .. import diffusion"),
        ("ptq_exp.quantization.layers", "import ptq_exp"),
        ("ptq_exp.quantization.layers", "from ptq_exp import load_model"),
        ("ptq_exp.diffusion.sampler", "from ptq_exp.quantization.quantizer import Quantizer"),
        ("ptq_exp.diffusion.zoo.ldm", "from ...quantization import rules"),
        ("ptq_exp.calibration.sources", "from ptq_exp.quantization import quantize_"),
        ("ptq_exp.evaluation.metrics", "from ptq_exp.embedded import load"),
        ("ptq_exp.evaluation.metrics", "import torch, pytorch_lightning as pl"),
        ("ptq_exp.embedded.load", "from ptq_exp.quantization import quantize_"),
        ("ptq_exp.embedded.load", "if TYPE_CHECKING:\n    from omegaconf import DictConfig"),
        ("ptq_exp.deploy.export", "from ptq_exp.lightning import trainer"),
        ("ptq_exp.lightning.calibration", "from hydra.utils import instantiate"),
        ("ptq_exp.lightning.calibration", "from ptq_exp.tracking import results"),
        ("ptq_exp.tracking.results", "from ptq_exp.quantization import Report"),
        ("ptq_exp.tracking.results", "from omegaconf import OmegaConf"),
        ("ptq_exp.tracking.results", "from ptq_exp.config import ExperimentConfig"),
        ("ptq_exp.stages", "import hydra"),
        ("ptq_exp.errors", "from ptq_exp.evaluation import metrics"),
        ("ptq_exp", "import wandb"),
    ],
)
def test_the_checker_catches(module, source):
    assert len(violations(module, source)) == 1


def test_the_checker_resolves_relative_imports_of_a_package():
    assert violations("ptq_exp.quantization", "from .layers import QuantConv2d", is_package=True) == []
    assert len(violations("ptq_exp.quantization", "from ..diffusion import sample", is_package=True)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ptq_exp.quantization.layers", "from .affine import quantize\nfrom ptq_exp.errors import PTQError"),
        ("ptq_exp.diffusion.zoo.ldm", "from ...errors import PTQError\nfrom ..model import DiffusionModel"),
        ("ptq_exp.embedded.load", "from ptq_exp import __version__\nfrom ptq_exp.evaluation import to_uint8"),
        ("ptq_exp.lightning.calibration", "import pytorch_lightning\nfrom ptq_exp.quantization import rules"),
        ("ptq_exp.tracking.wandb_run", "import wandb\nfrom pytorch_lightning.loggers import WandbLogger"),
        ("ptq_exp.config", "import hydra, omegaconf\nfrom ptq_exp import stages"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(module, source) == []


def test_importing_the_package_alone_is_light():
    code = "import sys, ptq_exp; print(ptq_exp.__version__, *{'torch', 'numpy', 'hydra'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == ptq_exp.__version__
