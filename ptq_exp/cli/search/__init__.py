"""Search for the best combination of settings: what to try, the trials, and the experiment that comes of it."""

from ptq_exp.cli.search.coordinate import Search, Trial
from ptq_exp.cli.search.space import Space, Stage, merged
from ptq_exp.cli.search.trials import run_trial

__all__ = ["Search", "Space", "Stage", "Trial", "merged", "run_trial"]
