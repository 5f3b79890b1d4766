"""Correction, bit schedules and solvers through the command, in small."""

import json

import numpy as np
import pytest
from PIL import Image

from ptq_exp.results.record import read_samples
from ptq_exp.settings.compose import config_folder
from ptq_exp.storage.plain_json import read_json

OF_LDM4 = sorted(path.stem for path in (config_folder() / "experiment").glob("ptqd_ldm4_*.yaml"))
QUICK = ("metric=minmax", "logger=none", "evaluation=paired")
SCHEDULED = ("bits.gain_samples=2", "bits.gain_steps=2")


@pytest.fixture(scope="module")
def finished():
    """Folders of runs by their overrides; they are only read."""
    return {}


@pytest.fixture
def results_of(command, small_networks, finished):
    """Run the command on a small network, unless it has been run, and read its results: (folder, results)."""

    def run(*overrides):
        if overrides not in finished:
            finished[overrides] = command(*QUICK, *overrides)
        folder = finished[overrides]
        return folder, read_json(folder / "results.json")

    return run


def test_a_corrected_run_leaves_statistics_pictures_and_both_errors(results_of):
    folder, results = results_of("+experiment=ptqd_w4a8")
    correction = results["correction"]
    assert len(correction["k"]) == len(correction["residual_std"]) == 3
    assert set(correction["variance"]) == {"available", "needed", "steps_over", "left"}
    before, after = results["eps_error_uncorrected_per_step"], results["eps_error_per_step"]
    changes = [a / b - 1 for a, b in zip(after, before, strict=True)]
    assert correction["held_out_change_worst"] == pytest.approx(max(changes))
    assert results["metrics"]["eps_error"] == pytest.approx(np.mean(after))
    assert results["metrics"]["eps_error_uncorrected"] == pytest.approx(np.mean(before))
    assert results["metrics"]["eps_error_without_last"] == pytest.approx(np.mean(after[:-1]))
    assert results["metrics"]["eps_error_uncorrected_without_last"] == pytest.approx(np.mean(before[:-1]))
    shares = [results[f"fixed_pattern_share{kind}_per_step"] for kind in ("", "_uncorrected")]
    assert results["metrics"]["fixed_pattern_share"] == pytest.approx(np.mean(shares[0]))
    assert results["metrics"]["fixed_pattern_share_uncorrected"] == pytest.approx(np.mean(shares[1]))
    assert all(0 < share <= 1 for kind in shares for share in kind) and shares[0] != shares[1]
    assert results["eps_error_samples"] == 2 and results["fixed_pattern_share_independent"] == 2**-0.5
    card = (folder / "quantized" / "README.md").read_text()
    for key in ("eps_error_without_last", "fixed_pattern_share"):
        assert f"| {results['metrics'][key]:.4g} |" in card
    assert "(0.71 = independent errors of 2 samples)" in (folder / "ptqd_w4a8.log").read_text()
    for picture in ("eps_error.png", "noise.png"):
        assert Image.open(folder / picture).width >= 800
    assert "variance correction: fits in" in (folder / "ptqd_w4a8.log").read_text()


def test_the_twin_without_correction_shares_the_network_and_the_uncorrected_error(results_of):
    _, corrected = results_of("+experiment=ptqd_w4a8")
    folder, plain = results_of("+experiment=ptqd_w4a8", "correction=none")
    assert plain["name"] == "uniform_w4a8" and "correction" not in plain
    for name in ("eps_error", "fixed_pattern_share"):
        assert plain[f"{name}_per_step"] == pytest.approx(corrected[f"{name}_uncorrected_per_step"])
    assert plain["metrics"]["psnr"] != corrected["metrics"]["psnr"]
    assert "ranges: reused from the cache" in (folder / "uniform_w4a8.log").read_text()


def test_a_single_step_has_no_error_without_the_last_one(results_of):
    _, results = results_of("+experiment=ndtc_w4a4", "sampler.steps=1", "evaluation.eps_error_samples=1")
    assert "eps_error_without_last" not in results["metrics"]
    assert results["fixed_pattern_share_per_step"] == pytest.approx([1])  # of one sample: it is its own mean


