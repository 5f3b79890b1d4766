"""Saved quantized pipelines: whole folders of diffusers that give the same images, bit for bit, wherever they are."""

import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from small_pipelines import SMALL

import ptq_exp
from ptq_exp.deploy.artifact import Artifact
from ptq_exp.deploy.component import load_pipeline
from ptq_exp.errors import ConfigError, DataError, PTQError
from ptq_exp.experiment.quantize import quantize_with
from ptq_exp.pipelines import PipelineModel
from ptq_exp.quantization.save import COMPONENT_TENSORS_FILE as PACKED

QUICK = (
    "model=pipeline", "logger=none", "metric=minmax", "calibration.n_samples=2", "calibration.batch_size=2",
    "calibration.steps_per_sample=2",
)
KINDS = {
    "static": ("sd15", "bits=w4a8"),
    "steps": ("sd15", "bits=w8a8", "quantization.temporal=per_step", "correction=mean"),
    "schedule": ("ddpm", "bits=step_list", "bits.schedule=[8,4]", "bits.candidates=[4,8]"),
    "pictures": ("img2img", "bits=w8a8", "calibration.steps_per_sample=1"),
    "tokens": ("flux", "bits=w4a8", "quantization.transforms=[smooth]"),
}


class Saved(NamedTuple):
    pipe: DiffusionPipeline
    quantized: ptq_exp.deploy.quantized_model.QuantizedModel
    folder: str

    def images(self, pipe, seed=7):
        """Draw two images by another pipeline of this kind."""
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            return np.asarray(pipe(**self.quantized.model.arguments([0, 1], seed)).images)


