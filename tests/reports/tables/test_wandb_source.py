"""Runs from W&B: real offline folders, and an online project on a small server of the test."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.reports.tables.render import to_wandb
from ptq_exp.reports.tables.result_table import Request, result_table
from ptq_exp.reports.tables.runs import gather
from ptq_exp.reports.tables.wandb_log import read_log, records
from ptq_exp.reports.tables.wandb_source import TABLE_TAG, online_rows, recorded
from ptq_exp.results import wandb as wandb_run


@pytest.fixture(autouse=True)
def private_environment(tmp_path, monkeypatch):
    """A home without a key; whatever W&B sets in the environment is undone."""
    before = dict(os.environ)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    yield
    for variable in set(os.environ) - set(before):
        del os.environ[variable]
    os.environ.update(before)


def settled(folder):
    """The log of the one offline run in `folder`, whole: W&B's service may still be writing when `finish` returns."""
    (log,) = folder.rglob("*.wandb")
    for _ in range(600):
        if read_log(log)["exit_code"] is not None:
            return log
        time.sleep(0.1)
    raise AssertionError(f"{log} has no end")


def logged(folder, values, exit_code=0):
    """The log of the offline run that an experiment with these results leaves in `folder`."""
    logger = wandb_run.make_logger("offline", folder, name="x", config=values["config"])
    for step in range(3):
        wandb_run.log_metrics(logger, {"eps_error_of_step": 0.1 * step})
    wandb_run.log_metrics(logger, values["metrics"] | {"fp32/fid": 0.25, "bops_ratio": 16.0})
    wandb_run.log_summary(logger, {"metric_spec": values["metric_spec"]})
    wandb_run.finish(logger, exit_code)
    return settled(folder)


@pytest.fixture(scope="module")
def offline(tmp_path_factory, run_values):
    """Four offline runs and a table, in one folder: seeds 0 and 1, one that failed, one that was cut off."""
    folder = tmp_path_factory.mktemp("offline")
    before = dict(os.environ)
    for seed, fid in enumerate((1.0, 3.0)):
        logged(folder / f"job{seed}", run_values(seed=seed, metrics={"fid": fid, "psnr": float("inf")}))
    logged(folder / "job2", run_values(seed=2, metrics={"fid": 90.0}), exit_code=1)
    log = logged(folder / "job3", run_values(seed=3, metrics={"fid": 90.0}))
    log.write_bytes(log.read_bytes()[:-30])
    os.environ.clear()
    os.environ.update(before)
    return folder


def test_a_table_of_offline_runs(offline):
    runs = gather([offline], "wandb")
    assert runs["status"].tolist() == ["finished", "finished", "failed", "running"]
    table = result_table(runs, Request(rows=["calibration"], cols=["bits"], values=["fid", "psnr", "fp32.fid"]))
    assert table.frame["calibration"].tolist() == ["FP32", "ndtc"]  # FP32: the twins that the runs scored
    assert table.frame["w8a8/fid"].tolist() == [0.25, 2.0] and table.frame["w8a8/psnr"][1] == float("inf")
    assert table.frame["w8a8/fp32.fid"][1] == 0.25
    assert "n_samples 512" in table.notes[0] and "seed 0, 1" in table.notes[0]
    assert any("failed: job2/wandb/offline-run-" in note and "exit code 1" in note for note in table.notes)
    assert any("unfinished: job3/wandb" in note for note in table.notes)


def test_offline_runs_are_read_where_there_is_no_results_json(offline, tmp_path, write_run):
    assert len(gather([offline])) == 4
    folder = next((offline / "job0" / "wandb").glob("offline-run-*"))
    assert gather([folder])["run"].tolist() == [folder.name]
    write_run(offline / "job1", seed=1, metrics={"fid": 77.0})
    try:
        runs = gather([offline])
        assert sorted(runs["metrics.fid"].dropna()) == [1.0, 77.0, 90.0, 90.0]
        assert len(gather([offline], "results")) == 1 and len(gather([offline], "wandb")) == 4
    finally:
        (offline / "job1" / "results.json").unlink()
    with pytest.raises(DataError, match="no offline W&B run below"):
        gather([tmp_path], "wandb")
    with pytest.raises(ConfigError, match="source='online'"):
        gather([tmp_path], "online")


