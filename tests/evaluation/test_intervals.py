"""Bootstrap intervals against golden values, every possible resample, the normal law, and slow recomputation."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from ptq_exp.errors import DataError
from ptq_exp.evaluation import FeatureStatistics, change_intervals, paired_bootstrap, score
from ptq_exp.evaluation.bootstrap import percentiles, resampled_rows
from ptq_exp.evaluation.gate import gate_line, judged
from ptq_exp.evaluation.scores import SCORES, Comparison

GOLDEN = Path(__file__).parents[1] / "golden" / "pairs.npz"


def test_golden_intervals():
    with np.load(GOLDEN) as stored:
        x, y = stored["boot.x"], stored["boot.y"]
        means = (y - x)[stored["boot.index"].astype(int)].mean(axis=1)
        np.testing.assert_allclose(percentiles(means), stored["boot.percentile95_from_index"], atol=1e-9)
        low, high = stored["boot.scipy_percentile"]
        np.testing.assert_allclose(paired_bootstrap(y, x), (low, high), atol=0.03 * (high - low))


def test_all_resamples_of_four_pairs():
    a, b = np.array([1.0, 4.0, 2.0, 9.0]), np.array([0.5, 1.0, 2.0, 3.0])
    means = [np.mean([(a - b)[i] for i in drawn]) for drawn in itertools.product(range(4), repeat=4)]
    low, high = np.percentile(means, [2.5, 97.5])
    found = paired_bootstrap(a, b, 40_000)
    assert found == pytest.approx((low, high), abs=0.13)  # neighbouring values of this mean lie 0.125 apart


@pytest.mark.parametrize("n", [200, 2000])
def test_many_pairs_follow_the_normal_law(n):
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 5, n)
    a, b = 3 + noise + rng.normal(0, 0.2, n), noise
    half = 1.96 * (a - b).std(ddof=1) / np.sqrt(n)
    low, high = paired_bootstrap(a, b)
    assert (low, high) == pytest.approx(((a - b).mean() - half, (a - b).mean() + half), abs=0.06 * half)
    assert high - low < 0.1 * 1.96 * 2 * a.std() / np.sqrt(n)  # what both have in common cancels


def test_same_seed_same_interval_and_tensors_are_taken():
    import torch

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert paired_bootstrap(a, b) == paired_bootstrap(torch.tensor(a), torch.tensor(b))
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b, seed=0)
    assert paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b)
    assert paired_bootstrap([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0)
    low, high = paired_bootstrap(a, b)
    assert paired_bootstrap(b, a) == pytest.approx((-high, -low))


def test_seeds_of_a_prompt_stay_together():
    rng = np.random.default_rng(1)
    prompt = np.repeat(rng.normal(0, 1, 30), 8)  # nearly all variance lies between prompts
    values = prompt + rng.normal(0, 0.01, 240)
    names = [f"p{i // 8}" for i in range(240)]
    low, high = paired_bootstrap(values, np.zeros(240), prompts=names)
    half = 1.96 * values.reshape(30, 8).mean(axis=1).std(ddof=1) / np.sqrt(30)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert paired_bootstrap(values.reshape(30, 8), np.zeros((30, 8))) == pytest.approx((low, high))
    alone_low, alone_high = paired_bootstrap(values, np.zeros(240))
    assert high - low > 2.5 * (alone_high - alone_low)
    # one prompt for all says nothing of prompts: images are drawn
    assert paired_bootstrap(values, np.zeros(240), prompts=["p"] * 240) == (alone_low, alone_high)
    for rows in resampled_rows(6, 20, prompts=list("aabbbc")):
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[1] and counts[2] == counts[3] == counts[4]
        assert counts[0] + counts[2] + counts[5] == 3  # prompts


def test_rows_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    from ptq_exp.evaluation import bootstrap

    before = np.stack(list(resampled_rows(7, 25)))
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 21)
    assert np.array_equal(before, np.stack(list(resampled_rows(7, 25))))


@pytest.mark.parametrize(("a", "b", "resamples", "said"), [
    ([], [], 10, "shapes"), ([1.0], [1.0, 2.0], 10, "shapes"), ([1.0, np.inf], [0, 0], 10, "1 of 2"),
    ([np.nan], [0], 10, "NaN"), ([1.0], [0.0], 0, "resamples"),
])
def test_no_interval_of_nothing(a, b, resamples, said):
    with pytest.raises(DataError, match=said):
        paired_bootstrap(a, b, resamples)


def features(rng, n, shift=0.0):
    logits = rng.normal(shift, 1, (n, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return FeatureStatistics(rng.normal(shift, 1, (n, 5)), rng.normal(shift, 1, (n, 6)), probabilities)


def shifted(base, rng, by):
    return FeatureStatistics(base.pooled + rng.normal(by, 0.1, base.pooled.shape), base.spatial + by,
                             base.probabilities[:, ::-1])


@pytest.mark.parametrize("n_real", [400, 5])  # more rows than columns, or not
def test_intervals_of_distances_are_recomputed_on_every_resample(n_real):
    rng = np.random.default_rng(0)
    real, fp = features(rng, n_real), features(rng, 60)
    ours = shifted(fp, rng, 0.3)
    scores, fp_scores = score(ours, real), score(fp, real)
    between = SCORES["fid"].function(Comparison(ours, fp))
    estimates = {f"{name}_increase": scores[name] - fp_scores[name] for name in ("fid", "sfid", "is")}
    found = change_intervals(ours, fp, real, estimates | {"fid_to_fp": between, "psnr": 1.0}, resamples=40)
    assert set(found) == {*estimates, "fid_to_fp"}
    values = {name: [] for name in found}
    for rows in resampled_rows(60, 40):
        a, b = (FeatureStatistics(s.pooled[rows], s.spatial[rows], s.probabilities[rows]) for s in (ours, fp))
        sa, sb = score(a, real), score(b, real)
        for name in ("fid", "sfid", "is"):
            values[f"{name}_increase"].append(sa[name] - sb[name])
        values["fid_to_fp"].append(SCORES["fid"].function(Comparison(a, b)))
    for name, interval in found.items():
        drawn = np.array(values[name])
        estimate = (estimates | {"fid_to_fp": between})[name]
        expected = np.percentile(drawn - drawn.mean() + estimate, [2.5, 97.5])
        np.testing.assert_allclose(interval, expected, rtol=1e-7, atol=1e-9)
        assert interval[0] < estimate < interval[1]


def test_distances_without_reference_or_resamples():
    rng = np.random.default_rng(0)
    fp = features(rng, 30)
    found = change_intervals(fp, fp, None, {"fid_to_fp": 0.0}, resamples=5)
    assert found == {"fid_to_fp": (0.0, pytest.approx(0.0, abs=1e-12))}
    assert change_intervals(fp, fp, fp, {"fid_increase": 0.0}, resamples=0) == {}
    assert change_intervals(fp, fp, None, {"psnr": 30.0}, resamples=5) == {}


def test_the_gate_knows_which_side_is_better():
    scores = {"psnr": 28.5, "ssim": 0.9, "fid": 12.0, "eps_error": 0.01, "lpips": float("nan")}
    verdict = judged(scores, {"psnr": 30, "ssim": 0.9, "fid": 10.0, "eps_error": 0.02, "lpips": 0.1, "recall": 0.5})
    assert not verdict["passed"] and list(verdict["missed"]) == ["psnr", "fid", "lpips", "recall"]
    assert verdict["missed"]["psnr"] == {"value": 28.5, "bound": 30, "by": 1.5}
    assert verdict["missed"]["fid"]["by"] == pytest.approx(2.0) and verdict["missed"]["recall"]["value"] is None
    line = gate_line(verdict)
    assert "psnr 28.5 is 1.5 below 30" in line and "fid 12 is 2 above 10" in line and "recall was not measured" in line
    assert "\n" not in line and "ssim" not in line and "eps_error" not in line
    assert judged(scores, {"psnr": 28.5, "fid": 12.0})["passed"] and gate_line({}) == ""
