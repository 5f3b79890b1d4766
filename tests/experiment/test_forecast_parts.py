"""What a forecast counts is what is done: calls of pipelines, passes of transforms, rows under guidance, GPTQ."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_forecasts import SMALLEST
from small_networks import use_small_networks
from small_pipelines import PROMPTS, SMALL

import ptq_exp
from ptq_exp.calibration import CalibrationSet
from ptq_exp.calibration import positions as drawn_positions
from ptq_exp.deploy.measure import Trajectory, _Enough
from ptq_exp.experiment.budget import planned_network
from ptq_exp.experiment.forecast import forecast_run, pairs, speeds
from ptq_exp.experiment.forecast import placed as placed_network
from ptq_exp.experiment.forecast.engine import Engine, measuring_seconds
from ptq_exp.experiment.forecast.pipelines import Zeros, of_pipeline
from ptq_exp.experiment.forecast.probe import Line
from ptq_exp.experiment.forecast.transforms import transform_time
from ptq_exp.experiment.forecast.work import OBSERVED, work_of
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.run import Run
from ptq_exp.lightning import RecordingModule
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization import Fitting, transforms_of
from ptq_exp.runtime.timing import interleaved
from ptq_exp.settings.build import build
from ptq_exp.settings.compose import composed_from
from ptq_exp.settings.schema_machine import RuntimeConfig


class Counting(Zeros):
    """Answers with zeros and counts."""

    def __init__(self, model):
        super().__init__(model)
        self.rows = []

    def forward(self, x, t, **conditions):
        self.rows.append(len(x))
        return super().forward(x, t, **conditions)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_calls_of_a_pipeline_are_those_that_it_makes(scale):
    call = {"height": 16, "width": 16}
    model = PipelineModel(SMALL["sd15"].build(), PROMPTS, steps=3, call=call, guidance_scale=scale)
    assert model.copies == (1 if scale == 1 else 2)
    grid, config = model.time_grid(), composed_from([*SMALLEST, "model=pipeline", "calibration.steps_per_sample=2"])
    work = work_of(config, grid, quantizes=True, quantized=True, seed=config.seed)
    found = of_pipeline(work, config, model, len(grid), config.seed)

    network = Counting(model)
    for start in (0, 2):
        model.run(network, grid, range(start, start + 2), 0)
    (images,) = found["fp32_images"]
    assert (images.times, images.samples) == (len(network.rows), sum(network.rows))
    assert images.largest == max(network.rows) and found["quantized_images"][0].samples == images.samples

    recorder = Counting(model)
    module = RecordingModule(model, grid, seed=config.seed, denoiser=recorder)
    distribution = build(config.calibration.distribution, "x")
    steps = drawn_positions(distribution, 12, len(grid), config.seed).view(6, 2)
    for rows in torch.arange(6).split(4):
        with torch.no_grad():
            recorded = module.predict_step((rows, steps[rows]))
    (states,) = found["calibration_set"]
    assert (states.times, states.samples) == (len(recorder.rows), sum(recorder.rows))
    (observed,) = found["quantize"]
    assert observed.network == OBSERVED and observed.samples == 6 * recorded["x"].shape[1] == 12 * model.copies


def test_lpips_and_clip_scores_are_timed_on_images_of_noise(monkeypatch):
    run = SimpleNamespace(model=SimpleNamespace(image_shape=(3, 8, 6)), device=torch.device("cpu"))
    shapes = []

    class Scorer:
        def __init__(self, run, evaluation):
            pass

        def values(self, images, fp_images):
            shapes.append((images.shape, fp_images.dtype))

    def known(work, n, device):
        work(n)
        return Line(1.0, 0.5)

    monkeypatch.setattr(pairs, "PairScorer", Scorer)
    monkeypatch.setattr(pairs, "line", known)
    given = composed_from(["evaluation.lpips=alex.pth"]).evaluation
    assert pairs.compared_seconds(run, given, 100) == 1 + 0.5 * 100
    assert shapes == [((64, 8, 6, 3), np.uint8)]
    assert pairs.compared_seconds(run, composed_from([]).evaluation, 100) == 0 and len(shapes) == 1


def test_calibration_sees_both_halves_of_guidance():
    config = composed_from([*SMALLEST, "model=digits_ldm"])
    grid = type("Grid", (), {"make_scheduler": None, "__len__": lambda self: 3,
                             "network_time": lambda self, steps: steps.float()})()
    (found,) = work_of(config, grid, quantizes=True, quantized=True, seed=0, guided=True)["quantize"]
    zeros = np.zeros(6, np.int64)
    states = CalibrationSet(np.zeros((6, 1, 2, 2), np.float32), zeros, np.zeros(6, np.float32), zeros,
                            {"y": zeros}, {"y": np.array(1)})
    rows = [len(call.x) for call in states.batches(4)]
    assert found.samples == sum(rows) == 12 and found.times == len(rows) and found.largest == max(rows)


def test_layers_of_the_time_alone_see_every_time():
    grid = ptq_exp.load_model("digits").time_grid(7)
    given = [*SMALLEST, "quantization.temporal=static", "calibration.batch_size=4"]
    chosen = [composed_from([*given, f"quantization.time_layers={of}"]) for of in ("calibration_set", "all_steps")]
    alone, seen = (work_of(config, grid, quantizes=True, quantized=True, seed=0) for config in chosen)
    assert seen["quantize"][0] == alone["quantize"][0] and len(alone["quantize"]) == 1
    assert (seen["quantize"][1].samples, seen["quantize"][1].times) == (7, 2)


def test_a_transform_is_forecast_by_its_passes_and_its_places(placed):
    run, plan, _ = placed
    looked = []

    def look(network, transform, sites, rules):
        sites = dict(list(sites.items())[-3:])  # enough, and quick
        before = {name: value.clone() for name, value in network.state_dict().items()}
        call = run.example().expanded(2).mapped(torch.Tensor.contiguous)
        shown = []

        def show(net):
            shown.append(1)
            call.evaluate(net)

        found = transform_time(network, transform, sites, rules, call.evaluate, lambda net: Line(1.0, 0.5), run.device)
        with torch.no_grad():
            transform.fit(network, sites, Fitting(show, rules))
        assert found.passes == len(shown) and found.fitted > 0
        assert found.seconds(4, 8) == pytest.approx(found.fitted + len(shown) * 2 * (1 + 0.5 * 4))
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
        looked.append(transform.name)

    planned_network(run, plan, look)
    assert looked == ["smooth", "low_rank"]


def test_a_transform_that_looks_at_nothing_passes_nothing(placed):
    run, _, _ = placed
    (rotate,) = transforms_of([{"name": "rotate", "group": 16}])
    network = run.network_copy()
    sites = rotate.find(network, run.example())
    found = transform_time(network, rotate, sites, [], None, None, run.device)
    assert found.passes == 0 and found.seconds(4, 1000) == found.seconds(4, 1)


def test_a_transform_without_places_takes_the_passes_that_it_makes_all_the_same(placed):
    run, _, _ = placed
    (smooth,), network, shown = transforms_of(["smooth"]), run.network_copy(), []
    smooth.fit(network, {}, Fitting(shown.append, []))
    found = transform_time(network, smooth, {}, [], None, lambda net: Line(1.0, 0.5), run.device)
    assert found.seconds(4, 8) == pytest.approx(len(shown) * 2 * (1 + 0.5 * 4)) and shown


@pytest.mark.parametrize("draws", ["openvino", "simulate"])
@pytest.mark.parametrize(("most", "steps"), [(100.0, 6), (7.0, 6), (2.0, 12)])
def test_an_engine_is_measured_as_long_as_the_clock_lets_it(most, steps, draws):
    """Against the loops themselves, on a clock of their own; where the simulation draws, its images are there."""
    engine = Engine(compiled=0.0, speed=Line(0.25, 0.125))
    full, simulated, images = Line(0.0, 0.25), Line(0.5, 0.5), 2
    settings = RuntimeConfig(name=draws, compare="openvino", measure=4, measure_seconds=most)
    now = [0.0]

    def takes(line):
        def work(*_, **__):
            now[0] += line.seconds(images)
            return torch.zeros(images, 1)

        return work

    recorder = Trajectory(takes(simulated), steps, most, lambda: now[0], stops=True)
    try:
        for _ in range(steps):
            recorder(torch.zeros(images, 1), torch.zeros(1))
        drawn = steps
    except _Enough:
        drawn = 0
    if drawn and draws == "simulate":
        now[0] = 0.0
    for _ in range(len(recorder.kept) + drawn):
        takes(engine.speed)()
    ways = {name: takes(line) for name, line in (("f", full), ("s", simulated), ("e", engine.speed))}
    interleaved(ways, settings.measure, budget=most, clock=lambda: now[0])
    found = measuring_seconds(engine, full, simulated, settings, images, steps)
    assert 0.8 < found / now[0] < 1.25


@pytest.mark.parametrize("runtime", ["runtime.compare=openvino", "runtime=openvino"])
def test_nothing_is_compiled_for_a_forecast_that_nobody_asked_for(runtime, monkeypatch, tmp_path, caplog):
    def compiled(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(speeds, "engine_of", compiled)
    use_small_networks(monkeypatch)
    config = composed_from([*SMALLEST, runtime, f"cache_dir={tmp_path / 'cache'}"])
    run = Run.of(config)
    keys = Keys(config, run.model, run.grid, run.guidance_scale)
    with caplog.at_level("INFO", "ptq_exp"):
        made = forecast_run(run, Plan.of(config, run.grid), config, keys, tmp_path, 1e-9)
    if runtime == "runtime=openvino":
        assert made is None and "an engine would have to be compiled for it" in caplog.text
    else:
        assert made.seconds["runtime"] is None and made.seconds["quantized_images"] > 0


def test_large_weights_are_timed_where_there_is_time(monkeypatch):
    """By what smaller ones take in proportion; seconds are values over ten millions here."""
    searched = []
    monkeypatch.setattr(placed_network, "measured", lambda search, device: (search() / 1e7, 0.0))

    def alike(values, layers=1):
        weight = torch.zeros(1).expand(values)
        search = lambda weight, metric: (searched.append(len(weight)), len(weight))[1]  # noqa: E731
        return [SimpleNamespace(weight=weight, weight_quantizer=SimpleNamespace(search=search))] * layers

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = []
    shapes = [alike(1_000_000, 3), alike(2_000_000), alike(10_000_000), alike(100_000_000, 9)]
    timed = placed_network._timed_searches(shapes, "mse", torch.device("cpu"), before.append)
    assert searched == [1_000_000, 2_000_000, 10_000_000] and before == [layers[0] for layers in shapes[:3]]
    assert timed == {(1_000_000,): 0.1, (2_000_000,): 0.2, (10_000_000,): 1.0}
    searched.clear()
    placed_network._timed_searches(shapes[3:], "mse", torch.device("cpu"), before.append)
    assert searched == [100_000_000]  # one, at least
