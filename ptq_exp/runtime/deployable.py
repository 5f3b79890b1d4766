"""A quantized network in plain operations that engines recognise: its layers, see `plain_layers`, and its attention."""

from __future__ import annotations

import copy
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ptq_exp.quantization.online import OnlineLayer
from ptq_exp.runtime.grouped import GroupedLinear
from ptq_exp.runtime.integers import BYTE, grids
from ptq_exp.runtime.plain_layers import FloatLayer, GridQuantizer, IntegerLayer, Row
from ptq_exp.runtime.plan import ATTENTION, INT8, PRODUCT, LayerPlan, Plan, layers_of
from ptq_exp.runtime.sixteen_bits import store_


class IntegerAttnProcessor:
    """Attention on heads as a dimension of their own, its two products on quantized operands.

    Args:
        operands: quantizers of q, k and v, applied to the heads; the identity where there is none.
        softmax: quantizer of the softmax map.
    """

    def __init__(self, operands: tuple[nn.Module, nn.Module, nn.Module], softmax: nn.Module) -> None:
        self.operands, self.softmax = operands, softmax

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        layers = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer, x in layers)
        scores, scale = self._multiply(q, k.transpose(-1, -2), self.operands[0], self.operands[1])
        scores = scores * (scale * attn.scale)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], len(q))
            scores = scores + mask.unflatten(0, (len(q), attn.heads))
        y, scale = self._multiply(scores.softmax(-1), v, self.softmax, self.operands[2])
        y = (y if isinstance(scale, float) else y * scale).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        if len(shape) == 4:
            y = y.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            y = y + residual
        return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor

    @staticmethod
    def _multiply(a: Tensor, b: Tensor, left: nn.Module, right: nn.Module) -> tuple[Tensor, Tensor | float]:
        """(product, factor): a b = factor * product, where rows of ranges leave their scales outside."""
        scale: Tensor | float = 1.0
        operands = []
        for x, quantizer in ((a, left), (b, right)):
            if getattr(quantizer, "rows", 1) > 1 and quantizer.levels <= BYTE and quantizer.constant_zero:
                x, own, _ = quantizer.integers(x)
                scale = scale * own
            else:
                x = quantizer(x)
            operands.append(x)
        return operands[0] @ operands[1], scale


class Deployable(nn.Module):
    """A quantized network as plain operations on tensors alone: `forward(x, t, *conditions)`.

    With several rows of ranges the row, int64 [1], is the last argument. `condition_names` are those of the last
    tensors before it.
    """

    def __init__(self, network: nn.Module, row: Row, rows: int) -> None:
        super().__init__()
        self.network, self.rows, self.condition_names = network, rows, ()
        self._row = [row]

    def set_row(self, row: Tensor) -> None:
        """Choose the row of ranges, int64 [1]."""
        self._row[0].value = row

    def forward(self, *call: Tensor) -> Tensor:
        """Return the network's output; `row` int64 [1] is the last argument where `rows` > 1."""
        if self.rows > 1:
            *call, self._row[0].value = call
        n = len(call) - len(self.condition_names)
        return self.network(*call[:n], **dict(zip(self.condition_names, call[n:], strict=True)))


def deployable(network: nn.Module, plan: Plan, integer_layer: type[IntegerLayer] = IntegerLayer) -> Deployable:
    """Write a calibrated `network` in plain operations, as `integer_plan` has planned; the network stays as it is.

    Args:
        integer_layer: makes what stands for a layer that is executed as integers.
    """
    made, row = copy.deepcopy(network).float().eval().requires_grad_(False), Row()
    store_(made)  # what has no quantizers; quantized layers are of other types
    found = [grid for entry in plan.values() for grid in (*entry.inputs, entry.output) if grid is not None]
    rows = max((grid.rows for grid in found), default=1)
    attentions = [(name, layer, entry) for name, layer, entry in layers_of(made, plan) if entry.kind == ATTENTION]
    inside = {f"{name}.{role}" for name, _, _ in attentions for role in ("to_q", "to_k", "to_v")}
    for _, attention, entry in attentions:
        quantizers = [GridQuantizer(grid, row) for grid in entry.inputs] or [
            nn.Identity(), nn.Identity(), nn.Identity()
        ]
        softmax = nn.Identity() if entry.output is None else GridQuantizer(entry.output, row)
        attention.set_processor(IntegerAttnProcessor(tuple(quantizers), softmax))
        attention.softmax_quantizer = nn.Identity()  # the processor has what stands for it
    for name, layer, entry in list(layers_of(made, plan)):
        if entry.kind == PRODUCT:
            for side in ("left_quantizer", "right_quantizer"):
                grid = grids(getattr(layer, side))
                setattr(layer, side, GridQuantizer(grid[0], row) if grid else nn.Identity())
        if not entry.is_layer:
            continue
        if name in inside and entry.output is not None and plan[name.rpartition(".")[0]].inputs:
            entry = LayerPlan(**{**vars(entry), "output": None})  # on the heads instead
        if entry.grouped is not None:
            output = nn.Identity() if entry.output is None else GridQuantizer(entry.output, row)
            made.set_submodule(name, _with_online(layer, GroupedLinear(layer, entry.grouped, output)))
            continue
        kind = integer_layer if entry.executed == INT8 else FloatLayer
        made.set_submodule(name, _with_online(layer, kind(layer, entry, row)))
    return Deployable(made, row, rows)


def _with_online(layer: nn.Module, made: nn.Module) -> nn.Module:
    """Give `made`, which stands for `layer` and has a module `output` at its end, the online parts of `layer`.

    What transforms compute at run time stays in floating point, before and beside the layer.
    """
    if not isinstance(layer, OnlineLayer):
        return made
    made.online, made.branch, made.after, made.output = layer.online, layer.branch, made.output, nn.Identity()
    made.register_forward_pre_hook(_before)
    made.register_forward_hook(_after)
    return made


def _before(made: Any, args: tuple[Tensor, ...]) -> Tensor:
    return made.online(args[0])


def _after(made: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """`args` are what `_before` returned."""
    return made.after(y if made.branch is None else y + made.branch(args[0]))
