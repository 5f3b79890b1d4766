"""Pipelines in folders: what is loaded is what was saved, and what cannot be trusted or followed is one clear line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_folders import edit
from small_pipelines import SMALL

import ptq_exp
from ptq_exp.diffusion.zoo.build import mapped_weights
from ptq_exp.errors import CheckpointError, ConfigError, DataError
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.folder import pipeline_folder

SAVED = ("sd15", "sdxl", "pixart", "sd3", "flux", "sana", "dit", "ldm", "ddpm", "controlnet")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd15")
    SMALL["sd15"].build().save_pretrained(path)
    return path


@pytest.fixture
def folder(sd15, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(sd15, tmp_path / "pipeline")


def refusal(checkpoint, kind=CheckpointError, **options) -> str:
    with pytest.raises(kind) as caught:
        pipeline_folder(str(checkpoint), **{"prompts": ["low"], "steps": 2, "call": SMALL["sd15"].call} | options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_pipeline_is_the_same_model(name, tmp_path):
    small = SMALL[name]
    pipe = small.build()
    pipe.save_pretrained(tmp_path)
    own = PipelineModel(pipe, small.requests, steps=2, call=small.call)
    read = ptq_exp.load_model("pipeline", str(tmp_path), prompts=small.requests, steps=2, call=small.call)
    assert read.digest == own.digest
    assert torch.equal(read.sample(read.denoiser, read.time_grid(), [0], 1),
                       own.sample(own.denoiser, own.time_grid(), [0], 1))
    assert not any(parameter.requires_grad for parameter in read.denoiser.parameters())


def test_a_type_of_numbers_is_that_of_all_networks(sd15):
    model = pipeline_folder(str(sd15), prompts=["low"], steps=2, call=SMALL["sd15"].call, dtype="bfloat16")
    networks = [model.denoiser, model.pipeline.vae, model.pipeline.text_encoder]
    assert {parameter.dtype for part in networks for parameter in part.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model.sample(model.denoiser, model.time_grid(), [0], 1)).all()
    assert "choose one of" in refusal(sd15, ConfigError, dtype="int8")


def test_variants_are_found(sd15, tmp_path):
    SMALL["sd15"].build().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    model = pipeline_folder(str(tmp_path), prompts=["low"], steps=2, call=SMALL["sd15"].call)
    assert {parameter.dtype for parameter in model.pipeline.text_encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("both", [False, True])
def test_text_encoders_in_several_files_are_found(sd15, folder, both):
    """Of a variant alone, and of the plain weights beside one, as published folders of SD3 have them."""
    encoder = SMALL["sd15"].build().text_encoder
    (folder / "text_encoder" / "model.safetensors").unlink()
    if both:
        encoder.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    encoder.half().save_pretrained(folder / "text_encoder", variant="fp16", max_shard_size="20KB")
    names = {path.name for path in (folder / "text_encoder").glob("*.safetensors")}
    assert any(name.startswith("model.fp16-00002-of-") for name in names)
    assert any(name.startswith("model-00002-of-") for name in names) == both
    call = SMALL["sd15"].call
    found = pipeline_folder(str(folder), prompts=["low"], steps=2, call=call).pipeline.text_encoder.state_dict()
    expected = SMALL["sd15"].build().text_encoder if both else encoder.float()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_settings_of_the_sampler_are_arguments_of_the_call(sd15):
    call = {"height": 16, "width": 16}
    model = pipeline_folder(str(sd15), prompts=["low"], steps=3, call=call, guidance_scale=2.0)
    assert (model.sampler.guidance_scale, model.sampler.steps, model.copies) == (2.0, 3, 2)
    assert len(model.time_grid()) == 3


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_quantized_components_are_refused(folder, component):
    edit(folder, f"{component}/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    text = refusal(folder)
    assert f"{component}/config.json" in text and "quantized already, by bitsandbytes" in text
    edit(folder, f"{component}/config.json", quantization_config={"quant_method": "ptq_exp"})
    assert "ptq_exp.load_quantized" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_in_place_of_weights_are_refused(folder, dtype):
    state = load_file(folder / UNET)
    save_file({**state, "conv_in.weight": state["conv_in.weight"].to(dtype)}, folder / UNET)
    assert "conv_in.weight is" in refusal(folder) and "quantized already" in refusal(folder)


def test_code_from_a_folder_is_refused(folder):
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit('ran')")
    edit(folder, "model_index.json", unet=["my_unet", "MyUNet"])
    assert "unet is a MyUNet of my_unet: code from elsewhere is never run" in refusal(folder)
    edit(folder, "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert "no pipeline of diffusers; code from a folder is never run" in refusal(folder)
    edit(folder, "model_index.json", _class_name="UNet2DModel")
    assert "no pipeline of diffusers" in refusal(folder)


@pytest.mark.parametrize(("component", "file"), [
    ("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model"), ("vae", "diffusion_pytorch_model")])
def test_pickled_weights_are_refused(folder, component, file):
    safe = next((folder / component).glob("*.safetensors"))
    torch.save(load_file(safe), folder / component / f"{file}.bin")
    safe.unlink()
    text = refusal(folder)
    assert f"{component}/{file}.bin is no safetensors file" in text and "safe_serialization=True" in text


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_missing_weights_are_never_drawn(folder, component):
    path = next((folder / component).glob("*.safetensors"))
    state = load_file(path)
    gone = sorted(state)[3]
    save_file({name: value for name, value in state.items() if name != gone}, path, metadata={"format": "pt"})
    assert "missing" in refusal(folder)
    path.unlink()
    assert component in refusal(folder)


def test_incomplete_folders(folder, tmp_path):
    for component in ("tokenizer", "vae", "scheduler"):
        shutil.move(folder / component, tmp_path / component)
        assert f"names a {component}, but there is no folder of that name" in refusal(folder)
        (folder / component).mkdir()
        assert component in refusal(folder)
        (folder / component).rmdir()
        shutil.move(tmp_path / component, folder / component)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json" in refusal(folder)
    assert "no such folder or file" in refusal(tmp_path / "nowhere")
    assert "no such folder or file" in refusal("owner/name")
    (tmp_path / "empty").mkdir()
    assert "not a diffusers folder" in refusal(tmp_path / "empty")


def test_a_network_alone_is_refused_by_name(folder):
    (folder / "model_index.json").unlink()
    assert "a network without model_index.json" in refusal(folder / "unet")


def test_the_folder_of_the_network_stands_for_the_pipeline_around_it(folder):
    model = pipeline_folder(str(folder / "unet"), prompts=["low"], steps=2, call=SMALL["sd15"].call)
    assert type(model.pipeline).__name__ == "StableDiffusionPipeline"


def test_weights_that_are_not_finite_are_refused(folder):
    state = load_file(folder / UNET)
    state["conv_out.bias"][0] = torch.nan
    save_file(state, folder / UNET)
    assert "NaN" in refusal(folder)


def test_prompts_and_arguments_go_through(sd15, tmp_path):
    assert "model.prompts=null" in refusal(sd15, ConfigError, prompts=None)
    assert "takes no hight; did you mean 'height'?" in refusal(sd15, ConfigError, call={"hight": 16})
    assert "cannot be read" in refusal(sd15, DataError, prompts=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="model.prompt: the model pipeline has no such option"):
        ptq_exp.load_model("pipeline", str(sd15), prompt="low")


def test_files_that_are_no_checkpoint(tmp_path):
    for name, content in (("model.gguf", b"GGUF\x03"), ("hidden.safetensors", b"GGUF\x03\x00\x00\x00")):
        (tmp_path / name).write_bytes(content)
        assert "GGUF" in refusal(tmp_path / name)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    assert "others can hold code" in refusal(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "no safetensors file" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae", "safety_checker"])
def test_components_that_would_be_converted_need_room(folder, component):
    """As the network does; those that are in the type that is wanted stay in their files and need none."""
    if component == "safety_checker":  # of another library than the two
        shutil.copytree(folder / "text_encoder", folder / component)
        edit(folder, "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name == component:
            state = load_file(path)
            save_file({name: value.half() for name, value in state.items()}, path, metadata={"format": "pt"})
    most = 4 * sum(value.numel() for value in state.values() if value.is_floating_point()) - 1
    with mapped_weights(most):
        text = refusal(folder, ConfigError)
    assert text.startswith(f"model.dtype=float32: the weights in {folder / component} are float16, and converted they")
    assert "more than trainer.max_memory_gb=" in text and text.endswith(": set model.dtype=float16")
    if component != "safety_checker":
        with mapped_weights(most + 1):
            pipeline_folder(str(folder), prompts=["low"], steps=2, call=SMALL["sd15"].call)


def test_a_single_file_needs_room_as_well(folder, tmp_path):
    file = shutil.copy(folder / UNET, tmp_path / "model.safetensors")
    with mapped_weights(1):
        text = refusal(file, ConfigError, dtype="bfloat16", config=str(folder))
    assert text.startswith(f"model.dtype=bfloat16: the weights in {file} are float32, and converted they would take")
