"""A forecast counts what a run evaluates, grows as the settings do, and refuses what cannot fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_networks import use_blank_pictures, use_small_networks

import ptq_exp
from ptq_exp.calibration import StateRequest, labelled, positions
from ptq_exp.calibration.sources import denoise
from ptq_exp.correction import measured_steps, propagated
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.experiment import forecast_experiment, run_experiment
from ptq_exp.experiment.forecast import make, speeds
from ptq_exp.experiment.forecast.free_memory import available_memory
from ptq_exp.experiment.forecast.probe import Line, line
from ptq_exp.experiment.forecast.room import Need, check_disk, check_memory, free_disk
from ptq_exp.experiment.forecast.work import FULL, OBSERVED, QUANTIZED, calibration_work, work_of
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.run import Run
from ptq_exp.settings.build import build
from ptq_exp.settings.compose import composed_from

SMALL = ["sampler.steps=4", "evaluation.n_samples=8", "evaluation.batch_size=4", "evaluation.eps_error_samples=4",
         "evaluation.grid_images=2", "evaluation.fid_resamples=2", "calibration.n_samples=8",
         "calibration.batch_size=4", "metric=minmax", "logger=none", "trainer.progress_bar=false",
         "trainer.accelerator=cpu"]


def settings(folder, *overrides):
    return composed_from([*SMALL, f"cache_dir={folder}/cache", *overrides])


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        use_small_networks(patch)
        use_blank_pictures(patch)
        patch.setattr("ptq_exp.experiment.experiment.SHORT_RUN", 0.0)
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run, its results and its folder."""
    folder = tmp_path_factory.mktemp("forecast")
    config = settings(folder, "+experiment=ndtc_w4a8", "metric=minmax", "seed=3")
    return run_experiment(config, folder / "run"), folder / "run", config


def test_every_run_says_what_it_was_forecast_to_take(finished):
    results, _, _ = finished
    forecast, taken = results["forecast"], results["seconds"]
    assert {"fp32_images", "calibration_set", "quantize", "eps_error", "quantized_images"} <= set(forecast["seconds"])
    assert set(forecast["seconds"]) <= set(taken) | {"bit_schedule"}
    assert all(seconds is not None and seconds >= 0 for seconds in forecast["seconds"].values())
    assert forecast["total_seconds"] == pytest.approx(sum(forecast["seconds"].values()), abs=0.01)
    assert forecast["taken"]["seconds"] > 0 and forecast["reused"] == []
    assert forecast["memory_bytes"] > 1e8 or available_memory() is None


def test_a_short_run_is_not_forecast(finished, monkeypatch, caplog):
    _, folder, config = finished
    monkeypatch.setattr("ptq_exp.experiment.experiment.SHORT_RUN", 1e6)
    with caplog.at_level("INFO", "ptq_exp"):
        assert "forecast" not in run_experiment(config, folder.parent / "short")
    assert "no forecast: the network is evaluated for about" in caplog.text


def test_the_saved_model_takes_the_bytes_that_were_forecast(finished):
    results, folder, config = finished
    saved = folder / "quantized" / "quantized.safetensors"
    run = Run.of(config)
    found = speeds.Speeds(run, make.Plan.of(config, run.grid), {FULL: 1, QUANTIZED: 1, OBSERVED: 1}).placed
    assert make.tensors_bytes(found.network) == saved.stat().st_size
    files = sum(path.stat().st_size for name in ("samples.npz", "quantization.json", "quantized/quantization.json")
                for path in [folder / name])
    forecast = results["forecast"]["disk_bytes"]["run folder"]
    assert 0.8 < forecast / (files + saved.stat().st_size) < 1.25


def test_what_is_in_the_cache_takes_no_time(finished, small):
    _, folder, config = finished
    found = forecast_experiment(config, folder)
    reused = {"fp32_images", "fp32_scores", "reference", "calibration_set", "quantize", "eps_error", "quantized_images"}
    assert set(found.reused) == reused
    assert {stage: found.seconds[stage] for stage in reused - {"fp32_scores"}} == dict.fromkeys(
        reused - {"fp32_scores"}, 0.0
    )
    assert "reused from the cache" in found.table() and found.disk["cache"] == 0


