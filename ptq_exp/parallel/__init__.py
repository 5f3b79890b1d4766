"""Work shared among the CPU threads that torch was given."""

from ptq_exp.parallel.tasks import side_by_side

__all__ = ["side_by_side"]
