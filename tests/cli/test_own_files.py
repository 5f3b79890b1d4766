"""The command with configuration files of one's own, up to the experiment itself, which is only recorded."""

import os
import sys

import pytest

import ptq_exp.experiment.experiment
from ptq_exp.cli.main import main

G = "# @package _global_\n"
FILES = {
    "experiment/mine": f"{G}defaults:\n  - override /bits: w4a8\nbits:\n  weight: 3\n",
    "experiment/no_choice": f"{G}bits:\n  weight: 3\n",
    "experiment/sub/deep": f"{G}defaults:\n  - override /bits: w4a8\nbits:\n  weight: 3\n",
    "experiment/derived": f"{G}defaults:\n  - mine\n  - override /bits: w8a8\n",
    "experiment/settled": f"{G}defaults:\n  - mine\n  - override /bits: w8a8\nbits: {{weight: 8}}\n",
    "experiment/on_bits": "# @package bits\nweight: 3\n",
    "experiment/groups": f"{G}defaults:\n  - override /bits: w4a8\nbits:\n  groups: {{time: w8a8}}\n",
    "experiment/wrong": f"{G}defaults:\n  - override /metric: mze\n",
    "experiment/misspelt": f"{G}bits:\n  wight: 3\n",
    "experiment/headless": "seed: 3\n",
    "experiment/broken": f"{G}bits: [1\n",
    "experiment/mein (1),ü": f"{G}seed: 5\n",
    "bits/odd": "defaults: [w4a8]\nname: odd\nweight: 5\n",
    "quantization/narrow": f"{G}bits:\n  weight: 2\nquantization: {{name: narrow}}\n",
    "experiment/at_home": f"{G}cache_dir: ~/cache\nhydra: {{run: {{dir: ~/run}}}}\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "own" / "experiment" / "latin.yaml").write_bytes(b"# @package _global_\n# M\xfcller\nseed: 3\n")
    return tmp_path / "own"


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """Run the command; returns (settings, run folder) of each experiment, and the lines that tell an error."""
    found = []

    def record(config, run_folder, fresh_since=None):
        found.append((config, run_folder))
        return {"status": "finished", "metrics": {"eps_error": 0.0}}

    monkeypatch.setattr(ptq_exp.experiment.experiment, "run_experiment", record)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: str):
        found.clear()
        monkeypatch.setattr(sys, "argv", ["ptq-exp", *arguments])
        code = None
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        said = f"{capsys.readouterr().err}\n{code}".splitlines()
        return list(found), [line.removeprefix("error: ") for line in said if line.startswith("error: ")]

    return run


