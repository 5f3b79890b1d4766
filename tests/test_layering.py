"""The layering of the package, read from its import statements: what the table does not name is denied."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ptq_exp

# A room may import what is named beside it, itself, and `ptq_exp.__version__`. Every name is of a lower floor.
FLOORS = [
    {"errors": ""},
    {"storage": "errors", "parallel": ""},
    {
        "quantization": "errors storage parallel",
        "diffusion": "errors storage parallel",
        "evaluation": "errors storage",
        "results": "errors storage",
    },
    {
        "pipelines": "errors storage diffusion",
        "runtime": "errors storage quantization",
        "calibration": "errors storage diffusion",
        "correction": "errors storage quantization diffusion",
        "reports": "errors storage evaluation results",
    },
    {
        "reconstruction": "errors quantization diffusion calibration",
        "deploy": "errors storage quantization diffusion pipelines evaluation calibration correction runtime",
    },
    {
        "lightning": "errors storage quantization diffusion pipelines evaluation calibration correction reconstruction",
        "embedded": "errors storage diffusion pipelines evaluation",
        "settings": "errors storage quantization diffusion evaluation results calibration correction deploy runtime",
    },
    {
        "experiment": "errors storage parallel quantization diffusion pipelines evaluation results calibration "
        "correction reports reconstruction runtime deploy lightning settings",
    },
    {
        "api": "errors diffusion pipelines evaluation deploy experiment",
        "cli": "errors storage diffusion evaluation results reports runtime deploy embedded settings experiment",
    },
    {"__main__": "cli", "__init__": ""},
]
ALLOWED = {room: set(names.split()) for floor in FLOORS for room, names in floor.items()}
# Frameworks that own the configuration or the flow of a program, by the rooms or modules that may import them.
HYDRA, LIGHTNING = {"hydra", "omegaconf"}, {"pytorch_lightning", "lightning", "lightning_fabric"}
FRAMEWORKS = HYDRA | LIGHTNING | {"wandb", "argparse"}
MAY_USE = {
    "lightning": LIGHTNING,
    "embedded.training": LIGHTNING,
    "results.wandb": LIGHTNING | {"wandb"},
    "reports.tables.wandb_source": {"wandb"},
    "settings.compose": HYDRA,
    "settings.composition": HYDRA | {"argparse"},
    "settings.overrides": HYDRA | {"argparse"},
    "storage.paths": {"argparse"},
    "cli": FRAMEWORKS,
}
HEAVY = {"storage": {"torch", "pandas"}}
"""Libraries that a room does without."""


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
    room = module.split(".")[1] if "." in module else "__init__"
    problems = []
    for name in sorted(imports(module, source, is_package)):
        parts = name.split(".")
        if parts[0] in FRAMEWORKS and not _may_use(module, parts[0]):
            problems.append(f"{module} imports the framework {name}")
        elif parts[0] in HEAVY.get(room, ()):
            problems.append(f"{module} imports {name}, which {room} does without")
        elif parts[0] == "ptq_exp" and not _may_import(room, parts[1:]):
            problems.append(f"{module} imports {name}, which is no room that {room} may import")
    return problems


def _may_use(module: str, framework: str) -> bool:
    inside = module.removeprefix("ptq_exp.")
    return any(
        framework in names and (inside == where or inside.startswith(f"{where}."))
        for where, names in MAY_USE.items()
    )


def _may_import(room: str, parts: list[str]) -> bool:
    return parts in ([], ["__version__"]) or parts[0] in ALLOWED.get(room, set()) | {room}


def package_modules() -> list[tuple[str, str, bool]]:
    root = Path(ptq_exp.__file__).parent
    modules = []
    for path in sorted(root.rglob("*.py")):  # conf/ holds none
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        modules.append((".".join(parts[:-1] if is_package else parts), path.read_text(), is_package))
    return modules


def test_every_import_follows_the_table():
    modules = package_modules()
    assert len(modules) > 20
    assert [problem for module in modules for problem in violations(*module)] == []


def test_every_room_stands_on_a_floor():
    root = Path(ptq_exp.__file__).parent
    rooms = {path.parent.name for path in root.glob("*/__init__.py")} | {path.stem for path in root.glob("*.py")}
    assert rooms == set(ALLOWED)
    assert len(ALLOWED) <= 22 and len(FLOORS) <= 9


def test_the_table_names_lower_floors_alone():
    below = set()
    for floor in FLOORS:
        for room in floor:
            assert ALLOWED[room] <= below, room
        below |= set(floor)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ptq_exp.quantization.layers", "from ptq_exp.diffusion import TimeGrid"),
        ("ptq_exp.quantization.layers", "def f():\n    import ptq_exp.diffusion.sampler"),
        ("ptq_exp.quantization.layers", "from ..diffusion import TimeGrid"),
        ("ptq_exp.quantization.layers", "from .. import diffusion"),
        ("ptq_exp.quantization.layers", "from ptq_exp import load_model"),
        ("ptq_exp.diffusion.sampler", "from ptq_exp.quantization.quantizer import Quantizer"),
        ("ptq_exp.diffusion.zoo.ldm", "from ...quantization import rules"),
        ("ptq_exp.calibration.sources", "from ptq_exp.quantization import quantize_"),
        ("ptq_exp.evaluation.metrics", "from ptq_exp.embedded import load"),
        ("ptq_exp.evaluation.metrics", "import torch, pytorch_lightning as pl"),
        ("ptq_exp.embedded.load", "from ptq_exp.quantization import quantize_"),
        ("ptq_exp.embedded.load", "if TYPE_CHECKING:\n    from omegaconf import DictConfig"),
        ("ptq_exp.deploy.export", "from ptq_exp.lightning import trainer"),
        ("ptq_exp.unheard_of", "from ptq_exp.storage import atomic"),
        ("ptq_exp.storage.cache", "import torch"),
        ("ptq_exp.experiment.stages", "from ptq_exp.cli import table"),
        ("ptq_exp.lightning.calibration", "from hydra.utils import instantiate"),
        ("ptq_exp.lightning.calibration", "from ptq_exp.reports.tables import results"),
        ("ptq_exp.results.record", "from ptq_exp.quantization import Report"),
        ("ptq_exp.results.record", "from omegaconf import OmegaConf"),
        ("ptq_exp.results.record", "from ptq_exp.settings.compose import ExperimentConfig"),
        ("ptq_exp.experiment.stages", "import hydra"),
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
        ("ptq_exp.results.wandb", "import wandb\nfrom pytorch_lightning.loggers import WandbLogger"),
        ("ptq_exp.settings.compose", "import hydra, omegaconf\nfrom ptq_exp.deploy import artifact"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(module, source) == []


def test_importing_the_package_alone_is_light():
    code = "import sys, ptq_exp; print(ptq_exp.__version__, *{'torch', 'numpy', 'hydra'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == ptq_exp.__version__
