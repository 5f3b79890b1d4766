"""One operation of a network: its multiplications, and the widths of its two operands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ptq_exp.errors import QuantizationError

Bits = int | tuple[int, ...] | None
"""Width of an operand: a number, candidates of which each sampling step uses one, or None = FP."""
FP_BITS = 32
_WHERE_GIVEN = ("weight_format", "activation_format", "dynamic_scales", "added")
_UNLISTED = ("quantized_params", "quantized_bytes")
HOW_OFTEN = (
    "activations have candidate widths; say how often each width is used: report.mixed(shares) or report.at(row)"
)


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        name: module name; ``<module>.qk`` and ``<module>.av`` for the products q k^T and softmax(.) v of attention,
            ``<module>.product`` for any other one of two activations, numbered from the second one of a module on;
            ``(outside)`` for convolutions and products with a parameter outside of layers, ``(other)`` for all other
            multiplications outside known modules.
        type: class of the full-precision module, with the kind of a product behind it (``Attention.qk``);
            ``(outside)`` or ``(other)``.
        scope: ``conv_linear`` for layers and what is computed as they do, ``attention`` for products, ``other``.
        params: parameters of the module itself.
        macs: multiply-accumulates per sample; 0 for a layer that the example never called.
        weight_bits: bits of the weight; of k in q k^T, of v in softmax(.) v. None = FP.
        activation_bits: bits of the layer input, by its own quantizer or by the one of the layer that made it; of q in
            q k^T, of the map in softmax(.) v. None = FP. Of several candidates in either, the i-th ones are used
            together.
        weight_bytes: size of the module's parameters, with scales and zero points.
        reason: why an operand stays FP; empty if both are quantized.
        weight_format, activation_format: number format of the two operands; empty of integers.
        dynamic_scales: ranges that are found from the data, per sample and evaluation.
        quantized_params, quantized_bytes: of the quantized weight alone: how many values, and their size with scales.
        added: of what a transform computes at run time the widths of the two operands; None = the network's own.
    """

    name: str
    type: str
    scope: str
    params: int
    macs: int
    weight_bits: Bits
    activation_bits: Bits
    weight_bytes: float
    reason: str = ""
    weight_format: str = ""
    activation_format: str = ""
    dynamic_scales: int = 0
    quantized_params: int = 0
    quantized_bytes: float = 0.0
    added: tuple[int, int] | None = None

    @property
    def covered(self) -> bool:
        """Whether both operands are quantized."""
        return self.weight_bits is not None and self.activation_bits is not None

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """The operands' candidate widths, where there are several."""
        return tuple(bits for bits in (self.weight_bits, self.activation_bits) if isinstance(bits, tuple))

    @property
    def bops(self) -> int:
        """Bit operations per sample.

        Raises:
            QuantizationError: an operand has candidate widths.
        """
        if self.candidates:
            raise QuantizationError(f"{self.name}: {HOW_OFTEN}")
        weight, activation = self.added or (FP_BITS, FP_BITS)
        return self.macs * (self.weight_bits or weight) * (self.activation_bits or activation)

    @property
    def plain(self) -> dict:
        """What the report lists of it, as plain values for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
            if key not in _UNLISTED and (value or key not in _WHERE_GIVEN)
        }

    def at(self, row: int) -> Row:
        """Return the operation at the `row`-th candidate of each operand that has several."""
        if not self.candidates:
            return self
        weight, activation = (
            bits[row] if isinstance(bits, tuple) else bits for bits in (self.weight_bits, self.activation_bits)
        )
        return replace(self, weight_bits=weight, activation_bits=activation)