def test_ranges_from_the_cache_give_the_same_images(results_of):
    images = []
    for cache in ((), ("cache=on",), ("cache=refresh",)):  # on by default: made, reused, made again
        folder, _ = results_of("+experiment=ptqd_w4a8", "seed=3", *cache)
        images.append(read_samples(folder / "samples.npz")[0])
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


def test_at_eta_0_variance_is_said_to_be_left_alone(results_of):
    folder, ptqd = results_of("+experiment=ptqd_w4a8", "sampler.eta=0")
    assert "only the mean is corrected" in (folder / "ptqd_w4a8.log").read_text()
    other, _ = results_of("+experiment=ptqd_w4a8", "sampler.eta=0", "correction=mean")
    assert np.array_equal(*(read_samples(f / "samples.npz")[0] for f in (folder, other)))


def test_statistics_of_another_run_are_used_if_they_fit_and_refused_if_not(results_of, refused):
    folder, first = results_of("+experiment=ptqd_w4a8")
    given = f"correction.statistics={folder / 'noise_statistics.npz'}"
    _, second = results_of("+experiment=ptqd_w4a8", given)
    assert second["metrics"] == first["metrics"]
    said = refused(*QUICK, "+experiment=ptqd_w4a8", given, "bits=w3a8")
    assert "was made for another bits" in said and "set correction.statistics=null" in said
    said = refused(*QUICK, "+experiment=ptqd_w4a8", given, "sampler.steps=4", "metric=minmax")
    assert "was made for another grid" in said
    said = refused(*QUICK, "+experiment=ptqd_w4a8", given, "correction=bias")
    assert "was made for another correction" in said and "correlation" in said
    assert "no such file" in refused(*QUICK, "+experiment=ptqd_w4a8", "correction.statistics=no.npz").lower()


def test_the_quantized_trajectory_can_be_followed(results_of):
    _, fp = results_of("+experiment=ptqd_w3a8")
    _, quantized = results_of("+experiment=ptqd_w3a8", "correction.follow=quantized")
    # both start from the same noise, and part from there
    assert quantized["correction"]["r"][0] == pytest.approx(fp["correction"]["r"][0])
    assert quantized["correction"]["r"][2] != pytest.approx(fp["correction"]["r"][2])


def test_the_published_convention_runs(results_of):
    _, results = results_of("+experiment=ptqd_w4a8", "correction.convention=code")
    correction = results["correction"]
    assert correction["k"] == correction["k_unshrunk"]


@pytest.mark.parametrize("solver", ["dpm_solver", "pndm", "euler"])
def test_other_samplers_take_the_mean_correction(solver, results_of):
    folder, results = results_of("+experiment=ptqd_w4a8", f"sampler={solver}", "sampler.eta=0")
    evaluations = 4 if solver == "pndm" else 3
    assert len(results["eps_error_per_step"]) == evaluations
    assert "only the mean is corrected" in (folder / "ptqd_w4a8.log").read_text()


def test_a_deterministic_sampler_refuses_eta(refused):
    said = refused(*QUICK, "+experiment=ptqd_w4a8", "sampler=euler")
    assert "sampler.eta=1" in said and "choose 0" in said


@pytest.mark.parametrize("rule", ["step_snr", "step_budget"])
def test_a_bit_schedule_is_saved_drawn_reloaded_and_edited(rule, results_of, refused):
    extra = SCHEDULED if rule == "step_budget" else ()
    folder, first = results_of("+experiment=ptqd_mp", f"bits={rule}", *extra)
    saved = folder / "bit_schedule.json"
    widths = json.loads(saved.read_text())["activation"]
    assert first["bit_schedule"]["activation"] == widths and set(widths) <= {4, 8}
    assert Image.open(folder / "bit_schedule.png").width >= 800
    layers = json.loads((folder / "quantization.json").read_text())
    assert all(len(q["scale"]) == 2 for q in layers["quantizers"].values() if q["bits"] == [4, 8])
    _, again = results_of(
        "+experiment=ptqd_mp", "bits=step_list", f"bits.schedule={saved}", "bits.candidates=[4,8]"
    )
    assert again["bit_schedule"]["activation"] == widths
    assert again["metrics"]["psnr"] == pytest.approx(first["metrics"]["psnr"])
    said = refused(*QUICK, "bits=step_list", f"bits.schedule={saved}", "sampler.steps=4")
    assert "bits.schedule was made for 3 steps" in said
    assert "set bits.weight=8" in refused(*QUICK, "bits=step_list", f"bits.schedule={saved}", "bits.weight=4")


