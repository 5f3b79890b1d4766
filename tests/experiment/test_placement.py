"""Switches of the quantization policy through the command, in small."""

import json

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from guide_runs import SMALL, planned
from guide_text import conf

from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.storage.plain_json import read_json

QUICK = ("metric=minmax", "logger=none", "calibration=uniform", "evaluation=paired", "evaluation.n_samples=2")


def quantizers_of(folder) -> dict[str, dict]:
    return json.loads((folder / "quantization.json").read_text())["quantizers"]


@pytest.mark.usefixtures("small_networks")
def test_time_layers_see_every_time_once_and_each_step_has_its_row(command):
    folder = command(
        *QUICK, "+experiment=tfmq_w4a4", "quantization.shortcut=split_all", "quantization.time_embedding=split",
        "quantization.smooth=true",
    )
    assert read_json(folder / "results.json")["status"] == "finished"
    found = quantizers_of(folder)
    assert all(len(q["scale"]) == 3 for name, q in found.items() if "weight_quantizer" not in name)
    # the first layer of the embedding reads sines and cosines of one time per step: their range is known exactly
    model = load_model("digits")
    times = model.time_grid(3).timesteps.float()
    projection = model.denoiser.unet.time_proj
    read = get_timestep_embedding(
        times, projection.num_channels, projection.flip_sin_to_cos, projection.downscale_freq_shift
    )
    low, high = read.amin(1).clamp(max=0), read.amax(1).clamp(min=0)
    (first,) = [q for name, q in found.items() if name.endswith("time_embedding.linear_1.input_quantizer")]
    torch.testing.assert_close(torch.tensor(first["scale"])[:, 0], (high - low) / 15)
    segments = {name: q["segments"] for name, q in found.items() if q["segments"]}
    assert segments["unet.up_blocks.0.resnets.1.conv_shortcut.input_quantizer"] == [32, 16]
    assert segments["unet.up_blocks.0.resnets.1.conv1.weight_quantizer"] == [32, 16]
    assert segments["unet.mid_block.resnets.0.time_emb_proj.output_quantizer"] == [32, 32]
    assert len(segments) == 2 * 8 + 8
    said = next(folder.glob("*.log")).read_text()
    assert ": 18 quantizers depend on the time alone and see all 3 times" in said  # of 10 layers, 8 with an output's
    assert ": 8 layers read concatenations" in said and ": 3 places qualify: unet." in said
    files = ("results.json", "quantization.json")
    ((smooth,), again) = (json.loads((folder / name).read_text())["transforms"] for name in files)
    assert [smooth] == again and len(smooth["sites"]) == 3
    assert (smooth["name"], smooth["alpha"], smooth["macs"], smooth["bytes"]) == ("smooth", 0.5, 0, 0)
    attention = "unet.up_blocks.0.attentions.0"
    assert smooth["sites"][f"{attention}.group_norm"] == [f"{attention}.to_{name}" for name in "qkv"]


@pytest.mark.usefixtures("small_networks")
def test_a_static_range_of_time_layers_covers_all_times_exactly(command):
    # two states have two times at most; there are three
    found = quantizers_of(command(*QUICK, "quantization.time_layers=all_steps", "calibration.n_samples=2"))
    model = load_model("digits")
    projection = model.denoiser.unet.time_proj
    read = get_timestep_embedding(
        model.time_grid(3).timesteps.float(), projection.num_channels, projection.flip_sin_to_cos,
        projection.downscale_freq_shift,
    )
    (first,) = [q for name, q in found.items() if name.endswith("time_embedding.linear_1.input_quantizer")]
    assert first["scale"][0][0] == pytest.approx(float(read.max() - read.min()) / 255)


