"""Which operation gets which quantizers: ordered rules from name patterns to specifications.

A pattern is a case-sensitive glob (`fnmatch`) on module names as `named_modules` spells them: ``*`` matches
any text, dots included, ``[qkv]`` one of three letters. The first rule that matches a module decides.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.formats import FORMATS, BlockFormat, FloatFormat
from ptq_exp.quantization.granularity import Granularity, PerTensor, splits_channels
from ptq_exp.quantization.ranges.range_search import METRICS
from ptq_exp.quantization.widths import SOFTMAX_BITS, check_bits, check_width, checked_widths


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        bits: width of the integer, 2 to 16; or the name of a number format in `FORMATS`; for an activation also a
            tuple of candidate widths, ascending, of which every sampling step uses one. A tuple of one is the same as
            the number.
        symmetric: zero point 0.
        granularity: which elements share a range. Formats of blocks have their own; others have a scale per range.
        metric: error measure of the range search; None = the one of the run.
        headroom: factor >= 1 by which an activation's range is widened after the search.
        bins: rows of an activation's ranges, of which every sampling step uses one; not together with candidate widths.
            Formats of blocks take their scales from the data of each step and have one row.
        dynamic: of an activation, ranges that follow the data: one for each sample ("tensor"), or in the inputs of
            linear layers for each position ("token"), or for so many channels of each position (a number). Everything
            else then has one for each sample. `metric` and `headroom` have no effect. None = calibrated ranges.

    Raises:
        ConfigError: a value is outside the above.
    """

    bits: int | str | tuple[int, ...]
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    metric: str | None = None
    headroom: float = 1.0
    bins: int = 1
    dynamic: str | int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, tuple):
            # the dataclass is frozen
            object.__setattr__(self, "bits", checked_widths("TensorSpec.bits", self.bits, SOFTMAX_BITS))
        elif isinstance(self.bits, str):
            check_width("TensorSpec.bits", self.bits)
        else:
            check_bits("TensorSpec.bits", self.bits, SOFTMAX_BITS)
        if not isinstance(self.granularity, Granularity):
            raise ConfigError(
                f"TensorSpec.granularity={self.granularity!r}: choose PerTensor(), PerChannel(), PerGroup(size) or "
                "Segments(channels, within)"
            )
        if self.bins < 1 or (self.bins > 1 and isinstance(self.bits, tuple)):
            raise ConfigError(
                f"TensorSpec.bins={self.bins}: give 1 or more, and 1 with candidate widths (bits={self.bits}): each "
                "sampling step chooses one row, either its bin or its width"
            )
        if self.dynamic is not None:
            self._check_dynamic()
        if not self.headroom >= 1:
            raise ConfigError(f"TensorSpec.headroom={self.headroom}: choose 1 or more")
        if self.metric is not None and self.metric not in METRICS:
            raise ConfigError(f"TensorSpec.metric={self.metric!r}: choose one of {', '.join(METRICS)}")

    def _check_dynamic(self) -> None:
        group = isinstance(self.dynamic, int) and not isinstance(self.dynamic, bool) and self.dynamic >= 1
        if self.dynamic not in ("tensor", "token") and not group:
            raise ConfigError(f"TensorSpec.dynamic={self.dynamic!r}: choose tensor, token, or a number of channels")
        if self.bins > 1 or isinstance(self.bits, tuple) or self.granularity != PerTensor():
            raise ConfigError(
                f"TensorSpec.dynamic={self.dynamic}: ranges follow the data: give one width, no bins of steps and "
                "granularity PerTensor()"
            )

    @property
    def format(self) -> FloatFormat | BlockFormat | None:
        """The number format; None of integers."""
        return FORMATS[self.bits] if isinstance(self.bits, str) else None


@dataclass(frozen=True)
class QuantSpec:
    """Quantizers of one operation; None leaves that tensor in full precision.

    A convolution or linear layer uses `weight`, `input` and `output`. An attention module uses `softmax`: where its q,
    k and v are the outputs of its linear layers, they are quantized there. Any other module that multiplies activations
    uses `softmax` for softmax maps and `product` for all other operands. `is_operand` says of a layer that `output` is
    there because attention multiplies it: it is left out where the module around the layer quantizes its operands
    itself.

    Raises:
        ConfigError: an activation asks for one range per channel, the softmax map for a zero point or a number format,
            an operand of a product for segments, or a weight for several widths or bins.
    """

    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    softmax: TensorSpec | None = None
    product: TensorSpec | None = None
    is_operand: bool = False

    def __post_init__(self) -> None:
        if self.weight is not None and isinstance(self.weight.bits, tuple):
            raise ConfigError(
                f"QuantSpec.weight: bits={self.weight.bits}, but a weight is quantized once: give one width (only "
                "activations can change theirs from one sampling step to the next)"
            )
        if self.weight is not None and self.weight.dynamic is not None:
            raise ConfigError(f"QuantSpec.weight: dynamic={self.weight.dynamic}, but a weight is always the same")
        if self.weight is not None and self.weight.bins > 1:
            raise ConfigError(f"QuantSpec.weight: bins={self.weight.bins}, but a weight is the same at every step")
        for role in ("input", "output", "softmax", "product"):
            spec = getattr(self, role)
            if spec is not None and isinstance(spec.bits, str):
                check_width(f"QuantSpec.{role}: bits", spec.bits, activation=True)
            if spec is not None and splits_channels(spec.granularity):
                raise ConfigError(
                    f"QuantSpec.{role}: activations are quantized per tensor; use Segments to split them"
                )
        if self.softmax is not None and isinstance(self.softmax.bits, str):
            raise ConfigError(f"QuantSpec.softmax: bits={self.softmax.bits}, but the softmax map takes integers alone")
        if self.softmax is not None and (not self.softmax.symmetric or self.softmax.granularity != PerTensor()):
            raise ConfigError(
                "QuantSpec.softmax: the softmax map takes symmetric=True (zero point 0) and no segments"
            )
        if self.product is not None and self.product.granularity != PerTensor():
            raise ConfigError("QuantSpec.product: the operands of products have one range each: choose PerTensor()")


@dataclass(frozen=True)
class Rule:
    """Modules whose name matches the glob `pattern` follow `spec`; None keeps them FP for `reason`."""

    pattern: str
    spec: QuantSpec | None
    reason: str = ""

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the module called `name`."""
        return fnmatchcase(name, self.pattern)


def first_match(rules: Sequence[Rule], name: str) -> Rule | None:
    """Return the first rule that matches `name`, or None."""
    return next((rule for rule in rules if rule.matches(name)), None)


def check_rules(rules: Sequence[Rule], quantizable: Collection[str], left_alone: Collection[str]) -> None:
    """Check that every rule matches some module.

    Args:
        rules: in order.
        quantizable: names of the modules that can be quantized.
        left_alone: names of other modules with weights; a rule that keeps FP may speak of them.

    Raises:
        ConfigError: a rule matches none; the message names its pattern and similar names.
    """
    for rule in rules:
        names = [*quantizable, *left_alone] if rule.spec is None else list(quantizable)
        if any(rule.matches(name) for name in names):
            continue
        called = f"rule {rule.pattern!r}" + (f" ({rule.reason})" if rule.reason else "")
        blocked = [name for name in left_alone if rule.matches(name)]
        if blocked:
            raise ConfigError(f"{called} matches only modules that cannot be quantized: {blocked[:3]}")
        near = difflib.get_close_matches(rule.pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
        raise ConfigError(
            f"{called} matches no convolution, linear layer or attention of the model; "
            f"names near it: {', '.join(near) or 'none, the model has no such module'}"
        )
