"""The transforms of a saved model, as this version and the first one record them."""

from pathlib import Path

import pytest

from ptq_exp.deploy.artifact import Artifact
from ptq_exp.errors import DataError
from ptq_exp.quantization import Applied
from ptq_exp.quantization.transforms.smooth import Smooth

SITES = {"norm": ["q", "k"]}


def transforms(**description):
    return Artifact(Path("there"), {"settings": {"quantization": {"smooth_alpha": 0.6}}} | description).transforms()


def test_records_of_this_version():
    record = {"name": "smooth", "alpha": 0.3, "sites": SITES, "macs": 0, "bytes": 0}
    assert transforms(transforms=[record]) == (Applied(Smooth(0.3), {"norm": ("q", "k")}),)
    assert transforms(transforms=[]) == ()


def test_records_of_version_1():
    assert transforms(smoothed=SITES) == (Applied(Smooth(0.6), {"norm": ("q", "k")}),)
    assert transforms(smoothed={}) == transforms() == ()


@pytest.mark.parametrize("records", [3, [3], [{"name": "gone"}]])
def test_a_damaged_record_is_refused_with_its_file(records):
    with pytest.raises(DataError, match=r"^there/quantization.json: [^\n]*$"):
        transforms(transforms=records)
