"""Nested arguments as one level and back; calls as state, time and conditions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_exp.errors import ConfigError
from ptq_exp.pipelines import CallLayout
from ptq_exp.pipelines.nested import bound_arguments, containers_of, flattened, nested

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3),
                   st.integers(0, 3).map(lambda n: torch.arange(n)))
NAMES = st.text(st.characters(codec="ascii"), max_size=3)
ARGUMENTS = st.dictionaries(st.from_regex("[a-z_]{1,3}", fullmatch=True), st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=12), st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.one_of(NAMES, st.integers(0, 3)), inner, max_size=3)), max_leaves=12), max_size=4)


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one is other
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@settings(max_examples=60, deadline=None)
@given(ARGUMENTS)
def test_nested_undoes_flattened(arguments):
    flat = flattened(arguments)
    assert equal(nested(flat, containers_of(arguments)), arguments)
    assert all(isinstance(name, str) for name in flat)
    assert equal(flattened(nested(flat, containers_of(arguments))), flat)


def test_names_of_the_arguments_of_real_networks():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    flat = flattened({"x": a, "added_cond_kwargs": {"text_embeds": b, "ids": None}, "residuals": (a, [b, c]), "kw": {}})
    assert list(flat) == ["x", "added_cond_kwargs.text_embeds", "added_cond_kwargs.ids", "residuals.0", "residuals.1.0",
                          "residuals.1.1", "kw"]
    many = {"residuals": tuple(torch.tensor(i) for i in range(12))}
    assert [int(value) for value in nested(flattened(many), containers_of(many))["residuals"]] == list(range(12))


def test_arguments_are_bound_by_name():
    def forward(sample, timestep, *, scale=2, **further):
        raise AssertionError

    assert bound_arguments(forward, (1, 2), {"more": 3}) == {"sample": 1, "timestep": 2, "more": 3}
    with pytest.raises(TypeError):
        bound_arguments(forward, (1,), {})


def layout(one=None, two=None, rows=2, time=None):
    def arguments(rows, changes):
        t = torch.tensor(7) if time is None else time(rows)
        return {"sample": torch.zeros(rows, 3, 4, 4), "timestep": t, "ids": torch.zeros(5, 3), "names": ["a"],
                "added": {"text": torch.zeros(rows, 6), "scale": 1.5}} | (changes or {})

    return CallLayout.of(arguments(rows, one), arguments(2 * rows, two)), arguments


def test_a_call_and_its_arguments():
    found, arguments = layout()
    assert found.conditions == {"added.text": torch.float32}
    assert set(found.constants) == {"ids", "names", "added.scale"}
    given_ = arguments(6, {"added": {"text": torch.randn(6, 6), "scale": 1.5}})
    call = found.call(given_)
    assert call.t.tolist() == [7.0] * 6 and call.t.dtype == torch.float32
    back = found.arguments(*call)
    assert back["timestep"].dtype == torch.int64 and back["timestep"].tolist() == [7] * 6
    assert torch.equal(back["added"]["text"], given_["added"]["text"]) and back["added"]["scale"] == 1.5
    assert back["names"] == ["a"] and torch.equal(back["ids"], given_["ids"])


@pytest.mark.parametrize(("time", "dtype"), [
    (lambda rows: 7, None), (lambda rows: 7.5, None), (lambda rows: np.float64(7.5), None),
    (lambda rows: torch.tensor(7.5, dtype=torch.float64), torch.float64),
    (lambda rows: torch.full((rows,), 7), torch.int64), (lambda rows: torch.tensor([0.25], dtype=torch.bfloat16),
                                                         torch.bfloat16)])
def test_times_of_every_kind(time, dtype):
    found, arguments = layout(time=time)
    call = found.call(arguments(4, None))
    assert found.time_dtype is dtype and call.t.tolist() == [float(torch.as_tensor(time(4)).flatten()[0])] * 4
    back = found.arguments(*call)["timestep"]
    assert back.shape == (4,) and (dtype is None or back.dtype == dtype)


def test_numbers_of_fewer_bits_come_back():
    half = {"sample": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), "added": {
        "text": torch.zeros(2, 6, dtype=torch.float16), "scale": 1.5}}
    double = {"sample": half["sample"].repeat(2, 1, 1, 1), "added": {
        "text": half["added"]["text"].repeat(2, 1), "scale": 1.5}}
    found, arguments = layout(half, double)
    call = found.call(arguments(2, half)).mapped(torch.Tensor.float)
    back = found.arguments(*call)
    assert back["sample"].dtype == torch.bfloat16 and back["added"]["text"].dtype == torch.float16


@pytest.mark.parametrize("changes", [
    {"ids": torch.ones(5, 3)}, {"ids": torch.zeros(6, 3)}, {"names": ["b"]}, {"names": None}, {"new": 1},
    {"names": np.zeros(2)}])
def test_what_changes_without_rows_is_refused(changes):
    found, arguments = layout()
    with pytest.raises(ConfigError, match=f"with another {next(iter(changes))} than at first"):
        found.call(arguments(2, changes))


def test_an_argument_that_is_there_no_more_is_refused():
    found, arguments = layout()
    given_ = arguments(2, None)
    del given_["added"]
    with pytest.raises(ConfigError, match="with another added.scale than at first"):
        found.call(given_)


@pytest.mark.parametrize(("one", "message"), [
    ({"sample": [torch.zeros(3, 4, 4)]}, "no tensor"), ({"sample": torch.zeros(2, 3)}, "no tensor"),
    ({"timestep": torch.zeros(2, 3)}, "one time for each row")])
def test_networks_that_cannot_be_recorded(one, message):
    with pytest.raises(ConfigError, match=message):
        layout(one, one if "sample" in one else None)


def test_networks_without_state_or_time():
    with pytest.raises(ConfigError, match="takes a, b: none of sample, .*, its state; name another component"):
        CallLayout.of({"a": 1, "b": 2}, {"a": 1, "b": 2})
    with pytest.raises(ConfigError, match="its time"):
        CallLayout.of({"sample": torch.zeros(1, 3, 4, 4)}, {"sample": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(ConfigError, match="1 rows for one image and 1 for two"):
        one = {"sample": torch.zeros(1, 3, 4, 4), "t": 1}
        CallLayout.of(one, one)
