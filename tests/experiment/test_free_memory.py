"""Memory that control groups leave to this process, on made-up groups of both versions."""

from functools import partial

import pytest

from ptq_exp.experiment.forecast import free_memory
from ptq_exp.experiment.groups import groups_with

GB = 10**9
V2 = "memory.max", "memory.current", "active_file {0}\ninactive_file {0}\nanon 5\n"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file {0}\ntotal_inactive_file {0}\nactive_file 7\n"


def group(folder, names, most, held, of_files=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names[:2], "memory.stat"), (most, held, names[2].format(of_files)), strict=True):
        (folder / name).write_text(f"{text}\n")


def left(tmp_path, membership):
    (tmp_path / "membership").write_text(membership)
    found = groups_with("memory", tmp_path, tmp_path / "membership")
    return [room for version, place in found if (room := free_memory.left_by(version, place)) is not None]


@pytest.mark.parametrize(("names", "top", "row"), [(V2, "", "0::/user/job"), (V1, "memory", "4:memory:/user/job")])
def test_the_limits_of_a_group_and_of_those_around_it_hold(tmp_path, names, top, row):
    group(tmp_path / top / "user" / "job", names, 8 * GB, 3 * GB, of_files=GB)  # 1 GB is no file's
    group(tmp_path / top / "user", names, 6 * GB, 4 * GB, of_files=GB)
    group(tmp_path / top / "other", names, GB, GB)
    assert left(tmp_path, f"9:cpuset:/other\n{row}\n") == [7 * GB, 4 * GB]


@pytest.mark.parametrize(("names", "top", "unlimited"), [(V2, "", "max"), (V1, "memory", 2**63 - 4096)])
def test_without_a_limit_nothing_is_said(tmp_path, names, top, unlimited):
    group(tmp_path / top, names, unlimited, GB)
    assert left(tmp_path, "0::/\n4:memory:/\n") == []


@pytest.mark.parametrize("counts", [None, "", "active_file\ninactive_file what\n"])
@pytest.mark.parametrize(("names", "top"), [(V2, ""), (V1, "memory")])
def test_a_limit_holds_where_pages_of_files_are_not_counted(tmp_path, names, top, counts):
    group(tmp_path / top, names, 2 * GB, GB)
    (tmp_path / top / "memory.stat").unlink()
    if counts is not None:
        (tmp_path / top / "memory.stat").write_text(counts)
    assert left(tmp_path, "0::/\n4:memory:/\n") == [GB]


def test_the_group_of_a_container_is_the_root_whatever_path_the_host_has(tmp_path):
    group(tmp_path, V2, 2 * GB, GB)
    assert left(tmp_path, "0::/docker/0123\n") == [GB]


@pytest.mark.parametrize("text", ["", "what\n", "0::\n"])
def test_a_membership_that_cannot_be_read_leaves_the_root(tmp_path, text):
    group(tmp_path / "memory", V1, 2 * GB, GB)
    assert left(tmp_path, text) == [GB]


def test_the_least_counts(tmp_path, monkeypatch):
    group(tmp_path, V2, 2000, 1500)
    membership = tmp_path / "membership"
    monkeypatch.setattr(free_memory, "groups_with", partial(groups_with, root=tmp_path, membership=membership))
    assert free_memory.available_memory() == 500
