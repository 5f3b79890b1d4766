"""Frames as Markdown and as LaTeX: what is written for means, gaps and infinity, what is escaped, where rules stand."""

import math

import pandas as pd
import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.notation import to_latex, to_markdown


@pytest.fixture
def table():
    """Two rows: a mean with its deviation, and an infinite number alone."""
    return pd.DataFrame({
        "name": ["ndtc_w8a8", "fp|32"], "fid": [1.5, math.inf], "fid.std": [0.7071, math.nan],
        "coverage": [0.99, math.nan], "coverage.std": [0.0, math.nan], "nothing": [math.nan, math.nan],
    })


TITLES = {"name": "run", "fid": "FID_1", "coverage": "coverage %", "nothing": "?"}


def test_markdown(table):
    assert to_markdown(table, TITLES, digits=2) == (
        "| run       |       FID_1 |   coverage % |   ? |\n"
        "|:----------|------------:|-------------:|----:|\n"
        "| ndtc_w8a8 | 1.50 ± 0.71 |  0.99 ± 0.00 |   — |\n"
        "| fp\\|32    |           ∞ |            — |   — |\n"
    )
    assert to_markdown(table).splitlines()[0].split() == "| name | fid | coverage | nothing |".split()


def test_numbers_are_written_as_they_are_and_not_read_again(table):
    text = to_markdown(pd.DataFrame({"bits": [8, 4], "digest": ["1e5", "007"]}), digits=1)
    assert [line.split() for line in text.splitlines()[2:]] == ["| 8 | 1e5 |".split(), "| 4 | 007 |".split()]


def test_bold_count_and_difference_stand_in_the_cell():
    table = pd.DataFrame({"v": [2.0], "v.std": [1.0], "v.best": [True], "v.n": [3.0], "v.delta": [0.5]})
    assert "| **2.0 ± 1.0** (n=3) (+0.5) |" in to_markdown(table, digits=1)
    assert r"$\mathbf{2.0 \pm 1.0}\,(n{=}3) (+0.5)$ \\" in to_latex(table, digits=1)


def test_latex(table):
    table["fid"] = -table["fid"].where(table["fid"] == math.inf, -table["fid"])
    assert to_latex(table, TITLES, digits=2) == (
        "\\begin{tabular}{lrrr}\n"
        "\\toprule\n"
        "run & FID\\_1 & coverage \\% & ? \\\\\n"
        "\\midrule\n"
        "ndtc\\_w8a8 & $1.50 \\pm 0.71$ & $0.99 \\pm 0.00$ & -- \\\\\n"
        "fp|32 & $-\\infty$ & -- & -- \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_latex_floats_with_a_caption_and_rules_off_its_blocks():
    table = pd.DataFrame({"model": ["a", "a", "b"], "bits": [8, 4, 4], "ok": [True, False, True]})
    text = to_latex(table, caption="50 % of n_samples & more", label="tab:n_1", blocks=["model"])
    lines = text.splitlines()
    assert lines[:4] == [
        r"\begin{table}", r"\centering", r"\caption{50 \% of n\_samples \& more}", r"\label{tab:n_1}",
    ]
    assert lines[7:] == [
        r"\midrule", r"a & $8$ & True \\", r"a & $4$ & False \\", r"\midrule", r"b & $4$ & True \\", r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ]
    with pytest.raises(ConfigError, match="'bit'.*model"):
        to_latex(table, blocks=["bit"])


def test_headings_over_several_columns_have_rules_of_their_own():
    table = pd.DataFrame({"key": ["a"], "b/x": [1.0], "b/y": [2.0], "c/x": [3.0]})
    titles = {"key": "key", "b/x": "X", "b/y": "Y", "c/x": "X"}
    groups = {"b/x": "w8_a8", "b/y": "w8_a8", "c/x": "w4"}
    lines = to_latex(table, titles, digits=0, groups=groups).splitlines()
    assert lines[2:5] == [
        r" & \multicolumn{2}{c}{w8\_a8} & w4 \\", r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}",
        r"key & X & Y & X \\",
    ]
    assert to_markdown(table, titles, groups=groups).startswith("| key   |   w8_a8: X |")


def test_latex_escapes_every_character_of_its_own():
    table = pd.DataFrame({"x": ["%_&#${}", "a\\b~c^d", "<1±2>"]})
    assert to_latex(table).splitlines()[4:7] == [
        r"\%\_\&\#\$\{\} \\",
        r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d \\",
        r"\textless{}1$\pm$2\textgreater{} \\",
    ]


def test_columns_that_are_not_there_are_named(table):
    with pytest.raises(ConfigError, match="'fidd'.*fid"):
        to_markdown(table, {"fidd": "FID"})
