"""Files of torch.save as trees of tensors: torch.load(weights_only=True), inert classes, refusals.

A class that needs code is refused by name.

Tensors are mapped, not read, where the file is an archive (all since torch 1.6); a window of one is
a copy of its bytes. torch is imported only when a file is opened.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from pickletools import genops
from typing import TYPE_CHECKING, Any

from ..checkpoint import disk
from ..dtypes import TORCH, Bytes, gathered
from ..text import some
from . import recognise, torch_zip

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load"]

# Records of settings that other packages put beside weights. Objects of these become empty
# placeholders; their code, or the package, is not needed and not run.
_SETTINGS = (
    "argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode", "omegaconf.nodes.BooleanNode",
    "typing.Any", "builtins.dict", "numpy.dtype", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar", "datetime.datetime", "datetime.timedelta",
)  # fmt: skip
_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
)  # fmt: skip
_MAX_DEPTH = 50
_LOOKED_AT = 1 << 20  # bytes of a bare pickle, for the first name that it asks for


class _Nothing:
    """Stands for an object of a class whose code is not run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _leaf_of(tensor: Tensor, dtype: str) -> recognise.Leaf:
    shape, first, strides = tuple(tensor.shape), int(tensor.storage_offset()), tensor.stride()
    key = (tensor.untyped_storage().data_ptr(), first, shape, strides, dtype)

    def read(begin: int, end: int) -> Bytes:
        import torch

        if tensor.is_contiguous():
            raw: Bytes = tensor.reshape(-1).view(torch.uint8)[begin:end].numpy().copy()
            return raw
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
        itemsize = tensor.itemsize
        return gathered(memory.numpy(), first, shape, strides, itemsize, begin, end)

    return recognise.Leaf(dtype, shape, read, key)


def load(path: Path, inert: Iterable[str] = ()) -> tuple[Any, dict[str, str]]:
    """Read the objects of a file, with a `Leaf` for each tensor.

    Args:
        path: A file that torch.save wrote.
        inert: Further classes whose objects become empty placeholders.

    Returns:
        The objects; and the tensors that safetensors cannot hold, name -> why.

    Raises:
        ValueError: The file is damaged, has compressed records, or holds objects of other classes.
            Their code is not run.

    Note:
        *Cost*: the table of contents; tensors of an archive are mapped.
    """
    import torch

    # torch keeps classes in a dict by identity, so each name has one of its own.
    allowed: list[Any] = [
        (type(name.rpartition(".")[2], (_Nothing,), {}), name)
        for name in {*_SETTINGS, *inert} - {*_DICTS}
    ]
    allowed += [(dict, name) for name in _DICTS]
    allowed.append((lambda *factory: {}, "collections.defaultdict"))
    mapped = _is_archive(path)
    records = _records(path) if mapped else {}
    unsafe: list[str] = []  # classes that torch would not load
    try:
        # NOTE: torch warns of its own storages, and its errors advise to run the code.
        with (
            disk.disk_errors(path),
            warnings.catch_warnings(),
            torch.serialization.safe_globals(allowed),
        ):
            warnings.simplefilter("ignore")
            if mapped:
                unsafe += sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(_refusal(path, error, unsafe)) from None
    trees = _Trees(str(path))
    tree = trees.make(loaded)
    if mapped:
        _refuse_other_lengths(path, trees.storages, records)
    return tree, trees.unsupported


def _is_archive(path: Path) -> bool:
    """Whether the file begins as an archive does, so that a damaged one is an archive too."""
    return disk.beginning(path, 4) == b"PK\3\4"


def _records(path: Path) -> dict[int, int]:
    """Begin -> length of each record. Raises ValueError for one that torch would map wrongly.

    It maps a compressed record as if its bytes were elements.
    """
    with disk.open_regular(path) as file, disk.disk_errors(path):
        records = torch_zip.records(
            lambda begin, end: os.pread(file.fileno(), end - begin, begin),
            path.stat().st_size,
            str(path),
        )
    return {begin: end - begin for begin, end in records.values()}


