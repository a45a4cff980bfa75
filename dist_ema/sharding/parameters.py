"""`Stages` and `Parameters`: a model that came in parts, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping

from . import names, torch_classes

__all__ = ["Model", "ModelOrStages", "Parameters", "Stages", "module_of", "unsharded_copies"]


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
            if getattr(tensor, "_fsdp_flattened", False):
                raise ValueError(
                    f"parameter {name} belongs to FSDP1, which moves its parameters at every "
                    "forward: pass the model."
                )
            name = names.canonical(name)
            if name in self._parameters:
                raise ValueError(f"two parameters are called {name}.")
            self._parameters[name] = tensor  # type: ignore[assignment]
            self.nameless |= not isinstance(item, tuple)
        self.owners = self._find_owners()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The given tensors by name. The shard stands for a copy that FSDP2 unsharded."""
        return self._parameters  # type: ignore[return-value]

    def _find_owners(self) -> list[nn.Module]:
        """The FSDP2 modules around. Copies that they unsharded give way to the shards.

        See [Note: stale roots] in wrappers.
        """
        modules = list(_module_state_mapping)
        copies = unsharded_copies(modules)
        for name, tensor in self.tensors.items():
            self.tensors[name] = copies.get(id(tensor), tensor)
        parameters_given = set(map(id, self.tensors.values()))
        records = _fsdp2_records(modules)
        return list(
            dict.fromkeys(
                m for m, record in records if id(record.sharded_param) in parameters_given
            )
        )


_TAKES = "EMA takes a module, a list of stages, parameters, or pairs of a name and a parameter"


def unsharded_copies(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """The sharded parameter behind each parameter that FSDP2 unsharded, by the id of the copy."""
    copies = {}
    for _, record in _fsdp2_records(modules):
        for attribute in ("_unsharded_param", "_sharded_post_forward_param"):
            copy = getattr(record, attribute, None)
            if copy is not None:
                copies[id(copy)] = record.sharded_param
    return copies


def _fsdp2_records(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    """(module, what FSDP2 keeps of one parameter) of the modules given to fully_shard."""
    for module in modules:
        reference = _module_state_mapping.get(module) if torch_classes.is_fsdp2(module) else None
        state: Any = None if reference is None else reference()
        if state is not None:
            # torch 2.8 has one group.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (
                (module, record) for group in groups if group for record in group.fsdp_params
            )
