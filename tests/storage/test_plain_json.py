"""Files of plain values: whole or not at all, and never all of their text in memory."""

import json
import tracemalloc

import pytest

from ptq_exp.storage.plain_json import dump_indented


def test_pieces_are_written_as_they_come(tmp_path):
    """The whole text, with a string for each number, is never in memory."""
    plain = {"scale": [[0.123456789 + n] for n in range(60_000)]}
    text = json.dumps(plain, indent=2) + "\n"
    tracemalloc.start()
    dump_indented(tmp_path / "ranges.json", plain)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "ranges.json").read_text() == text and peak < len(text) / 4
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_indented(tmp_path / "ranges.json", {"scale": [1.0, float("nan")]})
    assert (tmp_path / "ranges.json").read_text() == text and [*tmp_path.iterdir()] == [tmp_path / "ranges.json"]
