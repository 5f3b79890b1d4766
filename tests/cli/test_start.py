"""What a command imports late is there when it is asked for, and nothing breaks where a library has changed."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from ptq_exp.cli import start

NOT_FOR_A_UNET = {
    "diffusers.hooks", "peft", "scipy.signal", "torch._dynamo", "torch_fidelity", "torchvision", "transformers",
}
RUN = f"""
import sys
from ptq_exp.cli.main import main
from ptq_exp.cli.start import postpone_imports

postpone_imports()
from diffusers import UNet2DModel

loaded = []
forward = UNet2DModel.forward

def first(*args, **kwargs):
    if not loaded:
        loaded.append(sorted({NOT_FOR_A_UNET} & set(sys.modules)))
    return forward(*args, **kwargs)

UNet2DModel.forward = first
main()
print("loaded:", *loaded)
"""
BACK = """
import sys
from ptq_exp.cli.start import postpone_imports
postpone_imports()
from diffusers import UNet2DModel
import pytorch_lightning.utilities.compile as lightning
assert "torch._dynamo" not in sys.modules and "diffusers.models.transformers.auraflow_transformer_2d" not in sys.modules

import torch, torchmetrics
network = torch.nn.Linear(2, 2)
assert not isinstance(network, lightning.OptimizedModule)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers import AuraFlowTransformer2DModel, DiTTransformer2DModel
from diffusers import DiTTransformer2DModel as the_same, UNet2DConditionModel, VQModel
from diffusers.models.unets import *
from diffusers.models.unets.unet_1d import UNet1DModel as of_module
assert UNet1DModel is of_module and the_same is DiTTransformer2DModel

import diffusers.utils.import_utils as utils, importlib.metadata
assert dict(utils._package_map) == dict(importlib.metadata.packages_distributions())

from torchmetrics.functional.text import char_error_rate
from torchmetrics.functional.text.cer import char_error_rate as original
assert char_error_rate is original and torchmetrics.image.FrechetInceptionDistance and torchmetrics.functional.accuracy

import scipy
assert "scipy.signal" not in sys.modules
assert scipy.signal.hamming is scipy.signal.windows.hamming and scipy.signal.convolve([1, 2], [3]).tolist() == [3, 6]

compiled = torch.compile(network)
assert isinstance(compiled, lightning.OptimizedModule) and lightning.OptimizedModule is type(compiled)
from torch._dynamo import trace_rules
assert trace_rules.is_callable_allowed(BasicTransformerBlock)
print("all there")
"""


def python(code: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(start.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_evaluates_a_unet_before_it_loads_what_that_does_without(tmp_path):
    said = python(
        RUN, "+experiment=fp32", "logger=none", "evaluation=paired", "evaluation.n_samples=2", "sampler.steps=1",
        f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", folder=tmp_path,
    )
    assert "loaded: []" in said


@pytest.mark.slow
def test_what_was_postponed_is_there_when_it_is_asked_for(tmp_path):
    assert python(BACK, folder=tmp_path).strip() == "all there"


def test_a_package_runs_its_code_at_the_first_name():
    package, runs = ModuleType("package"), []

    def run(module):
        runs.append(module)
        module.value = 3

    start._at_first_name(run, package)
    assert not hasattr(package, "__wrapped__") and not runs
    assert (package.value, package.value) == (3, 3) and runs == [package]
    with pytest.raises(AttributeError):
        package.other  # noqa: B018


def test_threads_wait_for_a_package_that_another_one_loads():
    package, runs, found = ModuleType("package"), [], []

    def run(module):
        runs.append(module)
        time.sleep(0.1)
        assert not hasattr(module, "value")  # its own code asks for what is not there yet
        module.value = 3

    start._at_first_name(run, package)
    threads = [threading.Thread(target=lambda: found.append(package.value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 4 and len(runs) == 1


def test_a_package_that_could_not_be_loaded_is_tried_again():
    package, broken = ModuleType("package"), [True]

    def run(module):
        if broken:
            raise ImportError("no such module: part")
        module.value = 3

    start._at_first_name(run, package)
    for _ in range(2):
        with pytest.raises(ImportError, match="part"):
            package.value  # noqa: B018
    broken.clear()
    assert package.value == 3


def test_the_names_of_a_package_are_those_of_its_code():
    package = ModuleType("package")
    start._at_first_name(lambda module: vars(module).update(value=3), package)
    assert "value" in dir(package) and "__getattr__" not in vars(package) and "__dir__" not in vars(package)


def test_a_package_whose_parts_do_not_come_apart_is_imported_as_it_is(monkeypatch):
    package, seen = ModuleType("whole"), []
    monkeypatch.setitem(sys.modules, "whole.part", ModuleType("whole.part"))
    monkeypatch.setitem(start._HOW, "whole.part", start._at_first_name)

    def run(module):
        seen.append("whole.part" in sys.modules or "whole.part" in start._HOW)
        if seen[-1]:
            raise ImportError("partially initialized module")

    start._or_at_once(run, package)
    assert seen == [True, False]


def test_a_module_that_does_not_bear_it_is_imported_as_it_is():
    module, runs = ModuleType("changed"), []

    def without(run, module):
        run(module)
        raise ImportError("cannot import a name that another version needs")

    start._postponed(without, runs.append, module)
    assert runs == [module, module]
    with pytest.raises(ImportError, match="broken itself"):
        start._postponed(without, _broken, module)


def _broken(module):
    raise ImportError("broken itself")


def test_the_collector_rests_once_in_a_process(monkeypatch):
    monkeypatch.setattr(start, "_paused", None)
    assert gc.isenabled()
    try:
        start.pause_collector()
        assert not gc.isenabled()
        start.loaded()
        assert gc.isenabled()
        frozen = gc.get_freeze_count()
        start.pause_collector()  # the next job: what the one before left is garbage
        assert gc.isenabled()
        start.loaded()
        assert gc.get_freeze_count() <= frozen
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_collector_that_is_off_stays_off(monkeypatch):
    monkeypatch.setattr(start, "_paused", None)
    gc.disable()
    try:
        start.pause_collector()
        start.loaded()
        assert not gc.isenabled()
    finally:
        gc.enable()
