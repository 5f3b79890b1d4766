"""Which operators of torch multiply matrices, and how much; which do not; all others are unknown.

Counted are multiply-accumulates: products that are summed. Multiplications of elements (scales, gates, outer products
written as broadcasts), norms, reductions, pooling, resampling and everything that only moves values are not.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ptq_exp.quantization.cost.owners import place_of

aten = torch.ops.aten

_CREATING = """
    arange bartlett_window blackman_window empty empty_like empty_permuted empty_strided eye fft_fftfreq fft_rfftfreq
    full full_like hamming_window hann_window kaiser_window linspace logspace new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like range scalar_tensor tril_indices triu_indices zeros zeros_like
    _efficientzerotensor
"""
_RANDOM = """
    bernoulli binomial cauchy exponential geometric log_normal multinomial native_dropout normal normal_functional
    poisson rand rand_like randint randint_like randn randn_like random randperm uniform _fused_dropout
"""
_MOVING = """
    alias as_strided as_strided_scatter block_diag bucketize cat channel_shuffle clone col2im complex constant_pad_nd
    contiguous copy detach diag_embed diagonal_scatter embedding fill flip gather im2col index index_add index_copy
    index_fill index_put index_reduce index_select is_pinned is_same_size isin kthvalue lift lift_fresh lift_fresh_copy
    masked_fill masked_scatter masked_select max_unpool2d max_unpool3d nonzero nonzero_static one_hot pixel_shuffle
    pixel_unshuffle polar put reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave
    replication_pad1d replication_pad2d replication_pad3d resize resize_as roll rot90 scatter scatter_add scatter_reduce
    searchsorted select_scatter set slice_scatter sort split split_with_sizes squeeze stack t take topk transpose tril
    triu unfold unique_consecutive unique_dim unsafe_split unsafe_split_with_sizes unsqueeze view where zero
    _index_put_impl _local_scalar_dense _pin_memory _reshape_alias _reshape_copy _stack _to_copy _to_dense _unique
    _unique2 _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate _unsafe_view
    _assert_async _assert_scalar _assert_tensor_metadata _fused_sdp_choice _has_same_storage_numel _is_all_true
    _is_any_true is_contiguous sym_size sym_stride sym_numel sym_storage_offset size stride numel dim storage_offset
"""
_REDUCING = """
    all allclose any argmax argmin bincount count_nonzero cummax cummin cumprod cumsum dist equal histc log_softmax
    logcumsumexp logsumexp max mean median min mode nanmedian norm prod renorm softmax std sum trace var var_mean
    segment_reduce _cummax_helper _cummin_helper _embedding_bag _embedding_bag_forward_only _log_softmax _logcumsumexp
    _masked_softmax _safe_softmax _softmax aminmax _aminmax
    batch_norm_elemt batch_norm_stats cudnn_batch_norm miopen_batch_norm native_batch_norm native_group_norm
    native_layer_norm native_norm _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _native_batch_norm_legit
    _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _weight_norm_interface
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
    avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    _adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_max_pool2d mkldnn_max_pool3d mkldnn_adaptive_avg_pool2d
"""
_RESAMPLING = """
    cudnn_grid_sampler grid_sampler_2d grid_sampler_3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _grid_sampler_2d_cpu_fallback
"""
# the gates of a recurrent cell are given; its matrix products are operators of their own
_ELEMENTWISE = """
    addr copysign floor_divide gelu glu hardswish heaviside log_sigmoid_forward mish rrelu_with_noise threshold
    _prelu_kernel _thnn_fused_gru_cell _thnn_fused_lstm_cell dequantize fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine_cachemask int_repr q_scale q_zero_point quantize_per_channel quantize_per_tensor
    _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
"""
WITHOUT_PRODUCTS = frozenset(" ".join((_CREATING, _RANDOM, _MOVING, _REDUCING, _RESAMPLING, _ELEMENTWISE)).split())
"""Operators of ``aten`` that multiply no matrices, without the underscore of those that work in place."""
_TAGS = {getattr(torch.Tag, name) for name in ("pointwise", "reduction", "view_copy") if hasattr(torch.Tag, name)}


def _first_two(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of a matrix or vector `a` and a vector or matrix `b` [K, ...], summed over K."""
    return a.numel() * prod(b.shape[1:])


def _last_two(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return _first_two(a, b)


def _batched(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return a.numel() * b.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expand: Any, **_: Any) -> int:
    """Of sum(a b c), as `torch.nn.Bilinear` computes it: one for each element of the product before the sum."""
    grown = []
    for tensor, dims in zip((a, b, c), expand, strict=False):
        for dim in dims:
            tensor = tensor.unsqueeze(dim)
        grown.append(tensor.shape)
    return prod(torch.broadcast_shapes(*grown))


def _recurrent(x: Tensor, *weights: Any, **_: Any) -> int:
    """Every matrix of the cell once for each step of each sequence (and layer and direction, which have their own)."""
    found = [w for part in weights for w in (part if isinstance(part, list | tuple) else (part,))]
    matrices = [w for w in found if isinstance(w, Tensor) and w.ndim == 2]
    return prod(x.shape[:-1]) * sum(w.numel() for w in matrices)


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _first_two, aten.dot: _first_two, aten.vdot: _first_two, aten._int_mm: _first_two,
    aten.addmv: _last_two, aten._addmm_activation: _last_two, aten.addbmm: _batched, aten._trilinear: _trilinear,
    aten.addmv_: _last_two, aten.addmm_: _last_two, aten.addbmm_: _batched, aten.baddbmm_: _batched,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: lambda x, w, r, *_, **__: _recurrent(x, w, r),
    aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
}
"""Beside those of `torch.utils.flop_counter`: (arguments of the operator) -> multiply-accumulates."""
_CONVOLUTIONS = {aten.convolution, aten._convolution}
_OF_ONE_MATRIX = {aten.mm, aten.addmm, aten.addmm_, aten._addmm_activation, aten._int_mm}


def counted(operator: Any) -> bool:
    """Whether `macs_of` knows the operator (an overload of one)."""
    packet = operator.overloadpacket
    return packet in _FORMULAS or packet in flop_registry


def macs_of(operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    """Multiply-accumulates of one call of a `counted` operator."""
    packet = operator.overloadpacket
    if packet in _FORMULAS:
        return _FORMULAS[packet](*args, **kwargs)
    return flop_registry[packet](*args, **kwargs, out_val=output) // 2


def as_layers_do(function: torch._ops.OpOverload, args: tuple, parameters: Container[int]) -> bool:
    """Whether an operator is a convolution, or multiplies rows by one of `parameters`, as a linear layer does.

    Args:
        parameters: where the network's parameters lie, see `place_of`.
    """
    if function.overloadpacket in _CONVOLUTIONS:
        return True
    return function.overloadpacket in _OF_ONE_MATRIX and any(place_of(value) in parameters for value in args)


def without_products(operator: Any) -> bool:
    """Whether the operator is known to multiply no matrices."""
    if operator.namespace == "prim" or operator.is_view or _TAGS & set(operator.tags):
        return True
    if operator.namespace != "aten":
        return False
    name = operator.overloadpacket.__name__
    name = name.removesuffix("_") if not name.endswith("__") else name
    name = name.removesuffix("_copy") if hasattr(aten, name.removesuffix("_copy")) else name
    if name.startswith("_foreach_"):
        return name != "_foreach_mm"
    return name in WITHOUT_PRODUCTS or any(_elementwise(name))


def _elementwise(name: str):
    """Whether the overloads of the operator called `name` work element by element; tags are missing from some."""
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        yield torch.Tag.pointwise in getattr(packet, overload).tags
