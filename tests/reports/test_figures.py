"""The curves hold the numbers that were given, and the files are whole pictures."""

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ptq_exp.errors import DataError
from ptq_exp.reports import figures
from ptq_exp.reports.curves import write_figure

STEPS = 7
BEFORE = np.linspace(0.02, 0.08, STEPS)
AFTER = BEFORE * [0.9, 0.8, 1.25, 0.9, 0.9, 0.5, 0.9]
EDGES = np.linspace(-2, 2, 9)
NOISE = {"k": [-0.1] * STEPS, "r": [0.5] * STEPS, "kurtosis": range(STEPS), "edges": EDGES, "title": "noise"}


def histogram(steps=STEPS):
    return np.arange(steps * 8).reshape(steps, 8)


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def schedule(bits=(8, 8, 4), output_snr=None, forward_snr=(0.1, 1.0, math.inf)):
    return {"bits": bits, "output_snr": output_snr or {}, "forward_snr": forward_snr, "title": "bits"}


@pytest.mark.parametrize(
    ("plot", "arguments"),
    [
        (figures.eps_error, {"before": BEFORE, "after": AFTER, "title": "digits_ldm, $5 and a long title " * 5}),
        (figures.eps_error, {"before": None, "after": AFTER, "title": "t", "share": AFTER, "share_of_noise": 0.2}),
        (figures.noise, NOISE | {"histogram": histogram()}),
        (figures.bit_schedule, schedule(output_snr={8: [9.0, 9.0, 9.0]})),
        (figures.bit_schedule, schedule()),
    ],
)
def test_a_whole_picture_is_written(plot, arguments, tmp_path):
    write_figure(tmp_path / "new" / "plot.png", plot(**arguments))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1000 and picture.height >= 300
        assert len(set(np.asarray(picture.convert("L")).ravel())) > 10  # not blank


def test_eps_error_shows_both_curves_the_change_and_the_worst_step():
    upper, lower = figures.eps_error(BEFORE, AFTER, title="title").axes
    curves = lines(upper)
    np.testing.assert_array_equal(curves["before correction"], BEFORE)
    np.testing.assert_array_equal(curves["after correction"], AFTER)
    change = [line.get_ydata() for line in lower.get_lines() if len(line.get_ydata()) == STEPS]
    np.testing.assert_allclose(change, [[-10, -20, 25, -10, -10, -50, -10]], atol=1e-9)
    (worst,) = [line for line in lower.get_lines() if line.get_label().startswith("worst")]
    assert worst.get_label() == "worst: step 2, +25.0 %" and worst.get_xdata() == [2]
    assert lower.get_xlabel() == "sampling step s (0 = noisiest)" and "%" in lower.get_ylabel()
    assert upper.get_yscale() == "linear"


def test_the_share_of_a_fixed_pattern_stands_below_over_that_of_independent_errors():
    share = np.linspace(0.8, 0.3, STEPS)
    for before, panels in ((BEFORE, 3), (None, 2)):
        axes = figures.eps_error(before, AFTER, share=share, share_of_noise=0.25).axes
        assert len(axes) == panels and axes[-1].get_ylim()[0] == 0 and axes[-1].get_xlabel()
        floor, curve = axes[-1].get_lines()
        assert set(floor.get_ydata()) == {0.25} and floor.get_linestyle() == "--" and "√N" in floor.get_label()
        np.testing.assert_array_equal(curve.get_ydata(), share)
    (curve,) = axes[0].get_lines()  # without a correction one curve, which needs no name
    np.testing.assert_array_equal(curve.get_ydata(), AFTER)
    assert axes[0].get_legend() is None


def test_eps_error_is_logarithmic_where_it_spans_more_than_a_factor_of_20():
    for factor, scale in ((20.0, "linear"), (20.1, "log")):
        assert figures.eps_error([1.0, factor], [1.0, 1.0]).axes[0].get_yscale() == scale


