"""The Python of the guide in docs/, as the reader has it: own models, metrics, calibration strategies, corrections."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from guide_text import conf, run_of
from small_pipelines import SMALL

from ptq_exp.calibration import CalibrationSet, StateRequest, source
from ptq_exp.embedded import digits_model
from ptq_exp.evaluation import Comparison, FeatureStatistics
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.run import Run, calibration_images
from ptq_exp.experiment.stages import make_calibration_set
from ptq_exp.quantization import FORMATS, METRICS, Policy, Widths, calibrate_, fake_quantize, quantize_, search_range
from ptq_exp.storage.plain_json import read_json

pytestmark = pytest.mark.usefixtures("blank_pictures")
QUICK = ("logger=none", "evaluation=paired", "evaluation.n_samples=2", "evaluation.batch_size=2",
         "save_quantized=false")


def test_a_diffusers_folder(command, here):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )
    DDPMPipeline(unet, DDIMScheduler(100)).save_pretrained(here / "my_folder")
    results = read_json(command(*run_of("own_model", "ndtc_w8a8 model=diffusers"), *QUICK) / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage_conv_linear"] == 1


def test_a_pipeline_in_three_lines(here):
    SMALL["sd15"].build().save_pretrained(here / "my-model")
    made = runpy.run_path("three_lines.py")
    assert made["image"].size == (16, 16) and made["quantized"].report.totals["coverage"]["conv_linear"] == 1


def weights(here):
    """The weights of the guide's own model."""
    model = runpy.run_path(str(here / "my_model.py"))
    torch.manual_seed(0)
    torch.save(model["Denoiser"]().state_dict(), here / "my_weights.pt")


