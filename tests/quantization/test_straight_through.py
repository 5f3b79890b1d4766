"""Gradients through quantizers of number formats: as if nothing was rounded, but for what saturates."""

import pytest
import torch

from ptq_exp.quantization.affine import straight_through
from ptq_exp.quantization.quantizer.formats import activation_quantizer
from ptq_exp.quantization.specs import TensorSpec


@pytest.mark.parametrize(("bits", "dynamic"), [
    ("mxfp4", None), ("int4_g32", None), ("fp4_e2m1", "token"), (4, "token"),
])
def test_what_is_rounded_passes_the_gradient(bits, dynamic):
    quantizer = activation_quantizer(TensorSpec(bits, symmetric=True, dynamic=dynamic), linear=True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = quantizer(x)
    with torch.no_grad():
        assert torch.equal(y, quantizer(x)) and not torch.equal(y, x)
    weight = torch.arange(96.0).view(3, 32)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_what_saturates_passes_none():
    quantizer = activation_quantizer(TensorSpec("fp4_e2m1", symmetric=True))
    quantizer.set_range(quantizer.range_of(torch.ones(())))
    x = torch.tensor([0.4, -5.9, 6.5, -7.0]).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_what_is_kept_stays_and_passes_its_gradient():
    x = torch.tensor([0.4, 9.0, 9.0]).requires_grad_()
    y = straight_through(x, torch.tensor([0.5, 6.0, 6.0]), torch.tensor([0.0, 0.0, 1.0]), x.detach() <= 6)
    y.sum().backward()
    assert y.tolist() == [0.5, 6, 9] and x.grad.tolist() == [1, 0, 1]
