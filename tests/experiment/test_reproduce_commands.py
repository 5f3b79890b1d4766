"""Commands of docs/reproduce.md, run as they stand: default logger and settings, small sizes and networks."""

import pytest
from guide_runs import chosen_by, run_or_plan

RUNS = chosen_by(lambda page: page == "reproduce")
pytestmark, COMMON_CACHE = pytest.mark.usefixtures("small_networks"), True


def test_there_are_as_many_as_the_page_has():
    assert len(RUNS) > 20


@pytest.mark.parametrize("job", RUNS)
def test_it_ends_well_with_the_default_logger(job, command):
    run_or_plan(job, command)
