"""The main job, killed with SIGKILL at random points and started again, ends as one that nobody disturbed."""

import itertools
import random

import numpy as np
import pytest

from ptq_exp.results.record import read_samples
from ptq_exp.storage.atomic import file_digest
from ptq_exp.storage.entries import PARTS, entries
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.plain_json import read_json

KILLS = 12
JOB = ["+experiment=ptqd_w4a8"]


@pytest.fixture
def start(job, tmp_path):
    """Start, or start again, the job of a chain, on a small network: a run folder and a cache of its own."""

    def run(chain, **kwargs):
        folder = tmp_path / f"chain{chain}"
        return folder, job(*JOB, f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache", small=True, **kwargs)

    return run


def outcome(folder):
    """All that a run decides: numbers, images, the quantized model."""
    results = read_json(folder / "run" / "results.json")
    assert results["status"] == "finished"
    images, _ = read_samples(folder / "run" / "samples.npz")
    numbers = {key: results[key] for key in ("metrics", "fp32", "eps_error_per_step", "quantization", "correction")}
    return numbers, np.array(images), file_digest(folder / "run" / "quantized" / "quantized.safetensors")


def check_files(folder):
    """Whatever has its final name can be read in full; returns how many files were looked at."""
    seen = 0
    for path in (folder / "run").glob("[!.]*.json"):
        seen += bool(read_json(path))
    for path in [*(folder / "run").glob("[!.]*.npz"), *(folder / "cache" / PARTS).rglob("[!.]*.npz")]:
        seen += all(array.size >= 0 and np.array(array) is not None for array in npz_arrays(path).values())
    found = entries(folder / "cache", verify=True)
    assert {entry.problem for entry in found} <= {None, "half-written"}
    return seen + len(found)


def points(rng):
    """Shares of a run's CPU time at which to kill it, one at random from each of KILLS equal parts, shuffled."""
    edges = np.linspace(0.02, 0.95, KILLS + 1)
    found = [rng.uniform(*part) for part in itertools.pairwise(edges)]
    rng.shuffle(found)
    return found


def test_kills_at_random_points_of_every_part_of_a_run_change_nothing(start):
    folder, undisturbed = start("undisturbed")
    assert undisturbed.status == 0, undisturbed.output
    numbers, images, model = outcome(folder)
    at, kills, chain, in_chain, seen, resumed = points(random.Random(0)), 0, 0, 0, 0, 0
    while kills < KILLS:
        # every fifth start of a chain is left alone, so that it ends; a short one may end before its time
        spare = in_chain == 4
        kill_at = None if spare else at[kills] * undisturbed.cpu_seconds
        folder, ended = start(chain, kill_at=kill_at)
        assert ended.status in (0, -9), ended.output
        seen += check_files(folder)
        if ended.status == -9:
            kills, in_chain = kills + 1, in_chain + 1
            continue
        resumed += in_chain
        again = outcome(folder)
        assert again[0] == numbers and np.array_equal(again[1], images) and again[2] == model
        chain, in_chain = chain + 1, 0
    folder, ended = start(chain)
    assert ended.status == 0, ended.output
    assert outcome(folder)[0] == numbers
    assert seen > KILLS and resumed > KILLS / 2
