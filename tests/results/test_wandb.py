"""Real offline W&B runs, read back with W&B's own reader; online without a key ends in one clear error."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ptq_exp.errors import ConfigError, PTQError
from ptq_exp.results import wandb as wandb_run


@pytest.fixture(autouse=True)
def private_environment(tmp_path, monkeypatch):
    """A home without a key; whatever the run sets in the environment is undone."""
    before = dict(os.environ)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    yield
    for variable in set(os.environ) - set(before):
        del os.environ[variable]
    os.environ.update(before)


def inspect(run_dir):
    """What an offline run's transaction log holds: {record type: [records of that type]}."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", run_dir]
    environment = os.environ | {"WANDB_MODE": "offline"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    records = {}
    for record in map(json.loads, output.splitlines()):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def test_an_offline_run_holds_everything_and_leaves_the_run_folder_alone(tmp_path, capfd):
    folder = tmp_path / "run"
    logger = wandb_run.make_logger(
        "offline",
        folder,
        project="quantization",
        name="ndtc_w8a8",
        group="sweep",
        tags=["w8a8", "digits"],
        config={"bits": {"weight": 8}, "folder": Path("a/b"), "missing": None},
    )
    logger.log_metrics({"fid": 1.5, "psnr": float("inf")})
    logger.log_metrics({"eps_error": 0.25}, step=7)
    Image.fromarray(np.full((6, 9, 3), 77, np.uint8)).save(tmp_path / "grid.png")
    wandb_run.log_image(logger, "grid", tmp_path / "grid.png", caption="FP over W8A8")
    wandb_run.log_table(logger, "layers", pd.DataFrame({"layer": ["conv_in", "mid"], "bits": [8, 4]}))
    wandb_run.finish(logger, exit_code=3)

    (run_dir,) = (folder / "wandb").glob("offline-run-*")
    records = inspect(run_dir)
    (run,) = records["run"]
    assert (run["run_group"], run["display_name"], run["project"]) == ("sweep", "ndtc_w8a8", "quantization")
    assert run["tags"] == ["w8a8", "digits"]
    config = {key: value for key, value in run["config"]["update"].items() if key != "_wandb"}
    assert config == {"bits": {"weight": 8}, "folder": "a/b", "missing": None}
    first, second = (record["item"] for record in records["history"][:2])
    assert (first["fid"], first["psnr"]) == (1.5, "Infinity")
    assert (second["eps_error"], second["trainer/global_step"]) == (0.25, 7)
    assert records["exit"][0]["exit_code"] == 3
    (image,) = (run_dir / "files" / "media" / "images").glob("grid*.png")
    assert (np.asarray(Image.open(image)) == 77).all()
    (table,) = (run_dir / "files" / "media" / "table").glob("layers*.json")
    assert json.loads(table.read_text())["data"] == [["conv_in", 8], ["mid", 4]]

    assert [path for path in (tmp_path / "home").rglob("*") if "wandb" in path.name] == []
    assert capfd.readouterr().err == ""


def test_a_second_run_of_the_process_is_its_own(tmp_path):
    for name in ("one", "two"):
        logger = wandb_run.make_logger("offline", tmp_path / name, name=name)
        with pytest.raises(PTQError, match="still open"):
            wandb_run.make_logger("offline", tmp_path / "other")
        logger.log_metrics({name: 1.0})
        wandb_run.finish(logger)
    (run_dir,) = (tmp_path / "two" / "wandb").glob("offline-run-*")
    records = inspect(run_dir)
    assert [run["display_name"] for run in records["run"]] == ["two"]
    assert [{"one", "two"} & set(record["item"]) for record in records["history"]] == [{"two"}]
    assert records["exit"][0]["exit_code"] == 0


def test_online_without_a_key_names_the_setting_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as an earlier offline run of the process leaves it
    with pytest.raises(ConfigError, match=r"logger\.mode=online needs a valid W&B key.*`wandb login`"):
        wandb_run.make_logger("online", tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match=r"logger\.mode=online .* \(WANDB_API_KEY invalid"):
        wandb_run.make_logger("online", tmp_path)


def test_none_is_no_run(tmp_path):
    assert wandb_run.make_logger("none", tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_an_unknown_mode_names_the_valid_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.mode='ofline' .* offline, online, none"):
        wandb_run.make_logger("ofline", tmp_path)


def test_an_offline_run_does_without_the_launch_service(monkeypatch):
    from ptq_exp.results.wandb import _LAUNCH, _without_launch

    monkeypatch.delitem(sys.modules, _LAUNCH, raising=False)
    with _without_launch("offline"), pytest.raises(ModuleNotFoundError):
        importlib.import_module(_LAUNCH)
    assert _LAUNCH not in sys.modules
    with _without_launch("online"):
        assert _LAUNCH not in sys.modules  # nothing stands in its way
    monkeypatch.setitem(sys.modules, _LAUNCH, sys)
    with _without_launch("offline"):
        assert importlib.import_module(_LAUNCH) is sys  # it is there already
