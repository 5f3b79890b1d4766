"""Bit-widths and number formats: which are allowed, and those of a whole network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ptq_exp.errors import ConfigError

LAYER_BITS = (2, 8)
SOFTMAX_BITS = (2, 16)
UNQUANTIZED = 16
"""Width that leaves activations as they are (W4A16)."""


@dataclass(frozen=True)
class Widths:
    """Bit-widths of a network.

    Attributes:
        weight: 2 to 8, or the name of a number format in `FORMATS`.
        activation: 2 to 8, or a number format, of layer inputs and the q, k, v of attention. Several, ascending:
            candidate widths, of which every sampling step uses one (the other widths below are the same at all steps).
            16: no activation is quantized, the softmax map and those that enter the first and last layers neither.
        softmax: 2 to 16, the attention map (zero point 0, unsigned).
        first_last: 2 to 8, least width of weights and inputs in the first and last layers. At 8 bits these weights
            keep their whole range: the last layer's inputs are nowhere negative but for SiLU's dip, so that what a
            clipped weight loses adds up over all of them and shifts the noise estimate.
        boundary: 2 to 16, width of the activations that enter the first and last layers. x_t is the sampler's state
            rather than an activation: its rounding error passes into the noise estimate divided by the noise level.
            Wider than 8 bits, the range is that of the calibration data times `BOUNDARY_HEADROOM`, without search:
            Gaussian tails beyond those that calibration saw are clipped otherwise.

    Raises:
        ConfigError: a width is out of range, or candidates do not ascend; the message names the setting.
    """

    weight: int | str
    activation: int | str | tuple[int, ...]
    softmax: int = 8
    first_last: int = 8
    boundary: int = 16

    def __post_init__(self) -> None:
        check_width("bits.weight", self.weight)
        if isinstance(self.activation, Sequence) and not isinstance(self.activation, str):
            # the dataclass is frozen
            object.__setattr__(self, "activation", checked_widths("bits.candidates", self.activation))
        else:
            check_width("bits.activation", self.activation, activation=True)
        check_bits("bits.first_last", self.first_last)
        check_bits("bits.softmax", self.softmax, SOFTMAX_BITS)
        check_bits("bits.boundary", self.boundary, SOFTMAX_BITS)

    @property
    def widest(self) -> int:
        """The activation width, or the widest candidate; of a number format, that of its elements."""
        return self.activation[-1] if isinstance(self.activation, tuple) else width_of(self.activation)

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized at all."""
        return self.activation != UNQUANTIZED


def check_bits(setting: str, bits: int, allowed: tuple[int, int] = LAYER_BITS) -> None:
    """Raise ConfigError, naming `setting`, unless `bits` is an integer in the closed interval `allowed`."""
    low, high = allowed
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
        raise ConfigError(f"{setting}={bits!r}: choose {low}..{high}")


def check_width(setting: str, bits: int | str, *, activation: bool = False) -> None:
    """Raise ConfigError, naming `setting`, unless `bits` is a width of `LAYER_BITS` or the name of a number format.

    `activation`: 16 is one, too (`UNQUANTIZED`), and formats of weights alone are none.
    """
    if not isinstance(bits, str):
        if activation and bits == UNQUANTIZED:
            return
        try:
            check_bits(setting, bits)
        except ConfigError as error:
            unquantized = f", {UNQUANTIZED} (activations stay as they are)" if activation else ""
            raise ConfigError(f"{error}{unquantized}, or a number format such as mxfp4") from error
        return
    from ptq_exp.quantization.formats import FORMATS  # loads torch, which the schema of settings does without

    names = [name for name, made in FORMATS.items() if not (activation and made.weights_only)]
    if bits not in names:
        why = ", which is a format of weights alone" if bits in FORMATS else ""
        unquantized = f", {UNQUANTIZED} (not quantized)" if activation else ""
        raise ConfigError(
            f"{setting}={bits}{why}: choose {LAYER_BITS[0]}..{LAYER_BITS[1]}{unquantized}, or one of {', '.join(names)}"
        )


def width_of(bits: int | str) -> int:
    """Return the width of an integer, or of the elements of a number format."""
    if not isinstance(bits, str):
        return bits
    from ptq_exp.quantization.formats import FORMATS

    return FORMATS[bits].bits


def at_least(bits: int | str, least: int) -> int | str:
    """Return `bits`, or the integer width `least` where that is wider."""
    return bits if width_of(bits) >= least else least


def checked_widths(
    setting: str, widths: Sequence[int], allowed: tuple[int, int] = LAYER_BITS
) -> int | tuple[int, ...]:
    """Return candidate `widths` as a tuple, or as the number if there is one.

    Raises:
        ConfigError: none are given, they do not ascend, or one is no integer in `allowed`; the message names `setting`.
    """
    widths = tuple(widths)
    for bits in widths:
        check_bits(setting, bits, allowed)
    if not widths or any(low >= high for low, high in pairwise(widths)):
        raise ConfigError(f"{setting}={list(widths)}: give candidate widths in ascending order, each once")
    return widths if len(widths) > 1 else widths[0]
