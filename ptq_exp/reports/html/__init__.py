"""Reports that people read: one self-contained report.html per run and per sweep, made from the files of its folder."""

from ptq_exp.reports.html.run import write_run_report
from ptq_exp.reports.html.sweep import write_sweep_report

__all__ = ["write_run_report", "write_sweep_report"]
