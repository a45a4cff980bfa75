"""Where the elements of a tensor lie: the plain tensor behind a subclass, the order in memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from .torch_classes import is_dtensor

__all__ = ["form", "memory_of", "present_memory", "storage_order"]


def memory_of(tensor: Tensor) -> Tensor | None:
    """The plain tensor that holds a weight's elements here; None where no single one does.

    A subclass by dispatch is looked through while it has exactly one inner tensor, of the same
    shape and dtype. Sparse, nested and quantized tensors have none. *Aliases* `tensor`.
    """
    local = tensor._local_tensor if is_dtensor(tensor) else tensor
    while type(local).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        flatten = getattr(local, "__tensor_flatten__", None)
        names: list[str] = flatten()[0] if flatten else []
        inner = getattr(local, names[0]) if len(names) == 1 else None
        if inner is None or (inner.shape, inner.dtype) != (local.shape, local.dtype):
            return None
        local = inner
    plain = local.layout is torch.strided and not (local.is_quantized or local.is_nested)
    return local if plain else None


def present_memory(tensor: Tensor) -> Tensor:
    """`memory_of` a tensor that had memory when it was recorded."""
    if type(tensor) is nn.Parameter:
        return tensor
    local = getattr(tensor, "_local_tensor", None)  # of a DTensor, and mostly plain
    memory = local if type(local) is Tensor else memory_of(tensor)
    assert memory is not None
    return memory


@lru_cache(maxsize=256)  # a model may have ten thousand experts of one shape
def storage_order(
    shape: torch.Size, stride: tuple[int, ...]
) -> tuple[bool, tuple[int, ...] | None]:
    """Whether the elements lie without gaps, and their dimensions from slowest to fastest.

    None for the dimensions stands for their own order.
    """
    if 0 in shape:
        return True, None
    order = sorted(range(len(shape)), key=lambda i: (-stride[i], i))
    longer = [i for i in order if shape[i] != 1]
    step = 1
    for i in reversed(longer):
        if stride[i] != step:
            return False, None
        step *= shape[i]
    return True, None if longer == sorted(longer) else tuple(order)


def form(memory: Tensor) -> tuple[torch.Size, list[int], bool]:
    """Shape, order in memory, and whether a view conjugates.

    The stride of a dimension of length 1 says nothing.
    """
    strides = zip(memory.stride(), memory.shape, strict=True)
    return memory.shape, [step for step, length in strides if length > 1], memory.is_conj()
