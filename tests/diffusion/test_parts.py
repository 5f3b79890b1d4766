"""Networks that evaluate a batch in parts: the same estimates, whatever the threads; when a batch stays whole."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import ptq_exp
from ptq_exp.diffusion import Call, InParts
from ptq_exp.diffusion.parts import ROWS
from ptq_exp.quantization.offload import stream_weights_


class Network(nn.Module):
    """Squares the state, adds time and label; notes how many samples came at once."""

    def __init__(self):
        super().__init__()
        self.weight, seen = nn.Parameter(torch.ones(())), []
        self.note, self.noted = seen.append, lambda: seen

    @property
    def seen(self):
        return self.noted()

    def forward(self, x, t, y=None):
        self.note(len(x))
        return self.weight * x.square() + t[:, None] + (0 if y is None else y[:, None])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def call_of(n):
    return Call(torch.arange(2.0 * n).view(n, 2), torch.arange(n) / 7, {"y": torch.arange(n)})


@torch.no_grad()
@pytest.mark.parametrize(("n", "parts"), [(ROWS, [ROWS]), (ROWS + 1, [17, 16]), (3 * ROWS - 1, [32, 32, 31])])
def test_parts_are_nearly_equal_and_their_estimates_in_order(threads, n, parts):
    network = Network()
    assert torch.equal(call_of(n).evaluate(InParts(network)), call_of(n).evaluate(Network()))
    assert sorted(network.seen, reverse=True) == parts


def test_where_gradients_are_recorded_the_batch_stays_whole(threads):
    network = Network()
    call_of(100).evaluate(InParts(network)).sum().backward()
    assert network.seen == [100]
    assert network.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("watch", ["register_forward_hook", "register_forward_pre_hook"])
def test_where_hooks_watch_the_batch_stays_whole(threads, watch):
    network = nn.Sequential(nn.Identity())
    network.forward = lambda x, t: network[0](x)
    seen = []
    handle = getattr(network[0], watch)(lambda module, inputs, *result: seen.append(len(inputs[0])))
    InParts(network)(torch.zeros(100, 2), torch.zeros(100))
    assert seen == [100]
    handle.remove()
    InParts(network)(torch.zeros(100, 2), torch.zeros(100))
    assert seen == [100]


@torch.no_grad()
def test_hooks_that_move_weights_leave_the_parts_alone(threads, tmp_path):
    """So that the numbers of a network in files are those of one in memory, in which no hooks are."""
    network = nn.Sequential(nn.Identity())
    sizes = []
    network.forward = lambda x, t: (sizes.append(len(x)), network[0](x))[1]
    stream_weights_(network, ["0"])
    assert network[0]._forward_hooks and network[0]._forward_pre_hooks
    InParts(network)(torch.zeros(64, 2), torch.zeros(64))
    assert sizes == [32, 32]


@torch.no_grad()
def test_where_a_hook_of_all_modules_watches_the_batch_stays_whole(threads):
    network = Network()
    with register_module_forward_hook(lambda module, inputs, result: None):
        InParts(network)(torch.zeros(100, 2), torch.zeros(100))
    assert network.seen == [100]


@torch.no_grad()
@pytest.mark.parametrize("t", [torch.full((100,), 3.0), torch.full((1,), 3.0), torch.tensor(3.0), 3])
@pytest.mark.parametrize("y", [torch.full((100,), 2), torch.full((1,), 2), torch.tensor(2), 2, None])
def test_what_has_no_row_for_each_sample_goes_to_the_whole_batch(threads, t, y):
    seen = []

    def network(x, t, y):
        seen.append(len(x))
        return x + torch.as_tensor(t).view(-1, 1) + (0 if y is None else torch.as_tensor(y).view(-1, 1))

    module = nn.Identity()
    module.__dict__["forward"] = network
    assert torch.equal(InParts(module)(torch.zeros(100, 2), t, y=y), network(torch.zeros(100, 2), t, y))
    rows = all(isinstance(value, torch.Tensor) and value.shape == (100,) for value in (t, y))
    assert seen == ([25] * 4 if rows else [100]) + [100]


class Noting(nn.Module):
    """Keeps something of what passes, in one of several ways; notes how many samples came at once."""

    def __init__(self, way):
        super().__init__()
        seen = []
        self.way, self.note, self.noted = way, seen.append, lambda: seen
        self.inner = nn.Module()
        self.inner.kept, self.inner.by_name, self.inner.rows, self.inner.calls = None, {}, [], 0
        self.inner.register_buffer("mean", torch.zeros(2))

    def forward(self, x, t):
        self.note(len(x))
        inner = self.inner
        match self.way:
            case "attribute":
                inner.kept = t
            case "dictionary":
                inner.by_name["t"] = t
            case "list":
                inner.rows.append(t)
            case "number":
                inner.calls += 1
            case "buffer":
                inner.mean = x.mean(0)
            case "in place":
                inner.mean.lerp_(x.mean(0), 0.1)
            case "random":
                return x + torch.rand(2)
        return x


@torch.no_grad()
@pytest.mark.parametrize("way", ["attribute", "dictionary", "list", "number", "buffer", "in place", "random"])
def test_a_network_that_keeps_something_gets_whole_batches(threads, way):
    network = Noting(way)
    parted = InParts(network)
    for _ in range(3):
        parted(torch.ones(100, 2), torch.zeros(100))
    assert network.noted() == [25, 100, 100, 100]  # the first part shows it
    network.way = "nothing"
    again = InParts(network)
    for _ in range(2):
        again(torch.ones(100, 2), torch.zeros(100))
    assert network.noted() == [25, 100, 100, 100] + [25] * 8


@torch.no_grad()
@pytest.mark.parametrize("policy", [{"temporal": "binned", "temporal_bins": 2}, {"activation": "dynamic_tensor"}])
def test_quantized_networks_keep_nothing(policy):
    model = ptq_exp.load_model("digits")
    transforms = ["smooth", {"name": "low_rank", "rank": 4}] if "temporal" in policy else []
    quantized = ptq_exp.quantize(
        model, "w8a8", n=4, steps=2, metric="minmax", policy=policy, transforms=transforms, progress=False
    )
    for network in (model.in_parts(model.denoiser), quantized.denoiser):
        network(torch.zeros(40, *model.sample_shape), torch.full((40,), float(quantized.grid.timesteps[0])))
        assert [part._pure for part in network.modules() if isinstance(part, InParts)] == [True]


@torch.no_grad()
def test_a_compiled_network_gets_whole_batches(threads):
    network = Network()
    network._compiled_call_impl = network._call_impl  # what `compile` sets
    InParts(network)(torch.zeros(100, 2), torch.zeros(100))
    assert network.seen == [100]


@torch.no_grad()
def test_an_error_of_a_part_is_that_of_the_call(threads):
    def fail(x, t):
        if float(x.sum()) > 1e6:
            raise ValueError("too large")
        return x

    network = nn.Identity()
    network.forward = fail
    x = torch.zeros(100, 2)
    x[-1] = 1e7
    with pytest.raises(ValueError, match="too large"):
        InParts(network)(x, torch.zeros(100))


@torch.no_grad()
def test_the_digits_model_gives_the_same_numbers_with_one_and_with_two_threads():
    model, before, found = ptq_exp.load_model("digits"), torch.get_num_threads(), []
    x = torch.randn(70, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    call = Call(x, torch.full((70,), 500.0), {})
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(call.evaluate(model.in_parts(model.denoiser)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], call.evaluate(model.denoiser), rtol=1e-4, atol=1e-4)
