"""`PickledTensor`: one tensor as torch.save pickles it, a view of a storage. No torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..checkpoint import safetensors
from . import unpickler
from .dcp_metadata import NAMES, sizes

__all__ = ["PickledTensor", "Storage", "read"]

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip


class Storage(NamedTuple):
    """A record of the archive; of bytes, which are read as any dtype, if `dtype` is None."""

    dtype: str | None
    record: str


class PickledTensor(NamedTuple):
    """A view of a storage: offset, shape and strides in elements."""

    storage: Storage
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def is_dense(self) -> bool:
        """Row-major. The stride of a dimension of one element means nothing."""
        row_major = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        steps = zip(self.shape, self.strides, row_major, strict=True)
        return all(stride == step for size, stride, step in steps if size != 1)

    @property
    def last(self) -> int:
        """The offset of the last element from the first."""
        steps = zip(self.shape, self.strides, strict=True)
        return sum((size - 1) * stride for size, stride in steps)

    def fits(self, nbytes: int) -> bool:
        """Every element lies in the storage, and none of them twice, as far as sizes tell."""
        if len(self.shape) != len(self.strides):
            return False
        # Expanded tensors, whose elements share bytes, could make a small file a large model.
        reach = max(self.begin + self.last + 1, math.prod(self.shape))
        return reach * safetensors.ITEMSIZE[self.dtype] <= nbytes


def read(data: bytes, where: str) -> Any:
    """The object of a pickle: a `PickledTensor`, or what else it describes."""
    return unpickler.read(data, _NAMES, where, _storage)


def _storage(pid: Any) -> Storage:
    """A persistent id: ('storage', type, record, location, numel)."""
    # The device is of no interest, and the length is that of the record.
    word, dtype, name, *_ = pid
    if word != "storage" or type(name) is not str:
        raise TypeError("no storage")
    return Storage(dtype, f"data/{name}")


def _tensor(
    storage: Any, begin: Any, shape: Any, strides: Any, grad: Any, hooks: Any, *metadata: Any
) -> PickledTensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)"""
    return _typed_tensor(storage, begin, shape, strides, grad, hooks, storage.dtype, *metadata)


def _typed_tensor(
    storage: Any, begin: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any,
    *metadata: Any,
) -> PickledTensor:  # fmt: skip
    """torch._utils._rebuild_tensor_v3: the same, and a dtype. metadata: a lazy conjugate."""
    if type(storage) is not Storage or type(dtype) is not str or any(metadata):
        raise TypeError("no plain tensor")
    return PickledTensor(storage, sizes((begin,))[0], sizes(shape), sizes(strides), dtype)


def _parameter(tensor: Any, *_: Any) -> PickledTensor:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks)"""
    if type(tensor) is not PickledTensor:
        raise TypeError("no tensor")
    return tensor


# torch writes the class of a storage as its dtype, but for bytes.
_NAMES = {
    **NAMES,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": None,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
