"""Every command of the pages of results, run as those of test_guide_commands are."""

import pytest
from guide_runs import is_plain, run_as_it_stands, runs

RUNS = [job for page, job in runs() if page.startswith("results/") and not is_plain(job)]
pytestmark = pytest.mark.usefixtures("small_networks")


def test_there_are_as_many_as_the_pages_have():
    assert len(RUNS) > 15


@pytest.mark.parametrize("job", RUNS, ids=[" ".join(job)[:80] for job in RUNS])
def test_it_ends_well_with_the_default_logger(job, command):
    run_as_it_stands(job, command)
