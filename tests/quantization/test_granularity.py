"""Granularities: tables of ranges by hand, and as JSON, also as saved models of version 1 had them."""

import json

import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.quantization import PerChannel, PerGroup, PerTensor, QuantSpec, Rule, Segments, TensorSpec
from ptq_exp.quantization.granularity import from_plain, segmented_as, splits_channels, to_plain
from ptq_exp.quantization.plain_rules import rule_from_dict, rule_to_dict

TABLES = [
    (PerTensor(), 1, None),
    (PerChannel(), 6, None),
    (PerGroup(3), 6, (3, 3, 2)),
    (PerGroup(100), 6, (8,)),
    (Segments((5, 3)), 1, (5, 3)),
    (Segments((5, 3), PerChannel()), 6, (5, 3)),
    (Segments((5, 3), PerGroup(2)), 6, (2, 2, 1, 2, 1)),
]


@pytest.mark.parametrize(("granularity", "rows", "segments"), TABLES)
def test_rows_and_segments_of_six_outputs_and_eight_inputs(granularity, rows, segments):
    assert granularity.rows(6) == rows and granularity.segments(8) == segments
    assert splits_channels(granularity) == (rows == 6)
    assert from_plain(json.loads(json.dumps(to_plain(granularity)))) == granularity


def test_segments_are_put_around_and_taken_away():
    assert segmented_as(PerGroup(2), (5, 3)) == Segments((5, 3), PerGroup(2))
    assert segmented_as(Segments((4, 4), PerGroup(2)), (5, 3)) == Segments((5, 3), PerGroup(2))
    assert segmented_as(Segments((4, 4), PerGroup(2)), None) == PerGroup(2)


VERSION_1 = {"bits": 4, "symmetric": False, "granularity": "tensor", "segments": None, "metric": None,
             "headroom": 1.0, "bins": 1, "group_size": None}


@pytest.mark.parametrize(
    ("fields", "granularity"),
    [
        ({}, PerTensor()),
        ({"granularity": "channel"}, PerChannel()),
        ({"granularity": "group", "group_size": 16}, PerGroup(16)),
        ({"segments": [12, 4]}, Segments((12, 4))),
        ({"granularity": "channel", "segments": [12, 4]}, Segments((12, 4), PerChannel())),
        ({"granularity": "group", "group_size": 2, "segments": [12, 4]}, Segments((12, 4), PerGroup(2))),
    ],
)
def test_rules_of_version_1_are_read(fields, granularity):
    plain = {"pattern": "*", "reason": "", "spec": {"weight": VERSION_1 | fields, "input": None}}
    rule = rule_from_dict(plain)
    assert rule == Rule("*", QuantSpec(weight=TensorSpec(4, granularity=granularity)))
    assert rule_from_dict(json.loads(json.dumps(rule_to_dict(rule)))) == rule


@pytest.mark.parametrize("fields", [{"granularity": "group", "group_size": None}, {"segments": [0, 4]}])
def test_impossible_rules_of_version_1_are_refused(fields):
    with pytest.raises(ConfigError):
        rule_from_dict({"pattern": "*", "reason": "", "spec": {"weight": VERSION_1 | fields}})
