"""bits=auto on a network of six layers: costs, choices and errors against brute force, and what it refuses."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ptq_exp.diffusion import DiffusionModel, NoiseSchedule
from ptq_exp.diffusion.noise import CALIBRATION
from ptq_exp.diffusion.paired import paired_estimates
from ptq_exp.errors import ConfigError, InfeasibleError
from ptq_exp.experiment import latency
from ptq_exp.experiment.choices import Choices, at_widths, with_candidates
from ptq_exp.experiment.choose_bits import best_choice, measure_alone
from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.plan import Plan
from ptq_exp.experiment.quantize import quantize_with
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stages import make_calibration_set, quantize_model
from ptq_exp.runtime.simulate import Simulate
from ptq_exp.runtime.timing import Times
from ptq_exp.settings.compose import composed_from
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.plain_json import read_json

STEPS = 3
CANDIDATES = ("w8a8", "w4a6", "w3a3")
OVERRIDES = [
    "bits=auto", "bits.candidates=[w8a8,w4a6,w3a3]", "calibration=uniform", "calibration.n_samples=6",
    f"sampler.steps={STEPS}", "metric=minmax", "bits.sensitivity_samples=2", "bits.solution_samples=3", "cache=off",
    "trainer.accelerator=cpu", "trainer.progress_bar=false", "evaluation.batch_size=2", "bits.solutions=3",
]


class SixLayers(nn.Module):
    """Between a first and a last convolution: two linear layers on one tensor, and four more layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.b, self.c = (nn.Conv2d(6, 6, size, padding=size // 2) for size in (1, 3, 5))
        self.time = nn.Linear(2, 6)

    def forward(self, x, t):
        h = self.conv_in(x) + self.time(torch.stack([t / 40, 1 - t / 40], 1))[:, :, None, None]
        tokens = torch.tanh(h.movedim(1, -1))
        h = h + (self.q(tokens) * torch.sigmoid(self.k(tokens))).movedim(-1, 1)
        h = h + self.b(torch.relu(self.a(torch.relu(h))))
        return self.conv_out(torch.relu(self.c(h))) + 0.5 * x


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    betas = torch.linspace(1e-3, 0.2, 40, dtype=torch.float64)
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    return DiffusionModel("six", SixLayers().eval(), schedule, (1, 6, 6), clip_sample=True, digest="0")


def settings(*overrides):
    return composed_from([*OVERRIDES, *overrides])


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Run:
    grid = model.time_grid(STEPS)
    trainer = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "progress_bar": False}
    cache = ArtifactCache(tmp_path_factory.mktemp("cache"), "on")
    return Run(model, grid, 1.0, 0, torch.device("cpu"), cache, None, trainer)


@pytest.fixture(scope="module")
def states(run):
    config = settings("bits.budget.size_mb=1")
    keys = Keys(config, run.model, run.grid, 1.0)
    return make_calibration_set(run, config.calibration, keys.calibration(1))


@pytest.fixture(scope="module")
def choices(run) -> Choices:
    return Choices.of(run, settings("bits.budget={size_mb: 0.0015, bops_ratio: 20}"))


def layer_costs(layer: nn.Module, pixels: int, weight: int, activation: int) -> tuple[float, float]:
    """Bytes with a scale and a zero point per output channel and a float bias; bit operations."""
    out, params = layer.weight.shape[0], layer.weight.numel()
    return params * weight / 8 + out * (4 + 1) + 4 * out, params * pixels * weight * activation


def test_layers_that_read_one_tensor_are_a_group(choices):
    assert choices.groups == (("q", "k"), ("a",), ("b",), ("c",), ("time",))
    assert choices.candidates == CANDIDATES


def test_costs_are_those_of_the_layers(choices, model):
    size, bops = choices.limits
    network = model.denoiser
    for g, group in enumerate(choices.groups):
        for c, (weight, activation) in enumerate([(8, 8), (4, 6), (3, 3)]):
            costs = [layer_costs(network.get_submodule(name), 1 if name == "time" else 36, weight, activation)
                     for name in group]
            assert size.cost[g, c] == sum(cost for cost, _ in costs)
            assert bops.cost[g, c] == sum(cost for _, cost in costs)


@pytest.mark.parametrize("choice", [(0, 0, 0, 0, 0), (2, 2, 2, 2, 2), (0, 1, 2, 1, 0)])
def test_totals_are_those_of_the_network_with_that_choice(run, choices, choice):
    from ptq_exp.experiment.budget import planned_report
    from ptq_exp.settings.schema import ReconstructionConfig

    config = with_candidates(settings("bits.budget.size_mb=1"), choices.groups, choices.candidates, choice)
    totals = planned_report(run, Plan.of(config, run.grid), ReconstructionConfig()).totals
    size, bops = choices.limits
    assert size.of(choice) == pytest.approx(totals["weight_bytes"] / 1e6, rel=1e-12)
    assert bops.of(choice) == pytest.approx(totals["bops_reduction"]["conv_linear"], rel=1e-12)


def test_errors_are_those_of_networks_with_one_quantized_group(run, choices, states):
    config = settings("bits.budget.size_mb=1")
    error = measure_alone(run, config, choices, states)
    assert error.shape == (5, 3, STEPS)
    assert (error[:, 0].mean(1) < error[:, 1].mean(1)).all() and (error[:, 1].mean(1) < error[:, 2].mean(1)).all()
    # by hand: q and k at w3a3 in the network where all groups are
    low = with_candidates(config, choices.groups, choices.candidates, (2,) * 5)
    quantized = quantize_model(run, Plan.of(low, run.grid), Keys(low, run.model, run.grid, 1.0), states).network
    mixed = run.model.copy_denoiser()
    for name in ("q", "k"):
        setattr(mixed, name, quantized.get_submodule(name))
    wanted = []
    paired_estimates(
        run.model, run.model.denoiser, [mixed], run.grid, range(2), run.seed,
        lambda step, eps, others: wanted.append(float((others[0] - eps).norm() / eps.norm())), stream=CALIBRATION,
    )
    np.testing.assert_allclose(error[0, 2], wanted, rtol=1e-5)


@pytest.mark.parametrize(("size_mb", "ratio"), [(0.0014, 17), (0.0016, 30), (0.0013, 40), (0.01, 22)])
def test_the_solution_is_that_of_brute_force(run, choices, states, size_mb, ratio):
    config = settings(f"bits.budget={{size_mb: {size_mb}, bops_ratio: {ratio}}}", "bits.solutions=1")
    given = Choices.of(run, config)
    error = measure_alone(run, config, given, states)
    score = np.square(error).mean(2)
    within = [
        choice for choice in itertools.product(range(3), repeat=5)
        if given.limits[0].of(choice) <= size_mb and given.limits[1].of(choice) >= ratio
    ]
    wanted = min(within, key=lambda choice: math.fsum(score[g, c] for g, c in enumerate(choice)))
    (found,) = given.allocation(score).best()
    assert found.choice == wanted and 0 < len(within) < 3**5


def test_the_best_on_whole_trajectories_is_taken(run, choices, states):
    config = settings("bits.budget={size_mb: 0.0015, bops_ratio: 20}")
    error = measure_alone(run, config, choices, states)
    made = best_choice(run, config, choices, error, states)
    entry = made.record.numbers["allocation"]
    solutions = entry["solutions"]
    assert len(solutions) >= 4 and "w3a3" in {one["uniform"] for one in solutions}  # three solved, and what is uniform
    (chosen,) = [one for one in solutions if one["chosen"]]
    assert chosen["final_error"] == min(one["final_error"] for one in solutions)
    assert all(one["size_mb"] <= 0.0015 and one["bops_ratio"] >= 20 for one in solutions)
    assert solutions[0]["predicted_eps_error"] == min(one["predicted_eps_error"] for one in solutions)
    # by hand: the final states of that network
    keys = Keys(made.value, run.model, run.grid, 1.0)
    quantized = quantize_model(run, Plan.of(made.value, run.grid), keys, states)
    ends = [run.model.run(network, run.grid, range(3), 0, stream=CALIBRATION).flatten(1).double()
            for network in (run.model.denoiser, quantized.denoiser)]
    relative = (ends[1] - ends[0]).norm(dim=1) / ends[0].norm(dim=1)
    assert chosen["final_error"] == pytest.approx(float(relative.log().mean().exp()), rel=1e-4)
    assert made.value.bits.limits == {} and set(entry["layers"].values()) <= set(CANDIDATES)
    assert entry["layers"]["q"] == entry["layers"]["k"]
    rows = {row.name: f"w{row.weight_bits}a{row.activation_bits}" for row in quantized.report.rows}
    assert {name: rows[name] for name in entry["layers"]} == entry["layers"]


def test_no_choice_is_made_twice(run, choices, states):
    """A second time everything is found in the cache; other numbers of trajectories are other errors."""
    config = settings("bits.budget={size_mb: 0.0015, bops_ratio: 20}")
    before = measure_alone(run, config, choices, states)
    counts = dict(run.cache.counts())
    again = measure_alone(run, config, choices, states)
    assert run.cache.counts()["misses"] == counts["misses"]
    np.testing.assert_array_equal(again, before)
    other = measure_alone(run, settings("bits.budget.size_mb=1", "bits.sensitivity_samples=3"), choices, states)
    assert (other != before).any()


def test_in_one_call_from_python(model):
    quantized = quantize_with(model, [*OVERRIDES, "bits.budget.size_mb=0.0015"], steps=STEPS, progress=False)
    assert quantized.report.totals["weight_bytes"] <= 1500
    assert len({row.weight_bits for row in quantized.report.rows}) > 1


def test_groups_by_hand_are_left_alone(run):
    found = Choices.of(run, settings("bits.budget.size_mb=1", "+bits.groups={*b: w8a8}"))
    assert found.groups == (("q", "k"), ("a",), ("c",), ("time",))


def test_layers_kept_in_full_precision_are_left_alone(run):
    found = Choices.of(run, settings("bits.budget.size_mb=1", "quantization.keep_fp=[k]"))
    assert found.groups[0] == ("q",)


def test_what_no_choice_reaches_is_named_with_what_can_be(run):
    with pytest.raises(InfeasibleError, match=r"bits\.budget\.size_mb=0\.0005 is not met: the smallest .* reach is "):
        Choices.of(run, settings("bits.budget.size_mb=0.0005"))
    with pytest.raises(InfeasibleError, match=r"bits\.budget\.bops_ratio=500 is not met: the largest "):
        Choices.of(run, settings("bits.budget.bops_ratio=500"))
    with pytest.raises(InfeasibleError) as error:
        Choices.of(run, settings("bits.budget.size_mb=0.0005"))
    least = float(str(error.value).rsplit(" ", 1)[1])
    assert Choices.of(run, settings(f"bits.budget.size_mb={least * 1.00001}")).uniform() == [(2,) * 5]


def test_nothing_is_chosen_without_a_budget(run):
    assert Choices.of(run, composed_from(["bits=w8a8"])) is None
    assert at_widths(settings("bits.budget.size_mb=1"), {"q": "w4a4"}).bits.groups["[q]"] == "w4a4"


def test_the_latency_is_that_of_layers_on_the_engine(run, monkeypatch):
    """With a clock that ticks as often as the network multiplies: layers and the rest add up to the whole network."""

    def counted(ways, repeats):
        (call,) = ways.values()
        network = call.args[0]
        return {"layer": Times((sum(m.weight.numel() for m in network.modules() if hasattr(m, "weight")),) * repeats)}

    monkeypatch.setattr(latency, "interleaved", counted)
    monkeypatch.setattr(latency, "runtime_of", lambda name, options: Simulate())
    found = Choices.of(run, settings("runtime=torch", "bits.budget.latency_ms=2000"))
    (limit,) = found.limits
    network = run.model.denoiser
    sizes = [sum(network.get_submodule(name).weight.numel() for name in group) for group in found.groups]
    np.testing.assert_array_equal(limit.cost, np.array([sizes] * 3).T)
    assert limit.fixed == 2 * 54  # the first and the last layer
    with pytest.raises(InfeasibleError, match=r"latency_ms=10 is not met: the smallest .* is 1452"):
        Choices.of(run, settings("runtime=torch", "bits.budget.latency_ms=10"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "bits=auto needs a budget: bits.budget.size_mb=1.2"),
        (["bits.budget.size_mb=-1"], "bits.budget.size_mb=-1: give a number above 0"),
        (["bits.budget.size_mb=small"], "bits.budget.size_mb=small: give a number above 0"),
        (["+bits.budget.size=1"], "bits.budget.size: no such budget"),
        (["bits.budget.size_mb=1", "bits.candidates=[w8a8]"], "bits.candidates=.*: give two or more"),
        (["bits.budget.size_mb=1", "bits.candidates=[w8a8,w8a8]"], "bits.candidates=.*each once"),
        (["bits.budget.size_mb=1", "bits.candidates=[w8a8,w1a8]"], "bits.candidates=1: choose 2..8"),
        (["bits.budget.size_mb=1", "bits.candidates=null"], "bits.candidates=None: give two or more"),
        (["bits.budget.size_mb=1", "bits.min_bops_ratio=20"], "set bits.budget.bops_ratio=20 instead"),
        (["bits.budget.size_mb=1", "+bits.schedule=snr", "bits.activation=null"], "bits.budget contradicts"),
        (["bits.budget.size_mb=1", "quantization.activation_site=output"], "activation_site=output: a layer then"),
        (["bits.budget.latency_ms=1"], "runtime=simulate is none: choose"),
        (["bits.budget.size_mb=1", "bits.solutions=0"], "bits.solutions=0: choose 1 or more"),
    ],
)
def test_settings_without_meaning_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed_from(["bits=auto", *overrides])


