"""What the command says about itself: complete, in one line per option, without loading torch."""

import os
import subprocess
import sys

import pytest
import yaml

from ptq_exp.cli.main import main
from ptq_exp.cli.overview import comment, groups
from ptq_exp.settings.compose import config_folder

FILES = [path for files in groups().values() for path in files]
CHECKOUT = config_folder().parent


def said(monkeypatch, capsys, *arguments):
    """What the command prints, which must then have run nothing."""
    monkeypatch.setattr(sys, "argv", ["ptq-exp", *arguments])
    main()
    return capsys.readouterr().out


def test_groups_are_the_folders_of_conf():
    found = [path for path in config_folder().glob("*/*.yaml") if path.parent.name not in ("search", "table")]
    assert set(groups()) == {path.parent.name for path in found} and len(FILES) == len(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_has_a_comment_to_show(path):
    text = comment(path)
    assert len(text) > 10 and "\n" not in text and not text.startswith(("#", "@"))
    # the first comment line of the file is where it begins
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ") and (text.startswith(first[2:].rstrip(".")) or first[2:].startswith(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# @package _global_\n# One (A et al. 2023): first. Second.\nname: a\n", "One (A et al. 2023): first"),
        ("# Wrapped\n# over lines. More.\n", "Wrapped over lines"),
        ("# The only sentence\nkey: 1 # no\n", "The only sentence"),
        ("key: 1\n# late\n", ""),
        ("", ""),
    ],
)
def test_the_comment_is_the_first_sentence_at_the_top(tmp_path, text, expected):
    (tmp_path / "x.yaml").write_text(text)
    assert comment(tmp_path / "x.yaml") == expected


def test_without_arguments_nothing_runs_and_the_experiments_are_listed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = said(monkeypatch, capsys).splitlines()
    assert list(tmp_path.iterdir()) == []
    for path in groups()["experiment"]:
        (line,) = [line for line in lines if line.split()[:1] == [path.stem]]
        assert comment(path) in line
    for group, files in groups().items():
        assert group == "experiment" or any(
            line.split() == [group, *", ".join(file.stem for file in files).split()] for line in lines
        )
    assert sum(line.startswith("  python -m ptq_exp ") for line in lines) == 3
    assert any(line.split()[:1] == ["doctor"] for line in lines)


def test_help_lists_every_option_with_its_line_and_the_settings(monkeypatch, capsys):
    text = said(monkeypatch, capsys, "--help")
    lines = text.splitlines()
    for group, files in groups().items():
        start = lines.index(group)
        for path, line in zip(files, lines[start + 1 :], strict=False):
            assert line.split()[0] == path.stem and line.endswith(comment(path))
    settings = text.partition("Settings (any")[2].partition("\n\n")[2].partition("HYDRA_FULL")[0]
    assert yaml.safe_load(settings)["bits"]["weight"] == 8
    assert "weight: 4" in said(monkeypatch, capsys, "bits=w4a8", "--help")


def test_help_with_a_wrong_choice_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ptq-exp", "--help", "bits=w9"])
    with pytest.raises(SystemExit, match="^error: bits=w9: choose one of auto, fp32, "):
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctr"], "error: doctr: neither a command nor KEY=VALUE; did you mean 'doctor'?"),
        (["bits=w4a8", "seed"], "error: seed: give it a value, seed=VALUE"),
        (["zzzzzz"], "error: zzzzzz: neither a command nor KEY=VALUE; python -m ptq_exp --help lists what there is"),
    ],
)
def test_a_stray_word_is_reported(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["ptq-exp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == message


def test_the_other_commands_get_their_arguments(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ptq-exp", "table", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: .*results.json"):
        main()


def test_help_overview_and_reports_do_without_torch():
    code = (
        "import sys; from ptq_exp.cli.main import main\n"
        "for sys.argv in (['x'], ['x', '--help']): main()\n"
        "print('heavy:', *{'torch', 'diffusers', 'wandb', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules))\n"
        "sys.argv = ['x', 'report', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('report:', *{'torch', 'diffusers', 'wandb'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    said = [line.strip() for line in run.stdout.splitlines()]
    assert "heavy:" in said and said[-1] == "report:"


COMPLETE = """
eval "$(ptq-exp -sc install=bash)"
complete -p ptq-exp > /dev/null || exit 7
for line in "ptq-exp +experiment=nd" "ptq-exp seed=1 bits="; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_WORDS=($line); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    hydra_bash_completion; echo "${COMPREPLY[@]}"
done
"""


def test_the_console_script_completes_groups_and_options(tmp_path):
    """As bash calls it: the function that the script installs, with the variables that bash sets."""
    script = tmp_path / "ptq-exp"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom ptq_exp.cli.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run(["bash", "-c", COMPLETE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    experiments, bits = (set(line.split()) for line in run.stdout.splitlines())
    named = {path.stem for path in groups()["experiment"] if path.stem.startswith("nd")}
    assert len(named) > 2 and experiments == {f"+experiment={name}" for name in named}
    assert bits == {f"bits={path.stem}" for path in groups()["bits"]}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["doctor"], ["table", "--list"], ["cache", "ls"]], ids=" ".join)
def test_a_reader_that_went_away_is_no_error(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as head does after its lines
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "ptq_exp", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr.decode()) == (141, "")  # 128 + SIGPIPE, as of other commands
