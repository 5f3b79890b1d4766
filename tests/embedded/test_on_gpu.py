"""On a GPU a quantized network computes what it computes on the CPU."""

import pytest
import torch

from ptq_exp.embedded import digits_model
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.cuda
def test_a_quantized_forward_agrees_with_that_of_the_cpu():
    """Sums of another order may round a value to the next level: far less than what quantizing itself changes."""
    model = digits_model()
    grid, records = model.time_grid(4), []
    model.sample(model.denoiser, grid, range(4), 0, on_step=records.append)
    quantized = model.copy_denoiser()
    quantize_(quantized, Policy().rules(Widths(4, 8)), model.example_inputs())
    calibrate_(quantized, "minmax", [(r.x, grid.network_time(r.step, len(r.x))) for r in records])
    x, t = records[1].x, grid.network_time(records[1].step, 4)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        full, expected = model.denoiser(x, t), quantized(x, t)
        found = quantized.cuda()(x.cuda(), t.cuda())
        on_gpu = model.denoiser.cuda()(x.cuda(), t.cuda())
    assert found.is_cuda and distance(on_gpu.cpu(), full) < 1e-4
    assert distance(found.cpu(), expected) < 0.1 * distance(expected, full)