def test_a_python_function_through_the_command_and_in_python(command, here):
    weights(here)
    results = read_json(command(*run_of("own_model", "imports=[my_model]"), *QUICK) / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage_conv_linear"] == 1
    assert results["config"]["model"]["name"] == "mine"
    made = SimpleNamespace(**runpy.run_path("quantize_my_model.py"))
    assert made.images.shape == (8, 1, 16, 16) and made.report.totals["coverage"]["conv_linear"] == 1
    exact = made.model.sample(made.model.denoiser, made.grid, range(8), seed=0)
    assert 0 < float((made.images - exact).square().mean()) < 0.1 * float(exact.square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_of_the_metric_have_the_smallest_loss(symmetric, here):
    config = conf(*run_of("extend", "w8a8 imports=[my_metric] metric.name=huber"))
    assert config.metric.name == "huber" and METRICS["huber"] is not None
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.0).sample((20000,)).clamp(-40, 40) / 10
    loss = {}
    for metric in ("huber", "mse", "minmax", "lp"):
        found = search_range(x, 4, symmetric=symmetric, metric=metric)
        loss[metric] = float(torch.nn.functional.huber_loss(fake_quantize(x, *found), x, delta=0.1))
    assert loss["huber"] == min(loss.values()) and loss["huber"] < 0.99 * loss["mse"]


def test_the_metric_takes_five_lines(here):
    assert len(Path("my_metric.py").read_text().splitlines()) <= 5


def test_the_command_takes_the_metric(command, here):
    weights(here)
    arguments = run_of("extend", "w8a8 imports=[my_metric] metric.name=huber")
    small = ("imports=[my_metric,my_model]", "model=diffusers", "model.name=mine", "model.checkpoint=my_weights.pt")
    results = read_json(command(*arguments, *small, *QUICK) / "results.json")
    assert results["status"] == "finished" and results["metrics"]["psnr"] > 20


def test_the_calibration_strategies_make_their_sets(here, cache):
    small = ("sampler.steps=4", "calibration.n_samples=8", "trainer.accelerator=cpu", "trainer.progress_bar=false")
    made: dict[str, CalibrationSet] = {}
    for name in ("beta", "mixed"):
        arguments = run_of("extend", f"calibration.name={name}")
        config = conf(*small, f"cache_dir={cache}", *arguments)
        run = Run.of(config)
        key = Keys(config, run.model, run.grid, run.guidance_scale).calibration(1)
        made[name] = make_calibration_set(run, config.calibration, key, calibration_images(config))
    # most time indices of Beta(2, 3) are in the lower half, which are the later positions
    assert (made["beta"].step >= 2).sum() > 4
    model, mixed = digits_model(), made["mixed"]
    request = StateRequest(model.time_grid(4), range(8), torch.from_numpy(mixed.step.copy()), 0)
    denoised, _ = source("denoise")(model, request)
    same = [torch.allclose(torch.from_numpy(x.copy()), y, atol=1e-5) for x, y in zip(mixed.x, denoised, strict=True)]
    assert same == [False, True] * 4


def test_the_score_is_computed_and_shown(command, here, capsys):
    made = SimpleNamespace(**runpy.run_path("my_score.py"))
    rest = np.zeros((4, 1)), np.ones((4, 1))
    real, drawn = (FeatureStatistics(np.full((4, 2), x), *rest) for x in ([1.0, 1.0], [4.0, 5.0]))
    assert made.mean_distance(Comparison(drawn, real)) == 5  # a triangle of 3, 4 and 5
    small = ("logger=none", "save_quantized=false", "metric=minmax", "sampler.steps=2")
    folder = command(*run_of("extend", "imports=[my_score]"), *small)
    values = read_json(folder / "results.json")
    assert values["metrics"]["mean_distance"] > 0 and values["fp32"]["mean_distance"] > 0
    printed = capsys.readouterr().out
    assert "mean distance" in printed and f"{values['metrics']['mean_distance']:.4g}" in printed
    assert "mean distance" in (folder / "report.html").read_text()


def test_the_correction_lowers_the_error_of_other_trajectories(here):
    made = SimpleNamespace(**runpy.run_path("my_correction.py"))
    model = digits_model()
    grid, quantized = model.time_grid(4), model.copy_denoiser()
    quantize_(quantized, Policy().rules(Widths(3, 8)), model.example_inputs())
    records = []
    model.run(model.denoiser, grid, range(16), 0, on_step=records.append)
    calibrate_(quantized, "minmax", [(r.x, grid.network_time(r.step, 16)) for r in records])
    corrected = made.WithoutPattern(quantized, made.mean_errors(model, quantized, grid, 32, seed=1), grid)
    with torch.no_grad():
        before, after = (
            sum(float((network(r.x, grid.network_time(r.step, 16)) - r.eps).square().mean()) for r in records)
            for network in (quantized, corrected)
        )
    assert after < 0.9 * before
    assert model.sample(corrected, grid, range(2), seed=0).isfinite().all()


def test_statistics_of_a_rule_of_ones_own_go_through_the_command(command, here):
    quick = (*QUICK, "metric=minmax")
    first = command("+experiment=ptqd_w4a8", *quick)
    (here / "noise_statistics.npz").write_bytes((first / "noise_statistics.npz").read_bytes())
    runpy.run_path("one_slope.py")
    second = command(*run_of("extend", "correction.statistics=one_slope.npz"), *quick)
    values = read_json(second / "results.json")
    assert values["status"] == "finished" and values["name"] == "one_slope_w4a8"
    assert values["eps_error_per_step"] != read_json(first / "results.json")["eps_error_per_step"]


def test_number_formats_and_one_more(here):
    made = SimpleNamespace(**runpy.run_path("show_formats.py"))
    assert made.bits == 4.25 and made.codes.dtype == torch.uint8 and made.scales["block_scale"].shape == (4, 2)
    config = conf(*run_of("number_formats", "imports=[my_format]"))
    assert config.bits.weight == "seventh" and FORMATS["seventh"].bits == 4
    x = torch.linspace(-1, 1, 64)[None]
    assert torch.allclose(FORMATS["seventh"].fake_quantize(x) * 7, (x * 7).round())
