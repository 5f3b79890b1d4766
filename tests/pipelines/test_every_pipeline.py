"""What holds for a pipeline of every architecture: its images, its calls, its times, and that it stays as it was."""

import copy
import functools
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from small_pipelines import SMALL
from torch import nn

from ptq_exp.evaluation.images import to_uint8
from ptq_exp.pipelines import PipelineModel, answering

STEPS, SEED = 4, 5
ALL = pytest.mark.parametrize("name", SMALL)


class Wrapped(nn.Module):
    """A network that is not the model's own, but does the same."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, **conditions):
        return self.network(x, t, **conditions)


class Halved(Wrapped):
    def forward(self, x, t, **conditions):
        return super().forward(x, t, **conditions) / 2


@functools.cache
def pipeline(name):
    return SMALL[name].build()


@functools.cache
def model(name) -> PipelineModel:
    small = SMALL[name]
    return PipelineModel(pipeline(name), small.requests, steps=STEPS, call=small.call)


def by_hand(name, indices):
    """Levels of the pipeline's own images, its arguments written out."""
    small, pipe, n = SMALL[name], pipeline(name), len(indices)
    given = {
        key: [value] * n if key in ("negative_prompt", "prompt_2", "image", "mask_image") else value
        for key, value in small.call.items()
    }
    if small.requests is None:
        given |= {"class_labels": model(name).labels(indices, SEED).tolist()} if "dit" in name else {"batch_size": n}
    else:
        requests = [small.requests[i % len(small.requests)] for i in indices]
        requests = [{"prompt": request} if isinstance(request, str) else request for request in requests]
        given |= {key: [request[key] for request in requests] for key in requests[0]}
    pipe.set_progress_bar_config(disable=True)
    generators = model(name).arguments(indices, SEED)["generator"]
    return np.rint(255 * np.asarray(pipe(
        **given, num_inference_steps=STEPS, generator=generators, output_type="np").images))


@functools.cache
def images(name) -> np.ndarray:
    return levels(model(name), model(name).denoiser, [0, 1])


def levels(m, denoiser, indices, **kwargs) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    return to_uint8(m.sample(denoiser, m.time_grid(), indices, SEED, **kwargs))


def records(m, indices, **kwargs):
    found = []
    m.run(m.denoiser, m.time_grid(), indices, SEED, on_step=found.append, **kwargs)
    return found


@ALL
def test_images_are_those_of_the_pipeline_bitwise(name):
    np.testing.assert_array_equal(images(name), by_hand(name, [0, 1]))
    assert images(name).std() > 5
    height, width, channels = images(name).shape[1:]
    assert model(name).image_shape == (channels, height, width)


@ALL
def test_another_network_in_its_place_decides_the_images(name):
    m = model(name)
    np.testing.assert_array_equal(levels(m, Wrapped(m.denoiser), [0, 1]), images(name))
    assert (levels(m, Halved(m.denoiser), [0, 1]) != images(name)).any()


@ALL
def test_an_image_does_not_depend_on_its_batch(name):
    m = model(name)
    np.testing.assert_array_equal(levels(m, m.denoiser, [1, 2])[0], images(name)[1])
    np.testing.assert_array_equal(levels(m, m.denoiser, [2, 0])[1], images(name)[0])


@ALL
def test_recorded_calls_give_the_recorded_estimates(name):
    m = model(name)
    found, grid = records(m, [0, 1]), m.time_grid()
    assert [record.step for record in found] == list(range(len(grid)))
    for record in found:
        assert len(record.call.x) == len(record.call.t) == len(record.eps) == 2 * m.copies
        assert all(len(value) == 2 * m.copies for value in record.call.conditions.values())
        assert (record.call.t == grid.timesteps[record.step].float()).all()
        assert record.eps.std() > 0
        own = [record.call.mapped(lambda rows, call=call: rows.chunk(m.calls)[call]) for call in range(m.calls)]
        torch.testing.assert_close(torch.cat([call.evaluate(m.denoiser) for call in own]), record.eps, rtol=0, atol=0)
    # in other numbers of rows sums may be taken in another order
    one = found[0].call.mapped(lambda rows: rows[:1])
    torch.testing.assert_close(one.evaluate(m.denoiser), found[0].eps[:1], rtol=1e-4, atol=1e-5)


