"""`FileForm`: what transformers, diffusers and peft expect of files: config.json, adapters.

Duck-typed: a model that has these was made by its library, so nothing is imported here.

[Note: adapters]  A PeftModel whose averaged weights all belong to adapters is saved as its adapter
alone. peft writes the form itself: its `save_pretrained` gets the number of each weight in place of
the weight. So the file that comes back says which weight has which name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..sharding import ownership, storage, wrappers
from .load_file import load_file
from .safetensors import ADAPTER, ADAPTER_CONFIG

__all__ = [
    "FileForm",
    "adapters_of",
    "complete_form",
    "form_of",
    "merged",
    "only_used",
]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class FileForm:
    """What the files of a model are called, and what lies beside them.

    names: the model's canonical name -> the name in the files, where they differ.
    texts: file -> its content.
    folder: the folder of an adapter, where `save_pretrained` puts it; '' for the one called
        default.
    is_adapter: the files hold the weights in `names` alone ([Note: adapters]).
    """

    names: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    folder: str = ""
    is_adapter: bool = False

    @property
    def weights(self) -> str:
        """What `Manifest.weights` says of a complete model, or of an adapter."""
        return "adapter" if self.is_adapter else "all"

    def holds(self, name: str) -> bool:
        """Whether a weight of the model is in the files."""
        return not self.is_adapter or name in self.names

    def name_of(self, name: str) -> str:
        """The name of a weight in the files."""
        return self.names.get(name, name)


def _inner(model: nn.Module) -> Any:
    """The module inside all wrappers."""
    for prefix, module, _ in wrappers.walk_modules(model):
        if prefix:
            break
        inner = module
    return inner


def _is_peft_model(module: nn.Module) -> bool:
    return any(
        each.__name__ == "PeftModel" and each.__module__.startswith("peft.")
        for each in type(module).__mro__
    )


def adapters_of(model: nn.Module, averaged: Sequence[str]) -> list[FileForm]:
    """The adapters of a PeftModel, or [] where something else is averaged too.

    Prompt learning and AdaLoRA too give []: peft computes what it writes for them.

    Args:
        model: However it is wrapped.
        averaged: The canonical names of what is averaged.
    """
    peft_model = _inner(model)
    if not _is_peft_model(peft_model) or any(
        config.is_prompt_learning or str(config.peft_type).endswith("ADALORA")
        for config in peft_model.peft_config.values()
    ):
        return []
    parameters = peft_model.named_parameters(remove_duplicate=False)
    buffers = peft_model.named_buffers(remove_duplicate=False)
    names = [name for name, _ in chain(parameters, buffers)]
    numbers = {name: torch.tensor(i) for i, name in enumerate(names)}
    adapters = []
    with TemporaryDirectory() as folder:
        # save_embedding_layers=False, or peft asks the hub for the config of the base model.
        peft_model.save_pretrained(folder, state_dict=numbers, save_embedding_layers=False)
        for adapter in peft_model.peft_config:
            place = "" if adapter == "default" else adapter
            where = Path(folder, place)
            names_in_file = {
                wrappers.canonical(names[number]): wrappers.canonical(name)
                for name, number in load_file(where / ADAPTER).items()
            }
            texts = {ADAPTER_CONFIG: (where / ADAPTER_CONFIG).read_bytes()}
            adapters.append(FileForm(names_in_file, texts, place, is_adapter=True))
    adapted = {name for adapter in adapters for name in adapter.names}
    return adapters if adapted.issuperset(averaged) else []


def only_used(adapters: Sequence[FileForm], averaged: Sequence[str]) -> FileForm:
    """The adapter that holds all averaged weights; the plain form where there is no such one."""
    used = [form for form in adapters if not form.names.keys().isdisjoint(averaged)]
    return used[0] if len(used) == 1 else FileForm()


# --- the merged model ----------------------------------------------------------------------------


@contextmanager
def merged(
    model: nn.Module, states: Sequence[ownership.ParamState], dtype: torch.dtype | None
) -> Iterator[tuple[list[ownership.ParamState], FileForm]]:
    """Merge the active adapters into the weights below them, for the block.

    Args:
        model: A PeftModel, however it is wrapped.
        states: What it persists.
        dtype: See `complete_form`.

    Yields:
        (what the merged model persists, as it lies in `model`; the form of its files)

    Raises:
        ValueError: `model` is no PeftModel, or a rank holds a part of a weight that peft cannot
            merge.

    Note:
        *Cost*: a copy of the weights that adapters sit on.
    """
    peft_model = _mergeable(model)
    state_names = [name for state in states for name in state.shard.names]
    names = _merged_names(peft_model, state_names)
    cut = [
        state.name
        for state in states
        if state.shard.flat_parameter is not None or hasattr(state.shard.tensor, "ds_tensor")
    ]
    if cut:
        raise ValueError(
            f"merged=True: {cut[0]} is a flat part of a weight here (FSDP1, ZeRO-3), which peft "
            "cannot merge. Export the adapter, and merge it offline: "
            "PeftModel.from_pretrained(base, out).merge_and_unload()."
        )
    weights = [p for name, p in peft_model.named_parameters() if ".base_layer." in name]
    # NOTE: peft adds in place. To assign `data` of a DTensor leaves its elements where they are.
    below = [p if (memory := storage.memory_of(p)) is None else memory for p in weights]
    unmerged = [p.data for p in below]
    try:
        for p in below:
            p.data = p.data.clone()
        peft_model.base_model.merge_adapter()
        merged_states = [
            replace(state, shadow=None, local=state.shard.read())
            for state in states
            if state.name in names
        ]
        yield merged_states, FileForm(names, _config_files(peft_model.get_base_model(), dtype))
    finally:
        try:
            peft_model.base_model.unmerge_adapter()
        finally:
            for p, data in zip(below, unmerged, strict=True):
                p.data = data


def _mergeable(model: nn.Module) -> Any:
    """The PeftModel inside. Raises ValueError where there is none, or it has nothing to merge."""
    peft_model = _inner(model)
    if not _is_peft_model(peft_model):
        raise ValueError(f"merged=True needs a PeftModel, got {type(peft_model).__name__}.")
    if not hasattr(peft_model.base_model, "merge_adapter"):
        raise ValueError(
            f"merged=True: {peft_model.active_peft_config.peft_type.value} adds no weights to "
            "others, so there is nothing to merge. Export it without."
        )
    return peft_model


def _merged_names(peft_model: Any, names: Sequence[str]) -> dict[str, str]:
    """Canonical name -> the name in the model without adapters."""
    # The layers that adapters sit on. What they hold beside `base_layer` is the adapters'.
    adapted = {
        wrappers.canonical(name)
        for name, module in peft_model.named_modules()
        if "base_layer" in module._modules
    }
    active = peft_model.active_adapter
    merged_names = {}
    for name in names:
        plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{active}.", ".")
        parts = name.split(".")
        in_adapter = plain == name and any(
            ".".join(parts[:end]) in adapted for end in range(1, len(parts))
        )
        replaced = ".original_module." in name or ".modules_to_save." in plain
        if name.startswith(_PREFIX) and not replaced and not in_adapter:
            merged_names[name] = plain.removeprefix(_PREFIX)
    return merged_names


# --- config.json ---------------------------------------------------------------------------------


def complete_form(model: nn.Module, dtype: torch.dtype | None) -> FileForm:
    """The whole model, beside it config.json, as its library writes it, where it has one to give.

    Args:
        model: However it is wrapped.
        dtype: That the floating weights are exported in; None: their own.
    """
    return FileForm(texts=_config_files(_inner(model), dtype))


def form_of(model: nn.Module, averaged: Sequence[str], dtype: torch.dtype | None) -> FileForm:
    """The adapter that is averaged, or else the whole model."""
    adapters = adapters_of(model, averaged)
    return only_used(adapters, averaged) if adapters else complete_form(model, dtype)


def _config_files(inner: Any, dtype: torch.dtype | None) -> dict[str, bytes]:
    config: Any = getattr(inner, "config", None)
    if _is_peft_model(inner):
        return {}  # the config is that of the model inside
    if hasattr(inner, "to_json_string"):  # diffusers
        return {"config.json": inner.to_json_string().encode()}
    # A class of the user's may have one of the two, and need not take what is set below.
    if not (hasattr(config, "to_json_string") and hasattr(config, "architectures")):
        return {}
    config = copy.deepcopy(config)
    # `fully_shard` changes the name of the class.
    config.architectures = [type(inner).__name__.removeprefix("FSDP")]
    # A module of the user's may have a config of transformers, and no dtype.
    dtype = dtype or getattr(inner, "dtype", None)
    if isinstance(dtype, torch.dtype):
        config.dtype = str(dtype).removeprefix("torch.")
    files = {"config.json": config.to_json_string().encode()}
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files