def test_our_reading_of_a_log_agrees_with_that_of_wandb(offline):
    folder = next((offline / "job0" / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline"}
    theirs = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    (log,) = folder.glob("*.wandb")
    ours = read_log(log)
    assert ours["exit_code"] == theirs["exit_code"] == 0
    without = {key: value for key, value in ours["config"].items() if key != "_wandb"}
    assert without == {key: value for key, value in theirs["config"].items() if key != "_wandb"}
    for key in ("fid", "fp32/fid", "eps_error_of_step", "metric_spec"):
        assert ours["summary"][key] == theirs["summary"][key]


def test_a_long_record_over_several_blocks_and_a_damaged_one(offline, tmp_path, run_values):
    values = run_values(config={"logger": {"tags": ["x" * 100_000]}})
    log = logged(tmp_path / "long", values)
    assert read_log(log)["config"]["logger"]["tags"] == ["x" * 100_000]
    content = bytearray(log.read_bytes())
    content[60] ^= 1
    log.write_bytes(content)
    with pytest.raises(DataError, match="is damaged at byte"):
        list(records(log))
    assert gather([tmp_path / "long"])["status"].tolist() == ["unreadable"]
    log.write_bytes(b"")  # what a run leaves that is killed in its first second
    assert gather([tmp_path / "long"])["status"].tolist() == ["running"]
    log.write_bytes(b"<html>")
    with pytest.raises(DataError, match="no log of an offline W&B run"):
        list(records(log))


def test_a_table_is_written_into_an_offline_run_which_is_no_experiment(offline, tmp_path):
    table = result_table(gather([offline]), Request(rows=["calibration"], values=["fid", "sfid"], title="T"))
    folder = to_wandb(table, "offline", tmp_path / "tables", "metrics", {"rows": "calibration"})
    (content,) = (tmp_path / "tables").rglob("metrics*.table.json")
    content = json.loads(content.read_text())
    columns = ["calibration", "fid", "fid.std", "fid.n", "sfid", "sfid.n"]
    assert str(tmp_path) in folder and content["columns"] == columns
    assert content["data"] == [
        ["FP32", 0.25, 0.0, 2, None, None], ["ndtc", 2.0, pytest.approx(2**0.5), 2, None, None],
    ]  # fmt: skip
    log = settled(tmp_path / "tables")
    assert read_log(log)["tags"] == [TABLE_TAG] and read_log(log)["config"]["notes"] == table.notes
    with pytest.raises(DataError, match="no results.json"):
        gather([tmp_path / "tables"])
    with pytest.raises(ConfigError, match="--to-wandb project: expected entity/project, or offline"):
        to_wandb(table, "project", tmp_path, "metrics", {})
    with pytest.raises(ConfigError, match="needs a valid W&B key"):
        to_wandb(table, "me/project", tmp_path, "metrics", {})


def test_only_numbers_of_the_experiment_become_metrics():
    row = recorded({"name": "n", "seed": 1, "_wandb": {}}, {
        "fid": 2, "_step": 3, "trainer/global_step": 1, "grid": {"_type": "images"}, "note": "text", "psnr": "NaN",
        "quantization": {"bops": {"conv_linear": 5}}, "coverage_conv_linear": 1.0, "fp32/is": 9.0,
    })  # fmt: skip
    assert row.pop("metrics.psnr") != row.get("metrics.psnr")
    assert row == {
        "name": "n", "seed": 1, "config.name": "n", "config.seed": 1, "metrics.fid": 2, "fp32.is": 9.0,
        "quantization.bops.conv_linear": 5, "quantization.coverage_conv_linear": 1.0,
    }  # fmt: skip


class _Server(BaseHTTPRequestHandler):
    """The GraphQL operations that wandb.Api needs to list the runs of a project."""

    runs: dict[str, list] = {}
    keys: set[str] = set()

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/graphql":
            request = json.loads(content)
            self.keys.add(self.headers.get("Authorization", ""))
            answer = {"data": self._answer(request["query"], request.get("variables") or {})}
        else:  # the client's account of its own requests, an empty one
            assert self.path.startswith("/sdk/otel/"), self.path
            answer = {}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, query, variables):
        viewer = {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
        if "runs(" not in query:
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}}}
        runs = self.runs.get(variables["project"])
        if runs is None:
            return {"project": None}
        start = int(variables.get("cursor") or 0)
        page = runs[start : start + 2]  # pages of two, so that there is more than one
        end = start + len(page)
        edges = [{"node": node, "cursor": str(start + i + 1)} for i, node in enumerate(page)]
        info = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        runs = {"edges": edges, "pageInfo": info}
        return {"project": {"internalId": "1", "runCount": 99, "readOnly": False, "runs": runs}}

    def log_message(self, *_):
        pass


