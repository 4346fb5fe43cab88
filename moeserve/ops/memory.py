"""Memory for weights on CPUs: large pages where the system has them, small weights side by side in one block.

A decode step reads every active weight once; with pages of 4 KiB the walks of the page tables halve the rate.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_BLOCK = 32 << 20  # what small weights share; memory that nobody writes costs nothing
_ALIGNMENT = 64


class WeightMemory:
    """Hands out uninitialised tensors that live until the last of their block is dropped."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        if num_bytes > _BLOCK // 4:
            return _huge_block(num_bytes)[:num_bytes].view(dtype).view(shape)
        if self._used + num_bytes > self._block.numel():
            self._block, self._used = _huge_block(_BLOCK), 0
        part = self._block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype).view(shape)


def _huge_block(num_bytes: int) -> Tensor:
    """uint8, at least num_bytes at an address where a large page can start; asked to be of such pages."""
    num_bytes = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    whole = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    block = whole[-whole.data_ptr() % HUGE_PAGE :][:num_bytes]
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:  # Linux; a kernel without such pages refuses, and nothing is lost
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(block.data_ptr(), num_bytes, advice)
    return block
