"""Values that a run lacks."""

import math
from typing import Any

import pandas as pd


def is_missing(value: Any) -> bool:
    """None, NaN, or pandas' own missing value."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