class FixedScoring:
    """Features take 0.01 s for each image, a resample 1 s, scores nothing."""

    features = Line(0, 0.01)

    def scored(self, n, real):
        return 0.0

    def resampled(self, n, resamples):
        return float(resamples)


class Fixed(speeds.Speeds):
    """Speeds that are known: an evaluation takes 1 s, and 0.1 s for each sample; quantized twice as long."""

    full, quantized, decoded = Line(1, 0.1, 10), Line(2, 0.2, 30), Line(0, 0)
    placed = speeds.Placed(torch.nn.Linear(10, 10), None, weights=7.0, ranges=5.0, observed=Line(3, 0.3, 20))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scoring = FixedScoring()


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """A folder, and the objects of a run in it."""
    folder = tmp_path_factory.mktemp("base")
    return folder, Run.of(settings(folder))


@pytest.fixture
def forecast(base, monkeypatch):
    """The forecast of settings at known speeds."""
    monkeypatch.setattr(make, "Speeds", Fixed)
    monkeypatch.setattr(make, "_disk", lambda *_: {})
    return lambda *overrides: made(base, *overrides)


def made(base, *overrides):
    folder, run = base
    config = settings(folder, *overrides)
    run = replace(run, grid=run.model.time_grid(config.sampler.steps))
    plan = None if config.bits.name == "fp32" else make.Plan.of(config, run.grid)
    return make.forecast_run(run, plan, config, Keys(config, run.model, run.grid, 1.0), folder)


def test_seconds_are_those_of_all_evaluations(forecast):
    found = forecast("calibration=uniform").seconds
    images = 2 * 4 * (1 + 0.1 * 4)  # two batches of four images, four steps
    assert found["fp32_images"] == pytest.approx(images) and found["quantized_images"] == pytest.approx(2 * images)
    assert found["eps_error"] == pytest.approx(4 * 1.4 * 3)
    assert found["quantize"] == pytest.approx(7 + 5 + 2 * 3 + 0.3 * 8)
    assert found["pairs"] == 2.0 and found["scores"] == pytest.approx(0.08)
    # states that enter steps 0, 1, 2, 3, twice each, in batches of four
    calls, samples = (sum(sizes) for sizes in zip(*_calibration_calls(4, 8, 4), strict=True))
    assert found["calibration_set"] == pytest.approx(calls * 1 + samples * 0.1)


def _calibration_calls(steps, n, batch):
    """Evaluations and their samples, step by step, for states spread evenly; those of the first steps come first."""
    config = composed_from([*SMALL, "calibration=uniform"])
    drawn = positions(build(config.calibration.distribution, "x"), n, steps, config.seed)
    states = labelled(drawn, ptq_exp.load_model("digits").time_grid(steps))
    for rows in states.enters.sort().values.split(batch):
        for step in range(steps):
            if active := int((rows > step).sum()):
                yield 1, active


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [(["evaluation.n_samples=16"], {"fp32_images", "fp32_scores", "quantized_images", "scores"}),
     (["evaluation.fid_resamples=4"], {"pairs"}), (["evaluation.eps_error_samples=8"], {"eps_error"})],
)
def test_twice_as_much_takes_twice_as_long_where_it_is_done(forecast, overrides, stages):
    before, after = forecast().seconds, forecast(*overrides).seconds
    for stage in before:
        assert after[stage] == pytest.approx((2 if stage in stages else 1) * before[stage]), stage


def test_steps_and_corrections_take_their_time(forecast):
    before = forecast().seconds
    assert forecast("sampler.steps=8").seconds["fp32_images"] == pytest.approx(2 * before["fp32_images"])
    assert "noise_statistics" not in before
    corrected = forecast("correction=ptqd", "correction.n_samples=8", "correction.batch_size=4").seconds
    assert corrected["noise_statistics"] == pytest.approx(2 * 4 * 1.4 * 3)


