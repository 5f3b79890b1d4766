"""Products of two activations, quantized in whatever module multiplies them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_transformers import NETWORKS, built, call_of
from torch import nn

from ptq_exp.errors import QuantizationError
from ptq_exp.quantization import (
    Policy,
    QuantSpec,
    Rule,
    TensorSpec,
    Widths,
    calibrate_,
    calibrating,
    describe,
    disabled,
    load_quantized_,
    proven,
    quantize_,
    quantizers,
    refuted,
    save_quantized,
    select_row,
    set_mode,
)
from ptq_exp.quantization.products import QuantMultiplier

TRACED = ("sd3", "flux", "sana")  # attention of other classes than diffusers' `Attention` with its plain processor
MULTIPLYING = {"sd3": 3, "flux": 2, "sana": 4}


def policy(weight=8, activation=8, softmax=8, bins=1, **settings):
    widths = Widths(weight, activation, softmax, boundary=8)
    return Policy(first=(), last=(), **settings).rules(widths, bins)


@torch.no_grad()
def output(network, call):
    return network(*call[:2], **call[2])


@pytest.fixture(scope="module", params=TRACED)
def traced(request):
    """(name, quantized and calibrated network, its report, the full-precision one)."""
    original = built(request.param)
    network = copy.deepcopy(original)
    report = quantize_(network, policy(4, 6), call_of(request.param))
    calibrate_(network, "minmax", [call_of(request.param, 2)])
    return request.param, network, report, original


@pytest.mark.parametrize("name", NETWORKS)
def test_all_multiplications_of_the_networks_of_pipelines_are_covered(name):
    network, call = built(name), call_of(name)
    report = quantize_(network, policy(), call)
    assert report.totals["coverage"] == {"conv_linear": 1.0, "everything": 1.0} and not report.not_counted
    assert all(row.covered or not row.macs for row in report.rows)
    assert any(row.scope == "attention" for row in report.rows)
    assert sum(isinstance(m, QuantMultiplier) for m in network.modules()) == MULTIPLYING.get(name, 0)


def test_off_they_are_the_full_precision_network_bit_for_bit(traced):
    name, _, _, original = traced
    network, call = copy.deepcopy(original), call_of(name, 3)
    quantize_(network, policy(), call_of(name))
    with disabled(network):
        assert torch.equal(output(network, call), output(original, call))


def test_both_operands_of_every_product_lie_on_their_grids(traced):
    name, network, report, _ = traced
    checked = proven(network, report, call_of(name, 3, seed=7))
    assert refuted(report, checked) == [] and checked.totals["coverage"]["everything"] == 1.0


def test_a_product_whose_operand_changes_on_its_way_is_refuted(traced):
    name, network, report, _ = traced
    network = copy.deepcopy(network)
    rows = [row for row in report.rows if row.scope == "attention" and row.macs]
    changed = next(m for m in network.modules() if isinstance(m, QuantMultiplier)).products
    for product in changed.values():
        product.right_quantizer.register_forward_hook(lambda _, args, y: y * 1.01)
    checked = refuted(report, proven(network, report, call_of(name)))
    assert len(checked) == len(changed) < len(rows)
    assert all("weight does not" in row.reason for row in checked)


def test_a_quantized_network_is_described_as_when_it_was_quantized(traced):
    name, network, report, _ = traced
    assert describe(network, call_of(name)) == report


def test_copies_and_pickles_compute_the_same(traced):
    name, network, _, original = traced
    call = call_of(name, 2, seed=5)
    wanted = output(network, call)
    found = copy.deepcopy(network)
    assert torch.equal(output(found, call), wanted)
    module = next(m for m in network.modules() if isinstance(m, QuantMultiplier))
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is type(module) and loaded.state_dict().keys() == module.state_dict().keys()
    set_mode(found, "off")
    assert torch.equal(output(network, call), wanted)
    kinds = {key: type(m) for key, m in original.named_modules()}
    assert all(isinstance(network.get_submodule(key), kind) for key, kind in kinds.items())


def test_saved_and_loaded_they_give_the_same_bits(traced, tmp_path):
    name, network, report, original = traced
    call = call_of(name, 2, seed=6)
    save_quantized(tmp_path, network, policy(4, 6), report, {})
    loaded = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert load_quantized_(loaded, tmp_path, call_of(name)) == report
    assert torch.equal(output(loaded, call), output(network, call))


@pytest.mark.parametrize(("name", "qk"), [
    # 16 image and 5 text tokens of width 16: two joint ones, and one of the image tokens alone
    ("sd3", [21 * 21 * 16, 16 * 16 * 16, 21 * 21 * 16]),
    ("flux", [21 * 21 * 32, 21 * 21 * 32]),
    # text: 64 tokens of width 24 read 5
    ("sana", [64 * 5 * 24] * 2),
])
def test_macs_of_products(name, qk):
    rows = describe(built(name), call_of(name)).rows
    assert sorted(row.macs for row in rows if row.name.endswith(".qk")) == sorted(qk)
    assert sorted(row.macs for row in rows if row.name.endswith(".av")) == sorted(qk)
    if name == "sana":  # v with a row of ones [13, 64] times k [64, 12], and that times q [12, 64], of two heads
        linear = [row.macs for row in rows if "product" in row.name]
        assert linear == [2 * 13 * 64 * 12] * 4


def test_layers_give_operands_to_products_unrounded_where_these_are_quantized_themselves():
    network = built("sd3")
    quantize_(network, policy(), call_of("sd3"))
    joint = network.component.transformer_blocks[0].attn
    assert all(type(getattr(joint, f"to_{role}").output_quantizer) is nn.Identity for role in "qkv")
    kept = built("sd3")
    quantize_(kept, [Rule("*.attn", None, "kept"), *policy()], call_of("sd3"))
    joint = kept.component.transformer_blocks[0].attn
    assert not isinstance(joint, QuantMultiplier) and joint.to_q.output_quantizer.bits == 8


# ---- hand-computed: one attention of joint tokens, q and k normalised


class Joint(nn.Module):
    """Attention over two kinds of tokens; `function`: of q, k, v, mask."""

    def __init__(self, function) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.more = (nn.Linear(8, 8) for _ in range(4))
        self.norm_q, self.norm_k, self.function = nn.RMSNorm(4), nn.RMSNorm(4), function

    def operands(self, x, y):
        """q, k, v of two heads of width 4, of all tokens."""
        q, k, v = (torch.cat((layer(x), self.more(y)), 1).unflatten(2, (2, 4)).transpose(1, 2)
                   for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x, y, mask=None):
        return self.function(*self.operands(x, y), mask).transpose(1, 2).flatten(2)


def added(mask):
    """`mask` as what is added to the scores."""
    if mask is None:
        return torch.zeros(())
    return torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_keywords(q, k, v, mask):
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.5, dropout_p=0.0)


def spelled_out(q, k, v, mask):
    return torch.matmul((q @ k.transpose(-1, -2) / 2 + added(mask)).softmax(-1), v)


def in_batches(q, k, v, mask):
    n = q.shape[0]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = added(mask).expand(n, 2, 7, 7).flatten(0, 1)
    weights = F.softmax(torch.baddbmm(bias, q, k.mT, alpha=0.5), -1)
    return torch.bmm(weights, mat2=v).unflatten(0, (n, 2))


def by_einsum(q, k, v, mask):
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) / 2 + added(mask)).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", [weights, v])


def q_(quantizer, x):
    """`x` on the grid of a quantizer, computed from its buffers."""
    scale, zero, low, high = (getattr(quantizer, key).double() for key in ("scale", "zero_point", "qmin", "qmax"))
    return ((x.double() / scale).round() + zero).clamp(low, high).sub(zero).mul(scale).float()


def tokens(n=3):
    made = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, 8, generator=made), torch.randn(n, 2, 8, generator=made)


BOOL = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool).view(1, 1, 1, 7)
BIAS = torch.randn(1, 2, 7, 7, generator=torch.Generator().manual_seed(4))
PRODUCTS = [QuantSpec(softmax=TensorSpec(8, symmetric=True), product=TensorSpec(4))]


def joint(function, mask=None, spec=PRODUCTS[0]):
    torch.manual_seed(0)
    network, call = Joint(function).eval(), (*tokens(), mask)
    report = quantize_(network, [Rule("", spec), Rule("*", None)], (*tokens(1), mask))
    calibrate_(network, "minmax", [call])
    return network, report, call


@pytest.mark.parametrize("function", [fused, by_keywords, spelled_out, in_batches, by_einsum])
@pytest.mark.parametrize("mask", [None, BIAS, BOOL], ids=["none", "float", "bool"])
def test_joint_attention_by_hand(function, mask):
    network, _, (x, y, mask) = joint(function, mask)
    qk, av = network.products.values()
    with torch.no_grad():
        q, k, v = network.operands(x, y)
        scores = q_(qk.left_quantizer, q) @ q_(qk.right_quantizer, k).mT / 2 + added(mask)
        wanted = q_(av.left_quantizer, scores.softmax(-1)) @ q_(av.right_quantizer, v)
        found = network(x, y, mask)
        wanted = wanted.transpose(1, 2).flatten(2)
        full = network.function(q, k, v, mask).transpose(1, 2).flatten(2)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (wanted - full).abs().max() > 0.05  # 4 bits make a difference
    bits = [(qk.left_quantizer.bits, qk.right_quantizer.bits), (av.left_quantizer.bits, av.right_quantizer.bits)]
    assert bits == [(4, 4), (8, 4)] and av.left_quantizer.symmetric and not qk.left_quantizer.symmetric


@pytest.mark.parametrize("mask", [None, BIAS, BOOL, "causal", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_torchs_attention_where_the_grids_are_fine(mask, dtype, groups):
    """With 16 bits everywhere, to their rounding."""
    settings = {"attn_mask": mask}
    if mask == "causal":
        settings = {"is_causal": True}
    elif mask == "empty":  # the first query reads nothing
        settings = {"attn_mask": torch.ones(7, 7, dtype=torch.bool).index_fill(0, torch.tensor(0), False)}
    elif mask is not None and mask.is_floating_point():
        settings = {"attn_mask": mask.to(dtype)}

    class Net(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=groups > 1, **settings)

    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 4, generator=made).to(dtype) for heads in (2, 2 // groups, 2 // groups))
    network, fine = Net(), TensorSpec(16)
    quantize_(network, [Rule("*", QuantSpec(softmax=TensorSpec(16, symmetric=True), product=fine))], (q, k, v))
    calibrate_(network, "minmax", [(q, k, v)])
    found, wanted = network(q, k, v), Net()(q, k, v)
    assert found.dtype == dtype and torch.allclose(found, wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-3)


# ---- what is a product, whose it is, and what cannot be quantized


class Around(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, x):
        return self.function(self, self.layer(x))


@pytest.mark.parametrize("function", [
    lambda net, x: x @ net.matrix, lambda net, x: torch.matmul(x, net.table), lambda net, x: net.table @ x,
    lambda net, x: torch.einsum("bij->bji", x), lambda net, x: x @ (net.matrix * 2),
], ids=["parameter", "buffer", "from the left", "one operand", "made of a parameter"])
def test_products_with_what_is_no_activation_are_left_alone(function):
    network, x = Around(function), torch.randn(1, 4, 4)
    report = quantize_(network, [Rule("layer", QuantSpec(TensorSpec(8), TensorSpec(8)))], (x,))
    assert not isinstance(network, QuantMultiplier)
    assert {row.scope for row in report.rows} <= {"conv_linear", "other"}


def test_products_count_in_the_order_of_calls():
    def function(net, x):
        mixed = torch.bmm(x, x.mT) @ net.matrix
        return torch.mm(mixed[0], x[0]) + F.scaled_dot_product_attention(x, x, x) + torch.addmm(x[0], x[0], x[0])

    network, x = Around(function), torch.randn(1, 4, 4)
    report = quantize_(network, [Rule("*", QuantSpec(*[TensorSpec(8)] * 2, product=TensorSpec(5)))], (x,))
    products = {row.name: row for row in report.rows if row.scope == "attention"}
    assert list(products) == ["product", "product_2", "qk", "av", "product_3"]
    assert [(row.weight_bits, row.activation_bits) for row in products.values()] == [(5, 5)] * 3 + [(5, None), (5, 5)]
    assert products["av"].reason == "an operand has no quantizer"
    assert all(row.macs == 64 and row.type == f"Around.{name.partition('_')[0]}" for name, row in products.items())
    with disabled(network):
        assert torch.equal(network(x), Around.forward(network, x))


class Otherwise(nn.Module):
    """Multiplies once for few rows, and twice for more."""

    def forward(self, x):
        return x @ x.mT if x.shape[-2] < 4 else F.scaled_dot_product_attention(x, x, x)


def test_another_call_than_the_example_is_an_error_that_says_what_to_do():
    network = nn.Sequential(Otherwise())
    spec = QuantSpec(product=TensorSpec(8))
    quantize_(network, [Rule("*", spec)], (torch.randn(1, 3, 4),))
    with pytest.raises(QuantizationError, match=r"^0 multiplies.*quantization\.keep_fp"), calibrating(network):
        network(torch.randn(1, 5, 4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Otherwise()

    def forward(self, x):
        return self.core(x[:, :3]).sum() + self.core(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Otherwise()

    def forward(self, x):
        return self.core(x @ x.mT)


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = Otherwise()
        self.core.forward = lambda x: x @ x.mT

    def forward(self, x):
        return self.core(x)


@pytest.mark.parametrize(("kind", "name", "reason"), [
    (Twice, "core", "it multiplies otherwise from one call to the next"),
    (Nested, "", "modules inside of it multiply activations, too: core"),
    (Replaced, "core", "its forward was replaced by another function"),
])
def test_what_cannot_be_quantized_says_why(kind, name, reason):
    network, x = kind(), torch.randn(1, 5, 4)
    wanted = network(x)
    report = quantize_(network, [Rule("*", QuantSpec(product=TensorSpec(8)))], (x,))
    assert not isinstance(network.get_submodule(name), QuantMultiplier)
    rows = [row for row in report.rows if row.scope == "attention" and row.type.startswith("Nested") == (name == "")]
    assert rows and all(row.reason == f"left alone: {reason}" and not row.covered for row in rows)
    with disabled(network):
        assert torch.equal(network(x), wanted)


# ---- the rest of the framework sees them


@torch.no_grad()
def test_a_compiled_network_computes_the_same():
    network, _, call = joint(fused, BIAS)
    wanted = network(*call)
    assert torch.equal(torch.compile(network, backend="eager")(*call), wanted)
    with disabled(network):
        off = network(*call)
        assert torch.allclose(torch.compile(network, backend="eager")(*call), off, atol=1e-6)  # it spells norms out
    assert (off - wanted).abs().max() > 0.05


def test_ranges_of_bins_and_candidate_widths_have_one_step():
    for rules in (policy(bins=2), policy(activation=(4, 8))):
        network = built("sd3")
        quantize_(network, rules, call_of("sd3"))
        quantizer = network.component.transformer_blocks[0].attn.products["qk"].left_quantizer
        assert len(quantizer.scale) == 2
        steps = {id(q.step) for _, q in quantizers(network) if getattr(q, "step", None) is not None}
        assert len(steps) == 1
        select_row(network, 1)
        assert int(quantizer.step.row) == 1


def test_qkv_symmetric_is_of_their_operands():
    network = built("flux")
    quantize_(network, policy(qkv_symmetric=True), call_of("flux"))
    products = network.component.transformer_blocks[0].attn.products
    assert products["qk"].left_quantizer.symmetric and products["av"].right_quantizer.symmetric
    assert not network.component.transformer_blocks[0].attn.to_q.input_quantizer.symmetric
    unquantized = built("flux")
    report = quantize_(unquantized, policy(attention=False), call_of("flux"))
    assert not any(isinstance(m, QuantMultiplier) for m in unquantized.modules())
    reasons = {row.reason for row in report.rows if row.scope == "attention"}
    assert reasons == {"rule '*' quantizes no products"}


def test_observed_ranges_are_those_of_the_operands():
    network, _, (x, y, _) = joint(fused)
    with torch.no_grad():
        q, _, v = network.operands(x, y)
    for quantizer, tensor in ((network.products["qk"].left_quantizer, q), (network.products["av"].right_quantizer, v)):
        step = float(quantizer.scale)
        low, high = ((getattr(quantizer, end) - quantizer.zero_point) * step for end in ("qmin", "qmax"))
        assert abs(float(low) - float(tensor.min())) <= step and abs(float(high) - float(tensor.max())) <= step
