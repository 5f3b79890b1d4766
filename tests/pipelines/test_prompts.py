"""What images are asked for: texts, files, pictures, classes; and the one line that says what is wrong with them."""

import json

import numpy as np
import pytest
import torch
from small_pipelines import ddpm, dit, flux, img2img, picture, sd15

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.prompts import requests_of

CALL = {"height": 16, "width": 16, "guidance_scale": 2.0}


def refusal(pipe, prompts=None, kind=ConfigError, **options) -> str:
    with pytest.raises(kind) as caught:
        PipelineModel(pipe, prompts, steps=2, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_prompts(tmp_path):
    texts = ({"prompt": "a red fox"}, {"prompt": "löw"})
    (tmp_path / "p.txt").write_text("a red fox\n\n  löw \n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps(["a red fox", {"prompt": "löw"}]))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red fox"}\n\n"l\\u00f6w"\n')
    for name in ("p.txt", "p.json", "p.jsonl"):
        assert requests_of(tmp_path / name) == requests_of(str(tmp_path / name)) == texts
    assert requests_of(["a red fox", {"prompt": "löw"}]) == texts and requests_of(None) == ()


def test_pictures_lie_beside_their_file(tmp_path):
    picture(3).save(tmp_path / "a.png")
    picture(4).save(tmp_path / "m.png")
    np.save(tmp_path / "depth.npy", np.full((4, 4), 0.5, np.float32))
    (tmp_path / "p.jsonl").write_text(json.dumps({
        "prompt": "low", "image": "a.png", "mask_image": "m.png", "control_image": "depth.npy"}))
    found = requests_of(tmp_path / "p.jsonl")[0]
    assert np.array_equal(np.asarray(found["image"]), np.asarray(picture(3))) and found["mask_image"].mode == "L"
    assert found["control_image"].shape == (4, 4)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.txt", None, "cannot be read"), ("bad.json", "[", "cannot be read"), ("bad.jsonl", "{}\n{", "cannot be read"),
    ("number.json", "3", "expected a list of prompts"), ("numbers.json", "[3]", "expected a list of prompts"),
    ("text.json", '"low"', "expected a list of prompts"),
    ("picture.json", '[{"image": "gone.png"}]', "no picture that can be read"),
    ("text.jsonl", '{"image": "text.jsonl.png"}', "no picture that can be read")])
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        requests_of(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00l")
    with pytest.raises(DataError, match="cannot be read"):
        requests_of(tmp_path / "p.txt")


def test_empty_and_unlike_requests(tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    for empty in ([], tmp_path / "p.txt"):
        with pytest.raises(ConfigError, match="there are none"):
            requests_of(empty)
    with pytest.raises(ConfigError, match="number 1 has image, prompt, the first prompt"):
        requests_of(["low", {"prompt": "low", "image": None}])


def test_arguments_that_a_pipeline_does_not_take():
    pipe = sd15()
    assert "model.call: StableDiffusionPipeline takes no hight; did you mean 'height'?" in refusal(
        pipe, ["low"], call={"hight": 16})
    assert "model.prompts: StableDiffusionPipeline takes no image" in refusal(
        pipe, [{"prompt": "low", "image": picture()}])
    for name in ("generator", "output_type", "num_inference_steps", "num_images_per_prompt", "return_dict"):
        assert f"{name} is set by the model itself" in refusal(pipe, ["low"], call={name: 1})
    assert "set model.call.height" in refusal(pipe, [{"prompt": "low", "height": 16}])
    assert "leave one of them out" in refusal(
        pipe, [{"prompt": "low", "negative_prompt": "er"}], call={"negative_prompt": "er"})
    assert "batch_size is set by the model itself" in refusal(ddpm(), call={"batch_size": 2})


def test_prompts_that_are_missing():
    assert "model.prompts=null: StableDiffusionPipeline draws from prompts" in refusal(sd15())
    assert "model.prompts=null: FluxPipeline draws from prompts" in refusal(flux())
    assert PipelineModel(sd15(), steps=2, call=CALL | {"prompt": "low"}).prompts([0, 1], 0) == ["low"] * 2


def test_components_and_steps():
    pipe = sd15()
    assert "model.component=transformer: StableDiffusionPipeline has the networks" in refusal(
        pipe, ["low"], component="transformer")
    assert "never calls its vae: name another" in refusal(pipe, ["low"], component="vae", call=CALL)
    assert "sampler.steps=0: choose 1 or more" in refusal_of_steps(pipe, 0)
    assert "cannot draw with the given model.call" in refusal_of_steps(pipe, 2000)


def refusal_of_steps(pipe, steps) -> str:
    with pytest.raises(ConfigError) as caught:
        PipelineModel(pipe, ["low"], steps=steps, call=CALL)
    return str(caught.value)


def test_what_the_pipeline_itself_refuses_is_one_line():
    assert "cannot draw with the given model.call and model.prompts: `height` and `width` have to be" in refusal(
        sd15(), ["low"], call={"height": 17, "width": 16})


def test_settings_of_a_sampler():
    model = PipelineModel(sd15(), ["low"], steps=2, call=CALL, eta=0.5)
    assert model.sampler.eta == model.call["eta"] == 0.5
    for setting, value in (("steps", 3), ("eta", 0.1), ("spacing", "quad"), ("solver", "unipc")):
        with pytest.raises(ConfigError, match=f"sampler.{setting}={value}: a pipeline is driven by its own scheduler"):
            model.time_grid(**{setting: value})
    assert "sampler.guidance_scale=2.0: DDPMPipeline takes no guidance_scale" in refusal(ddpm(), guidance_scale=2.0)
    assert "sampler.eta=0.5: DDPMPipeline takes no eta" in refusal(ddpm(), eta=0.5)
    with pytest.raises(ConfigError, match="a pipeline guides by itself"):
        model.guided(model.denoiser, 5.0)


def test_classes():
    model = PipelineModel(dit(), steps=2, call={"guidance_scale": 1.0})
    labels = model.labels(range(8), 3)
    assert labels.unique().numel() == 8 and (labels < 1000).all()
    assert model.arguments([2, 5], 3)["class_labels"] == labels[[2, 5]].tolist()
    chosen = PipelineModel(dit(), [{"class_labels": 7}, {"class_labels": 9}], steps=2)
    assert chosen.labels([0, 1, 2], 0).tolist() == [7, 9, 7] and chosen.prompts([0, 1], 0) is None
    for wrong in (1000, -1, "fox", 1.5, True):
        assert f"class_labels={wrong}: choose 0..999" in refusal(dit(), [{"class_labels": wrong}])


def test_requests_go_round_and_texts_are_said():
    model = PipelineModel(sd15(), ["low", "er"], steps=2, call=CALL)
    assert model.prompts([0, 1, 2], 0) == ["low", "er", "low"] and model.labels([0], 0) is None


def test_values_for_each_image_and_for_all():
    embeds = torch.randn(1, 77, 32)
    model = PipelineModel(sd15(), steps=2, call=CALL | {"prompt_embeds": embeds, "negative_prompt_embeds": 0 * embeds})
    assert model.arguments([0, 1, 2], 0)["prompt_embeds"].shape == (3, 77, 32)
    requests = [{"prompt_embeds": torch.randn(77, 32), "negative_prompt_embeds": torch.zeros(77, 32)} for _ in range(2)]
    model = PipelineModel(sd15(), requests, steps=2, call=CALL)
    given = model.arguments([1, 0, 1], 0)["prompt_embeds"]
    assert torch.equal(given[0], given[2]) and torch.equal(given[1], requests[0]["prompt_embeds"])
    assert model.sample(model.denoiser, model.time_grid(), [0, 1], 0).shape == (2, 3, 16, 16)
    model = PipelineModel(img2img(), ["low"], steps=4, call={"image": picture(), "strength": 0.5})
    assert len(model.arguments([0, 1], 0)["image"]) == 2