@ALL
def test_a_run_of_fewer_steps_shows_the_same_and_ends(name):
    m = model(name)
    whole, short = records(m, [0, 1]), []
    assert m.run(m.denoiser, m.time_grid(), [0, 1], SEED, on_step=short.append, steps=1).numel() == 0
    assert [record.step for record in short] == [0]
    assert torch.equal(short[0].eps, whole[0].eps) and torch.equal(short[0].call.x, whole[0].call.x)
    assert m.run(m.denoiser, m.time_grid(), [0, 1], SEED, steps=0).numel() == 0


@ALL
def test_estimates_by_image_and_the_shape_of_a_sample(name):
    m = model(name)
    estimates = records(m, [0, 1], steps=1)[0].eps
    together = m.by_image(estimates, 2)
    assert together.shape == (2, *m.sample_shape)
    height = m.sample_shape[1] // m.copies
    for image in range(2):
        for copy_ in range(m.copies):
            rows = together[image, :, copy_ * height : (copy_ + 1) * height]
            assert torch.equal(rows, estimates[2 * copy_ + image])


@ALL
def test_the_times_are_those_of_the_scheduler(name):
    m = model(name)
    times = m.pipeline.scheduler.timesteps.double()
    if "img2img" in name:
        times = times[-m.pipeline.get_timesteps(STEPS, SMALL[name].call["strength"], "cpu")[1] :]
    expected = list(dict.fromkeys((times / 1000 if "flux" in name else times).tolist()))
    np.testing.assert_allclose(m.time_grid().timesteps.numpy(), expected, rtol=1e-6)


@ALL
def test_the_pipeline_stays_as_it_was(name):
    small = SMALL[name]
    pipe = small.build()
    attributes, scheduler = dict(vars(pipe)), copy.deepcopy(vars(pipe.scheduler))
    weights = {key: part.state_dict() for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    weights = copy.deepcopy(weights)
    m = PipelineModel(pipe, small.requests, steps=1 if "img2img" not in name else 2, call=small.call)
    m.sample(Wrapped(m.denoiser), m.time_grid(), [0], SEED)
    assert vars(pipe).keys() == attributes.keys()
    assert all(vars(pipe)[key] is value for key, value in attributes.items())
    assert "forward" not in vars(getattr(pipe, m.component))
    for key, value in scheduler.items():
        same = vars(pipe.scheduler)[key]
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else repr(same) == repr(value), key
    for part, state in weights.items():
        now = getattr(pipe, part).state_dict()
        assert all(torch.equal(now[key], value) for key, value in state.items())


@ALL
def test_first_and_last_layers_and_blocks_are_there(name):
    m = model(name)
    names = [key for key, _ in m.denoiser.named_modules()]
    for globs in (m.first_layers, m.last_layers):
        assert globs and all(any(fnmatchcase(key, glob) for key in names) for glob in globs)
    assert any(fnmatchcase(key, glob) for key in names for glob in m.blocks)


@ALL
def test_the_example_is_a_call_of_one_row(name):
    m = model(name)
    example = m.example_inputs()
    assert len(example.x) == len(example.t) == 1
    assert example.evaluate(m.denoiser).shape == (1, m.sample_shape[0], m.sample_shape[1] // m.copies,
                                                  *m.sample_shape[2:])


@ALL
def test_a_pipeline_with_another_network_is_used_as_its_own(name):
    m = model(name)
    network = copy.deepcopy(m.denoiser)
    pipe = m.pipeline_with(answering(network, Wrapped(network)))
    drawn = np.asarray(pipe(**m.arguments([0, 1], SEED)).images)
    np.testing.assert_array_equal(np.rint(255 * drawn), images(name))
    assert isinstance(getattr(pipe, m.component), type(getattr(pipeline(name), m.component)))
    assert getattr(pipeline(name), m.component) is m.denoiser.component
