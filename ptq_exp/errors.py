"""Errors that a user can mend: the message says what was found, what was expected and which setting to change."""


class PTQError(ValueError):
    """Root of the errors that end a run in one clear line instead of a traceback."""


class ConfigError(PTQError):
    """A setting is misspelt, impossible, or contradicts another one."""


class InfeasibleError(PTQError):
    """A configuration exceeds a limit that was set for it: nothing was computed, and nothing is wrong."""


class CheckpointError(PTQError):
    """A checkpoint file is missing, truncated, or belongs to another architecture."""


class DataError(PTQError):
    """Input data is missing, of the wrong shape, or holds NaN or infinity."""


class QuantizationError(PTQError):
    """A quantizer cannot be placed, calibrated or run."""