class _Quiet(ThreadingHTTPServer):
    """Does not tell that a client hung up."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def node(name, values, state="finished", created="2026-01-01T00:00:00Z", tags=()):
    summary = values["metrics"] | {"metric_spec": values["metric_spec"], "_step": 5}
    config = {key: {"value": value} for key, value in (values["config"] | {"_wandb": {}}).items()}
    return {
        "id": name, "name": name, "projectId": "1", "displayName": f"run-{name}", "tags": list(tags), "state": state,
        "config": json.dumps(config), "summaryMetrics": json.dumps(summary), "systemMetrics": "{}", "group": None,
        "jobType": None, "sweepName": None, "commit": None, "readOnly": False, "createdAt": created,
        "heartbeatAt": created, "description": "", "notes": "", "historyLineCount": 1, "historyKeys": None,
        "user": {"name": "me", "username": "me"},
    }  # fmt: skip


@pytest.fixture
def server(run_values):
    _Server.runs = {
        "empty": [],
        "ours": [
            node("a", run_values(seed=0, metrics={"fid": 1.0})),
            node("b", run_values(seed=1, metrics={"fid": 50.0})),
            node("c", run_values(seed=1, metrics={"fid": 3.0}), created="2026-02-01T00:00:00Z"),
            node("d", run_values("w4a8", metrics={"fid": 9.0}), state="crashed"),
            node("t", run_values(seed=7), tags=[TABLE_TAG]),
        ],
    }
    _Server.keys = set()
    http = _Quiet(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_table_of_an_online_project(server):
    runs = pd.DataFrame(online_rows("me/ours", server, "0" * 40))
    assert len(runs) == 4 and _Server.keys  # the logged table is left out; every page was asked for
    table = result_table(runs, Request(rows=["bits"], values=["fid"]))
    assert table.frame["bits"].tolist() == ["w8a8", "w4a8"] and table.frame["fid"][0] == 2.0
    assert any("newest" in note and "run-b (b)" in note for note in table.notes)
    assert "failed: run-d (d) (crashed)" in table.notes


def test_what_is_wrong_with_a_project_is_one_line(server):
    with pytest.raises(ConfigError, match="--wandb ours: expected entity/project"):
        online_rows("ours", server, "0" * 40)
    with pytest.raises(ConfigError, match="--wandb me/other: .*other"):
        online_rows("me/other", server, "0" * 40)
    with pytest.raises(DataError, match="--wandb me/empty has no runs"):
        online_rows("me/empty", server, "0" * 40)
    with pytest.raises(ConfigError, match="needs a valid W&B key: run `wandb login`"):
        online_rows("me/ours", server)
