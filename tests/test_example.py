"""The example ends with the numbers that it promises."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_gives_its_numbers(tmp_path):
    picture = tmp_path / "digits.png"
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quantize_digits.py", picture],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )
    assert run.returncode == 0, run.stderr
    assert re.findall(r"^(W\dA\d): \d", run.stdout, re.MULTILINE) == ["W8A8", "W4A8", "W4A4"] and picture.exists()
