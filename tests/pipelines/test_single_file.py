"""Checkpoints of one file: with a folder of settings they are the pipeline that they were made of."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from single_files import original_state
from small_pipelines import SMALL

from ptq_exp.errors import CheckpointError, ConfigError
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.folder import pipeline_folder

pytest.importorskip("accelerate")


def settings_of(pipe, path):
    """A folder of the pipeline's settings, without weights."""
    pipe.save_pretrained(path)
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    return path


def opened(name, path, **options):
    small = SMALL[name]
    return pipeline_folder(str(path), prompts=small.requests, call=small.call, steps=2, **options)


def same_images(name, pipe, model):
    small = SMALL[name]
    own = PipelineModel(pipe, small.requests, steps=2, call=small.call)
    assert own.digest == model.digest
    return torch.equal(model.sample(model.denoiser, model.time_grid(), [0], 1),
                       own.sample(own.denoiser, own.time_grid(), [0], 1))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """Return a pipeline, its file, its settings."""
    path, pipe = tmp_path_factory.mktemp("sd15"), SMALL["sd15"].build()
    save_file(original_state(pipe), path / "model.safetensors")
    return pipe, path / "model.safetensors", settings_of(pipe, path / "settings")


def test_stable_diffusion_in_one_file(sd15):
    pipe, file, settings = sd15
    assert same_images("sd15", pipe, opened("sd15", file, config=str(settings)))


def test_stable_diffusion_xl_in_one_file(tmp_path):
    pipe = SMALL["sdxl"].build()
    save_file(original_state(pipe), tmp_path / "model.safetensors")
    assert same_images("sdxl", pipe, opened(
        "sdxl", tmp_path / "model.safetensors", config=str(settings_of(pipe, tmp_path / "settings"))))


def test_a_file_of_the_network_alone_is_completed_by_the_folder(tmp_path):
    pipe = SMALL["flux"].build()
    pipe.save_pretrained(tmp_path / "flux")
    changed = {name: value * 1.5 for name, value in pipe.transformer.state_dict().items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    pipe.transformer.load_state_dict(changed)
    shutil.rmtree(tmp_path / "flux" / "transformer")
    SMALL["flux"].build().transformer.save_config(tmp_path / "flux" / "transformer")
    model = opened("flux", tmp_path / "tuned.safetensors", config=str(tmp_path / "flux"))
    assert same_images("flux", pipe, model)


def test_a_file_without_settings_says_which(sd15, tmp_path):
    _, file, settings = sd15
    with pytest.raises(ConfigError) as caught:
        opened("sd15", file)
    assert "set model.config to a folder with the settings of stable-diffusion-v1-5/" in str(caught.value)
    with pytest.raises(ConfigError, match="model.config=.*there is no model_index.json in it"):
        opened("sd15", file, config=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gone", ["model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
                                  "first_stage_model.decoder.conv_in.bias",
                                  "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"])
def test_missing_weights_are_never_drawn(sd15, tmp_path, gone):
    pipe, _, settings = sd15
    state = original_state(pipe)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        opened("sd15", tmp_path / "model.safetensors", config=str(settings))
    assert str(caught.value).startswith(f"model.checkpoint={tmp_path / 'model.safetensors'}")
    assert "missing" in str(caught.value) or "meta" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_file_is_refused(sd15, tmp_path):
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a StableDiffusionPipeline as the settings in"):
        opened("sd15", tmp_path / "other.safetensors", config=str(sd15[2]))
