"""`Stages`, `Parameters`: a model given as pipeline stages or bare parameters, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from . import fsdp2
from .torch_classes import is_flattened
from .wrapper_names import canonical

__all__ = ["Model", "ModelOrStages", "Parameters", "Stages", "module_of"]


Model = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
ModelOrStages = Model | Sequence[nn.Module]


def module_of(model: ModelOrStages) -> nn.Module:
    """The model, or a module around the stages or parameters that were given in its place."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (list, tuple)) and model and isinstance(model[0], nn.Module):
        return Stages(model)
    return Parameters(model)  # type: ignore[arg-type]


class Stages(nn.ModuleList):
    """The stages of a pipeline that this rank holds, as one model.

    Weights have the names that their stages give them.
    """


class Parameters(nn.Module):
    """Parameters without their module, under their names, or under 0, 1, ... in their order.

    It is not known whether DDP replicates them, whether the model registers another object now, or
    which buffers belong to them. FSDP2's are found through its own records. FSDP1's cannot be held
    from outside.

    Args:
        given: Parameters, or pairs of a name and a parameter.
        average_frozen: Average the frozen ones too, as loops may freeze and thaw them at any step.

    Raises:
        ValueError: Something else was given, FSDP1 moves a parameter, or a name comes twice.
    """

    def __init__(
        self, given: Iterable[Tensor] | Iterable[tuple[str, Tensor]], average_frozen: bool = False
    ) -> None:
        super().__init__()
        self.average_frozen, self.nameless = average_frozen, False
        if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable):
            raise ValueError(f"{_TAKES}, got {type(given).__name__}.")
        for i, item in enumerate(given):
            name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (str(i), item)
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"{_TAKES}, got {type(item).__name__} as number {i}.")
            if is_flattened(tensor):
                raise ValueError(
                    f"parameter {name} belongs to FSDP1, which moves its parameters at every "
                    "forward: pass the model."
                )
            name = canonical(name)
            if name in self._parameters:
                raise ValueError(f"two parameters are called {name}.")
            # register_parameter() refuses names with dots, and tensors that are no Parameters.
            self._parameters[name] = tensor  # type: ignore[assignment]
            self.nameless |= not isinstance(item, tuple)
        self.owners = fsdp2.find_modules(self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The given tensors by name. The shard stands for a copy that FSDP2 unsharded."""
        return self._parameters  # type: ignore[return-value]


_TAKES = "EMA takes a module, a list of stages, parameters, or pairs of a name and a parameter"