def test_eps_error_leaves_gaps_where_there_is_no_number():
    upper, lower = figures.eps_error([0.1, math.inf, 0.0], [0.05, 0.1, 0.0]).axes
    assert np.isnan(lines(upper)["before correction"]).tolist() == [False, True, False]
    assert lower.get_lines()[-1].get_label() == "worst: step 0, −50.0 %"
    figures.eps_error([0.0, 0.0], [0.0, 0.0])  # no change that could be computed


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0.1], [-0.1], "negative"),
        ([math.nan], [math.nan], "finite"),
    ],
)
def test_eps_error_refuses_what_does_not_fit(before, after, message):
    with pytest.raises(DataError, match=message):
        figures.eps_error(before, after)


def noise_figure(**changes):
    return figures.noise(**NOISE | {"histogram": histogram()} | changes)


def test_noise_shows_its_statistics_per_step():
    panels = sorted(noise_figure().axes[:3], key=lambda axes: -axes.get_position().y0)
    labels = {"k": "slope", "r": "correlation", "kurtosis": "0 = Gaussian"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        np.testing.assert_array_equal(axes.get_lines()[1].get_ydata(), list(NOISE[name]))
        assert label in axes.get_ylabel()
    of_kurtosis = panels[-1]
    assert of_kurtosis.get_xlabel() == "sampling step s (0 = noisiest)" and of_kurtosis.get_yscale() == "linear"
    assert noise_figure(kurtosis=[0.0] * 6 + [100.0]).axes[0].get_yscale() == "symlog"


def test_noise_shows_densities_of_thirds_of_the_steps_and_the_gaussian():
    counts = histogram()
    counts[:, 3] = 0
    density = noise_figure(histogram=counts).axes[3]
    labels = ["noisy (steps 0–2)", "middle (steps 3–4)", "clean (steps 5–6)"]
    assert [patch.get_label() for patch in density.patches] == labels
    for patch, steps in zip(density.patches, ((0, 1, 2), (3, 4), (5, 6)), strict=True):
        values, edges, _ = patch.get_data()
        assert np.isnan(values).tolist() == [False] * 3 + [True] + [False] * 4  # log 0
        assert np.nansum(values * np.diff(edges)) == pytest.approx(1)
        pooled = counts[list(steps)].sum(0)
        np.testing.assert_allclose(values[4] / values[5], pooled[4] / pooled[5])
    (gaussian,) = density.get_lines()
    assert gaussian.get_ydata().max() == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert density.get_yscale() == "log" and gaussian.get_label() == "N(0, 1)"


def test_a_single_step_has_one_density():
    figure = noise_figure(k=[0.1], r=[0.1], kurtosis=[0.1], histogram=histogram(1))
    assert [patch.get_label() for patch in figure.axes[3].patches] == ["noisy (step 0)"]


def test_the_bit_schedule_stands_below_the_ratios_it_comes_from():
    arguments = schedule(output_snr={8: [90.0, 80.0, math.inf], 4: [9.0, 8.0, 7.0]})
    bits, ratios = figures.bit_schedule(**arguments).axes
    values, edges, _ = bits.patches[-1].get_data()
    assert values.tolist() == [8, 8, 4] and edges.tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert bits.patches[-1].get_label() == "mean 6.67 bits"
    narrow, wide, forward = ratios.get_lines()
    assert narrow.get_label().startswith("output at 4 bits") and narrow.get_ydata().tolist() == [9, 8, 7]
    np.testing.assert_array_equal(wide.get_ydata(), [90, 80, math.nan])
    np.testing.assert_array_equal(forward.get_ydata(), [0.1, 1, math.nan])
    assert forward.get_linestyle() == "--" and ratios.get_yscale() == "log"
    assert bits.get_position().y0 < ratios.get_position().y0


def test_a_bit_schedule_may_stand_alone():
    (bits,) = figures.bit_schedule(**schedule()).axes
    assert bits.get_ylabel() == "activation bits" and bits.get_xlabel() == "sampling step s (0 = noisiest)"


def test_titles_are_plain_text():
    assert figures.eps_error(BEFORE, AFTER, title="$a_b$")._suptitle.get_parse_math() is False


def test_the_global_state_of_matplotlib_is_left_alone():
    code = "import sys, ptq_exp.reports.figures, ptq_exp.reports.pareto; print('matplotlib.pyplot' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
