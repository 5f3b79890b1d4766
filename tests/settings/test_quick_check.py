"""A value that cannot be is refused before torch is loaded, which takes seconds."""

import subprocess
import sys

PROGRAM = """
import sys
from ptq_exp.cli.main import main
sys.argv[1:] = ["+experiment=ndtc_w8a8", "hydra.run.dir=run", "hydra.output_subdir=null", {override!r}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""


def refused(tmp_path, override):
    command = [sys.executable, "-c", PROGRAM.format(override=override)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    return done.stderr, done.stdout.strip()


def test_words_and_bounds_are_checked_without_torch(tmp_path):
    line, loaded = refused(tmp_path, "cache=/some/path")
    assert line == "error: cache=/some/path: choose one of on, off, refresh\n" and loaded == "False"
    line, loaded = refused(tmp_path, "evaluation.n_samples=1")
    assert "evaluation.n_samples=1: choose 2 or more" in line and loaded == "False"
