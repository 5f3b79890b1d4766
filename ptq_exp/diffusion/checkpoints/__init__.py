"""Original checkpoint files: read safely, renamed to the `diffusers` layout, used to the last tensor."""

from ptq_exp.diffusion.checkpoints.convert import Part, check_schedule, fill, identity
from ptq_exp.diffusion.checkpoints.files import is_mapped, read_checkpoint

__all__ = ["Part", "check_schedule", "fill", "identity", "is_mapped", "read_checkpoint"]
