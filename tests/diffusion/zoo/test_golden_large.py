"""The large networks against the outputs of their original code; one at a time in memory, files deleted after use."""

import gc
import sys
import types

import pytest
import torch

from ptq_exp.diffusion.zoo.registry import load_model

pytestmark = pytest.mark.large
FLOAT32, FLOAT64 = 1e-4, 1e-9
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture(autouse=True)
def freed():
    yield
    gc.collect()


def denoiser_agrees(golden, shrink, model, network, name, small):
    """float32, float64, and back again with small weights: never two copies of a network."""
    assert golden.deviation(network, name) < FLOAT32
    model.denoiser.double()
    f64 = f"{name}_f64" if name.endswith("unet") else f"{name}.f64"
    assert golden.deviation(network, f64, torch.float64) < FLOAT64
    model.denoiser.float()
    shrink(model.denoiser, float(golden.file(small)["weight_scale"]))
    assert golden.deviation(network, small) < FLOAT32


def first_stage_agrees(golden, shrink, stage):
    assert golden.deviation(lambda z, _: stage.decode(z), "ldm4_imagenet256.decode16") < FLOAT32
    assert golden.deviation(lambda z, _: stage.decode(z), "ldm4_imagenet256.decode64") < FLOAT32
    assert golden.deviation(lambda x, _: stage.encode(x), "ldm4_imagenet256.encode64") < FLOAT32
    for name in ("ldm4_imagenet256.decode16", "ldm4_imagenet256.decode64"):
        file = golden.file(name)
        for i, codes in enumerate(file["codes"]):
            chosen = stage.autoencoder.quantize(golden.inputs(file, i)[0])[2][2]
            assert chosen.flatten().tolist() == codes.tolist()
    stage.double()
    assert golden.deviation(lambda z, _: stage.decode(z), "ldm4_imagenet256.decode16_f64", torch.float64) < FLOAT64
    stage.float()
    shrink(stage, float(golden.file("ldm4_imagenet256.decode16_small")["weight_scale"]))
    assert golden.deviation(lambda z, _: stage.decode(z), "ldm4_imagenet256.decode16_small") < FLOAT32


def lightning_file(saved, monkeypatch, state):
    """A file as Lightning 1.x wrote it: the state of a callback is stored under the class of the callback."""
    callback = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, CALLBACK, types.SimpleNamespace(ModelCheckpoint=callback))
        callbacks = {callback: {"best_model_score": torch.tensor(0.1), "best_model_path": "epoch=1.ckpt"}}
        return saved({"epoch": 1, "global_step": 2, "callbacks": callbacks, "state_dict": state})


def test_imagenet64(golden, shrink, saved, portable_sines):
    path = saved(golden.state("iddpm_imagenet64"))
    model = load_model("ddim_imagenet64", path)
    assert model.sample_shape == (3, 64, 64) and len(model.time_grid()) == 250
    assert sum(p.numel() for p in model.denoiser.parameters()) == 121_063_942
    unet = model.denoiser.unet
    denoiser_agrees(golden, shrink, model, lambda x, t: unet(x, t).sample, "iddpm_imagenet64",
                    "iddpm_imagenet64.small")


def test_ldm4_imagenet256(golden, shrink, saved, monkeypatch, portable_sines):
    path = lightning_file(saved, monkeypatch, golden.state("ldm4_imagenet256"))
    gc.collect()
    model = load_model("ldm4_imagenet256", path)
    assert (model.sample_shape, model.image_shape) == ((3, 64, 64), (3, 256, 256))
    assert (model.n_classes, model.null_label, model.sampler.guidance_scale) == (1000, 1000, 3.0)
    assert sum(p.numel() for p in model.denoiser.unet.parameters()) == 400_920_579
    x, t, _ = golden.inputs(golden.file("ldm4_imagenet256.unet"), 0)
    x, null = x[..., :16, :16], torch.full((1,), 1000)
    assert torch.equal(model.denoiser(x, t, None), model.denoiser(x, t, null))
    denoiser_agrees(golden, shrink, model, model.denoiser, "ldm4_imagenet256.unet", "ldm4_imagenet256.unet_small")
    first_stage_agrees(golden, shrink, model.first_stage)


def test_ldm4_lsun_bedrooms256(golden, shrink, saved, portable_sines):
    path = saved({"state_dict": golden.state("ldm4_lsun_bedrooms256")})
    gc.collect()
    model = load_model("ldm4_lsun_bedrooms256", path)
    assert (model.sample_shape, model.n_classes, model.sampler.eta) == ((3, 64, 64), None, 1.0)
    assert sum(p.numel() for p in model.denoiser.parameters()) == 274_056_163
    assert golden.deviation(model.denoiser, "ldm4_lsun_bedrooms256.unet_ema") < FLOAT32
    averaged = model.digest
    del model
    gc.collect()
    model = load_model("ldm4_lsun_bedrooms256", path, ema=False)
    assert model.digest != averaged
    denoiser_agrees(golden, shrink, model, model.denoiser, "ldm4_lsun_bedrooms256.unet",
                    "ldm4_lsun_bedrooms256.unet_small")
    decode = golden.deviation(lambda z, _: model.first_stage.decode(z), "ldm4_imagenet256.decode16")
    assert decode < FLOAT32
