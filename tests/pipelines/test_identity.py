"""What decides the images is in the digest and in `drawing`, and nothing else; random numbers beside the generators."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from small_pipelines import SMALL, dit, picture, sd3, sd15
from torch import nn

from ptq_exp.errors import ConfigError
from ptq_exp.pipelines import PipelineModel
from ptq_exp.pipelines.identity import pipeline_digest, plain
from ptq_exp.pipelines.randomness import own_random_numbers

CALL = {"height": 16, "width": 16, "guidance_scale": 2.0}


def test_the_digest_is_of_weights_settings_and_kinds():
    own = pipeline_digest(sd15())
    assert pipeline_digest(sd15()) == own
    others = [sd15(EulerDiscreteScheduler()), sd15(HeunDiscreteScheduler()), sd15(unet={"act_fn": "gelu"})]
    for name in ("unet", "vae", "text_encoder"):
        others.append(sd15())
        with torch.no_grad():
            next(getattr(others[-1], name).parameters()).view(-1)[0] += 1e-6
    others.append(sd15())
    others[-1].vae.register_to_config(scaling_factor=0.5)
    others.append(sd15())
    others[-1].tokenizer.add_tokens(["fox"])
    others.append(sd15().to(torch.bfloat16))
    assert len({own, *map(pipeline_digest, others)}) == len(others) + 1


def test_where_a_pipeline_comes_from_is_not_in_its_digest(tmp_path):
    pipe = sd15()
    own = pipeline_digest(pipe)
    pipe.unet.register_to_config(_name_or_path="elsewhere")
    pipe.register_to_config(_name_or_path="elsewhere")
    assert pipeline_digest(pipe) == own


def test_values_as_json_holds_them():
    values = {"a": 1, "b": [None, 2.5, "x"], 3: (True,), "f": plain, "cls": DDIMScheduler, "object": object()}
    assert plain(values) == {"a": 1, "b": [None, 2.5, "x"], "3": [True], "f": "ptq_exp.pipelines.identity.plain",
                             "cls": f"{DDIMScheduler.__module__}.DDIMScheduler", "object": "builtins.object"}
    ones = [picture(1), np.asarray(picture(1)), torch.from_numpy(np.asarray(picture(1)).copy())]
    assert len({plain(one) for one in ones}) == 1 and plain(picture(1)) != plain(picture(2))
    assert plain(np.zeros((2, 3))) != plain(np.zeros((3, 2)))
    assert plain(torch.ones(2, dtype=torch.bfloat16)) == plain(torch.ones(2))


def test_drawing_says_calls_and_requests():
    small = SMALL["img2img"]
    models = [PipelineModel(small.build(), small.requests[:n], steps=2, call=small.call) for n in (1, 2, 2)]
    assert models[0].drawing != models[1].drawing == models[2].drawing
    assert models[0].drawing["component"] == "unet"


def test_noise_beside_the_generators_is_repeatable_and_warned_of(caplog):
    pipe = dit()
    pipe.scheduler = DDPMScheduler(variance_type="fixed_small")
    model = PipelineModel(pipe, steps=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first = model.sample(model.denoiser, model.time_grid(), [0, 1], 0)
    assert "DiTPipeline draws random numbers beside those of its generators" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model.sample(model.denoiser, model.time_grid(), [0, 1], 0), first)


def test_no_warning_without_reason(caplog):
    model = PipelineModel(sd15(), ["low"], steps=2, call=CALL | {"eta": 1.0})
    with caplog.at_level(logging.WARNING):
        model.sample(model.denoiser, model.time_grid(), [0], 0)
    assert "random numbers" not in caplog.text
    with own_random_numbers(3, torch.device("cpu"), "it"):
        one = torch.rand(1)
    with own_random_numbers(3, torch.device("cpu"), "it"):
        assert torch.equal(torch.rand(1), one)


def test_callbacks_are_called_and_may_change_guidance():
    """Without guidance after the first step there are fewer rows of each image in a call."""
    seen = []

    def callback(pipe, step, t, given):
        seen.append(step)
        pipe._guidance_scale = 0.0
        return {} if step else {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}

    call = CALL | {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    model = PipelineModel(sd15(), ["low", "er"], steps=3, call=call)
    found = []
    model.run(model.denoiser, model.time_grid(), [0, 1], 0, on_step=found.append)
    assert [len(record.call.x) for record in found] == [4, 2, 2] and seen[-3:] == [0, 1, 2]
    assert all(torch.equal(record.call.evaluate(model.denoiser), record.eps) for record in found)
    assert "callback" in model.drawing["call"]["callback_on_step_end"]


class Darkened(nn.Module):
    """A safety checker that finds everything unsafe."""

    def forward(self, clip_input, images):
        return np.zeros_like(images) if isinstance(images, np.ndarray) else 0 * images, [True] * len(images)


def test_a_safety_checker_has_its_say():
    pipe = sd15(safety_checker=None)
    pipe.run_safety_checker = lambda image, device, dtype: Darkened()(None, image)
    model = PipelineModel(pipe, ["low"], steps=2, call=CALL)
    assert model.sample(model.denoiser, model.time_grid(), [0], 0).unique().numel() == 1


def test_skipped_layers_of_sd3_are_refused():
    """Their call has an argument that the others do not have."""
    call = CALL | {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    model = PipelineModel(sd3(), ["low"], steps=4, call=call)
    with pytest.raises(ConfigError, match="with another skip_layers than at first"):
        model.run(model.denoiser, model.time_grid(), [0], 0, on_step=lambda record: None)


def test_a_compiled_network_is_refused():
    pipe = sd15()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ConfigError, match="unet is compiled"):
        PipelineModel(pipe, ["low"], steps=2, call=CALL)
