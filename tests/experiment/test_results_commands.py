"""Every command of the pages of results, run as those of test_guide_commands are."""

import pytest
from guide_runs import chosen_by, run_or_plan

# kit_w4a8 names three levels, of which the small network has two: test_experiment_files runs it on the embedded one
RUNS = [job for job in chosen_by(lambda page: page.startswith("results/")) if "+experiment=kit_w4a8" not in str(job)]
pytestmark, COMMON_CACHE = pytest.mark.usefixtures("small_networks"), True


def test_there_are_as_many_as_the_pages_have():
    assert len(RUNS) > 15


@pytest.mark.parametrize("job", RUNS)
def test_it_ends_well_with_the_default_logger(job, command):
    run_or_plan(job, command)
