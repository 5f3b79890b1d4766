"""Layout files: what they may hold, and one clear line for what they may not."""

import pytest

from ptq_exp.errors import ConfigError
from ptq_exp.reports.tables.layouts import find_layout, read_layout

GOOD = """
title: A table
rows: [model, metric]
values: [fid]
where: {bits: w8a8, metric: [lp, kl]}
command: python -m ptq_exp
published:
  - heading: P
    source: table 1
    rows:
      - {model: m, fp32: true, fid: 1}
      - {model: m, metric: lp, fid: 2.5}
"""


def read(tmp_path, text):
    (tmp_path / "t.yaml").write_text(text)
    return read_layout(tmp_path / "t.yaml")


def test_a_layout_as_written(tmp_path):
    layout = read(tmp_path, GOOD)
    assert (layout.name, layout.command, layout.request.agg) == ("t", ("python -m ptq_exp",), ("seed",))
    assert layout.request.where == {"bits": ["w8a8"], "metric": ["lp", "kl"]}
    (published,) = layout.request.published
    assert published.values() == ["fid"] and [row.figures for row in published.rows] == [{"fid": 1.0}, {"fid": 2.5}]
    assert [row.key(["model", "metric"]) for row in published.rows] == [("m", None), ("m", "lp")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title:", "titel:"), "titel: no such key; did you mean 'title'"),
        (("values: [fid]\n", ""), "values is missing"),
        (("rows: [model, metric]", "rows: []"), "rows is missing"),
        (("values: [fid]", "values: 3"), "values=3: expected a list, found a int"),
        (("rows: [model, metric]", "rows: [1]"), r"rows=\[1\]: expected a list of names"),
        (("where: {bits: w8a8, metric: [lp, kl]}", "where: w8a8"), "where=w8a8: expected a dict"),
        (("source: table 1", "page: 3"), "needs heading, source and rows"),
        (("metric: lp, fid: 2.5", "fid: 2.5"), "metric is missing, a key of the rows"),
        (("fid: 2.5", "fdi: 2.5"), "fdi is no key of the rows and no value"),
        (("fid: 2.5", "fid: good"), "fid=good: expected a number"),
        (("title:", "sort: fdi\ntitle:"), "sort=fdi: no such value; did you mean"),
        (("title:", "blocks: [bits]\ntitle:"), "blocks: bits is no key of the rows; valid: metric, model"),
        (("title:", "labels: [{bits: w8a8, label: x}]\ntitle:"), "expected label and keys of the rows"),
        (("title:", "labels: [{metric: lp}]\ntitle:"), "expected label and keys of the rows"),
        (("title:", "labels: [lp]\ntitle:"), "expected label and keys of the rows"),
        ((GOOD, "- a"), "expected keys and values, found list"),
        ((GOOD, "a: [b"), "no readable YAML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, GOOD.replace(*change))


def test_a_layout_is_found_by_name_or_by_path(tmp_path):
    read(tmp_path, GOOD)
    assert find_layout("t", tmp_path) == find_layout(str(tmp_path / "t.yaml"), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--layout tt: no such layout; did you mean 't'"):
        find_layout("tt", tmp_path)
    with pytest.raises(ConfigError, match="no such layout; valid: t \(or give the path"):
        find_layout("zzz", tmp_path)
