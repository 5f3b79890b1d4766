"""Runs with evaluation=pairs and with a gate, through the command in this process, in small."""

import numpy as np
import pytest
import torch

from ptq_exp.diffusion import DiffusionModel
from ptq_exp.evaluation import SCORES, paired_bootstrap, psnr, ssim
from ptq_exp.results.layout import entry_of
from ptq_exp.results.worst_pairs import WORST, worst_pairs
from ptq_exp.storage.plain_json import flatten, read_json

PAIRS = ["+experiment=uniform_w8a8", "bits=w4a4", "metric=minmax", "logger=none", "evaluation=pairs",
         "evaluation.n_samples=15", "evaluation.fid_resamples=20"]


@pytest.fixture(autouse=True)
def small(small_networks):
    """Numbers of the networks do not matter here."""


def exit_code(run) -> int | str | None:
    try:
        run()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_run_of_pairs(command, capsys):
    folder = command(*PAIRS, "evaluation.gate={psnr: 1, ssim: -1}")
    results = read_json(folder / "results.json")
    metrics, intervals = results["metrics"], results["intervals"]
    assert set(metrics) >= {"psnr", "ssim", "fid_to_fp", "eps_error"} and "fid" not in metrics
    assert set(intervals) == {"psnr", "ssim", "fid_to_fp"}
    assert results["resamples"] == {"pairs": 10000, "features": 20}
    assert results["gate"] == {"passed": True, "bounds": {"psnr": 1.0, "ssim": -1.0}, "missed": {}}
    with np.load(folder / "pairs.npz") as kept, np.load(folder / "samples.npz") as samples:
        images, values, worst = samples["arr_0"], dict(kept), kept["worst"]
    assert values["psnr"].shape == values["ssim"].shape == (15,)
    for name in ("psnr", "ssim"):
        assert metrics[name] == pytest.approx(values[name].mean())
        assert tuple(intervals[name]) == paired_bootstrap(values[name], np.zeros(15))
    # the full-precision images of the worst pairs, held against their numbers
    assert len(worst) == WORST and np.array_equal(worst, np.argsort(values["psnr"], kind="stable")[:WORST])
    again = psnr(values["worst_fp32"], images[worst])
    np.testing.assert_allclose(again, values["psnr"][worst])
    planes = [np.moveaxis(x, 3, 1) for x in (values["worst_fp32"], images[worst])]
    np.testing.assert_allclose(ssim(*planes, 255), values["ssim"][worst])
    assert [pair.index for pair in worst_pairs(folder)] == worst.tolist()
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption>image ") == WORST and 'id="worst-pairs"' in page
    printed = capsys.readouterr()
    assert "LPIPS (evaluation.lpips)" in printed.out + printed.err


def test_lpips_and_clip_score_beside_the_others(command, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionModel, "prompts", lambda self, indices, seed: [f"a {i % 4}" for i in indices])
    torch.manual_seed(0)
    package = pytest.importorskip("lpips")
    torch.save(package.LPIPS(net="alex", pnet_rand=True, verbose=False).state_dict(), tmp_path / "alex.pth")

    class Dummy:
        name = "tiny-clip-0"

        def __call__(self, images, prompts):
            assert len(images) == len(prompts)
            return images.mean(axis=(1, 2, 3)) / 2.55

    monkeypatch.setattr("ptq_exp.experiment.pairs.ImageText.load", lambda folder, device: Dummy())
    folder = command(*PAIRS, f"evaluation.lpips={tmp_path / 'alex.pth'}", f"evaluation.clip={tmp_path}")
    results = read_json(folder / "results.json")
    metrics = results["metrics"]
    assert metrics["lpips"] > 0 and [key for key in flatten(results) if entry_of(key) is None] == []
    assert metrics["clip_score_change"] == pytest.approx(metrics["clip_score"] - results["fp32"]["clip_score"])
    assert set(results["intervals"]) == {"psnr", "ssim", "lpips", "clip_score", "clip_score_change", "fid_to_fp"}
    assert results["metric_spec"]["clip"] == "tiny-clip-0" and "enlarged 4 times" in results["metric_spec"]["lpips"]
    with np.load(folder / "pairs.npz") as kept:
        expected = paired_bootstrap(kept["lpips"], np.zeros(15), prompts=kept["prompts"].tolist())
        assert tuple(results["intervals"]["lpips"]) == expected
    assert worst_pairs(folder)[0].drawn_from.startswith("a ")


def test_a_missed_gate_ends_with_3_and_one_line(command, tmp_path, capsys):
    assert exit_code(lambda: command(*PAIRS, "evaluation.gate={psnr: 100, fid_to_fp: 0, eps_error: 9}")) == 3
    line = [line for line in capsys.readouterr().err.splitlines() if "gate" in line]
    assert len(line) == 1 and "psnr" in line[0] and "below 100" in line[0] and "fid_to_fp" in line[0]
    assert "eps_error" not in line[0]
    (path,) = tmp_path.rglob("results.json")
    results = read_json(path)
    assert results["status"] == "finished" and results["stage"] == "done"
    missed = results["gate"]["missed"]
    assert set(missed) == {"psnr", "fid_to_fp"} and not results["gate"]["passed"]
    assert missed["psnr"]["by"] == pytest.approx(100 - results["metrics"]["psnr"])
    assert (path.parent / "report.html").exists()


@pytest.mark.parametrize(("overrides", "said"), [
    (["evaluation.gate={psnrr: 30}"], "psnrr"),
    (["evaluation.gate={fid: 30}"], "does not measure it"),
    (["evaluation.gate={lpips: 0.1}"], "evaluation.lpips=PATH"),
    (["evaluation.gate={psnr: nan}"], "finite"),
    (["evaluation.gate={psnr: high}"], "evaluation.gate.psnr"),
    (["evaluation.gate={psnr: 30}", "bits=fp32", "calibration=none"], "full precision"),
    (["evaluation.pairs=[sim]"], "ssim"),
    (["evaluation.pairs=[lpips]"], "evaluation.lpips=PATH"),
    (["evaluation.pairs=[clip_score]"], "evaluation.clip=PATH"),
    (["evaluation.extractor=null"], "fid_to_fp"),
    (["evaluation.lpips=/none/alex.pth"], "no such file"),
    (["evaluation.clip=/none"], "draws from none"),
])
def test_what_cannot_be_measured_is_refused_before_the_run(refused, overrides, said, monkeypatch):
    monkeypatch.setattr("ptq_exp.experiment.experiment.full_precision_images", None)  # nothing may be drawn
    message = refused(*PAIRS, *overrides)
    assert said in message
    if "psnrr" in said:
        assert all(name in message for name in SCORES)


def test_intervals_of_the_default_evaluation_of_digits(command):
    folder = command("+experiment=uniform_w8a8", "metric=minmax", "logger=none", "evaluation.fid_resamples=20")
    results = read_json(folder / "results.json")
    intervals, metrics = results["intervals"], results["metrics"]
    assert set(intervals) == {"psnr", "fid_increase", "fid_increase_units", "sfid_increase", "is_increase"}
    for name, base in (("fid_increase", "fid"), ("sfid_increase", "sfid"), ("is_increase", "is")):
        assert metrics[name] == metrics[base] - results["fp32"][base]
        low, high = intervals[name]
        assert low < metrics[name] < high
    unit = results["real"]["half_split_fid"]
    assert intervals["fid_increase_units"] == pytest.approx([bound / unit for bound in intervals["fid_increase"]])
    assert "gate" not in results
