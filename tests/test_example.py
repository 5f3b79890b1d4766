"""The example ends with the numbers that it promises."""

import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_gives_its_numbers(tmp_path, monkeypatch, capsys):
    """It checks them itself."""
    program, picture = ROOT / "examples" / "quantize_digits.py", tmp_path / "digits.png"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), str(picture)])
    runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().out
    assert re.findall(r"^(W\dA\d): \d", said, re.MULTILINE) == ["W8A8", "W4A8", "W4A4"] and picture.exists()
