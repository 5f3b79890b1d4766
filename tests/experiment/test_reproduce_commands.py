"""Commands of docs/reproduce.md, run as they stand: default logger and settings, small sizes and networks."""

import pytest
from guide_runs import is_plain, run_as_it_stands, runs

RUNS = [job for page, job in runs() if page == "reproduce" and not is_plain(job)]
pytestmark = pytest.mark.usefixtures("small_networks")


def test_there_are_as_many_as_the_page_has():
    assert len(RUNS) > 20


@pytest.mark.parametrize("job", RUNS, ids=[" ".join(job)[:80] for job in RUNS])
def test_it_ends_well_with_the_default_logger(job, command):
    run_as_it_stands(job, command)
