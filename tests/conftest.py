"""One thread per process: two on a busy machine are slower than one, and the order of sums stays the same."""

import gc
import io
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# W&B's list of all that is installed takes longer than anything else of an offline run
os.environ.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
# OpenVINO would report each import and conversion over the network, from a forked process
sys.modules["openvino_telemetry"] = None


# Whole experiments, new interpreters, trainings, many networks: files and folders below tests/ that `-m "not slow"`
# leaves out. Those that take longest come first, and are started first, so that two processes end together.
SLOW = (
    "experiment/test_experiment_files.py", "experiment/test_noise.py", "experiment/test_reproduce_commands.py",
    "experiment/test_guide_commands.py", "experiment/test_reconstruction.py", "experiment/test_models.py",
    "experiment/test_evaluate_repeats.py", "experiment/test_guide.py", "experiment/test_run.py", "test_example.py",
    "cli/test_search.py", "cli/sweep", "robustness/test_interruption.py", "robustness/test_chaos.py",
    "experiment/test_results_commands.py", "experiment/test_settings.py", "experiment/test_evaluate.py",
    "experiment/test_placement.py", "quantization/test_range_search_exhaustive.py",
    "embedded/test_training_latent.py", "embedded/test_training_pipelines.py", "embedded/test_pipelines.py",
    "embedded/test_pipeline_folders.py", "deploy", "runtime/test_products.py",
    "results/test_layout.py", "experiment/test_analysis.py",
    "robustness/test_malformed_settings.py", "experiment", "runtime/test_export.py", "runtime/test_openvino.py",
    "robustness/test_full_disk.py", "embedded/test_training.py", "lightning", "reports/html",
    "reports/tables/test_wandb_source.py", "results/test_wandb.py", "storage/test_cache.py", "pipelines", "api",
    "diffusion/zoo",
    "quantization/test_bops_ldm4.py", "cli", "embedded/test_load.py", "embedded/test_latent.py", "test_packaging.py",
    "test_layering.py", "test_api.py", "storage/test_atomic.py", "correction/test_on_digits.py",
    "quantization/test_save.py", "evaluation/test_inception.py", "runtime/test_deploy_policy.py",
    "runtime/test_torch_int8.py", "runtime/test_deployable.py", "runtime/test_grouped.py",
    "quantization/test_candidate_widths.py", "evaluation/test_pairs.py", "quantization/test_compiled.py",
    "test_benchmarks.py",
)
TESTS = Path(__file__).parent


def place_among_slow(path: Path) -> int:
    """The place in SLOW of the first entry that is `path` or holds it; behind all, if there is none."""
    below = path.relative_to(TESTS)
    names = {below.as_posix(), *(parent.as_posix() for parent in below.parents)}
    return next((place for place, entry in enumerate(SLOW) if entry in names), len(SLOW))


def pytest_collection_finish(session):
    """Spare the garbage collector the modules, a tenth of all time: what is loaded by now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_configure(config):
    missing = [entry for entry in SLOW if not (TESTS / entry).exists()]
    if missing:
        raise pytest.UsageError(f"SLOW in tests/conftest.py names {', '.join(missing)}, which is not below tests/")
    config.option.loadscopereorder = False  # pytest-xdist takes the files in the order given here


def pytest_collection_modifyitems(items):
    """Mark what is slow and put it in front; `large` tests, of minutes each, before everything. Skip without a GPU."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
        if place_among_slow(item.path) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    large = {item.path for item in items if item.path.name == "test_golden_large.py"}
    items.sort(key=lambda item: (item.path not in large, place_among_slow(item.path)))


@pytest.fixture(autouse=True)
def log_handlers_end_with_the_test():
    """Hydra adds handlers to the root logger: to log files in temporary folders, and to a captured standard output."""
    before = list(logging.root.handlers)
    yield
    for handler in [handler for handler in logging.root.handlers if handler not in before]:
        logging.root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file as the published InceptionV3 weights, but random: scaled so that signals neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class RandomInception(FeatureExtractorInceptionV3):
        """The library's constructor without weights to load."""

        def load_state_dict(self, state):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = RandomInception("random", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path
