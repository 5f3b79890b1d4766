"""Every operator is counted, known to multiply nothing, or named; then coverage of everything is not claimed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq_exp.quantization import Policy, Widths, calibrate_, describe, proven, quantize_
from ptq_exp.quantization.cost.macs import trace
from ptq_exp.quantization.cost.operators import without_products

X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
MAP = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """``function(part, x)``."""

    def __init__(self, function, part=None):
        super().__init__()
        self.function, self.part = function, part

    def forward(self, x):
        return self.function(self.part, x)


@torch.library.custom_op("ptq_exp_test::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.mT


class Unknown(nn.Linear):
    def forward(self, x):
        return product(x, self.weight)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.mT


ATTENTION = 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8  # projections of q, k, v; of the output; two products
ENCODER = ATTENTION + 2 * 5 * 8 * 16
COUNTED = {
    "attention": (lambda m, x: m(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True), ATTENTION),
    "attention with weights": (lambda m, x: m(x, x, x, need_weights=False)[0],
                               nn.MultiheadAttention(8, 2, batch_first=True), ATTENTION),
    "encoder layer": (lambda m, x: m(x), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ENCODER),
    "encoder": (lambda m, x: m(x, src_key_padding_mask=torch.tensor([[False] * 4 + [True]])),
                nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), 2 * ENCODER),
    "fused attention": (lambda _, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), None, 400),
    "matrix and vector": (lambda _, x: x @ x[0, 0], None, 40),
    "vectors": (lambda _, x: torch.dot(x[0, 0], x[0, 1]), None, 8),
    "addmv": (lambda _, x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), None, 40),
    "addbmm": (lambda _, x: torch.addbmm(torch.zeros(5, 5), x, x.mT), None, 200),
    "einsum": (lambda _, x: torch.einsum("bij,bkj->bik", x, x), None, 200),
    "bilinear": (lambda m, x: m(x, x), nn.Bilinear(8, 8, 3), 5 * 3 * 8 * 8),
    # 4 gates of 6 in 2 directions: 8 inputs and 6 states, then 12 inputs and 6 states
    "lstm": (lambda m, x: m(x)[0], nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True),
             5 * 24 * 2 * (8 + 6 + 12 + 6)),
    "gru": (lambda m, x: m(x)[0], nn.GRU(8, 6, batch_first=True), 5 * 18 * (8 + 6)),
    "cell": (lambda m, x: m(x[:, 0])[0], nn.LSTMCell(8, 6), 24 * (8 + 6)),
    "embedding": (lambda m, x: x @ m.weight.T, nn.Embedding(10, 8), 400),
    "autograd function": (lambda _, x: Square.apply(x), None, 200),
    "scripted": (lambda m, x: m(x), torch.jit.script(nn.Linear(8, 4)), 5 * 8 * 4),
    "checkpointed": (lambda m, x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False), nn.Linear(8, 4), 160),
    "outer product": (lambda _, x: (x[..., None] * x[..., None, :]).sum(-1), None, 0),
    "moved": (lambda _, x: x.sort()[0].roll(1).flip(1)[:, x[0, :, 0].argsort()].repeat(2, 1, 1).softmax(-1), None, 0),
    "filled": (lambda _, x: F.pad(x.clone().masked_fill_(x > 1, 0).clamp_(0).tril(), (1, 1)).topk(2)[0], None, 0),
    "normalised": (lambda _, x: F.rms_norm(F.layer_norm(F.silu(x), (8,)), (8,)).std(-1), None, 0),
}
OF_MAPS = {
    "conv3d": (lambda m, x: m(x[:, :, None]), nn.Conv3d(4, 3, (1, 3, 3)), 3 * 36 * 4 * 9),
    "transposed": (lambda m, x: m(x), nn.ConvTranspose2d(4, 3, 3, stride=2), 4 * 64 * 3 * 9),
    "unfolded": (lambda _, x: F.unfold(x, 3).mT @ torch.ones(36, 2), None, 36 * 36 * 2),
    "resampled": (lambda _, x: F.interpolate(F.grid_sample(x, torch.zeros(1, 4, 4, 2), align_corners=False), size=9),
                  None, 0),
    "pooled": (lambda _, x: F.adaptive_avg_pool2d(F.max_pool2d(F.avg_pool2d(x, 2), 2), 1), None, 0),
    "shuffled": (lambda _, x: F.group_norm(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 2), None, 0),
}


@pytest.mark.parametrize("name", [*COUNTED, *OF_MAPS])
def test_multiplications_are_counted_by_hand(name):
    function, part, macs = (COUNTED | OF_MAPS)[name]
    net = Call(function, part).eval().requires_grad_(False)
    found = trace(net, (X if name in COUNTED else MAP,))
    assert (found.total_macs, dict(found.uncounted)) == (macs, {})
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("function", "operator"), [
    (lambda _, x: torch.fft.fft2(x).real, "aten._fft_c2c"),
    (lambda _, x: torch.linalg.svd(x[0, 0])[1], "aten._linalg_svd"),
    (lambda _, x: torch.linalg.inv(x[0, 0]), "aten.linalg_inv_ex"),
    (lambda _, x: torch.cdist(x, x), "aten._cdist_forward"),
    (lambda _, x: torch.sparse.mm(x[0, 0].to_sparse(), x[0, 0]), "aten._sparse_addmm"),
    (lambda _, x: product(x, x), "ptq_exp_test.product"),
], ids=["fft", "svd", "inverse", "distance", "sparse", "custom"])
def test_what_is_not_counted_is_named_and_everything_is_not_claimed(function, operator):
    net = nn.Sequential(nn.Conv2d(4, 4, 1), Call(function)).eval().requires_grad_(False)
    report = quantize_(net, Policy(attention=False, first=(), last=()).rules(Widths(8, 8)), (MAP,))
    assert any(entry.startswith(f"{operator} (called") for entry in report.not_counted)
    totals, plain = report.totals, report.to_dict()
    assert totals["coverage"] == {"conv_linear": 1.0, "everything": None}
    assert plain["not_counted"] == list(report.not_counted)
    lines = report.summary().splitlines()
    (everything,) = (line for line in lines if line.startswith("everything"))
    assert "%" not in everything and any(line.startswith("not counted") and operator in line for line in lines)
    assert describe(net, (MAP,)) == report


def test_a_layer_that_an_unknown_operator_computes_keeps_the_macs_of_its_shape():
    net = nn.Sequential(nn.Linear(8, 8), Unknown(8, 4)).eval().requires_grad_(False)
    report = quantize_(net, Policy(attention=False, first=(), last=()).rules(Widths(8, 8)), (X,))
    assert [row.macs for row in report.rows] == [5 * 8 * 8, 5 * 8 * 4]
    assert report.totals["coverage"]["conv_linear"] == pytest.approx(2 / 3)


def test_both_layouts_of_attention_have_the_same_account():
    class Net(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.first, self.attention, self.batch_first = nn.Linear(8, 8), nn.MultiheadAttention(8, 2), batch_first
            self.attention.batch_first = batch_first

        def forward(self, x):
            x = self.first(x)
            x = x if self.batch_first else x.transpose(0, 1)
            return self.attention(x, x, x)[0]

    rules = Policy(attention=False, first=(), last=()).rules(Widths(8, 8))
    reports = [
        quantize_(Net(first).eval().requires_grad_(False), rules, (X,))
        for first in (False, True)
    ]
    assert reports[0] == reports[1]
    assert reports[0].totals["macs"]["everything"] == 5 * 8 * 8 + ATTENTION


def test_the_fused_path_around_quantized_layers_is_not_taken():
    net = COUNTED["encoder"][1].eval().requires_grad_(False)
    net = Call(COUNTED["encoder"][0], net)
    x, rules = torch.randn(1, 5, 8), Policy(attention=False, first=(), last=()).rules(Widths(4, 4))
    report = quantize_(net, rules, (x,))
    calibrate_(net, "minmax", [(x,)])
    checked = proven(net, report, (x,))
    assert {row.name for row in checked.rows if row.covered} == {
        f"part.layers.{n}.linear{i}" for n in (0, 1) for i in (1, 2)
    }
    seen = []
    net.part.layers[0].linear1.input_quantizer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        net(x)
    assert seen


def test_the_list_speaks_of_operators_that_there_are():
    assert without_products(torch.ops.aten.mul.Tensor) and without_products(torch.ops.aten.silu_.default)
    assert without_products(torch.ops.aten.view_copy.default) and without_products(torch.ops.aten.copy_.default)
    for operator in (torch.ops.aten.mm, torch.ops.aten.convolution, torch.ops.aten._fft_r2c, torch.ops.aten.addmv,
                     torch.ops.aten._native_multi_head_attention, torch.ops.aten._foreach_mm):
        assert not without_products(operator.default)
    assert not without_products(torch.ops.ptq_exp_test.product.default)
