"""LoRA adapters of peft, on quantized pipelines and on those that are quantized."""

import numpy as np
import pytest
import torch
from small_pipelines import SMALL

import ptq_exp
from ptq_exp.errors import ConfigError
from ptq_exp.pipelines.adapters import adapters_of

peft = pytest.importorskip("peft")
CALL = SMALL["sd15"].call
LAYERS = ["conv_in", "conv1", "to_q", "to_v", "to_out.0"]  # convolutions and linear layers, at the root and deep inside


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("low", num_inference_steps=2, generator=generator, output_type="np", **CALL).images


def quantized(pipe):
    return ptq_exp.quantize(pipe, "w8a8", prompts=["low"], n=1, steps=2, metric="minmax", progress=False, **CALL)


@pytest.fixture(scope="module")
def model():
    return quantized(SMALL["sd15"].build())


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A file of random adapters of rank 4."""
    path = tmp_path_factory.mktemp("lora")
    pipe = SMALL["sd15"].build()
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in pipe.unet.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    layers = peft.get_peft_model_state_dict(pipe.unet, adapter_name="default")
    type(pipe).save_lora_weights(path, unet_lora_layers=layers)
    return path


def test_an_adapter_of_zeros_changes_no_bit(model):
    before = images(model.pipeline)
    model.component.add_adapter(peft.LoraConfig(r=4, target_modules=LAYERS), "zeros")
    try:
        assert adapters_of(model.component) == ["zeros"]
        assert np.array_equal(images(model.pipeline), before)
    finally:
        model.pipeline.unload_lora_weights()
    assert adapters_of(model.component) == [] and np.array_equal(images(model.pipeline), before)


def test_an_adapter_changes_the_images_as_in_full_precision(model, lora, tmp_path):
    pipe = SMALL["sd15"].build()
    before, full = images(model.pipeline), images(pipe)
    model.save(tmp_path / "saved")
    loaded = ptq_exp.load_quantized(tmp_path / "saved").pipeline
    for one in (pipe, model.pipeline, loaded):
        one.load_lora_weights(lora)
    try:
        change, expected = images(model.pipeline) - before, images(pipe) - full
        assert abs(expected).max() > 0.05
        assert np.corrcoef(change.ravel(), expected.ravel())[0, 1] > 0.9
        assert np.array_equal(images(loaded), images(model.pipeline))
        with pytest.raises(ConfigError, match="has the LoRA adapters default_0: call unload_lora_weights"):
            model.save(tmp_path / "with")
    finally:
        model.pipeline.unload_lora_weights()
    assert np.array_equal(images(model.pipeline), before)


def test_adapters_are_fused_before_a_pipeline_is_quantized(lora):
    pipe = SMALL["sd15"].build()
    plain = images(pipe)
    pipe.load_lora_weights(lora)
    with pytest.raises(ConfigError, match=r"unet has the LoRA adapter default_0, .*pipe\.fuse_lora\(\)") as caught:
        quantized(pipe)
    assert "\n" not in str(caught.value)
    pipe.fuse_lora()
    fused, model = images(pipe), quantized(pipe)
    assert adapters_of(model.component) == [] and adapters_of(pipe.unet) == ["default_0"]
    found = images(model.pipeline)
    assert abs(found - fused).mean() < abs(fused - plain).mean() / 4
    assert np.array_equal(images(pipe), fused)
    pipe.unload_lora_weights()
    assert np.array_equal(images(quantized(pipe).pipeline), found)
