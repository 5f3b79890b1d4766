"""A network whose evaluation is recorded and replayed answers as the network itself does, whatever happens to it."""

import pytest
import torch
from torch import nn

from ptq_exp.correction import Scheduled
from ptq_exp.diffusion import Guided, SampleNoise, sample
from ptq_exp.diffusion.time_grid import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError
from ptq_exp.experiment.run import Run
from ptq_exp.quantization import QuantSpec, Rule, TensorSpec, calibrate_, disabled, quantize_, step_of
from ptq_exp.runtime import GraphedNetwork
from ptq_exp.runtime.cuda_graph import MOST, PLAIN
from ptq_exp.settings.compose import composed_from


class Small(nn.Module):
    """eps(x, t, y) with two convolutions; counts its evaluations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.table, self.evaluations = nn.Embedding(5, 8), 0

    def forward(self, x, t, y):
        self.evaluations += 1
        return self.last((self.first(x) + self.table(y)[:, :, None, None] + t[:, None, None, None] / 1000).tanh())


class Tape:
    """Records as a device does: a replay reads nothing but the tensors it was recorded with, and overwrites its result.

    `network` counts no evaluation of a replay.
    """

    def __init__(self, network):
        self.network, self.records, self.replays = network, 0, 0

    def __call__(self, evaluate):
        result, self.records = evaluate(), self.records + 1

        def replay():
            before = self.network.evaluations
            result.copy_(evaluate())
            self.network.evaluations = before
            self.replays += 1

        return replay, result


GRID = TimeGrid.from_schedule(NoiseSchedule.latent_diffusion(), 6)


def drawn(denoiser, n=3, seed=0):
    with torch.no_grad():
        return sample(denoiser, GRID, SampleNoise(seed, range(n), (2, 6, 6)), conditions={"y": torch.arange(n) % 4})


def taped(network):
    tape = Tape(network)
    return GraphedNetwork(network, tape), tape


def test_steps_are_replayed_and_the_last_smaller_batch_is_not():
    network = Small()
    wanted = [drawn(network), drawn(network, seed=1), drawn(network, 1, seed=2)]
    graphed, tape = taped(network)
    network.evaluations = 0
    assert torch.equal(drawn(graphed), wanted[0]) and torch.equal(drawn(graphed, seed=1), wanted[1])
    assert (tape.records, tape.replays, network.evaluations) == (1, 12 - PLAIN, PLAIN + 1)
    assert torch.equal(drawn(graphed, 1, seed=2), wanted[2]) and tape.records == 2  # six steps: a recording of its own


def test_estimates_that_a_solver_keeps_are_not_overwritten():
    graphed, _ = taped(Small())
    call = torch.randn(2, 2, 4, 4), torch.ones(2), torch.tensor([1, 2])
    with torch.no_grad():
        kept = [graphed(call[0] + k, call[1], y=call[2]) for k in range(5)]
        assert all(torch.equal(one, graphed.network(call[0] + k, call[1], y=call[2])) for k, one in enumerate(kept))


def quantized(activation, device="cpu"):
    network = Small().to(device)
    y = torch.arange(4, device=device)
    example = torch.zeros(1, 2, 6, 6, device=device), torch.zeros(1, device=device), {"y": y[:1]}
    quantize_(network, [Rule("*", QuantSpec(TensorSpec(8), TensorSpec(activation)))], example)
    states = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(device)
    calibrate_(network, "minmax", [(states, torch.ones(4, device=device), {"y": y})])
    return network


def test_each_step_has_its_own_row_of_ranges_and_guidance_its_two_halves():
    network = quantized((3, 6))
    rows = torch.tensor([0, 1, 0, 1, 1, 0])

    def denoiser(inner):
        return Guided(Scheduled(inner, rows, GRID), 2.0, {"y": 4})

    wanted = drawn(denoiser(network))
    graphed, tape = taped(network)
    assert torch.equal(drawn(denoiser(graphed)), wanted) and tape.replays == 6 - PLAIN
    assert not torch.equal(drawn(Guided(Scheduled(network, 0 * rows, GRID), 2.0, {"y": 4})), wanted)
    # samples with a row each are not what was recorded
    call = torch.randn(2, 2, 6, 6), torch.ones(2), torch.tensor([1, 2])
    with torch.no_grad(), step_of(network).each(torch.tensor([0, 1])):
        found = graphed(call[0], call[1], y=call[2])
        assert torch.equal(found, network(call[0], call[1], y=call[2]))


def test_a_network_that_changed_is_recorded_anew():
    network = quantized(4)
    graphed, tape = taped(network)
    drawn(graphed)
    with disabled(network):
        assert torch.equal(drawn(graphed), drawn(network)) and tape.records == 2
    seen = []
    handle = network.first.register_forward_hook(lambda *_: seen.append(1))
    drawn(graphed)
    handle.remove()
    assert tape.records == 3 and len(seen) > 0
    network.first.weight.data = network.first.weight.data.clone()  # as `to` does
    drawn(graphed)
    assert tape.records == 4
    with torch.no_grad():
        network.first.bias.add_(1)  # in its place: what is replayed reads it
    assert torch.equal(drawn(graphed), drawn(network)) and tape.records == 4


def test_few_shapes_are_recorded():
    network = Small()
    graphed, tape = taped(network)
    for n in range(1, MOST + 3):
        for _ in range(PLAIN + 2):
            x = torch.randn(n, 2, 4, 4)
            with torch.no_grad():
                found = graphed(x, torch.ones(n), y=torch.zeros(n, dtype=torch.long))
                assert torch.equal(found, network(x, torch.ones(n), torch.zeros(n, dtype=torch.long)))
    assert tape.records == MOST
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    assert graphed(x, torch.ones(1), y=torch.zeros(1, dtype=torch.long)).requires_grad  # gradients are not recorded


def test_what_cannot_be_recorded_names_the_setting():
    def refuses(evaluate):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed = GraphedNetwork(Small(), refuses)
    with pytest.raises(ConfigError, match="^trainer.cuda_graph=true: an evaluation .*not permitted.*cuda_graph=false$"):
        drawn(graphed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_the_setting_is_an_error(tmp_path):
    config = composed_from(["trainer.cuda_graph=true", "trainer.accelerator=cpu", f"cache_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="^trainer.cuda_graph=true: CUDA graphs need an NVIDIA GPU.*computes on cpu"):
        Run.of(config)
    with pytest.raises(ConfigError, match="^trainer.cuda_graph=true: runtime=openvino"):
        composed_from(["trainer.cuda_graph=true", "runtime=openvino"])


@pytest.mark.cuda
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_gpu_images_are_those_without_recording(channels_last):
    network = quantized((3, 6), "cuda")
    if channels_last:
        network.to(memory_format=torch.channels_last)
    graphed, rows = GraphedNetwork(network), torch.tensor([0, 1, 0, 1, 1, 0])

    def images(inner):
        denoiser = Guided(Scheduled(inner, rows, GRID), 2.0, {"y": 4}).cuda()
        noise = SampleNoise(0, range(3), (2, 6, 6))
        with torch.no_grad():
            return sample(denoiser, GRID, noise, conditions={"y": torch.arange(3).cuda()}, device="cuda")

    assert torch.equal(images(graphed), images(network)) and torch.equal(images(graphed), images(network))
    assert len(graphed._recorded) == 1
