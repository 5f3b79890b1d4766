"""What a run will take, before it runs: seconds, memory, disk; and a refusal of what cannot fit."""

from ptq_exp.experiment.forecast.forecast import Forecast
from ptq_exp.experiment.forecast.make import forecast_run, refuse_copy

__all__ = ["Forecast", "forecast_run", "refuse_copy"]