MIXED = [
    (["+experiment=mine", "bits=w8a8"], "bits=w8a8 would take over bits.weight=3, which experiment=mine sets for its "),
    (["+experiment='mine'", "bits='w8a8'"], "bits=w8a8 would take over bits.weight=3, which experiment=mine sets for"),
    (["+experiment=no_choice", "bits=w4a8"], "bits=w4a8 would take over bits.weight=3, which experiment=no_choice"),
    (["+experiment=sub/deep", "bits=w8a8"], "bits=w8a8 would take over bits.weight=3, which experiment/sub=deep sets"),
    (["+experiment/sub=deep", "bits=odd"], "bits=odd would take over bits.weight=3, which experiment/sub=deep sets"),
    (["+experiment=on_bits", "bits=w8a8"], "bits=w8a8 would take over bits.weight=3, which experiment=on_bits sets"),
    (["+experiment=groups", "bits=w8a8"], "bits=w8a8 would take over bits.groups.time=w8a8, which experiment=groups"),
    (["+experiment=derived"],
     "bits=w8a8 would take over bits.weight=3, which experiment=mine sets for its own bits=w4"),
    (["quantization=narrow", "bits=w8a8"], "bits=w8a8 would take over bits.weight=2, which quantization=narrow sets"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "flag"),
    [(*case, ("--config-dir", "hydra.searchpath")[n % 2]) for n, case in enumerate(MIXED)],
)
def test_bits_of_a_file_are_not_mixed_with_another_choice(arguments, message, flag, command, folder):
    own = ["--config-dir", str(folder)] if flag == "--config-dir" else [f"hydra.searchpath=[file://{folder}]"]
    found, (line,) = command(*own, *arguments)
    assert not found and line.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        (["+experiment=mine"], ("w4a8", 3, 8)),
        (["+experiment=mine", "bits=w8a8", "bits.weight=8"], ("w8a8", 8, 8)),
        (["+experiment=settled"], ("w8a8", 8, 8)),
        (["bits=odd"], ("odd", 5, 8)),
        (["+experiment='mein (1),ü'"], ("w8a8", 8, 8)),
    ],
)
def test_bits_that_are_not_mixed_are_taken(arguments, bits, command, folder):
    ((config, _),), lines = command("--config-dir", str(folder), *arguments)
    assert (config.bits.name, config.bits.weight, config.bits.activation) == bits and not lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=mine", "bits.weight=8", "metric=mze"], "metric=mze: choose one of cosine, kl, l1, lp, minmax, "),
        (["+experiment=mine", "model=none"], "model=none: choose one of ddim_cifar10, "),
        (["+experiment=wrong"], "metric=mze (chosen by the file of experiment=wrong): choose one of cosine, kl, "),
        (["+experiment=mime"], "experiment=mime: choose one of analyze, "),
        (["+experiment=misspelt"], "bits.wight: no such setting; did you mean 'weight'?"),
        (["+experiment=headless"], "experiment/headless.yaml: begin it with the line `# @package _global_`"),
        (["+experiment=broken"], "a configuration file is no YAML: "),
        (["+experiment=latin"], "{own}/experiment/latin.yaml: is not encoded in UTF-8"),
    ],
)
def test_mistakes_are_told_of_the_group_or_file_that_has_them(arguments, message, command, folder):
    found, (line,) = command("--config-dir", str(folder), *arguments)
    assert not found and line.startswith(message.format(own=folder))


def test_a_file_of_the_package_does_not_hide_ones_own(command, folder):
    (folder / "metric" / "mse.yaml").parent.mkdir()
    (folder / "metric" / "mse.yaml").write_text("name: l1\n")
    found, (line,) = command("--config-dir", str(folder), "seed=1")
    assert not found and line.startswith(f"{folder}/metric/mse.yaml is not read, as ") and "a name of its own" in line


def test_a_home_folder_is_written_out_in_every_path(command, folder, tmp_path):
    home = tmp_path / "home"
    paths = ["cache_dir=~/c", "model.checkpoint='~/a=1'", "evaluation.reference=~", "hydra.run.dir=~/r"]
    ((config, run),), _ = command("evaluation=adm", *paths)
    assert (config.cache_dir, config.model.checkpoint, config.evaluation.reference, run) == (
        f"{home}/c", f"{home}/a=1", str(home), home / "r"
    )
    assert config.model.build["checkpoint"] == f"{home}/a=1"
    ((config, run),), _ = command("--config-dir", str(folder), "+experiment=at_home")
    assert (config.cache_dir, run) == (f"{home}/cache", home / "run")
    for key in ("hydra.run.dir", "model.checkpoint", "--config-dir"):
        found, (line,) = command(f"{key}=~nobody123/x")
        assert not found and line.startswith(f"{key}=~nobody123/x: there is no user nobody123")
    assert not os.path.lexists("~")


def test_a_sweep_into_any_folder_is_resumed_as_its_end_says(command, folder, tmp_path, capsys):
    name = "s ü,=(1)#'"
    quoted = 'hydra.sweep.dir="~/' + name + '"'
    found, _ = command("--config-dir", str(folder), "-m", "+experiment=mine", "bits.weight=5,6", quoted)
    place = tmp_path / "home" / name
    assert [run.parent for _, run in found] == [place, place]
    again, lines = command(f'sweep.resume="{place}"')
    assert [(config.bits.weight, run) for config, run in again] == [(c.bits.weight, run) for c, run in found]
    assert not lines
