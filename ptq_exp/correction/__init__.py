"""Quantization noise per sampling step: its statistics, its correction, and activation widths that follow the steps.

statistics = fit_statistics(eps_fp, eps_q, step, len(grid), shrink=True)
corrected = Corrected(quantized, statistics, grid)
images = model.sample(corrected, grid, range(8), seed=0, eps_noise_std=statistics.eps_noise_std)
"""

from ptq_exp.correction.corrected import Corrected, VarianceFit
from ptq_exp.correction.fit import fit_moments, fit_statistics, mean_square_error, relative_error
from ptq_exp.correction.fixed_pattern import fixed_pattern_share, share_of_noise
from ptq_exp.correction.moments import POWERS, Merged, MomentChunks, sample_moments
from ptq_exp.correction.residuals import (
    EDGES,
    residual_histogram,
    standardised_residual,
    step_correlation,
    step_products,
)
from ptq_exp.correction.schedule.assign import budget_rows, forward_snr, snr_rows
from ptq_exp.correction.schedule.bit_schedule import BitSchedule, Scheduled, parse_widths
from ptq_exp.correction.schedule.propagation import gains, measured_steps, propagated
from ptq_exp.correction.statistics import CONVENTIONS, NoiseStatistics
from ptq_exp.correction.trajectory import check_grid, final_error_db, fit_on_trajectory, nearest

__all__ = [
    "CONVENTIONS", "EDGES", "POWERS", "BitSchedule", "Corrected", "Merged", "MomentChunks", "NoiseStatistics",
    "Scheduled", "VarianceFit", "budget_rows", "check_grid", "final_error_db", "fit_moments", "fit_on_trajectory",
    "fit_statistics", "fixed_pattern_share", "forward_snr", "gains", "mean_square_error", "measured_steps", "nearest",
    "parse_widths", "propagated", "relative_error", "residual_histogram", "sample_moments", "share_of_noise",
    "snr_rows", "standardised_residual", "step_correlation", "step_products",
]