@pytest.mark.usefixtures("small_networks")
def test_a_run_saves_what_it_chose_and_evaluates_it_again(command):
    folder = command(
        "bits=auto", "bits.budget.bops_ratio=30", "bits.candidates=[w8a8,w4a4]", "bits.sensitivity_samples=1",
        "bits.solutions=1", "bits.solution_samples=2", "metric=minmax", "logger=none", "evaluation=paired",
    )
    results = read_json(folder / "results.json")
    entry = results["allocation"]
    assert results["name"] == "ndtc_auto" and results["quantization"]["bops_ratio"] >= 30
    report = {row["name"]: row for row in json.loads((folder / "quantization.json").read_text())["layers"]}
    for name, bits in entry["layers"].items():
        assert f"w{report[name]['weight_bits']}a{report[name]['activation_bits']}" == bits
    assert {"w8a8", "w4a4"} == set(entry["layers"].values())
    arrays = npz_arrays(folder / "allocation.npz")
    assert arrays["error"].shape == (entry["groups"], 2, 3) and len(arrays["layers"]) == len(entry["layers"])
    assert "allocation" in (folder / "report.html").read_text()
    again = command("+experiment=evaluate", f"quantized={folder / 'quantized'}", "logger=none")
    assert read_json(again / "results.json")["metrics"]["psnr"] == results["metrics"]["psnr"]
