"""Number formats against other implementations: every code, every tie, and what lies around them."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq_exp.errors import ConfigError, QuantizationError
from ptq_exp.quantization.formats import FORMATS, SCALE_RULES, BlockFormat, IntegerGroups
from ptq_exp.quantization.formats.mx import SixtyFourths
from ptq_exp.quantization.packing import pack, unpack

GOLDEN = Path(__file__).parents[1] / "golden" / "kit"
ELEMENTWISE = ("fp8_e4m3fn", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")
MX = {
    "mxfp8_e4m3": "fp8_e4m3fn", "mxfp8_e5m2": "fp8_e5m2", "mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": "fp4_e2m1",
}
BLOCKS = [name for name, made in FORMATS.items() if isinstance(made, BlockFormat)]
BITS = {
    "fp8_e4m3fn": 8, "fp4_e2m1": 4, "mxfp8_e4m3": 8.25, "mxfp6_e3m2": 6.25, "mxfp4": 4.25, "mxint8": 8.25, "nvfp4": 4.5,
    "nf4": 4.5, "int4_g64": 4.25, "int4_g32": 4.5, "int2_g32": 2.5,
}


def same(found, expected) -> bool:
    """Equal, NaN at the same places, zeros of the same sign."""
    found, expected = np.asarray(found), np.asarray(expected)
    known = ~np.isnan(expected)
    return np.array_equal(found, expected, equal_nan=True) and np.array_equal(
        np.signbit(found[known]), np.signbit(expected[known])
    )


def golden(name: str):
    return np.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_code_tie_and_edge_of_the_scalar_formats(name):
    stored, made = golden("formats"), FORMATS[name]
    values, x = stored[f"{name}/values"], torch.from_numpy(stored[f"{name}/cast_in"])
    codes = stored[f"{name}/cast_spec_sat"]
    assert made.values.dtype == torch.float64 and same(made.values, values)
    assert np.array_equal(made.encode(x), codes)
    for cast in (made.cast(x), made.cast(x.double())):
        assert same(cast, values[codes])
    assert same(made.decode(torch.from_numpy(codes)), values[codes].astype(np.float32))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_16_bit_types_are_those_of_their_values(name, dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)  # all of them
    found = FORMATS[name].cast(x)
    assert found.dtype == dtype and same(found.float(), FORMATS[name].cast(x.float()))


def test_mxint8_has_sixty_fourths():
    assert same(SixtyFourths().values, golden("formats")["int8_s1p6/values"])


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", MX)
def test_microscaling_scales_and_codes(name, rule):
    stored, made, key = golden("mx"), replace(FORMATS[name], rule=rule), f"{MX[name]}/{rule}"
    x = torch.from_numpy(stored["x"])
    encoded = made.encode(x)
    assert np.array_equal(encoded.scales["block_scale"], stored[f"{key}/scale_e8m0"])
    assert np.array_equal(encoded.codes, stored[f"{key}/code"])
    for found in (made.decode(encoded), made.fake_quantize(x), made.fake_quantize(x.double()).float()):
        assert same(found, stored[f"{key}/dequant"])


def test_mxint8_scales_and_codes():
    stored, made = golden("mx"), FORMATS["mxint8"]
    x = torch.from_numpy(stored["x"])
    encoded = made.encode(x)
    assert np.array_equal(encoded.scales["block_scale"], stored["int8/floor/scale_e8m0"])
    assert np.array_equal(encoded.codes.view(torch.int8), stored["int8/floor/code"])
    assert np.array_equal(made.fake_quantize(x), stored["int8/floor/dequant"])


@pytest.mark.parametrize("name", MX)
def test_a_block_with_nan_becomes_nan_and_infinity_saturates(name):
    stored = golden("mx")
    x = torch.from_numpy(stored["special/x"])
    for rule in ("floor", "rceil"):
        made = replace(FORMATS[name], rule=rule)
        assert np.array_equal(made.scales(x)["block_scale"], stored[f"special/{MX[name]}/{rule}/scale_e8m0"])
        assert torch.equal(made.fake_quantize(x).isnan().all(1), x.isnan().any(1))
        assert not bool(made.fake_quantize(x).isinf().any())


@pytest.mark.parametrize("name", BLOCKS)
def test_nan_is_not_hidden(name):
    x = torch.ones(2, 128)
    x[0, 3] = torch.nan
    found = FORMATS[name].fake_quantize(x, torch.ones(()))
    assert bool(found[0, : FORMATS[name].block].isnan().all()) and not bool(found[1].isnan().any())


@pytest.mark.parametrize(("name", "level"), [("nvfp4", "two_level"), ("nvfp4_one_level", "one_level")])
def test_nvfp4_scales_and_codes(name, level):
    stored, made = golden("nvfp4"), FORMATS[name]
    x = torch.from_numpy(stored["x"])
    encoded = made.encode(x)
    assert np.array_equal(encoded.scales["block_scale"], stored[f"spec/{level}/scale"])
    assert np.array_equal(encoded.codes, stored[f"spec/{level}/code"])
    assert same(made.fake_quantize(x), made.decode(encoded))
    expected = stored[f"spec/{level}/dequant"]  # in float64, of a product of three factors
    assert np.allclose(made.decode(encoded), expected, rtol=2**-23, atol=0)
    if level == "two_level":
        assert float(encoded.scales["tensor_scale"]) == float(stored["tensor_scale"])


def test_nf4_is_that_of_bitsandbytes():
    stored, made = golden("int_nf4"), FORMATS["nf4"]
    weight = torch.from_numpy(stored["w"])  # rows of whole blocks, so that these do not cross rows
    encoded = made.encode(weight)
    assert np.array_equal(made.values.float(), stored["nf4/table"])
    assert np.array_equal(encoded.codes, stored["nf4/bnb_bs64/code"])
    assert np.array_equal(encoded.scales["block_scale"].flatten(), stored["nf4/bnb_bs64/absmax"])
    assert np.array_equal(made.fake_quantize(weight), stored["nf4/bnb_bs64/dequant"])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_integer_groups(size):
    stored = golden("int_nf4")
    weight, scale = torch.from_numpy(stored["w"]), stored[f"absmax_qmax/b4g{size}/scale"]
    made = IntegerGroups("exact", size, torch.float32, 4)
    encoded = made.encode(weight)
    assert np.allclose(encoded.scales["block_scale"], scale, rtol=1e-6, atol=0)
    found, ratio = made.values[encoded.codes.long()].numpy(), weight.numpy() / np.maximum(scale, 1e-30).repeat(size, 1)
    tie = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-5
    assert np.array_equal(found[~tie], stored[f"absmax_qmax/b4g{size}/code"][~tie]) and tie.mean() < 0.01
    half = replace(made, scale_dtype=torch.float16)  # elements are chosen with the scale as it is stored
    again = half.encode(weight)
    assert torch.equal(half.decode(again), half.fake_quantize(weight))


def test_signed_scales_use_the_lowest_integer():
    stored = golden("int_nf4")
    rows = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]  # with one largest entry in each group
    weight = torch.from_numpy(stored["w"])[rows]
    made = IntegerGroups("exact", 32, torch.float32, 4, signed_scale=True)
    expected = stored["nncf_sym/b4g32/dequant"][rows]
    assert np.allclose(made.fake_quantize(weight), expected, atol=1e-6)
    constant = torch.full((1, 32), 0.25)
    assert torch.equal(made.fake_quantize(constant), constant) and int(made.encode(constant).codes[0, 0]) == 8


@pytest.mark.parametrize("width", [2, 3, 4])
def test_codebooks_have_the_error_of_another_implementation(width):
    stored = golden("int_nf4")
    weight = torch.from_numpy(stored["w"])
    found = FORMATS[f"codebook{width}"].fake_quantize(weight)
    other = torch.from_numpy(stored[f"sdnq_codebook/b{width}/dequant"])
    error, expected = ((values - weight).square().sum(1) for values in (found, other))
    assert bool((error <= 1.01 * expected + 1e-6).all())
    assert torch.equal(found, FORMATS[f"codebook{width}"].fake_quantize(weight.clone()))


def data(seed: int = 0, columns: int = 77) -> torch.Tensor:
    """Rows of different sizes, one of zeros, one of -0, one of one value, one that only float32 subnormals hold."""
    x = torch.randn(12, columns, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-3, 3, 12)[:, None]
    x[0], x[1], x[2], x[3] = 0, -0.0, 0.3, x[3] * 1e-38
    return x


@pytest.mark.parametrize("name", FORMATS)
def test_values_of_the_format_stay(name):
    made, x = FORMATS[name], data()
    if not isinstance(made, BlockFormat):
        once = made.cast(x)
        assert same(made.cast(once), once)
    else:
        scales = made.scales(x)
        once = made.cast(x, scales)
        assert same(made.cast(once, scales).abs(), once.abs())
        if name.startswith("mx") or name in ("nf4", "nvfp4_one_level"):
            assert same(made.fake_quantize(once), once)  # the scales are found anew
    assert bool(once.isfinite().all()) and once.shape == x.shape and once.dtype == x.dtype
    assert bool((once[:2] == 0).all())


@pytest.mark.parametrize("levels", ["", "_one_level"])
def test_four_over_six_takes_the_better_scale_of_each_block(levels):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[0], x[1, :16] = 0, torch.tensor([4.0, -4, 2, 3] * 4)
    best, six = FORMATS[f"nvfp4_4over6{levels}"], FORMATS[f"nvfp4{levels}"]
    four = replace(six, tops=(4.0,))
    scale = six.scale_of(x.abs().amax()) if six.tensor_scale else None
    errors = [(made.fake_quantize(x, scale) - x).square().unflatten(-1, (4, 16)).sum(-1) for made in (best, six, four)]
    assert torch.equal(errors[0], torch.minimum(errors[1], errors[2]))
    assert bool((errors[0] < errors[1]).any()) and bool((errors[0] < errors[2]).any())
    found = best.fake_quantize(x, scale)
    assert torch.equal(best.decode(best.encode(found, scale)), found)
    if levels:
        assert torch.equal(found[1, :16], x[1, :16])  # 3 and 2 are in the elements' reach with 4 as the largest


def test_values_of_nvfp4_are_recognised_whatever_their_block_scale():
    made = FORMATS["nvfp4"]
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(4)) * torch.logspace(-7, 0, 512)[:, None]
    scale = made.scale_of(x.abs().amax())
    once = made.fake_quantize(x, scale)
    again = made.fake_quantize(once, scale)
    assert bool((again != once).any())  # scales below the normal numbers of e4m3
    assert made.off_grid(once, scale) == 0 and made.off_grid(x, scale) > 0


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("_signed")])
def test_rounding_is_monotone_in_a_block_and_symmetric(name):
    made = FORMATS[name]
    x = torch.randn(8, made.block or 64, generator=torch.Generator().manual_seed(3)).sort(1).values
    quantize = made.fake_quantize if isinstance(made, BlockFormat) else made.cast
    assert bool((quantize(x).diff(dim=1) >= 0).all())
    if name != "nf4" and not name.startswith("codebook"):
        assert torch.equal(quantize(-x), -quantize(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_codes_and_scales_are_all_that_is_needed(name):
    made, x = FORMATS[name], data(1)
    encoded = made.encode(x)
    assert same(made.decode(encoded).abs(), made.fake_quantize(x).abs())
    packed = pack(encoded.codes.numpy(), made.bits)
    codes = torch.tensor(unpack(packed, made.bits, x.numel())).view(x.shape)
    assert torch.equal(codes, encoded.codes)
    stored = sum(8 * value.numel() * value.element_size() for value in encoded.scales.values())
    assert stored == len(x) * made.scale_bits(x.shape[1]) + 32 * made.tensor_scale
    like = made.scale_like(tuple(x.shape))
    assert {key: (v.shape, v.dtype) for key, v in like.items()} == {
        key: (v.shape, v.dtype) for key, v in encoded.scales.items()
    }
    with pytest.raises(QuantizationError, match="NaN"):
        made.encode(torch.full((1, 4), torch.nan))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_begin_with_each_row_and_the_last_may_be_short(name):
    made = FORMATS[name]
    x = data(2)
    scale = None if not made.tensor_scale else made.scale_of(x.abs().amax())
    apart = torch.stack([made.fake_quantize(row, scale) for row in x])
    assert torch.equal(made.fake_quantize(x, scale), apart)
    if made.block:
        cut = made.fake_quantize(x[:, : made.block], scale)
        assert torch.equal(made.fake_quantize(x, scale)[:, : made.block], cut)


def test_bits_per_value_count_the_scales():
    assert {name: FORMATS[name].bits_per_value for name in BITS} == BITS


def test_an_unknown_rule_of_scales_is_refused():
    with pytest.raises(ConfigError, match="choose one of floor, ceil, even, rceil"):
        replace(FORMATS["mxfp4"], rule="round")


def test_a_block_format_that_says_too_little_cannot_be_made():
    @dataclass(frozen=True)
    class Half(BlockFormat):
        @property
        def bits(self):
            return 8

    with pytest.raises(TypeError, match="abstract"):
        Half("half", 32)