def test_a_rule_for_bits_takes_the_evaluations_that_it_makes(base, monkeypatch):
    folder, run = base
    config = settings(folder, "bits=step_budget", "bits.gain_steps=3", "bits.gain_samples=6", "correction=ptqd",
                      "correction.n_samples=8", "correction.batch_size=4")
    counted = dict.fromkeys((FULL, QUANTIZED), 0)

    def counting(network, what):
        def call(x, t, **conditions):
            counted[what] += len(x)
            return network(x, t, **conditions)
        return call

    grid, full = run.model.time_grid(4), run.model.denoiser
    propagated(run.model, counting(full, FULL), counting(full, QUANTIZED), grid, measured_steps(4, 3), range(6), 0)
    widths = 2  # each on 8 trajectories of 4 steps, as is full precision
    found = work_of(config, grid, quantizes=True, quantized=True, seed=0)
    of = {name: sum(e.samples for e in found["bit_schedule"] if e.network == name) for name in counted}
    # 6 trajectories in batches of 4 count as 8: all batches are of one size
    assert of == {FULL: 8 * 4 + counted[FULL] * 8 // 6, QUANTIZED: widths * 8 * 4 + counted[QUANTIZED] * 8 // 6}
    assert "noise_statistics" not in found  # fitted to the same noise
    snr = work_of(settings(folder, "bits=step_snr", "correction.n_samples=8", "correction.batch_size=4"), grid,
                  quantizes=True, quantized=True, seed=0)["bit_schedule"]
    assert [(e.network, e.samples) for e in snr] == [(FULL, 32), (QUANTIZED, 32), (QUANTIZED, 32)]


@pytest.mark.parametrize("bits", [["bits=step_snr"], ["bits=step_budget", "bits.gain_steps=2", "bits.gain_samples=2"]])
def test_a_network_of_several_widths_is_forecast(base, bits):
    found = made(base, *bits, "correction.n_samples=4")
    assert found.seconds["bit_schedule"] > 0 and None not in found.seconds.values()


def test_the_calibration_is_counted_as_it_is_drawn():
    config, model = composed_from([*SMALL, "calibration=ndtc", "calibration.n_samples=11"]).calibration, None
    model = ptq_exp.load_model("digits")
    grid, calls = model.time_grid(5), []

    class Counting(torch.nn.Module):
        def forward(self, x, t, **_):
            calls.append(len(x))
            return torch.zeros_like(x)

    states = labelled(positions(build(config.distribution, "x"), 11, 5, 0), grid, config.labels)
    for rows in states.order.split(config.batch_size):
        denoise(model, StateRequest(grid, rows.tolist(), states.enters[rows], 0, denoiser=Counting()))
    (found,) = calibration_work(config, grid, 0, FULL)
    assert (found.times, found.samples) == (len(calls), sum(calls)) and found.largest >= max(calls)


def test_a_line_goes_through_what_was_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ptq_exp.experiment.forecast.probe.time.perf_counter", lambda: now[0])

    def work(n):
        now[0] += 0.25 + 0.125 * n

    found = line(work, 1000, torch.device("cpu"), budget=4.0)
    assert found.seconds(1000) == pytest.approx(0.25 + 125) and found.seconds(8, 3) == pytest.approx(3 * 1.25)


def test_a_forecast_draws_nothing_changes_nothing_and_never_ends_a_run(base, monkeypatch, caplog):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    weights = {name: value.clone() for name, value in base[1].model.denoiser.state_dict().items()}
    assert made(base) is not None
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert all(torch.equal(value, weights[name]) for name, value in base[1].model.denoiser.state_dict().items())

    caplog.set_level("INFO", "ptq_exp")
    for kind in (RuntimeError, ValueError, MemoryError):

        def broken(*_, kind=kind):
            raise kind(f"no such kernel: {kind.__name__}")

        monkeypatch.setattr(make, "stage_seconds", broken)
        assert made(base) is None and f"no forecast: no such kernel: {kind.__name__}" in caplog.text


def test_memory_that_does_not_suffice_is_said_with_the_setting_that_fits(forecast, monkeypatch):
    monkeypatch.setattr(make, "available_memory", lambda: 600.0)
    monkeypatch.setattr(make, "weight_bytes", lambda network: 440.0)
    message = "evaluation.batch_size=64: drawing quantized images would take .*: set evaluation.batch_size=5$"
    with pytest.raises(ConfigError, match=message):
        forecast("evaluation.batch_size=64", "evaluation.n_samples=64")  # (600 - 440 bytes of weights) / 30
    monkeypatch.setattr(make, "available_memory", lambda: None)
    forecast("evaluation.batch_size=64", "evaluation.n_samples=64")


def test_a_network_that_does_not_fit_twice_ends_before_it_is_copied(small, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "available_memory", lambda: 1000.0)
    message = r"model=digits: a quantized copy of its weights would take .* GB: set trainer.max_memory_gb"
    with pytest.raises(ConfigError, match=message):
        run_experiment(settings(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "samples.npz").exists()


def test_memory_is_refused_only_where_the_forecast_leaves_no_doubt():
    need = {"it": Need(100.0, 10.0, "evaluation.batch_size", 10)}
    check_memory(need, 160.0, "free are")
    with pytest.raises(ConfigError, match=r"set evaluation\.batch_size=5$"):
        check_memory(need, 150.0, "free are")
    with pytest.raises(ConfigError, match="set trainer.max_memory_gb"):
        check_memory(need, 90.0, "free are")


def test_a_disk_without_room_names_the_settings(tmp_path):
    place = {"cache": (tmp_path / "a" / "b", 2 * free_disk(tmp_path)), "run folder": (tmp_path, 1.0)}
    message = r"a/b: the run would write .* GB \(cache, run folder\), the disk has .* GB free: set cache_dir"
    with pytest.raises(ConfigError, match=message):
        check_disk(place, {"cache": "set cache_dir=PATH", "run folder": "set hydra.run.dir=PATH"})
    check_disk({"cache": (tmp_path, 1.0)}, {"cache": "set cache_dir=PATH"})


def test_images_on_another_disk_are_there_twice(small, tmp_path, monkeypatch):
    config = settings(tmp_path)
    here = forecast_experiment(config, tmp_path).disk
    monkeypatch.setattr(make, "disk_of", lambda path: len(str(path)))  # each path on a disk of its own
    other = forecast_experiment(config, tmp_path).disk
    images = config.evaluation.n_samples * float(np.prod(ptq_exp.load_model(config.model.name).image_shape))
    assert other["cache"] - here["cache"] == images > 0 and other["run folder"] == here["run folder"]


def test_the_command_prints_a_table_and_runs_nothing(small, command, cache, capsys):
    folder = command("forecast=true")
    printed = capsys.readouterr().out
    assert "quantized_images" in printed and "memory (cpu)" in printed and "disk: run folder" in printed
    assert not folder.exists() and not list(cache.rglob("entry.json"))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    command("forecast=true", f"hydra.run.dir={folder}")
    assert (folder / "notes.txt").exists()


def test_what_is_not_forecast_is_said(base, tmp_path, caplog):
    caplog.set_level("INFO", "ptq_exp")
    assert made(base, "bits=auto", "bits.budget.size_mb=1") is None and "no forecast: bits=auto" in caplog.text
    with pytest.raises(ConfigError, match="forecast=true"):
        forecast_experiment(replace(settings(tmp_path), quantized="runs/one"), tmp_path)


def test_full_precision_has_the_stages_of_full_precision(forecast):
    assert set(forecast("+experiment=fp32").seconds) == {"fp32_images", "fp32_scores", "reference"}
    assert set(work_of(composed_from([*SMALL, "+experiment=fp32"]), ptq_exp.load_model("digits").time_grid(2),
                       quantizes=False, quantized=False, seed=0)) == {"fp32_images"}
