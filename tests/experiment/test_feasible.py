"""What a model cannot do, or its data do not allow, is said before anything is computed."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from ptq_exp.storage.plain_json import read_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines with random weights: an unconditional U-Net without attention, and a DiT."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=8,
        add_attention=False,
    )
    DDPMPipeline(unet, DDIMScheduler(100)).save_pretrained(root / "unet")
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=3,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=8, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
    )
    DiTPipeline(transformer, autoencoder, DDIMScheduler(100)).save_pretrained(root / "dit")
    np.savez(root / "images.npz", arr_0=np.zeros((2, 6, 6, 3), np.uint8))
    return root


@pytest.mark.parametrize(("kind", "overrides", "message"), [
    ("unet", ["calibration=raw"], "need real images: set model.images.path"),
    ("dit", ["+experiment=training_mimic_w8a8"], "need real images: set model.images.path"),
    ("unet", ["calibration=raw", "model.images.path={root}/images.npz", "model.images.size=6"],
     "the images are uint8 [6, 6, 3] (height, width, channels), but the model diffusers works on uint8 [8, 8, 3]"),
    ("dit", ["quantization.last=['*conv_out']"], "rule '*conv_out' matches no convolution"),
    ("dit", ["quantization.keep_fp=['*conv_shortcut']"], "rule '*conv_shortcut' (quantization.keep_fp) matches no"),
    ("unet", ["evaluation=digits"], "set model.images.path, or choose evaluation=paired"),
    ("unet", ["bits.groups.attention=w8a8"], "bits.groups.attention"),
    ("unet", ["quantization.temporal=per_step", "calibration=naive_last"], "have no calibration state"),
], ids=["no images", "none to diffuse", "other size", "layers", "keep_fp", "reference", "groups", "bins"])
def test_it_is_refused_in_a_line(kind, overrides, message, refused, folders, tmp_path):
    given = [text.format(root=folders) for text in overrides]
    line = refused(*given, "model=diffusers", f"model.checkpoint={folders / kind}", "logger=none")
    assert message in line
    (path,) = [*tmp_path.glob("*/results.json")] or [None]
    assert path is None or "seconds" not in read_json(path)


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("overrides", [
    ["+experiment=best_w4a4"], ["+experiment=tfmq_w4a8"], ["+experiment=tfmq_w4a8", "reconstruction=adaround"],
    ["+experiment=brecq_w4a8", "reconstruction=adaround"],
], ids=["best", "tfmq", "tfmq by layers", "layers"])
def test_a_dit_is_reconstructed(overrides, command, folders):
    folder = command(*overrides, "model=diffusers", f"model.checkpoint={folders / 'dit'}", "logger=none")
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage"]["everything"] == 1
    assert results["reconstruction"]["blocks"] >= 5 and "proof" in results["seconds"]
