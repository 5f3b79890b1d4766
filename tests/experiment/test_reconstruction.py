"""Reconstruction in small, through the command: reused, never for another network, and on every kind of model."""

import pytest
import torch

from ptq_exp.diffusion.zoo.registry import load_model
from ptq_exp.experiment import reconstruct as reconstruction_stage
from ptq_exp.storage.plain_json import read_json

FAST = ("metric=minmax", "logger=none", "evaluation=paired", "bits=w4a8")
LAYERS, BLOCKS, ATTENTIONS, SMOOTHED, OF_THE_TIME = 51, 18, 4, 3, 10
"""Of the small network."""
pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.mark.parametrize("method", ["adaround", "qdrop", "gptq"])
def test_a_second_run_reuses_the_reconstruction_and_repeats_every_number(method, command):
    overrides = (*FAST, f"reconstruction={method}")
    folders = [command(*overrides) for _ in range(2)]
    first, second = (read_json(folder / "results.json") for folder in folders)
    said = [(folder / f"ndtc_{method}_w4a8.log").read_text() for folder in folders]
    assert f"reconstruction {method}: computed" in said[0] and f"reconstruction {method}: reused" in said[1]
    assert first["metrics"] == second["metrics"] and first["reconstruction"] == second["reconstruction"]
    took = first["calibration_seconds"]  # also where all of it is reused
    assert second["calibration_seconds"] == took and min(took.values()) > 0
    assert took["total"] == pytest.approx(took["calibration_set"] + took["ranges"] + took["reconstruction"], abs=0.02)
    blocks = read_json(folders[0] / "reconstruction.json")["blocks"]
    assert len(blocks) == first["reconstruction"]["blocks"] == {"adaround": LAYERS}.get(method, BLOCKS)
    details = [detail for block in blocks for detail in block.get("details", [])]
    assert len(details) == (LAYERS if method == "gptq" else 0)
    assert ("objective" in first["reconstruction"]) == (method == "gptq")
    assert {"before_fp", "after_fp", "before_quantized", "after_quantized", "kept"} <= set(blocks[0])


@pytest.mark.parametrize("method", ["brecq", "gptq"])
def test_a_network_of_float64_is_restored_to_its_last_digit(method, command):
    folders = [command(*FAST, f"reconstruction={method}", "model.dtype=float64") for _ in range(2)]
    assert f"reconstruction {method}: reused" in (folders[1] / f"ndtc_{method}_w4a8.log").read_text()
    # a weight that is not on the grid of its ranges is refused when the network is saved
    assert (folders[0] / "quantization.json").exists() and (folders[1] / "quantization.json").exists()


def test_reconstructions_share_ranges_and_nothing_else(command):
    plain = command(*FAST, "reconstruction=none")
    learned = command(*FAST, "reconstruction=brecq", "reconstruction.iterations=3", "reconstruction.lr=0.5")
    other = command(*FAST, "reconstruction=brecq", "reconstruction.iterations=3", "reconstruction.lr=0.4")
    texts = [(folder / f"{folder_name}.log").read_text() for folder, folder_name in (
        (plain, "ndtc_w4a8"), (learned, "ndtc_brecq_w4a8"), (other, "ndtc_brecq_w4a8"))]
    assert all("ranges: reused from the cache" in text for text in texts[1:])
    assert all("reconstruction brecq: computed" in text for text in texts[1:])
    errors = [read_json(folder / "results.json")["metrics"]["eps_error"] for folder in (plain, learned, other)]
    assert len(set(errors)) == 3


def test_with_a_correction_and_a_schedule_of_widths(command):
    folder = command("+experiment=ptqd_mp", *FAST[:-1], "bits=step_snr", "reconstruction=brecq")
    results = read_json(folder / "results.json")
    assert results["name"] == "ptqd_brecq_step_snr" and {"correction", "bit_schedule", "reconstruction"} <= set(results)
    assert results["reconstruction"]["blocks"] == BLOCKS


def test_a_latent_model_with_classes_and_guidance(command):
    folder = command(*FAST, "model=digits_ldm", "reconstruction=qdrop")
    blocks = read_json(folder / "reconstruction.json")["blocks"]
    assert any("transformer_blocks" in block["name"] and block["layers"] == 10 for block in blocks)


def test_with_ranges_per_step_each_sample_uses_its_own_and_time_layers_see_all_times(command):
    overrides = (*FAST[:-1], "+experiment=tfmq_w4a4", "quantization.smooth=true")
    learning = ("reconstruction=brecq", "reconstruction.step_lr=0.01")
    learned, again, nearest = (command(*overrides, *learning), command(*overrides, *learning), command(*overrides))
    results = [read_json(folder / "results.json") for folder in (learned, again, nearest)]
    assert "reconstruction brecq: reused" in next(again.glob("*.log")).read_text()
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["reconstruction"]["kept"] > 0
    scales = [{name: q["scale"] for name, q in read_json(folder / "quantization.json")["quantizers"].items()
               if "weight" not in name} for folder in (learned, again, nearest)]
    assert scales[0] == scales[1] != scales[2] and all(len(scale) == 3 for scale in scales[0].values())
    first, *others = read_json(learned / "reconstruction.json")["blocks"]
    assert first["name"] == "layers of the time" and first["layers"] == OF_THE_TIME
    # residual blocks without their projections, and no blocks for the two layers of the embedding
    assert len(others) == BLOCKS - 2 and sum(block["layers"] for block in others) == LAYERS - OF_THE_TIME
    assert f"{OF_THE_TIME} layers depend on the time alone and are reconstructed on all 3 times, together" in (
        next(learned.glob("*.log")).read_text()
    )


def test_bins_are_reconstructed_with_guidance(command):
    folder = command(
        *FAST, "model=digits_ldm", "calibration=uniform", "quantization.temporal=binned",
        "quantization.temporal_bins=2", "quantization.time_layers=all_steps", "reconstruction=qdrop",
        "evaluation.n_samples=4",
    )
    assert read_json(folder / "results.json")["reconstruction"]["kept"] > 0
    assert read_json(folder / "reconstruction.json")["blocks"][0]["layers"] == 10


def test_a_smoothed_network_is_reconstructed_from_its_smoothed_weights(command, monkeypatch):
    found = []

    def recorded(network, reference, *args, **kwargs):
        x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        inputs = (x, torch.tensor([10.0, 400.0, 900.0]))
        with torch.no_grad():
            torch.testing.assert_close(reference(*inputs), model.denoiser(*inputs), rtol=0, atol=1e-5)
        nearest = 0
        for name, weight in reference.named_parameters():
            quantizer = getattr(network.get_submodule(name.rpartition(".")[0]), "weight_quantizer", None)
            if name.endswith("weight") and quantizer is not None:
                scale = quantizer.cells(weight).scale
                assert ((network.get_parameter(name) - weight).abs() <= 0.5001 * scale).all(), name
                nearest += 1
            if name.endswith("to_q.weight"):
                found.append(not torch.equal(weight, model.denoiser.get_parameter(name)))
        assert nearest == LAYERS
        return original(network, reference, *args, **kwargs)

    model, original = load_model("digits"), reconstruction_stage.Reconstruction
    monkeypatch.setattr(reconstruction_stage, "Reconstruction", recorded)
    folder = command(*FAST, "quantization.smooth=true", "reconstruction=brecq", "seed=3")
    assert len(found) == ATTENTIONS and sum(found) == SMOOTHED
    results = read_json(folder / "results.json")
    assert results["reconstruction"]["kept"] > 0 and len(results["transforms"][0]["sites"]) == SMOOTHED
