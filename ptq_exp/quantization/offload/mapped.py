"""Weights in files that are mapped into memory: they are read and written like any others, and need not stay in it.

The files have no name any more once they are mapped: their space is free when the tensors are gone, however a process
ends. What is written reaches the file by itself; `release` gives back the memory and loses nothing.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq_exp.errors import PTQError

_OF_FILE = "in_file_of"
_PLACE: ContextVar[tuple[float, Path] | None] = ContextVar("place_of_weights", default=None)
_PAGE_OUT, _BRING_IN, _WRITE_BACK = 21, 22, 4  # of Linux 5.4 and 5.14, and of msync; Python does not name them
SMALLEST = 1 << 16
"""Bytes of the smallest tensor that `in_file` is worth it for."""


def in_file(like: Tensor, folder: Path) -> Tensor:
    """Return a clone of `like` on the CPU whose elements lie in a file in `folder`; zeros where it has none (meta).

    Raises:
        PTQError: there is no room for the file.
    """
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    path = folder / f"{uuid.uuid4().hex}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:  # room first: a mapped file that cannot grow ends the process
            os.posix_fallocate(stream.fileno(), 0, like.numel() * like.element_size())
        flat = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
    except (OSError, RuntimeError) as error:
        raise PTQError(f"cannot write {path}: {error}; free space there or choose another folder") from error
    finally:
        with suppress(OSError):
            path.unlink()
    tensor = flat.as_strided(like.shape, strides_of_clone(like))
    if not like.is_meta:
        tensor.copy_(like.detach())
        _advise(flat, mmap.MADV_DONTNEED)  # they are in the file
    return tensor


def strides_of_clone(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that a clone of `tensor` has: on others, kernels may round otherwise."""
    return torch.empty_like(tensor, device="meta").stride()


def mapped_copy(network: nn.Module, folder: Path) -> nn.Module:
    """Return an independent copy of `network`, as `copy.deepcopy` makes it, whose parameters lie in files in `folder`.

    Parameters without memory (meta) become zeros.

    Raises:
        PTQError: there is no room for them.
    """
    memo: dict[int, object] = {}
    for parameter in network.parameters():
        if type(parameter) is nn.Parameter:
            _advise(parameter, _BRING_IN)
            made = nn.Parameter(in_file(parameter, folder), requires_grad=parameter.requires_grad)
            setattr(made, _OF_FILE, folder)
            memo[id(parameter)] = made
            _release(parameter)
    return copy.deepcopy(network, memo)


@contextmanager
def placing(limit: float | None, folder: Path) -> Iterator[None]:
    """Inside, `copy_of` and `fill_` put weights of more than `limit` bytes into files in `folder`; None = none."""
    token = _PLACE.set(None if limit is None else (limit, folder))
    try:
        yield
    finally:
        _PLACE.reset(token)


def copy_of(network: nn.Module) -> nn.Module:
    """Return an independent copy of `network`; see `placing`."""
    place = _PLACE.get()
    if place is None or weight_bytes(network) <= place[0]:
        return copy.deepcopy(network)
    return mapped_copy(network, place[1])


def fill_(network: nn.Module, types: Callable[[str], torch.dtype]) -> None:
    """Give parameters without memory (meta) zeros of the types that `types` says of their names; see `placing`."""
    place = _PLACE.get()
    folder = None if place is None or weight_bytes(network) <= place[0] else place[1]
    for prefix, module in network.named_modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                like = value.to(types(f"{prefix}.{name}" if prefix else name))
                zeros = torch.zeros_like(like, device="cpu") if folder is None else in_file(like, folder)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
                if folder is not None:
                    setattr(module._parameters[name], _OF_FILE, folder)


def folder_of(network: nn.Module) -> Path | None:
    """Return the folder of the files that the parameters of `network` lie in; None = they lie in memory."""
    return next((getattr(p, _OF_FILE) for p in network.parameters() if _in_own_file(p)), None)


def _in_own_file(tensor: Tensor) -> bool:
    """Say whether the memory of `tensor` is a file of ours: what pickle or `to` made of one has its mark alone."""
    return hasattr(tensor, _OF_FILE) and tensor.untyped_storage().filename is not None


def weight_bytes(network: nn.Module) -> int:
    """Return the size of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def release(module: nn.Module) -> None:
    """Give back the memory of the parameters of `module` that lie in files; they are read again when they are used.

    Those that safetensors has mapped count, too. Elsewhere than on Linux nothing happens.
    """
    for parameter in module.parameters():
        _release(parameter)


def bring_in(module: nn.Module) -> None:
    """Read the parameters of `module` that lie in files into memory, all at once.

    Page by page, as they are used, takes ten times the processor time. Elsewhere than on Linux nothing happens.
    """
    for parameter in module.parameters():
        _advise(parameter, _BRING_IN)


def stream_weights_(network: nn.Module, names: Sequence[str]) -> None:
    """Let each module of `names` bring in its weights before each call, and give back their memory after it."""
    bring_in_before_calls_(network, names)
    for name in names:
        network.get_submodule(name).register_forward_hook(_release_after)


def bring_in_before_calls_(network: nn.Module, names: Sequence[str]) -> None:
    """Let each module of `names` bring in its weights before each call; asked again, nothing changes."""
    for name in names:
        module = network.get_submodule(name)
        if _bring_in_before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_bring_in_before)


def _bring_in_before(module: nn.Module, args: tuple) -> None:
    bring_in(module)


def _release_after(module: nn.Module, args: tuple, output: object) -> None:
    release(module)


_bring_in_before.reads_values = _release_after.reads_values = False  # see `diffusion.parts`


def _release(tensor: Tensor) -> None:
    # memory of our own files is dropped; of others the kernel decides, which keeps what no file holds
    _advise(tensor, mmap.MADV_DONTNEED if _in_own_file(tensor) else _PAGE_OUT)


def evict(module: nn.Module) -> None:
    """Leave the parameters of `module` that lie in files on the disk alone, so that they are read from there again.

    `release` leaves them in the system's cache of files. Where the system does not do that, nothing happens.
    """
    bring_in(module)  # what is not in the memory of this process would be kept
    for parameter in module.parameters():
        _advise(parameter, _PAGE_OUT, write_back=True)


def _advise(tensor: Tensor, advice: int, *, write_back: bool = False) -> None:
    """Tell the system what to do with the pages that `tensor` has for itself; elsewhere than on Linux nothing."""
    if not sys.platform.startswith("linux") or tensor.is_meta or tensor.device.type != "cpu":
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    begin, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        system, pages = ctypes.CDLL(None), (ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))
        if write_back:
            system.msync(*pages, _WRITE_BACK)
        if system.madvise(*pages, advice) and advice == _BRING_IN:
            system.madvise(*pages, mmap.MADV_WILLNEED)  # of older kernels: begin to read
