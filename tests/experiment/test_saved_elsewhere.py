"""A model quantized from a folder is complete where its images need no first stage, wherever both folders have gone."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_folders import ddim, dit_folder, latent_folder, pixel_folder, unet

import ptq_exp
from ptq_exp.errors import CheckpointError, ConfigError, DataError
from ptq_exp.quantization.save import _description_hash
from ptq_exp.results.record import read_samples

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.usefixtures("blank_pictures")
QUICK = ("metric=minmax", "logger=none", "bits=w4a8", "model=diffusers", "sampler.guidance_scale=1",
         "evaluation=paired")
MAKERS = {"pixel": pixel_folder, "latent": latent_folder, "dit": dit_folder}


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def made_of(command, made, tmp_path_factory):
    """(run folder, original folder) of a model of a kind; both are only read, and renamed since the run."""

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("made")
            MAKERS[kind](folder / "original")
            run = command(*QUICK, f"model.checkpoint={folder / 'original'}", "evaluation.n_samples=5")
            shutil.move(run, folder / "run")
            (folder / "original").rename(folder / "renamed")
            made[kind] = folder / "run", folder / "renamed"
        return made[kind]

    return make


def images(folder):
    return read_samples(folder / "samples.npz")[0]


def forged(folder, edit, edit_tensors=lambda tensors: None):
    """Edit the description and the tensors, then make its hash agree again, as whoever edits it on purpose would."""
    from safetensors.torch import load_file, save_file

    from ptq_exp.storage.atomic import file_digest

    path, file = folder / "quantization.json", folder / "quantized.safetensors"
    description = json.loads(path.read_text())
    edit(description)
    tensors = load_file(file)
    edit_tensors(tensors)
    metadata = {"format": description["format"], "version": str(description["version"])}
    metadata["description_sha256"] = _description_hash(description)
    save_file(tensors, file, metadata)
    description["file"]["sha256"] = file_digest(file)
    path.write_text(json.dumps(description))


def test_a_pixel_model_is_complete_without_its_folder(made_of, tmp_path, monkeypatch):
    run, original = made_of("pixel")
    shutil.copytree(run / "quantized", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    before = torch.random.get_rng_state()
    alone, whole = (ptq_exp.load_quantized("elsewhere", checkpoint=c) for c in (None, str(original)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not alone.full_precision and whole.full_precision
    assert alone.model.denoiser is alone.network and alone.model.digest != whole.model.digest
    assert alone.network.state_dict().keys() == whole.network.state_dict().keys()
    for model in (alone, whole):
        assert np.array_equal(ptq_exp.sample(model, 5, batch_size=5), images(run))
    one, other = alone.model, whole.model
    same = ("name", "sample_shape", "image_shape", "clip_sample", "n_classes", "null_label", "first_layers", "blocks",
            "sampler", "last_layers")
    assert [getattr(one, key) for key in same] == [getattr(other, key) for key in same]
    assert torch.equal(one.schedule.alphas_cumprod, other.schedule.alphas_cumprod)


@pytest.mark.parametrize("settings", [
    {"out_channels": 6}, {"sample_size": (8, 4)}, {"block_out_channels": (4, 12), "center_input_sample": True},
    {"attention_head_dim": None, "add_attention": False, "resnet_time_scale_shift": "scale_shift"},
])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_structure_says_all_of_a_network(settings, dtype, tmp_path):
    """From the settings files alone comes a network with the same tensors, which computes the same from them."""
    from ptq_exp.diffusion.zoo.structure import folder_of_structure

    scheduler = ddim(beta_schedule="squaredcos_cap_v2", steps_offset=1)
    # other weights than the random ones of a network without a checkpoint
    path = pixel_folder(tmp_path, scheduler, network=unet(seed=17, **settings))
    model = ptq_exp.load_model("diffusers", path, dtype=dtype)
    structure = json.loads(json.dumps(model.structure))  # as it is saved
    with folder_of_structure(structure, "here") as folder:
        built = ptq_exp.load_model("diffusers", folder, dtype=dtype)
    assert not all(map(torch.equal, model.denoiser.parameters(), built.denoiser.parameters()))
    built.denoiser.load_state_dict(model.denoiser.state_dict(), strict=True)
    x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([7.0, 900.0])
    with torch.no_grad():
        assert torch.equal(model.denoiser(x, t), built.denoiser(x, t))
    assert built.schedule.steps_offset == 1 and built.structure == structure
    assert torch.equal(model.schedule.alphas_cumprod, built.schedule.alphas_cumprod)


@pytest.mark.parametrize("kind", ["latent", "dit"])
def test_a_first_stage_must_be_given(kind, made_of):
    run, original = made_of(kind)
    line = r"quantized: the first stage of diffusers .* give checkpoint=, .*original"
    with pytest.raises(CheckpointError, match=line):
        ptq_exp.load_quantized(run)
    model = ptq_exp.load_quantized(run, checkpoint=str(original))
    assert model.full_precision and np.array_equal(ptq_exp.sample(model, 5, batch_size=5), images(run))


def test_a_repository_in_the_local_cache_is_used(made_of, tmp_path, monkeypatch):
    from huggingface_hub import constants

    run, original = made_of("latent")
    snapshot = tmp_path / "hub" / "models--some--body" / "snapshots" / "0123"
    shutil.copytree(original, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    shutil.copytree(run / "quantized", tmp_path / "copy")
    forged(tmp_path / "copy", lambda d: d["settings"]["model"].update(checkpoint="some/body"))
    with pytest.raises(CheckpointError, match="give checkpoint=.*some/body"):
        ptq_exp.load_quantized(tmp_path / "copy")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert ptq_exp.load_quantized(tmp_path / "copy").full_precision


def test_another_folder_under_the_recorded_name(made_of, tmp_path, caplog):
    """It is not taken: a complete model says so, and one that needs its folder asks for it."""
    for kind in ("pixel", "latent"):
        run, _ = made_of(kind)
        shutil.copytree(run / "quantized", tmp_path / kind)
        other = str(pixel_folder(tmp_path / "other", ddim(), layers_per_block=2))
        forged(tmp_path / kind, lambda d, other=other: d["settings"]["model"].update(checkpoint=other))
    logging.root.addHandler(caplog.handler)  # a run in this process has put others in its place
    assert not ptq_exp.load_quantized(tmp_path / "pixel").full_precision
    assert "loaded without its full-precision network" in caplog.text and "this model diffusers has" in caplog.text
    with pytest.raises(CheckpointError, match="give checkpoint=.*this model diffusers has"):
        ptq_exp.load_quantized(tmp_path / "latent")
    with pytest.raises(CheckpointError, match=r"set checkpoint to the checkpoint"):
        ptq_exp.load_quantized(tmp_path / "pixel", checkpoint=other)
    with pytest.raises(CheckpointError, match="^checkpoint=nowhere: no such folder"):
        ptq_exp.load_quantized(tmp_path / "pixel", checkpoint="nowhere")


def test_read_only_folders_and_links(made_of, tmp_path):
    run, _ = made_of("pixel")
    shutil.copytree(run / "quantized", tmp_path / "copy")
    for path in (*(tmp_path / "copy").iterdir(), tmp_path / "copy"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert ptq_exp.sample(ptq_exp.load_quantized(tmp_path / "link"), 2).shape == (2, 8, 8, 3)


def test_evaluate_needs_full_precision(made_of, command, refused):
    run, original = made_of("pixel")
    evaluate = ("logger=none", "+experiment=evaluate", f"quantized={run}", "evaluation=paired",
                "evaluation.n_samples=5")
    said = refused(*evaluate)
    assert f"quantized={run} is compared with images of full precision" in said and "set model.checkpoint to" in said
    again = command(*evaluate, f"model.checkpoint={original}")
    assert np.array_equal(images(again), images(run))


def test_evaluate_reads_the_saved_model_before_it_draws(made_of, refused, tmp_path, monkeypatch):
    from ptq_exp.experiment import experiment

    run, original = made_of("pixel")
    shutil.copytree(run / "quantized", tmp_path / "copy")
    forged(tmp_path / "copy", lambda d: None, lambda t: t["unet.conv_in.input_quantizer.scale"].fill_(float("nan")))
    monkeypatch.setattr(experiment, "full_precision_images", lambda *given: pytest.fail("images were drawn"))
    line = refused("logger=none", "+experiment=evaluate", f"quantized={tmp_path}/copy", "evaluation=paired",
                   f"model.checkpoint={original}")
    assert f"quantized={tmp_path}/copy: {tmp_path}/copy/quantized.safetensors: " in line
    assert "_quantizer: scale holds NaN or infinity in 1 of" in line


@pytest.mark.parametrize("edit", [
    lambda s: s["unet/config.json"].update(block_out_channels=[4, 8, 16]), lambda s: s.pop("unet/config.json"),
    lambda s: s["model_index.json"].update(_class_name="os.system"), lambda s: s.update({"../evil/config.json": {}}),
    lambda s: s.update({"/tmp/config.json": {}}), lambda s: s.update({"": {}}), lambda s: s.update({"unet/x.py": {}}),
    lambda s: s["unet/config.json"].update(down_block_types=["os.system"] * 2),
    lambda s: s["scheduler/scheduler_config.json"].update(beta_schedule="odd"), lambda s: s.clear(),
    lambda s: s.update({"unet/config.json": "text"}), lambda s: s["unet/config.json"].update(norm_num_groups=0),
])
def test_a_structure_that_is_none_is_one_line(edit, made_of, tmp_path):
    shutil.copytree(made_of("pixel")[0] / "quantized", tmp_path / "copy")
    path = tmp_path / "copy" / "quantization.json"
    description = json.loads(path.read_text())
    edit(description["model"]["structure"])
    path.write_text(json.dumps(description))
    with pytest.raises(DataError, match="was edited, or belongs to another"):
        ptq_exp.load_quantized(tmp_path / "copy")
    forged(tmp_path / "copy", lambda d: None)
    with pytest.raises(DataError) as refusal:
        ptq_exp.load_quantized(tmp_path / "copy")
    message = str(refusal.value)
    assert "\n" not in message and "quantization.json: model.structure: " in message and "/tmp/tmp" not in message


def test_models_of_an_earlier_version_are_loaded_as_before(tmp_path, monkeypatch):
    """Saved before structures were: such a model needs its folder, and gives what it gave then."""
    zipfile.ZipFile(GOLDEN / "saved_model_1.zip").extractall(tmp_path)
    description = json.loads((tmp_path / "quantized" / "quantization.json").read_text())
    assert description["version"] == 1 and "structure" not in description["model"]
    expected = np.load(tmp_path / "expected.npz")
    with pytest.raises(CheckpointError, match="the structure of diffusers is not in .* give checkpoint="):
        ptq_exp.load_quantized(tmp_path / "quantized")
    given = ptq_exp.load_quantized(tmp_path / "quantized", checkpoint=str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    recorded = ptq_exp.load_quantized("quantized")
    for model in (given, recorded):
        assert model.full_precision
        with torch.no_grad():
            eps = model.network(torch.from_numpy(expected["x"]), torch.from_numpy(expected["t"]))
        np.testing.assert_allclose(eps.numpy(), expected["eps"], atol=1e-2)  # other processors round otherwise
        assert np.abs(ptq_exp.sample(model, 2).astype(int) - expected["images"]).mean() < 2


@pytest.mark.parametrize("name", ["corrected", "scheduled"])
def test_what_follows_the_steps_is_loaded_from_an_earlier_version(name, tmp_path):
    """`corrected`: split shortcuts, groups, ranges per step, mean correction; `scheduled`: activation bits per step."""
    zipfile.ZipFile(GOLDEN / "saved_model_1_steps.zip").extractall(tmp_path)
    quantized = ptq_exp.load_quantized(tmp_path / name, checkpoint=str(tmp_path / "model"))
    expected = np.load(tmp_path / "expected.npz")
    x, grid = torch.from_numpy(expected["x"]), quantized.grid
    with torch.no_grad():
        eps = [quantized.denoiser(x, grid.network_time(torch.full((2,), step))) for step in range(len(grid))]
    # other processors round otherwise; on the one that wrote the file all bits agree
    np.testing.assert_allclose(torch.stack(eps).numpy(), expected[name], atol=1e-2)


def test_an_own_builder_needs_its_checkpoint_or_the_model(made_of, tmp_path, monkeypatch):
    def build(checkpoint, *, name="mine", dtype="float32"):
        return ptq_exp.load_model("diffusers", checkpoint, dtype=dtype)

    run, original = made_of("pixel")
    shutil.copytree(run / "quantized", tmp_path / "copy")
    forged(tmp_path / "copy", lambda d: d["model"].update(name="mine"))
    with pytest.raises(ConfigError, match="import the module that registers it, or build it and give model="):
        ptq_exp.load_quantized(tmp_path / "copy")
    monkeypatch.setitem(ptq_exp.MODELS, "mine", "builder_of_test:build")
    monkeypatch.setitem(__import__("sys").modules, "builder_of_test", type("Module", (), {"build": build}))
    with pytest.raises(ConfigError, match="model.checkpoint=null: the model mine needs a checkpoint"):
        ptq_exp.load_model("mine")
    with pytest.raises(CheckpointError, match="the structure of mine is not in the artefact: give checkpoint="):
        ptq_exp.load_quantized(tmp_path / "copy")
    assert ptq_exp.load_quantized(tmp_path / "copy", checkpoint=str(original)).full_precision
    assert ptq_exp.load_quantized(tmp_path / "copy", model=build(str(original))).full_precision
