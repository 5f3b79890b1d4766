"""Files of plain values: whole or not at all, and never all of their text in memory."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.storage.plain_json import compact, dump_indented, indented


def test_pieces_are_written_as_they_come(tmp_path):
    """The whole text, with a string for each number, is never in memory."""
    plain = {f"scale {n}": [0.123456789 + n] for n in range(60_000)}
    text = json.dumps(plain, indent=2).replace("[\n    ", "[").replace("\n  ]", "]") + "\n"
    tracemalloc.start()
    dump_indented(tmp_path / "ranges.json", plain)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "ranges.json").read_text() == text and peak < len(text) / 4
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_indented(tmp_path / "ranges.json", {"scale": [1.0, float("nan")]})
    assert (tmp_path / "ranges.json").read_text() == text and [*tmp_path.iterdir()] == [tmp_path / "ranges.json"]


def test_lists_of_numbers_stay_on_one_line():
    plain = {"a": [1, 2.5, "é", None], "b": {"c": [[True], [3, [4]], []], "d": {}, "e": ()}, "f": [{"g": "h"}, [3]]}
    text = """{
  "a": [1, 2.5, "é", null],
  "b": {
    "c": [[true], [3, [4]], []],
    "d": {},
    "e": []
  },
  "f": [
    {
      "g": "h"
    },
    [3]
  ]
}"""
    assert "".join(indented(plain, ensure_ascii=False)) == text
    assert "".join(indented(plain)) == text.replace("é", "\\u00e9")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20,
)


@given(PLAIN)
def test_indented_values_are_read_back(plain):
    assert json.loads("".join(indented(plain))) == plain
    assert "".join(compact(plain)) == json.dumps(plain, sort_keys=True, separators=(",", ":"))


@given(st.dictionaries(st.integers(), PLAIN) | st.dictionaries(st.floats(allow_nan=False, allow_infinity=False), PLAIN)
       | st.dictionaries(st.booleans(), PLAIN) | st.dictionaries(st.none(), PLAIN))
def test_keys_that_are_no_text_become_text(plain):
    assert json.loads("".join(indented({"a": [plain]}))) == json.loads(json.dumps({"a": [plain]}))
    assert "".join(compact({"a": plain})) == json.dumps({"a": plain}, sort_keys=True, separators=(",", ":"))