def test_widths_of_the_steps_on_the_command_line(results_of, refused):
    _, results = results_of("bits=[8]*2+[4]", "bits.weight=6")
    assert results["bit_schedule"]["activation"] == [8, 8, 4] and results["config"]["bits"]["weight"] == 6
    assert results["bit_schedule"]["shares"] == pytest.approx({"4": 1 / 3, "8": 2 / 3})
    _, uniform = results_of("bits=[8]*3")
    _, plain = results_of("bits=w8a8")
    assert uniform["metrics"]["psnr"] == plain["metrics"]["psnr"]
    assert "has 2 widths, but the sampler takes 3 steps" in refused(*QUICK, "bits=[8]*2")
    assert "give a list of one width per step" in refused(*QUICK, "bits=[8]*x")


def test_the_budget_is_kept_and_an_impossible_one_names_the_limits(command, refused):
    """Of the whole embedded network, whose limits are known."""
    folder = command(*QUICK, "evaluation.n_samples=2", "+experiment=ptqd_mp", *SCHEDULED, "bits.bops_ratio=17")
    results = read_json(folder / "results.json")
    assert results["quantization"]["bops_ratio"] >= 17
    said = refused(*QUICK, "+experiment=ptqd_mp", *SCHEDULED, "bits.bops_ratio=40")
    assert "bits.bops_ratio=40.0: at 4 bits in all steps the ratio is 31" in said and "choose 15.97" not in said


@pytest.mark.parametrize("name", OF_LDM4)
def test_the_experiments_of_ldm4_run_on_the_small_latent_model(name, results_of):
    extra = SCHEDULED if name.endswith("mp") else ()
    folder, results = results_of(f"+experiment={name}", "model=digits_ldm", "evaluation=digits", *extra)
    assert results["status"] == "finished"
    assert results["config"]["quantization"]["weight_granularity"] == "tensor"
    layers = json.loads((folder / "quantization.json").read_text())["layers"]
    shortcuts = [row for row in layers if "conv_shortcut" in row["name"]]
    assert all((row["weight_bits"] is None) == (not name.endswith("mp")) for row in shortcuts) and shortcuts


def test_a_correction_on_its_own_trajectory_says_what_it_keeps_and_is_evaluated_as_saved(results_of, command):
    folder, results = results_of("+experiment=ptqd_w3a8", "correction=trajectory")
    log = next(folder.glob("*.log")).read_text()
    assert "images of 2 other trajectories: nothing +0.00 dB, bias " in log and "; kept: " in log
    kept = log.split("; kept: ")[1].splitlines()[0]
    correction = results["correction"]
    assert any(correction["k"]) == (kept == "correlation and bias") and "variance" not in correction
    again = command(*QUICK, "+experiment=evaluate", f"quantized={folder}")
    assert np.array_equal(read_samples(folder / "samples.npz")[0], read_samples(again / "samples.npz")[0])


@pytest.mark.parametrize(("overrides", "said"), [
    (("correction=ptqd", "correction.fit=trajectory"), "correction.variance=true belongs to correction.fit=estimates"),
    (("correction=trajectory", "correction.convention=code"), "correction.convention=code belongs to"),
    (("correction=trajectory", "correction.follow=quantized"), "correction.follow=quantized belongs to"),
    (("correction=trajectory", "sampler=euler"), "correction.fit=trajectory follows the steps of sampler=ddim"),
])
def test_what_a_correction_on_its_own_trajectory_cannot_do_is_refused(overrides, said, command, small_networks, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*QUICK, "+experiment=ptqd_w3a8", "sampler.eta=0", *overrides)
    assert said in str(stop.value) + capsys.readouterr().err
