"""Runs from W&B: an online project on a small server of the test; tables written into an offline run."""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from wandb_log import read_log

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.reports.tables.render import to_wandb
from ptq_exp.reports.tables.request import Request
from ptq_exp.reports.tables.result_table import result_table
from ptq_exp.reports.tables.runs import gather
from ptq_exp.reports.tables.wandb_source import TABLE_TAG, online_rows, recorded


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


def test_the_offline_folder_of_a_run_stands_for_the_run(tmp_path, write_run):
    for seed in (0, 1):
        write_run(tmp_path / f"job{seed}", seed=seed, metrics={"fid": 1.0 + seed})
        (tmp_path / f"job{seed}" / "wandb" / "offline-run-1").mkdir(parents=True)
    folders = sorted(tmp_path.glob("*/wandb/offline-run-*"))
    assert gather(folders[:1])["metrics.fid"].tolist() == [1.0]
    assert gather([*folders, tmp_path / "job0"])["metrics.fid"].tolist() == [1.0, 2.0]
    (tmp_path / "alone" / "wandb" / "offline-run-2").mkdir(parents=True)
    with pytest.raises(DataError, match="no results.json below .*offline-run-2"):
        gather([tmp_path / "alone" / "wandb" / "offline-run-2"])


def test_a_table_is_written_into_an_offline_run_which_is_no_experiment(tmp_path, write_run):
    for seed, fid in enumerate((1.0, 3.0)):
        write_run(tmp_path / f"job{seed}", seed=seed, metrics={"fid": fid}, fp32={"fid": 0.25})
    table = result_table(gather([tmp_path]), Request(rows=["calibration"], values=["fid", "sfid"], title="T"))
    folder = to_wandb(table, "offline", tmp_path / "tables", "metrics", {"rows": "calibration"})
    (content,) = (tmp_path / "tables").rglob("metrics*.table.json")
    content = json.loads(content.read_text())
    columns = ["calibration", "fid", "fid.std", "fid.n", "sfid", "sfid.n"]
    assert str(tmp_path) in folder and content["columns"] == columns
    assert content["data"] == [
        ["FP32", 0.25, 0.0, 2, None, None], ["ndtc", 2.0, pytest.approx(2**0.5), 2, None, None],
    ]
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
    })
    assert row.pop("metrics.psnr") != row.get("metrics.psnr")
    assert row == {
        "name": "n", "seed": 1, "config.name": "n", "config.seed": 1, "metrics.fid": 2, "fp32.is": 9.0,
        "quantization.bops.conv_linear": 5, "quantization.coverage_conv_linear": 1.0,
    }


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
    }


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
