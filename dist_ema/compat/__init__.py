"""Drop-ins for other libraries' averages, and `install`, which puts one where a library looks.

Each module stands in for one package or snippet: same names, same arguments, same keys in
checkpoints. The import line is all that changes in a script. Where a library builds the average
itself, a script has no such line: `install` puts the drop-in where the library looks it up.

[Note: where a library looks]  `from timm.utils import ModelEmaV3` binds the class in the module
that says so. So a class is replaced under its name in every module of the library that holds it.
Modules that are imported later find it replaced in the module that defines it.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from importlib import import_module

__all__ = ["Installed", "install"]

# library -> its modules that must be imported first, the module that defines the classes, ours
_PLACES = {
    "diffusers": (["diffusers.training_utils"], "diffusers.training_utils", "diffusers"),
    "ema_pytorch": ([], "ema_pytorch", "ema_pytorch"),
    "lightning": (
        ["lightning.pytorch.callbacks.weight_averaging"],
        "torch.optim.swa_utils",
        "swa_utils",
    ),
    "pytorch_lightning": (
        ["pytorch_lightning.callbacks.weight_averaging"],
        "torch.optim.swa_utils",
        "swa_utils",
    ),
    "timm": (["timm.utils", "timm.task.task"], "timm.utils.model_ema", "timm"),
    "torch": ([], "torch.optim.swa_utils", "swa_utils"),
    "torch_ema": (["torch_ema"], "torch_ema.ema", "torch_ema"),
    "torchcontrib": (["torchcontrib.optim"], "torchcontrib.optim.swa", "contrib"),
    "ultralytics": (
        ["ultralytics.engine.trainer"],
        "ultralytics.utils.torch_utils",
        "yolo",
    ),
}


class Installed(ExitStack):
    """The handle of `install`: the end of a `with` block restores what was replaced.

    Attributes:
        places: "module.name" of everything that was replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def remove(self) -> None:
        """Give the library its own classes again. Averages that exist stay. Idempotent."""
        self.close()


def install(library: str) -> Installed:
    """Let a library build its averages by `dist_ema.compat`, where it builds them itself.

    Call it before the library's trainer or task is made. A script that has imported the class under
    a name of its own keeps the original.

    Args:
        library: "timm", "ultralytics", "lightning", "pytorch_lightning", "diffusers",
            "ema_pytorch", "torch_ema", "torchcontrib" or "torch", as it is imported.

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        ValueError: No drop-in is known for the library.
        ImportError: It is not installed, or this version has no such place.
    """
    if library not in _PLACES:
        raise ValueError(
            f"no drop-in is known for {library!r}; known are {', '.join(sorted(_PLACES))}. Where a "
            "library has a callback for its average, use one of dist_ema.integrations in its place."
        )
    imported, defining, ours = _PLACES[library]
    try:
        for name in imported:
            import_module(name)
        originals = import_module(defining)
    except ImportError as error:
        raise ImportError(
            f"install({library!r}): {error}. It is not installed, or this version builds its "
            f"average elsewhere than dist_ema knows ({', '.join([*imported, defining])})."
        ) from error
    drop_ins = import_module(f"{__name__}.{ours}")
    installed = Installed()
    for name in drop_ins.__all__:
        original, drop_in = getattr(originals, name, None), getattr(drop_ins, name)
        # Installed twice, or a name that this version of the library lacks.
        is_ours = original is None or original is drop_in
        for place, module in [] if is_ours else list(sys.modules.items()):
            # None stands for a module that must not be imported.
            inside = module is not None and f"{place}.".startswith(f"{library}.")
            if inside and vars(module).get(name) is original:
                installed.callback(setattr, module, name, original)
                setattr(module, name, drop_in)
                installed.places.append(f"{place}.{name}")
    if not installed.places:
        raise ImportError(
            f"install({library!r}): this version of it holds none of "
            f"{', '.join(drop_ins.__all__)}, or they were replaced before."
        )
    return installed
