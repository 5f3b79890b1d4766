"""Bit schedules: written, edited, read back, and run."""

import json

import pytest
import torch
from torch import nn

from ptq_exp.correction import BitSchedule, Scheduled, parse_widths
from ptq_exp.diffusion import NoiseSchedule, TimeGrid
from ptq_exp.errors import ConfigError, DataError, QuantizationError
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_, select_row

GRID = TimeGrid.from_schedule(NoiseSchedule.latent_diffusion(), 4)
TIMES = tuple(GRID.timesteps.tolist())


@pytest.mark.parametrize(
    ("text", "widths"),
    [("[8]*2+[4]*3", [8, 8, 4, 4, 4]), (" 2*[8, 4] ", [8, 4, 8, 4]), ("[6]", [6]), ([8, 4], [8, 4])],
)
def test_widths_are_read_from_lists_and_expressions(text, widths):
    assert parse_widths(text) == widths


@pytest.mark.parametrize(
    "text",
    ["", "[8]*", "8", "[8.0]", "[True]", "open('x')", "[8]*[4]", "[[8]]", "[8]*10**9", "[8]*10000000", "(" * 500, []],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match="give a list of one width per step"):
        parse_widths(text)


def test_a_schedule_is_saved_edited_and_read_back(tmp_path):
    path = tmp_path / "bit_schedule.json"
    schedule = BitSchedule(8, (4, 4, 8, 8), TIMES, "budget")
    schedule.save(path)
    assert BitSchedule.load(path) == schedule
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"activation": "[4]*1 + [8]*3"}))
    assert BitSchedule.load(path).activation == (4, 8, 8, 8)
    path.write_text(json.dumps(content | {"activation": [4, 8, 8]}))
    with pytest.raises(ConfigError, match="has 3 widths, but the sampler takes 4 steps"):
        BitSchedule.load(path)
    path.write_text(json.dumps(content | {"activation": [4, 8, 8, 9]}))
    with pytest.raises(ConfigError, match=r"bits.schedule=9: choose 2\.\.8"):
        BitSchedule.load(path)
    for broken in ("{", "[]", "{}", json.dumps({"activation": 8, "timesteps": 3, "weight": 8})):
        path.write_text(broken)
        with pytest.raises(DataError, match="is no bit schedule"):
            BitSchedule.load(path)


def test_shares_and_rows():
    schedule = BitSchedule(8, (4, 4, 8, 4), TIMES)
    assert schedule.widths == (4, 8) and schedule.shares([4, 6, 8]) == [0.75, 0.0, 0.25]
    assert schedule.rows([4, 6, 8]).tolist() == [0, 0, 2, 0]
    with pytest.raises(ConfigError, match=r"uses 4 bits, but only \[6, 8\] are calibrated"):
        schedule.rows([6, 8])


def test_a_schedule_belongs_to_its_grid():
    schedule = BitSchedule(8, (4, 4, 8, 8), TIMES)
    schedule.check(GRID)
    with pytest.raises(ConfigError, match="was made for 4 steps at the network times"):
        schedule.check(TimeGrid.from_schedule(NoiseSchedule.latent_diffusion(), 5))
    with pytest.raises(ConfigError, match="step 2 has 8 bits, an earlier one of the same network time"):
        BitSchedule(8, (4, 4, 8, 8), (9.0, 5.0, 5.0, 1.0))


class Network(nn.Module):
    """One convolution behind the signature of a denoiser."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, y=None):
        return self.conv(x)


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    network = Network()
    x = torch.randn(16, 1, 8, 8)
    rules = Policy(first=(), last=(), attention=False).rules(Widths(8, (4, 8)))
    quantize_(network, rules, (x[:1], torch.zeros(1)))
    calibrate_(network, "mse", [(x, None)])
    return network, x


@torch.no_grad()
def test_each_step_runs_at_its_width(quantized):
    network, x = quantized
    outputs = []
    for row in (0, 1):
        select_row(network, row)
        outputs.append(network(x, None))
    assert not torch.equal(*outputs)
    scheduled = Scheduled(network, BitSchedule(8, (4, 8, 4, 8), TIMES).rows([4, 8]), GRID)
    for step, row in enumerate((0, 1, 0, 1)):
        assert torch.equal(scheduled(x, GRID.network_time(step, len(x))), outputs[row])


def test_mistakes_of_a_scheduled_network_are_named(quantized):
    network, x = quantized
    scheduled = Scheduled(network, torch.tensor([0, 1, 0, 1]), GRID)
    with pytest.raises(ConfigError, match="one step a batch"):
        scheduled(x[:2], GRID.network_time(torch.tensor([0, 1])))
    with pytest.raises(ConfigError, match="12.5"):
        scheduled(x[:1], torch.tensor([12.5]))
    with pytest.raises(QuantizationError, match="one activation width in all steps"):
        Scheduled(Network(), torch.tensor([0, 1, 0, 1]), GRID)
