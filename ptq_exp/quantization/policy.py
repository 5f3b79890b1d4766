"""`Policy`: what of a network is quantized and how, apart from the bit-widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ptq_exp.errors import ConfigError
from ptq_exp.quantization.granularity import Granularity, PerChannel, PerGroup, PerTensor
from ptq_exp.quantization.widths import Widths

if TYPE_CHECKING:
    from ptq_exp.quantization.specs import Rule


def _setting(
    default: Any, meaning: str, *, choices: tuple[str, ...] = (), bounds: tuple[float, float | None] | None = None
) -> Any:
    """Declare a field with a sentence for the settings page, its valid words, and its least and largest value."""
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "bounds": bounds})


@dataclass(frozen=True)
class Policy:
    """Which operations are quantized, where, and with which ranges; the settings `quantization=` are of this form.

    The default quantizes every multiplication: both operands of each layer and attention product. Activations are
    quantized per tensor. Norms, SiLU, sums and concatenations stay FP. q, k and v have a quantizer each, on the outputs
    of their linear layers. Lists are kept as tuples.

    What each field means, and its choices, stand in its declaration; beside that:

    Attributes:
        attention: False for a network without attention.
        activation_site: with output, norms and sums come between, so that few multiplications read a quantized
            activation; the report says how many. The output of the layers of `last` stays FP.
        activation: dynamic ranges are those of all activations: the softmax map and what enters the first and the last
            layer, too, at their own widths, so that nothing needs calibration.
        quantize_state: x_t at the widest of the other activations' bits and `Widths.first_last`, its range found as
            theirs, in place of `Widths.boundary`; at either site.
        quantize_output: the noise estimate (with the variance, if the network makes one) at that same width.
        transforms: names in `TRANSFORMS`, or mappings of a "name" and settings of that transform.
        smooth: {name: smooth, alpha: `smooth_alpha`} is put before all other `transforms`.
        first, last: may be empty.
        keep_fp: globs, or names of `KEPT_SETS`.

    Raises:
        ConfigError: a value is none of the choices, or out of bounds; the message names the setting.
    """

    name: str = _setting("", "Name of the choice in this group.")
    attention: bool = _setting(True, "Quantize the products q·k and attention map·v.")
    weight_symmetric: bool = _setting(False, "Weights with zero point 0.")
    weight_granularity: str = _setting(
        "channel", "One weight range per output channel, per tensor, or per group of input channels.",
        choices=("channel", "tensor", "group"),
    )
    group_size: int = _setting(16, "Input channels per group for weight_granularity=group.", bounds=(1, None))
    activation_symmetric: bool = _setting(False, "Activations with zero point 0.")
    qkv_symmetric: bool = _setting(False, "q, k and v with zero point 0: engines then multiply them as integers.")
    activation_site: str = _setting(
        "input", "Quantize what layers read, or what they make (PTQ4DM's code).", choices=("input", "output")
    )
    shortcut: str = _setting(
        "joint", "Ranges of concatenated features: one, or one for each part in 1x1 shortcuts (split), or there and in "
        "the first 3x3 convolutions (split_all), as in Q-Diffusion.", choices=("joint", "split", "split_all"),
    )
    time_embedding: str = _setting(
        "none", "Output of the time embedding's projections: full precision, one range, or one for scale and one for "
        "shift (DI2N).", choices=("none", "shared", "split"),
    )
    temporal: str = _setting(
        "static", "Activation ranges along the sampling steps: the same, one set per bin of steps, or one per step "
        "(TFMQ-DM).", choices=("static", "binned", "per_step"),
    )
    temporal_bins: int = _setting(
        4, "Bins of consecutive steps for temporal=binned, at most sampler.steps.", bounds=(1, None)
    )
    activation: str = _setting(
        "static", "Activation ranges: calibrated, or those of the values of each evaluation: one per sample, one per "
        "token in inputs of linear layers, or one per group of a token's channels.",
        choices=("static", "dynamic_tensor", "dynamic_token", "dynamic_group"),
    )
    activation_group_size: int = _setting(64, "Channels per group for activation=dynamic_group.", bounds=(1, None))
    time_layers: str = _setting(
        "calibration_set", "Times that layers which depend on the time alone are calibrated on: those in the "
        "calibration set, or all sampling steps (TFMQ-DM).", choices=("calibration_set", "all_steps"),
    )
    quantize_state: bool = _setting(False, "Quantize x_t to the width of the other activations, not to bits.boundary.")
    quantize_output: bool = _setting(False, "Quantize the network's output as well.")
    transforms: tuple[Any, ...] = _setting(
        (), "Exact changes of the full-precision network before it is quantized, in order: smooth, rotate, low_rank, "
        "or mappings such as {name: smooth, alpha: 0.3}; see docs/transforms.md.",
    )
    smooth: bool = _setting(False, "Short for transforms=[smooth]: move outliers of activation channels into the "
                            "weights that read them (SmoothQuant).")
    smooth_alpha: float = _setting(0.5, "Share of the outliers that moves: 1 = all, 0 = none.", bounds=(0, 1))
    first: tuple[str, ...] | None = _setting(
        None, "Globs of the layers that read x_t; null: those that the model names."
    )
    last: tuple[str, ...] | None = _setting(
        None, "Globs of the layers that make the noise estimate; null: those that the model names."
    )
    keep_fp: tuple[str, ...] = _setting(
        (), "Globs of operations that stay in full precision, or what other code leaves so: `tfmq` (TFMQ-DM), "
        "`sdnq_common` (SDNQ, embeddings and ends), `modelopt_unet` (NVIDIA's Model Optimizer)."
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, setting.name, tuple(value))  # the dataclass is frozen
            _check(f"quantization.{setting.name}", value, setting.metadata)
        self._list_smoothing()

    def _list_smoothing(self) -> None:
        """Put `smooth` into `transforms`.

        Raises:
            ConfigError: it is there already.
        """
        default, alpha = type(self).smooth_alpha, self.smooth_alpha
        names = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in self.transforms]
        if "smooth" in names and (self.smooth or alpha != default):
            setting = "smooth=true" if self.smooth else f"smooth_alpha={alpha}"
            raise ConfigError(
                f"quantization.{setting}: quantization.transforms lists smooth already: leave it out, and write "
                f"{{name: smooth, alpha: {alpha}}} there"
            )
        if self.smooth:
            object.__setattr__(self, "transforms", ({"name": "smooth", "alpha": alpha}, *self.transforms))
        object.__setattr__(self, "smooth", False)
        object.__setattr__(self, "smooth_alpha", default)

    @property
    def granularity(self) -> Granularity:
        """Return that of the weights."""
        if self.weight_granularity == "group":
            return PerGroup(self.group_size)
        return PerChannel() if self.weight_granularity == "channel" else PerTensor()

    @property
    def dynamic(self) -> str | int | None:
        """Return what of a linear layer's input has a dynamic range of its own, see `TensorSpec`; None = static."""
        return {"dynamic_tensor": "tensor", "dynamic_token": "token", "dynamic_group": self.activation_group_size}.get(
            self.activation
        )

    def rules(self, widths: Widths, bins: int = 1) -> list[Rule]:
        """Return the ordered rules of this policy for any network, without `keep_fp` and what has to be found in one.

        Args:
            widths: of weights and activations.
            bins: ranges of every activation, of which each sampling step uses one; 1 with candidate widths.
        """
        from ptq_exp.quantization.rules import policy_rules  # loads torch, which the schema of settings does without

        return policy_rules(self, widths, bins)


def _check(setting: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if allowed["choices"] and value not in allowed["choices"]:
        raise ConfigError(f"{setting}={value}: choose one of {', '.join(allowed['choices'])}")
    if allowed["bounds"]:
        least, most = allowed["bounds"]
        if value < least or (most is not None and value > most):
            raise ConfigError(f"{setting}={value}: choose {least}{' or more' if most is None else f'..{most}'}")
