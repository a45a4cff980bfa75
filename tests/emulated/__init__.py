"""An accelerator without hardware, for tests: `torch.device("emulated", 0)`, and one more.

Operators run on host threads, later, in the order of their streams (device.cpp). `load` compiles
it once and registers `torch.emulated`. It needs a C++ compiler and ninja, and says so otherwise.

How to read a failure: a missing wait shows as NaN or as wrong numbers, at every run alike. Where
only `schedule(random=...)` shows it, the seed is part of the test's name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import sysconfig
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

__all__ = ["PATIENCE", "load", "needs", "refusing_syncs", "schedule"]

SOURCE = Path(__file__).with_name("device.cpp")
PATIENCE = 3  # milliseconds after which the streams of a rank work unasked
# Beside the interpreter, where pip puts ninja; a virtual environment need not be active.
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
BUILD = Path(__file__).parents[2] / "build" / "emulated"


def missing() -> str:
    """What a build lacks on this machine; "" where it has all."""
    compiler = shutil.which("c++") or shutil.which("g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = {
        "a C++ compiler": not compiler,
        "ninja (pip install ninja)": not shutil.which("ninja", path=TOOLS),
        "the headers of Python": not header.exists(),
        "torch 2.13 or newer": tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    }
    return ", ".join(name for name, lacks in lacking.items() if lacks)


needs = pytest.mark.skipif(bool(missing()), reason=f"the emulated device needs {missing()}")


@lru_cache(maxsize=1)
def load() -> Any:
    """Compile device.cpp where no build of it is there, and register the device. Idempotent.

    Returns:
        The extension. Processes that call it together compile once.
    """
    from torch.utils import cpp_extension

    os.environ["PATH"] = TOOLS
    text = SOURCE.read_bytes() + SOURCE.with_name("process_group.h").read_bytes()
    text += f"{torch.__version__} {sys.version}".encode()
    folder = BUILD / hashlib.sha256(text).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "built.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "emulated_device.so").exists():
            extension = cpp_extension._import_module_from_library(
                "emulated_device", str(folder), is_python_module=True
            )
        else:
            # NOTE: torch's own lock stays behind where a build was killed, and is waited for ever.
            (folder / "lock").unlink(missing_ok=True)
            extension = cpp_extension.load(
                "emulated_device", [str(SOURCE)], extra_cflags=["-O0"], build_directory=str(folder)
            )
    torch.utils.rename_privateuse1_backend("emulated")
    torch._register_device_module("emulated", _device_module(extension))
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[])
    dist.Backend.register_backend(
        "emulated",
        lambda store, rank, size, timeout: extension.Group(
            dist.ProcessGroupGloo(store, rank, size, timeout), rank, size
        ),
        devices=["emulated"],
    )
    return extension


def _device_module(extension: Any) -> types.ModuleType:
    """What torch and its wrappers look for under `torch.emulated`."""
    module: Any = types.ModuleType("torch.emulated")

    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(device)

    def new_stream(device: Any = None, priority: int = 0) -> torch.Stream:
        return torch.Stream(device if device is not None else current_device(), priority=priority)

    def current_device() -> torch.device:
        return torch.device("emulated", extension.current_device())

    def new_event(enable_timing: bool = False, **_: Any) -> torch.Event:
        return torch.Event("emulated", enable_timing=enable_timing)

    @contextmanager
    def device(chosen: Any) -> Iterator[None]:
        before = extension.current_device()
        extension.set_device(torch.device(chosen).index or 0)
        try:
            yield
        finally:
            extension.set_device(before)

    @contextmanager
    def stream(chosen: torch.Stream | None) -> Iterator[None]:
        before = current_stream()
        torch.accelerator.set_stream(chosen or before)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.device_count = lambda: extension.DEVICES
    module.current_device = extension.current_device
    module.set_device = lambda chosen: extension.set_device(torch.device(chosen).index or 0)
    module.synchronize = torch.accelerator.synchronize
    module.current_stream, module.Stream, module.Event = current_stream, new_stream, new_event
    module.device, module.stream = device, stream
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_current_stream_capturing = lambda: torch.accelerator.current_stream().is_capturing()
    return module  # type: ignore[no-any-return]


@contextmanager
def schedule(
    eager: bool = False, random: float = 0.0, seed: int = 0, patience: int = 0
) -> Iterator[None]:
    """When streams work, inside the block. By default as late as the waits of a program allow.

    Args:
        eager: At once, beside the host.
        random: The share of operators after which some stream does a part of its work.
        seed: Of these.
        patience: Milliseconds after which a stream works unasked; 0: never. Ranks need it, as
            they wait for each other's streams.
    """
    load().schedule(eager, random, seed, patience)
    try:
        yield
    finally:
        torch.accelerator.synchronize(torch.device("emulated", 0))
        torch.accelerator.synchronize(torch.device("emulated", 1))
        load().schedule(False, 0.0, 0, 0)


@contextmanager
def refusing_syncs() -> Iterator[None]:
    """Inside the block a host that waits for the device raises RuntimeError."""
    load().refuse_syncs(True)
    try:
        yield
    finally:
        load().refuse_syncs(False)