def quantized(name, *overrides, steps=2, **parts):
    small = SMALL[name]
    pipe = small.build(**parts)
    model = PipelineModel(pipe, small.requests, steps=steps, call=small.call)
    return pipe, quantize_with(model, [*QUICK, *overrides], progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function of a kind that quantizes and saves it, once."""
    made = {}

    def of(kind="static"):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "pipeline"
            pipe, model = quantized(*KINDS[kind])
            model.save(folder)
            made[kind] = Saved(pipe, model, folder)
        return made[kind]

    return of


@pytest.fixture
def copied(saved, tmp_path):
    """The folder of the static kind, which a test may change."""
    return shutil.copytree(saved().folder, tmp_path / "copied")


def test_a_pipeline_that_was_replaced_since_it_was_opened_is_noticed(copied, tmp_path):
    opened = Artifact.open(copied)
    quantized("sd15", "bits=w8a8")[1].save(tmp_path / "another")
    shutil.rmtree(copied)
    (tmp_path / "another").rename(copied)
    with pytest.raises(DataError, match="unet changed while it was read: load it again"):
        load_pipeline(opened, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_pipelines_draw_the_same_images(saved, kind):
    one = saved(kind)
    expected = one.images(one.quantized.pipeline)
    assert not np.array_equal(expected, one.images(one.pipe))
    loaded = ptq_exp.load_quantized(one.folder)
    for pipe in (DiffusionPipeline.from_pretrained(one.folder), loaded.pipeline):
        assert type(pipe) is type(one.pipe)
        assert np.array_equal(one.images(pipe), expected)
    assert np.array_equal(loaded.sample(3, seed=1), one.quantized.sample(3, seed=1))
    assert loaded.report.to_dict() == one.quantized.report.to_dict()
    assert loaded.model.requests == one.quantized.model.requests or kind == "pictures"


def test_the_folder_is_one_of_diffusers_without_the_weights_in_full_precision(saved, tmp_path):
    one = saved()
    one.pipe.save_pretrained(tmp_path)
    names = {path.relative_to(one.folder).as_posix() for path in one.folder.rglob("*.*")}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} < names
    described = json.loads((one.folder / "unet" / "quantization.json").read_text())
    config = json.loads((one.folder / "unet" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "ptq_exp", "bits": "w4a8", "dtype": "float32", "format_version": 2}
    whole, packed = (folder / "unet" / PACKED for folder in (tmp_path, one.folder))
    size = described["file"]
    assert packed.stat().st_size == size["bytes"] < whole.stat().st_size / 2
    assert size["bytes"] - size["header_bytes"] == pytest.approx(size["theoretical_bytes"], rel=0.05)
    floats = sum(value.numel() for value in load_file(packed).values() if value.is_floating_point())
    assert floats < sum(value.numel() for value in load_file(whole).values()) / 10


def test_a_fresh_process_that_imports_diffusers_afterwards_loads_it(saved, tmp_path):
    one = saved("steps")
    np.save(tmp_path / "expected.npy", one.images(one.quantized.pipeline))
    code = f"""
import ptq_exp, sys
assert not {{"torch", "diffusers"}} & set(sys.modules)
import diffusers
import numpy as np
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
from ptq_exp.diffusion.noise import EVALUATION, sample_generator
images = pipe({list(r["prompt"] for r in one.quantized.model.requests[:2])!r}, height=16, width=16, guidance_scale=3.0,
              negative_prompt=["wider"] * 2, num_inference_steps=2, output_type="np",
              generator=[sample_generator(7, i, EVALUATION) for i in range(2)]).images
assert np.array_equal(images, np.load(sys.argv[2]))
assert not {{"hydra", "pytorch_lightning", "wandb"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(one.folder), str(tmp_path / "expected.npy")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


def content(path):
    """What is in a file; of tensors whatever order safetensors has given to its own notes."""
    if path.suffix == ".safetensors":
        return {name: value.tolist() for name, value in load_file(path).items()}
    if path.name == "quantization.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "file"}
    return path.read_bytes()


def test_a_loaded_pipeline_is_saved_again_as_it_was(saved, tmp_path):
    one = saved("steps")
    DiffusionPipeline.from_pretrained(one.folder).save_pretrained(tmp_path / "one")
    ptq_exp.load_quantized(one.folder).save(tmp_path / "two")
    one.quantized.pipeline.save_pretrained(tmp_path / "three")
    for path in sorted((one.folder / "unet").iterdir()):
        for other in ("one", "two", "three"):
            assert content(tmp_path / other / "unet" / path.name) == content(path), (other, path.name)


def test_other_sizes_and_guidance_are_drawn_and_leave_the_saved_calls_alone(saved, tmp_path):
    one = saved()
    pipe = DiffusionPipeline.from_pretrained(one.folder)
    call = {"num_inference_steps": 3, "height": 32, "width": 24, "guidance_scale": 1.0, "output_type": "np"}
    images = [p("low", generator=torch.Generator().manual_seed(0), **call).images
              for p in (pipe, one.quantized.pipeline)]
    assert images[0].shape == (1, 32, 24, 3) and np.array_equal(*images)
    pipe.save_pretrained(tmp_path)
    assert content(tmp_path / "unet" / "quantization.json") == content(one.folder / "unet" / "quantization.json")


def test_steps_that_have_no_ranges_are_one_clear_line(saved):
    pipe = DiffusionPipeline.from_pretrained(saved("steps").folder)
    with pytest.raises(ConfigError, match="is not on the grid of 2 steps"):
        pipe("low", height=16, width=16, num_inference_steps=3)


def test_numbers_of_16_bits_are_loaded_as_such(tmp_path):
    small = SMALL["sd15"]
    pipe = small.build().to(torch.bfloat16)
    model = ptq_exp.quantize(pipe, "w8a8", prompts=["low"], n=1, steps=1, metric="minmax", progress=False, **small.call)
    model.save(tmp_path)
    loaded = ptq_exp.load_quantized(tmp_path)
    assert {p.dtype for p in loaded.component.parameters()} == {loaded.pipeline.vae.dtype} == {torch.bfloat16}
    assert np.array_equal(loaded.sample(2, seed=3), model.sample(2, seed=3))
    there = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    call = small.call | {"num_inference_steps": 1, "output_type": "np"}
    images = [p("low", generator=torch.Generator().manual_seed(0), **call).images for p in (there, model.pipeline)]
    assert np.array_equal(*images)
    with pytest.raises(ConfigError, match="quantized in torch.bfloat16; give torch_dtype=torch.bfloat16"):
        DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)


def edited(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _other_weights(folder):
    tensors = load_file(folder / PACKED)
    name = next(name for name, value in tensors.items() if value.dtype == torch.uint8)
    save_file(tensors | {name: tensors[name] ^ 1}, folder / PACKED)


DAMAGES = {
    "no description": (lambda f: (f / "quantization.json").unlink(), "quantization.json is missing"),
    "edited weights": (_other_weights, "not the file that quantization.json describes"),
    "edited description": (
        lambda f: edited(f / "quantization.json", lambda d: d | {"evaluations": 1}), "was edited, or belongs to"),
    "newer format": (
        lambda f: edited(f / "quantization.json", lambda d: d | {"version": 4}),
        "version 4 of the format, this code reads 1, 2, 3"),
    "no arguments": (lambda f: (f / "arguments.safetensors").unlink(), "arguments.safetensors is missing"),
    "other arguments": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "arguments.safetensors"), "is not the file that"),
    "other sizes": (
        lambda f: edited(f / "config.json", lambda c: c | {"cross_attention_dim": 16}), "of other sizes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_one_clear_line(copied, damage):
    change, expected = DAMAGES[damage]
    change(copied / "unet")
    for load in (DiffusionPipeline.from_pretrained, ptq_exp.load_quantized):
        with pytest.raises(PTQError) as caught:
            load(copied)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_packed_file_is_named(copied):
    (copied / "unet" / PACKED).unlink()
    with pytest.raises(DataError, match=f"{PACKED} is missing"):
        ptq_exp.load_quantized(copied)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        DiffusionPipeline.from_pretrained(copied)


def test_another_class_of_component_is_refused(saved):
    with pytest.raises(DataError, match="holds a quantized UNet2DModel, this is a UNet2DConditionModel"):
        UNet2DConditionModel.from_pretrained(saved("schedule").folder, subfolder="unet")


def test_a_folder_with_another_model_is_not_overwritten(saved, tmp_path):
    one = saved()
    one.pipe.save_pretrained(tmp_path)
    before = (tmp_path / "unet" / PACKED).read_bytes()
    with pytest.raises(ConfigError, match="holds the weights of another model: choose another folder"):
        one.quantized.save(tmp_path)
    assert (tmp_path / "unet" / PACKED).read_bytes() == before


def test_devices_are_one(saved):
    with pytest.raises(ConfigError, match="a quantized network is on one device"):
        type(saved().pipe.unet).from_pretrained(saved().folder, subfolder="unet", device_map="auto")


def test_a_component_alone_is_loaded_from_its_folder(saved):
    one = saved()
    unet = type(one.pipe.unet).from_pretrained(one.folder, subfolder="unet")
    call = [torch.randn(2, 4, 8, 8), torch.tensor(1), torch.randn(2, 77, 32)]
    with torch.no_grad():
        assert torch.equal(unet(*call).sample, one.quantized.component(*call).sample)


def test_arguments_that_cannot_be_saved_are_named(saved, tmp_path):
    one = saved()
    one.quantized.model.call["callback_on_step_end"] = print
    try:
        with pytest.raises(ConfigError, match="pipeline.call.callback_on_step_end is a builtin_function_or_method"):
            one.quantized.save(tmp_path)
    finally:
        del one.quantized.model.call["callback_on_step_end"]


def test_the_model_in_full_precision_is_told_from_others(saved):
    one = saved()
    small = SMALL["sd15"]
    model = PipelineModel(one.pipe, small.requests, steps=2, call=small.call)
    loaded = ptq_exp.load_quantized(one.folder, model=model)
    assert loaded.full_precision and np.array_equal(loaded.sample(2, seed=1), one.quantized.sample(2, seed=1))
    other = PipelineModel(SMALL["sd15 pndm"].build(), small.requests, steps=2, call=SMALL["sd15 pndm"].call)
    with pytest.raises(PTQError, match="was quantized from weights of"):
        ptq_exp.load_quantized(one.folder, model=other)


def test_a_network_alone_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    model = ptq_exp.quantize(network, "w8a8", calls=[(torch.randn(8, 8),)], metric="minmax", progress=False)
    model.save(tmp_path)
    blank = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    before = [value.clone() for value in blank.parameters()]
    loaded = ptq_exp.load_quantized(tmp_path, network=blank)
    x = torch.randn(5, 8)
    assert torch.equal(loaded.component(x), model.component(x))
    assert all(torch.equal(*pair) for pair in zip(before, blank.parameters(), strict=True))
    with pytest.raises(ConfigError, match="is a network alone: give network=, a Sequential"):
        ptq_exp.load_quantized(tmp_path)
    with pytest.raises(DataError, match="of another network or other rules"):
        ptq_exp.load_quantized(tmp_path, network=torch.nn.Sequential(torch.nn.Linear(8, 4)))
    with pytest.raises(DataError, match="holds a quantized Sequential, this is a Linear"):
        ptq_exp.load_quantized(tmp_path, network=torch.nn.Linear(8, 4))
