"""One job on two devices (two processes of the CPU) gives the numbers of one device."""

import numpy as np
import pytest
from small_networks import use_blank_pictures, use_small_networks

from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.lightning import EvaluationModule, draw_images, make_trainer
from ptq_exp.results.record import read_samples
from ptq_exp.storage.plain_json import read_json

SMALL = [
    "sampler.steps=2", "evaluation.n_samples=6", "evaluation.batch_size=2", "evaluation.eps_error_samples=2",
    "evaluation.grid_images=2", "evaluation.fid_resamples=2",
    "calibration.n_samples=4", "calibration.batch_size=4", "trainer.progress_bar=false",
    "trainer.accelerator=cpu", "trainer.threads=1", "metric=minmax", "logger=none",
]


def test_two_devices_give_the_metrics_of_one(command, tmp_path, monkeypatch):
    """Three batches of images for two devices, one batch of calibration states, one of trajectories for the error."""
    use_small_networks(monkeypatch)  # processes are forked and have it, too
    use_blank_pictures(monkeypatch)
    results, images = [], []
    for devices in ("trainer.devices=1", "trainer.devices=2"):
        folder = tmp_path / devices
        places = [f"hydra.run.dir='{folder}'", f"cache_dir='{folder / 'cache'}'"]
        assert command(*SMALL, devices, "trainer.strategy=ddp_fork", *places) is None
        results.append(read_json(folder / "results.json"))
        images.append(read_samples(folder / "samples.npz")[0])
    assert np.array_equal(*images)
    for key in ("metrics", "fp32", "eps_error_per_step", "fixed_pattern_share_per_step", "evaluations", "quantization"):
        assert results[0][key] == results[1][key], key
    assert results[1]["cache"]["hits"] == 0  # nothing was taken from the other run


@pytest.mark.filterwarnings("ignore")
def test_processes_that_are_spawned_draw_the_images_of_one(tmp_path):
    model, drawn = load_model("digits"), []
    for devices, strategy in ((1, "auto"), (2, "ddp_spawn")):
        trainer = make_trainer("t", accelerator="cpu", devices=devices, strategy=strategy, progress_bar=False)
        module = EvaluationModule(model, model.denoiser, model.time_grid(1), seed=0)
        path = tmp_path / f"{devices}.npz"
        draw_images(module, trainer, 4, 4, tmp_path / f"parts{devices}", path)
        drawn.append(np.array(read_samples(path)[0]))
    assert np.array_equal(*drawn)
