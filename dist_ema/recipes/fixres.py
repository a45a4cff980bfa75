"""FixRes: adapt a trained model to the resolution of the test (Touvron et al. 2019, section 4).

Random crops in training make objects look larger than centre crops do in a test. At another
resolution the activations before the classifier follow other statistics. The cure is a few
epochs at the resolution and with the preprocessing of the test, which train the classifier and the
last normalisation alone.

    frozen = freeze_for_resolution(model, classifier="fc", norm="layer4.1.bn2")
    optimizer = torch.optim.SGD(frozen.parameters(), lr=1e-3)
    ...                                             # train at the test resolution
    frozen.undo()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..sharding import wrappers

__all__ = ["Frozen", "freeze_for_resolution"]


class Frozen(ExitStack):
    """The changes of `freeze_for_resolution`. `undo` or the end of a `with` block reverts them.

    Attributes:
        model: As it was given.
        names: The names of the parameters that are trained.
    """

    def __init__(self, model: nn.Module, names: list[str], free: list[nn.Parameter]) -> None:
        super().__init__()
        self.model, self.names, self._free = model, names, free

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters for the optimizer."""
        return iter(self._free)

    def undo(self) -> None:
        """Every requires_grad and every mode as it was before. Idempotent."""
        self.close()


def freeze_for_resolution(model: nn.Module, *, classifier: str, norm: str | None = None) -> Frozen:
    """Train the modules named `classifier` and `norm` only; the rest stays in evaluation mode.

    The rest stays in it even when the loop calls `model.train()`. `norm` follows that call, so that
    a BatchNorm learns its statistics again. Build the optimizer on `.parameters()` of the
    result, or let it skip parameters without a gradient. Call this before FSDP1 wraps the model,
    whose flat parameters need one requires_grad for all (unless use_orig_params=True). Build the
    EMA after it.

    Args:
        model: The trained model.
        classifier: Its name, without the prefixes of wrappers.
        norm: The name of the last normalisation before it.

    Raises:
        ValueError: A name is no module of the model, or has no parameters. Existing names follow.
    """
    inner = wrappers.unwrapped(model)
    # Under all its names, as a user may know the classifier by any.
    named = inner.named_modules(remove_duplicate=False)
    modules = {wrappers.canonical(name): module for name, module in named}
    chosen = [_pick(modules, "classifier", classifier)]
    if norm is not None:
        chosen.append(_pick(modules, "norm", norm))
    trained = {inside for module in chosen for inside in module.modules()}
    # In the order of the modules; a weight that two of them share comes once.
    free = dict.fromkeys(parameter for module in chosen for parameter in module.parameters())
    names = [wrappers.canonical(name) for name, p in inner.named_parameters() if p in free]
    frozen = Frozen(model, names, list(free))
    for parameter in model.parameters():
        frozen.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(parameter in free)
    for module in model.modules():
        frozen.callback(setattr, module, "training", module.training)

    def keep_in_eval(*_: Any) -> None:
        for module in model.modules():
            if module not in trained:
                module.training = False

    frozen.callback(model.register_forward_pre_hook(keep_in_eval).remove)
    return frozen


def _pick(modules: dict[str, nn.Module], what: str, name: str) -> nn.Module:
    if name not in modules or name == "":
        with_weights = [
            path
            for path, module in modules.items()
            if path and any(True for _ in module.parameters(recurse=False))
        ]
        raise ValueError(
            f"{what}={name!r} is no module of the model; the last ones with weights: "
            f"{', '.join(with_weights[-5:])}."
        )
    if not any(True for _ in modules[name].parameters()):
        raise ValueError(
            f"{what}={name!r} is a {type(modules[name]).__name__} without parameters: nothing to "
            "train."
        )
    return modules[name]
