"""Parameters that came without their module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule

from .names import canonical

__all__ = ["Model", "Parameters", "fsdp2_records", "module_of"]


Model = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Parameters(nn.Module):
    """Parameters that came without their module, under their names, or under 0, 1, ... in their order.

    What a module would tell is not known of them: that DDP replicates them, that the model registers another object now,
    which buffers belong to them. FSDP2's are found through its own records, FSDP1's cannot be held from outside.

    always: frozen ones are averaged too, as loops may freeze and thaw them at any step.
    """

    def __init__(
        self, given: Iterable[Tensor] | Iterable[tuple[str, Tensor]], always: bool = False
    ) -> None:
        super().__init__()
        self.average_frozen = always
        if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable):
            raise ValueError(f"{_TAKES}, got {type(given).__name__}.")
        self.nameless = False
        for i, item in enumerate(given):
            name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (str(i), item)
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"{_TAKES}, got {type(item).__name__} as number {i}.")
            if getattr(tensor, "_fsdp_flattened", False):
                raise ValueError(
                    f"parameter {name} belongs to FSDP1, which moves its parameters at every forward: pass the model."
                )
            name = canonical(name)
            if name in self._parameters:
                raise ValueError(f"two parameters are called {name}.")
            self._parameters[name] = tensor  # type: ignore[assignment]
            self.nameless |= not isinstance(item, tuple)
        self.owners = self._find_owners()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What was given, by name; in place of a copy that FSDP2 unsharded, the shard."""
        return self._parameters  # type: ignore[return-value]

    def _find_owners(self) -> list[nn.Module]:
        """The FSDP2 modules around. A copy that one of them unsharded gives way to the shard ([Note: stale roots])."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._parameters.items():
            names.setdefault(id(tensor), []).append(name)
        owners: list[nn.Module] = []
        for module, record in fsdp2_records():
            copies = [
                getattr(record, f"_{kind}_param", None)
                for kind in ("unsharded", "sharded_post_forward")
            ]
            mine = [
                name for one in (record.sharded_param, *copies) for name in names.get(id(one), [])
            ]
            self._parameters.update(dict.fromkeys(mine, record.sharded_param))
            if mine and module not in owners:
                owners.append(module)
        return owners


_TAKES = "EMA takes a module, parameters, or pairs of a name and a parameter"


def module_of(model: Model) -> nn.Module:
    """The model, or a module around the parameters that were given in its place."""
    return model if isinstance(model, nn.Module) else Parameters(model)


def fsdp2_records() -> Iterator[tuple[nn.Module, Any]]:
    """(module, what FSDP2 keeps of one parameter) of every model of this process."""
    states: list[tuple[nn.Module, Any]] = [
        (module, state()) for module, state in _module_state_mapping.items()
    ]
    for module, state in states:
        if isinstance(module, FSDPModule) and state is not None:
            groups = getattr(state, "_fsdp_param_groups", None) or [
                state._fsdp_param_group
            ]  # torch 2.8: one
            yield from (
                (module, record)
                for group in groups
                if group is not None
                for record in group.fsdp_params
            )
