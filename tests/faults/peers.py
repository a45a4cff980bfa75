"""What others write in place, for comparison: torch.save, safetensors and dcp.save."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .shim import Operation
from .verbs import Case, Model, constant

__all__ = ["peer_cases"]


def peer_cases() -> list[Case]:
    """Each over an existing version of the same weights."""
    return [
        Case("dcp.save over", _save_dcp, _read_dcp, (1,)),
        Case("torch.save over", _save_torch, _read_torch, (1,)),
        Case(
            "safetensors save_file over",
            _save_safetensors,
            _read_safetensors,
            (1,),
            unseen=_rename_of_safetensors,
        ),
    ]


def _filled(version: int) -> dict[str, torch.Tensor]:
    model = Model()
    model.fill(version)
    return model.state_dict()


def _save_torch(root: Path, version: int) -> None:
    _quietly(lambda: torch.save(_filled(version), root / "model.pt"))


def _read_torch(root: Path) -> int | None:
    path = root / "model.pt"
    return constant(torch.load(path, weights_only=True)) if path.exists() else None


def _save_safetensors(root: Path, version: int) -> None:
    path = root / "model.safetensors"
    _quietly(lambda: safetensors.torch.save_file(_filled(version), path))


def _read_safetensors(root: Path) -> int | None:
    path = root / "model.safetensors"
    return constant(safetensors.torch.load_file(path)) if path.exists() else None


def _rename_of_safetensors(seen: list[Operation]) -> list[Operation]:
    """safetensors writes a temporary, and renames it by a system call of its own."""
    temporary = seen[-1].path
    final = str(Path(temporary).with_name("model.safetensors"))
    return [Operation("rename", temporary, final, 0, 0, 0, b"")]


def _save_dcp(root: Path, version: int) -> None:
    _quietly(lambda: dcp.save(_filled(version), checkpoint_id=root / "dcp", no_dist=True))


def _read_dcp(root: Path) -> int | None:
    if not (root / "dcp").exists():
        return None
    state = _filled(0)
    _quietly(lambda: dcp.load(state, checkpoint_id=root / "dcp", no_dist=True))
    return constant(state)


def _quietly(call: Callable[[], object]) -> None:
    """NOTE: a CheckpointException is no Exception; safetensors raises one of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (CheckpointException, SafetensorError) as error:
        raise RuntimeError(str(error)) from error
