"""Other models and evaluations through the whole experiment, in small."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from hydra import compose, initialize_config_dir

from ptq_exp.calibration import CalibrationSet
from ptq_exp.diffusion.zoo.registry import MODELS, load_model
from ptq_exp.embedded import digits_reference
from ptq_exp.results.record import read_samples
from ptq_exp.settings.compose import config_folder, validated
from ptq_exp.storage.plain_json import read_json

PAIRED = ("evaluation=paired", "evaluation.n_samples=2")


@pytest.mark.usefixtures("small_networks")
def test_the_latent_model_runs_through_first_stage_guidance_and_decoder(command, cache):
    folder = command("+experiment=ndtc_w8a8", "model=digits_ldm", "metric=minmax", "logger=none")
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage_conv_linear"] == 1
    assert set(results["metrics"]) >= {"is", "fid", "sfid", "psnr", "eps_error"}
    images, labels = read_samples(folder / "samples.npz")
    assert images.shape == (10, 32, 32, 1) and sorted(labels.tolist()) == list(range(10))
    (path,) = (cache / "calibration").glob("*/artefact.npz")
    made = CalibrationSet.load(path)
    assert made.x.shape == (6, 3, 8, 8) and made.unconditional == {"y": 10}
    assert len(set(made.conditions["y"].tolist())) == 6
    # guidance doubles the work: twice the states pass the network
    assert sum(len(x) for x, *_ in made.batches(4)) == 12


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("source", ["raw", "training_mimic"])
def test_real_images_are_encoded_for_calibration(command, source):
    folder = command(
        "model=digits_ldm", f"calibration={source}", "metric=minmax", "logger=none", "evaluation=paired",
        "evaluation.n_samples=2", "evaluation.batch_size=2",
    )
    assert read_json(folder / "results.json")["status"] == "finished"


@pytest.mark.usefixtures("small_networks")
def test_without_extractor_images_are_compared_with_their_twins_alone(command, caplog):
    folder = command("+experiment=ndtc_w8a8", "metric=minmax", "logger=none", "evaluation=paired")
    results = read_json(folder / "results.json")
    assert set(results["metrics"]) == {"psnr", "eps_error", "eps_error_without_last", "fixed_pattern_share"}
    assert results["fp32"] == results["real"] == {}
    assert results["metric_spec"]["extractor"] == "none"
    assert "no IS, FID, sFID: evaluation=paired" in (folder / "ndtc_w8a8.log").read_text()


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("evaluation", ["adm", "clean"])
def test_published_evaluation_against_an_npz_of_images(command, inception_weights, tmp_path, evaluation):
    np.savez(tmp_path / "reference.npz", arr_0=digits_reference()[:6].repeat(3, axis=3))
    overrides = [
        "metric=minmax", "logger=none", f"evaluation={evaluation}", f"evaluation.weights={inception_weights}",
        f"evaluation.reference={tmp_path / 'reference.npz'}", "evaluation.n_samples=5",
    ]
    results = read_json(command(*overrides) / "results.json")
    assert results["status"] == "finished" and results["metric_spec"]["extractor"].endswith(evaluation)
    assert set(results["metrics"]) >= {"is", "fid", "sfid", "kid", "precision", "recall", "fid_increase_units"}
    if evaluation == "adm":
        again = read_json(command(*overrides) / "results.json")
        assert again["metrics"] == results["metrics"]


@pytest.mark.usefixtures("small_networks")
def test_a_reference_of_stored_moments_has_no_unit_of_the_increase(command, inception_weights, tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, 2048))
    np.savez(tmp_path / "moments.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    folder = command(
        "+experiment=fp32", "logger=none", "evaluation=adm", f"evaluation.weights={inception_weights}",
        f"evaluation.reference={tmp_path / 'moments.npz'}", "evaluation.n_samples=5",
    )
    results = read_json(folder / "results.json")
    assert set(results["metrics"]) == {"fid", "is"} and results["real"] == {}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """An unconditional pipeline with random weights, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )
    DDPMPipeline(unet, DDIMScheduler(100)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("blank_pictures")
def test_any_diffusers_folder_is_a_model_and_any_image_folder_its_data(command, pipeline_folder, tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    folder = command(
        "model=diffusers", f"model.checkpoint={pipeline_folder}", "calibration=training_mimic", "metric=minmax",
        "logger=none", f"model.images.path={tmp_path / 'photos'}", "model.images.size=8",
    )
    results = read_json(folder / "results.json")
    assert results["status"] == "finished" and results["quantization"]["coverage_conv_linear"] == 1
    assert len(results["weights"]["model"]) == 12
    assert load_model("diffusers", str(pipeline_folder)).digest.startswith(results["weights"]["model"])
    assert read_samples(folder / "samples.npz")[0].shape == (10, 8, 8, 3)
    assert json.loads((folder / "quantization.json").read_text())["layers"]


@pytest.mark.usefixtures("blank_pictures")
def test_other_images_under_the_same_path_make_another_calibration_set(command, cache, pipeline_folder, tmp_path):
    def made() -> int:
        command(
            "model=diffusers", f"model.checkpoint={pipeline_folder}", "calibration=raw", "metric=minmax",
            "logger=none", f"model.images.path={tmp_path / 'images.npz'}", "model.images.size=8", *PAIRED,
        )
        return len(list((cache / "calibration").iterdir()))

    np.savez(tmp_path / "images.npz", arr_0=np.full((2, 8, 8, 3), 50, np.uint8))
    first = made()
    assert made() == first
    np.savez(tmp_path / "images.npz", arr_0=np.full((2, 8, 8, 3), 60, np.uint8))
    assert made() == first + 1


@pytest.mark.parametrize("path, message", [("null", "need real images: set model.images.path"), ("nowhere", "nowhere")])
def test_calibration_on_images_that_are_not_there_is_one_clear_line(command, pipeline_folder, capsys, path, message):
    with pytest.raises(SystemExit):
        command(
            "model=diffusers", f"model.checkpoint={pipeline_folder}", "calibration=raw", "metric=minmax",
            "logger=none", f"model.images.path={path}",
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.usefixtures("small_networks")
def test_channels_last_denoisers_give_the_same_account(command):
    plain = read_json(command("metric=minmax", "logger=none", *PAIRED) / "results.json")
    other = command("metric=minmax", "logger=none", *PAIRED, "model.channels_last=true")
    other = read_json(other / "results.json")
    assert other["quantization"] == plain["quantization"]
    assert other["metrics"]["psnr"] == pytest.approx(plain["metrics"]["psnr"], abs=3)


PIPELINES = ("digits_text", "digits_flow")
LARGE = ("ddim_imagenet64", "ldm4_imagenet256", "ldm4_lsun_bedrooms256")


OF_FOLDERS = {"diffusers", "pipeline", *PIPELINES}


@pytest.mark.parametrize("name", PIPELINES)
def test_embedded_pipelines_draw_as_their_settings_say(name):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = validated(compose("config", overrides=[f"model={name}"])).model
    options = {key: value for key, value in config.build.items() if key not in ("_target_", "checkpoint", "dtype")}
    model = load_model(name, **options)
    assert (config.sampler.steps, config.sampler.guidance_scale) == (model.steps, model.sampler.guidance_scale)
    assert model.image_shape == (1, 32, 32) and config.images["size"] == 32
    assert model.asked(range(12), 0) == [*range(10), 0, 1] and "zero" in model.prompts([0], 0)[0]


@pytest.mark.filterwarnings("ignore:model .*random weights")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.large) if n in LARGE else n for n in sorted(set(MODELS) - OF_FOLDERS)],
)
def test_the_command_and_python_sample_alike_and_images_have_the_size_of_the_data(name):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = validated(compose("config", overrides=[f"model={name}"])).model
    model = load_model(name)
    assert vars(config.sampler) == vars(model.sampler)
    assert config.images.get("size", 16) == model.image_shape[1] == model.image_shape[2]
    assert config.images.get("channels", 1) == model.image_shape[0]
    # on the meta device: shapes without arithmetic
    call = model.example_inputs().to("meta")
    assert call.evaluate(model.denoiser.to("meta")).shape == (1, *model.sample_shape)
