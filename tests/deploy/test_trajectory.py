"""What an engine is compared with: a few evaluations of the trajectory that the simulation draws anyway."""

import numpy as np
import pytest
import torch
from torch import nn

import ptq_exp
from ptq_exp.deploy import measure
from ptq_exp.deploy.measure import STATES, Trajectory, faithfulness
from ptq_exp.evaluation.images import to_uint8


class Scaled(nn.Module):
    """eps = x times the time, in a buffer of its own that the next call overwrites."""

    def __init__(self):
        super().__init__()
        self.register_buffer("answer", torch.zeros(2, 1))

    def forward(self, x, t, **conditions):
        return self.answer.copy_(x * t.view(-1, 1))


class Clock:
    def __init__(self, step):
        self.now, self.step = -step, step

    def __call__(self):
        self.now += self.step
        return self.now


def drawn(trajectory, steps):
    x, answers = torch.ones(2, 1), []
    for step in range(steps):
        answers.append(trajectory(x, torch.full((2,), float(step))).clone())
        x.add_(1)  # a sampler may work in place
    return answers


def test_the_first_trajectory_is_kept_and_all_go_through():
    trajectory = Trajectory(Scaled(), 9, 100.0, Clock(1.0))
    first, second = drawn(trajectory, 9), drawn(trajectory, 9)
    assert trajectory.whole and len(trajectory.kept) == STATES
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for (call, eps), step in zip(trajectory.kept, (0, 2, 4, 6, 8), strict=True):
        assert torch.equal(call.x, torch.full((2, 1), 1.0 + step)) and float(call.t[0]) == step
        assert torch.equal(eps, first[step])
    trajectory.forget()
    assert not trajectory.kept and not trajectory.whole


def test_what_takes_too_long_is_no_whole_trajectory():
    trajectory = Trajectory(Scaled(), 9, 4.5, Clock(1.0))
    assert len(drawn(trajectory, 9)) == 9 and not trajectory.whole
    assert [float(call.t[0]) for call, _ in trajectory.kept] == [0, 2, 4]
    with pytest.raises(measure._Enough):
        drawn(Trajectory(Scaled(), 9, 4.5, Clock(1.0), stops=True), 9)


def test_images_that_were_drawn_before_give_the_same_numbers(monkeypatch):
    model = ptq_exp.load_model("digits")
    how = {"n": 4, "steps": 5, "metric": "minmax", "progress": False}
    simulated, other = (ptq_exp.quantize(model, bits, **how) for bits in ("w8a8", "w4a8"))
    monkeypatch.setattr(type(other), "on", lambda self, _: simulated)
    wanted = faithfulness(other, 3, 0, 100.0)
    watched = measure.Trajectory(simulated.denoiser, len(simulated.grid), 100.0)
    images = to_uint8(model.sample(watched, simulated.grid, range(3), 0))
    calls, draw = [], measure.draw
    monkeypatch.setattr(measure, "draw", lambda *args, **named: calls.append(1) or draw(*args, **named))
    found = faithfulness(other, 3, 0, 100.0, simulated=(watched, np.concatenate([images, images])))
    assert found == wanted and found["states"] == 5 and 10 < found["psnr"] < 60 and len(calls) == 1
    watched.forget()
    assert faithfulness(other, 3, 0, 100.0, simulated=(watched, images)) == wanted and len(calls) == 3
