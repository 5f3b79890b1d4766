"""`Policy`: also the schema of the settings `quantization=`."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ptq_exp.calibration import TEMPORAL
from ptq_exp.errors import ConfigError
from ptq_exp.quantization import PerChannel, PerGroup, PerTensor, Policy, Widths
from ptq_exp.settings.schema import ExperimentConfig

FULL = yaml.safe_load((Path(__file__).parents[2] / "conf" / "quantization" / "full.yaml").read_text())
FIELDS = {field.name: field for field in dataclasses.fields(Policy)}


def test_the_default_policy_is_the_group_that_the_others_start_from():
    assert FULL.keys() == FIELDS.keys()
    assert Policy(**FULL) == Policy(name="full")
    assert isinstance(ExperimentConfig().quantization, Policy)


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.metadata["choices"]])
def test_a_word_that_is_no_choice_is_refused_with_those_that_are(name):
    choices = FIELDS[name].metadata["choices"]
    for choice in choices:
        assert getattr(Policy(**{name: choice}), name) == choice
    with pytest.raises(ConfigError, match=f"^quantization.{name}=odd: choose one of {', '.join(choices)}$"):
        Policy(**{name: "odd"})


@pytest.mark.parametrize(("name", "bad", "said"), [
    ("group_size", 0, "choose 1 or more"), ("temporal_bins", 0, "choose 1 or more"), ("smooth_alpha", 2, "choose 0..1"),
])
def test_a_number_out_of_bounds_is_refused(name, bad, said):
    with pytest.raises(ConfigError, match=f"^quantization.{name}={bad}: {said}$"):
        Policy(**{name: bad})


def test_a_policy_is_a_value():
    policy = Policy(first=["a"], keep_fp=["b", "c"])
    assert hash(policy) == hash(Policy(first=("a",), keep_fp=("b", "c")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attention = False


def test_granularity_of_the_weights():
    found = [Policy(weight_granularity=name, group_size=4).granularity for name in ("tensor", "channel", "group")]
    assert found == [PerTensor(), PerChannel(), PerGroup(4)]


def test_the_choices_along_time_are_those_of_calibration():
    assert set(FIELDS["temporal"].metadata["choices"]) == set(TEMPORAL)


def test_smoothing_has_a_short_form_that_is_put_before_the_other_transforms():
    policy = Policy(smooth=True, smooth_alpha=0.3, transforms=["other"])
    assert policy == Policy(transforms=[{"name": "smooth", "alpha": 0.3}, "other"])
    assert dataclasses.replace(policy, attention=False).transforms == policy.transforms


@pytest.mark.parametrize("settings", [{"smooth": True}, {"smooth_alpha": 0.3}])
@pytest.mark.parametrize("entry", ["smooth", {"name": "smooth", "alpha": 0.7}])
def test_smoothing_is_asked_for_once(settings, entry):
    with pytest.raises(ConfigError, match=r"^quantization.smooth.*: quantization.transforms lists smooth already"):
        Policy(transforms=[entry], **settings)


def test_widths_keep_candidates_as_a_tuple_and_one_of_them_as_a_number():
    assert Widths(8, [4, 8]) == Widths(8, (4, 8)) and Widths(8, [4]) == Widths(8, 4)
    assert Widths(8, (4, 6)).widest == 6 and Widths(8, 5).widest == 5


def test_symmetric_operands_of_attention_leave_all_other_activations_as_they_are():
    plain, symmetric = (Policy(qkv_symmetric=on).rules(Widths(8, 8)) for on in (False, True))
    changed = [(a, b) for a, b in zip(plain, symmetric, strict=True) if a != b]
    assert [a.pattern for a, _ in changed] == ["*to_[qkv]", "*"]
    operand = dataclasses.replace(plain[0].spec.input, bits=8, metric=None, headroom=1.0, symmetric=True)
    (before, after), (all_before, all_after) = changed
    assert after.spec == dataclasses.replace(before.spec, output=operand) and after.spec.is_operand
    assert all_after.spec == dataclasses.replace(all_before.spec, product=operand)
    everywhere = Policy(qkv_symmetric=True, attention=False)
    assert everywhere.rules(Widths(8, 8)) == Policy(attention=False).rules(Widths(8, 8))
