"""docs/settings.md says what the schema says; the schema says of every setting what it is for."""

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.widths import LAYER_BITS, SOFTMAX_BITS
from ptq_exp.settings.field import KEY, check_section, setting, setting_of
from ptq_exp.settings.names import setting_names, walk
from ptq_exp.settings.schema import ExperimentConfig
from ptq_exp.settings.schema_method import BitsConfig

DOCS = Path(__file__).parents[2] / "docs"
WIDTHS = {"weight": LAYER_BITS, "activation": LAYER_BITS, "first_last": LAYER_BITS, "softmax": SOFTMAX_BITS,
          "boundary": SOFTMAX_BITS}


def test_the_page_is_current():
    page = runpy.run_path(str(DOCS / "generate.py"))["settings_page"]()
    assert (DOCS / "settings.md").read_text() == page, "run: python docs/generate.py"


def test_the_page_has_a_row_for_every_setting():
    rows = [line.split("`")[1] for line in (DOCS / "settings.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted([*setting_names(), "sweep.resume"])


def test_every_setting_says_in_a_sentence_what_it_is_for():
    meanings = {name: setting_of(entry).meaning for name, _, entry in walk(ExperimentConfig)}
    assert len(meanings) > 90
    assert [name for name, text in meanings.items() if not text.endswith(".") or len(text) < 10] == []


@pytest.mark.parametrize("name", WIDTHS)
def test_bounds_of_widths_are_those_of_the_quantizers(name):
    known = BitsConfig.__dataclass_fields__[name].metadata[KEY]
    assert (known.low, known.high) == WIDTHS[name]


@dataclass
class Section:
    """Every kind of bound."""

    share: float | None = setting(0.5, "A share.", low=0, high=1)
    count: int = setting(1, "A count.", low=1)
    word: str = setting("a", "A word.", choices=("a", "b"))
    registered: str = setting("mse", "A word of a registry.", choices="ptq_exp.quantization.METRICS")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"share": 1.01}, "x.share=1.01: choose 0..1"),
        ({"share": -0.01}, "x.share=-0.01: choose 0..1"),
        ({"count": 0}, "x.count=0: choose 1 or more"),
        ({"word": "c"}, "x.word=c: choose one of a, b"),
        ({"registered": "hubre"}, "x.registered=hubre: choose one of mse, l1, cosine, kl, lp, minmax, percentile"),
    ],
)
def test_values_out_of_bounds_are_refused(value, message):
    with pytest.raises(ConfigError) as refused:
        check_section("x", Section(**value))
    assert str(refused.value) == message


@pytest.mark.parametrize("value", [{"share": None}, {"share": 0}, {"share": 1}, {"count": 10**6}, {"word": "b"}])
def test_values_within_bounds_pass(value):
    check_section("x", Section(**value))


def test_a_registry_is_read_when_the_value_is_checked(monkeypatch):
    from ptq_exp.quantization import METRICS

    monkeypatch.setitem(METRICS, "mine", None)
    check_section("x", Section(registered="mine"))