@pytest.mark.usefixtures("small_networks")
def test_a_second_round_calibrates_on_the_quantized_model_and_shares_the_first(command):
    plain = command(*QUICK, "bits=w4a4", "seed=5")
    twice = command(*QUICK, "bits=w4a4", "seed=5", "calibration.rounds=2")
    again = command(*QUICK, "bits=w4a4", "seed=5", "calibration.rounds=2")
    said = next(twice.glob("*.log")).read_text()
    assert "calibration set uniform: reused from the cache" in said
    assert "calibration set uniform of the quantized model, round 2: computed" in said
    one, two, three = (read_json(folder / "results.json") for folder in (plain, twice, again))
    assert two["evaluations"] == 2 * one["evaluations"] and two["metrics"] == three["metrics"]
    ranges = [quantizers_of(folder) for folder in (plain, twice)]
    # the first step starts from the same noise, later states differ
    assert ranges[0] != ranges[1] and set(ranges[0]) == set(ranges[1])
    assert "round 2: reused" in next(again.glob("*.log")).read_text()


def test_a_step_without_states_is_one_line_that_says_what_to_do(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("metric=minmax", "logger=none", "quantization.temporal=per_step", "calibration.n_samples=2")
    said = f"{stop.value}\n{capsys.readouterr().err}"
    assert "bins of sampling steps have no calibration state" in said and "choose calibration=uniform" in said


@pytest.mark.usefixtures("small_networks")
def test_binned_ranges_work_with_guidance_on_the_latent_model(command):
    folder = command(
        *QUICK, "model=digits_ldm", "quantization.temporal=binned", "quantization.temporal_bins=2",
        "quantization.weight_granularity=group", "quantization.time_embedding=split",
    )
    found = quantizers_of(folder)
    assert all(len(q["scale"]) == 2 for name, q in found.items() if "weight_quantizer" not in name)
    assert "changes nothing here" in next(folder.glob("*.log")).read_text()  # its embeddings are not cut


@pytest.mark.usefixtures("small_networks")
def test_the_operation_study_runs_at_both_sites(command):
    study = ("quantization.quantize_state=true", "quantization.quantize_output=true")
    for site in ("input", "output"):
        folder = command(*QUICK, *study, f"quantization.activation_site={site}", "quantization.temporal=per_step")
        found = quantizers_of(folder)
        assert found["unet.conv_in.input_quantizer"]["bits"] == found["unet.conv_out.output_quantizer"]["bits"] == 8
        coverage = read_json(folder / "results.json")["quantization"]["coverage_conv_linear"]
        assert (coverage == 1) == (site == "input")


@pytest.mark.parametrize("model, attention_weights", [("digits", None), ("digits_ldm", 8)])
def test_the_set_of_tfmqs_code_on_both_families_of_networks(model, attention_weights):
    report = planned(conf(*SMALL, *QUICK, f"model={model}", "+experiment=tfmq_release", "reconstruction=none"))
    kept = ("conv_in", "conv_out", "time_embedding.linear_1", "conv_shortcut", "downsamplers.0.conv", ".qk", ".av")
    widths = {row.name: (row.weight_bits, row.activation_bits) for row in report.rows}
    assert all(pair == (None, None) for name, pair in widths.items() if name.endswith(kept))
    # projections are 1-d convolutions in its AttentionBlocks, and linear layers in its transformer blocks
    assert {pair[0] for name, pair in widths.items() if ".to_" in name} == {attention_weights}
    others = [row.name for row in report.rows if row.type in ("Conv2d", "Linear") and "attentions" not in row.name]
    rest = [widths[name] for name in others if not name.endswith(kept)]
    assert len(rest) > 20 and set(rest) == {(8, 8)}
    if model == "digits":
        # 82.3 % in the code, which also skips two inputs (2.0 %)
        assert report.totals["coverage"]["everything"] == pytest.approx(0.8427, abs=1e-4)


def test_any_method_takes_the_set():
    report = planned(conf(*SMALL, *QUICK, "+experiment=best_w8a8", "quantization.keep_fp=[tfmq]"))
    assert report.totals["coverage"]["everything"] == pytest.approx(0.8427, abs=1e-4)