def _refuse_other_lengths(path: Path, storages: dict[int, int], records: dict[int, int]) -> None:
    """Raise ValueError unless each storage is a record: torch maps what follows a shorter one.

    Args:
        path: The file.
        storages: Address -> length.
        records: Begin in the file -> length. The address of the file is not known, but it is the
            one at which every storage begins where a record does.
    """
    if storages and not any(
        all(records.get(at - (min(storages) - begin)) == size for at, size in storages.items())
        for begin in records
    ):
        raise ValueError(
            f"{path} is damaged: a tensor is said to hold more or fewer bytes than its record."
        )


def _refusal(path: Path, error: Exception, unsafe: Sequence[str]) -> str:
    """One sentence for what torch raised."""
    text = " ".join(str(error).split())
    classes = unsafe or re.findall(r"GLOBAL ([\w.]+)", text)[:1]
    if any(
        name.startswith(("torch.nn.modules.", "torch.nn.Module")) or name.endswith("Model")
        for name in classes
    ):
        return (
            f"{path} holds whole modules ({some(classes)}): pickled code, which dist_ema does not "
            "run. Load it where that code is, and save a table of its tensors: "
            "torch.save(model.state_dict(), 'weights.pt')."
        )
    if classes:
        return (
            f"{path} asks for {some(classes)}, whose code dist_ema does not run. If they are only "
            f"settings beside the weights, pass inert={list(classes[:3])} to read past them."
        )
    name = "" if _is_archive(path) else _first_asked(path)
    if name:
        return (
            f"{path} is a pickle that torch.save did not write. It asks for {name}, whose code "
            "dist_ema does not run."
        )
    # torch's advice to run the code is cut off.
    text = re.sub(r"^Weights only load failed.* error: | Check the documentation.*", "", text)
    plain = isinstance(error, RuntimeError) or type(error).__name__ == "UnpicklingError"
    kind = "" if plain else f"{type(error).__name__}: "
    return f"{path} is no checkpoint of torch.save, or is damaged: {kind}{text[:200]}"


def _first_asked(path: Path) -> str:
    """The first name that a bare pickle asks for, from its opcodes: nothing of it is run.

    '' if there is none.
    """
    texts: list[str] = []
    with suppress(ValueError):
        # NOTE: a file reserves what an opcode claims, before it reads; bytes do not.
        for code, argument, _ in genops(disk.beginning(path, _LOOKED_AT)):
            if code.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if code.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            texts = [*texts[-1:], argument] if isinstance(argument, str) else texts
    return ""


class _Trees:
    """Trees of `Leaf` from what torch.load gave. An object that is held often is converted once."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._made: dict[int, Any] = {}
        self.storages: dict[int, int] = {}  # address -> bytes
        self.unsupported: dict[str, str] = {}

    def make(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """Convert tensors, mappings, lists, numbers and texts; anything else becomes None."""
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"{self._where} nests its tables more than {_MAX_DEPTH} deep.")
        if id(value) not in self._made:
            self._made[id(value)] = None  # what a container that holds itself finds inside
            self._made[id(value)] = self._make(value, path)
        return self._made[id(value)]

    def _make(self, value: Any, path: tuple[str, ...]) -> Any:
        import torch

        if isinstance(value, dict):
            keys = [key for key, item in value.items() if isinstance(item, torch.Tensor)]
            # A table by numbers is no model; a model must not lose what has a number for a name.
            for key in keys if any(isinstance(key, str) for key in keys) else ():
                if not isinstance(key, str):
                    where = ".".join((*path, str(key)[:200]))
                    self.unsupported[where] = f"its key is of {type(key).__name__}, no name"
            return {key: self.make(item, (*path, str(key)[:200])) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.make(item, (*path, str(i))) for i, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value if isinstance(value, (bool, int, float, str)) else None
        dtype = TORCH.get(str(value.dtype).removeprefix("torch."))
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta
        if dtype is not None and plain and value.layout == torch.strided:
            storage = value.untyped_storage()
            if storage.nbytes():
                self.storages[storage.data_ptr()] = storage.nbytes()
            return _leaf_of(value.detach().resolve_conj().resolve_neg(), dtype)
        kind = type(value).__name__ + " on meta" * value.is_meta
        self.unsupported[".".join(path)] = f"a {kind} of {value.dtype}, {value.layout}"
        return None
