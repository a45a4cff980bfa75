"""A model under the names that transformers' `save_pretrained` writes, where memory has others.

transformers 5 fuses experts and renames modules when it loads, and reverts that when it saves. The
table of both is its own, so it is asked, once for each weight; torch is imported for nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint import safetensors
from ..dtypes import Bytes
from . import foreign_trees, sources, sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reverted", "reverted"]

HELD = 4  # weights in memory, whose parts lie between each other in a file's order


def reverted(model: sources.Source, checked: sums.Checked, like: str | Path) -> Reverted | None:
    """The model as its library saves it; None where its names are those of `like`, or none knows.

    Args:
        model: An average of a model, under the names that it has in memory.
        checked: Where its bytes come from.
        like: A folder with the config.json of that model.

    Raises:
        ValueError: The config.json is not valid JSON, or transformers refuses it.
    """
    path = Path(like, "config.json")
    with sources.open_model(like) as pattern:
        if pattern.entries.keys() <= {*model.entries, *model.aliases} or not path.exists():
            return None
    values = foreign_trees.read_json(path)
    names = values.get("architectures") if isinstance(values, dict) else None
    name = str(names[0]) if isinstance(names, list) and names else ""
    try:
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 both names are the same
        return None
    architecture = getattr(transformers, name, None)
    if not (
        isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    ):
        return None
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(like)
        # Its names and shapes are asked for, so it needs no memory.
        with torch.device("meta"):
            library_model = architecture(config)
    except Exception as error:
        raise ValueError(f"transformers cannot build the {name} of {path}: {error}") from error

    def revert(name: str, weight: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            parts: dict[str, Tensor] = revert_weight_conversion(library_model, {name: weight})
        return parts

    return Reverted(model, checked, revert)


class Reverted:
    """A model whose weights are cut and named as its library saves them.

    Attributes:
        owners: Name in the files -> the weight in memory that it is, or is a part of.

    Note:
        *Cost*: a few weights of the model in memory, beside their parts.
    """

    def __init__(self, model: sources.Source, checked: sums.Checked, revert: Any) -> None:
        import torch

        from ..checkpoint.open_file import DTYPES

        self.path, self._checked, self._revert, self._dtypes = model.path, checked, revert, DTYPES
        self.owners, self.entries, self.aliases = dict[str, str](), {}, {}
        names = dict[str, str]()
        # Weights first: an alias is saved as the further name of what its weight is saved as.
        for name in chain(model.entries, model.aliases):
            entry = model.entries[model.aliases.get(name, name)]
            empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for saved, part in revert(name, empty).items():
                if name in model.entries:
                    self.owners[saved], names[name] = name, saved
                    self.entries[saved] = safetensors.Entry(entry.dtype, tuple(part.shape))
                else:
                    self.aliases[saved] = names[model.aliases[name]]
        self._parts = lru_cache(HELD)(self._parts_of)

    def read(self, name: str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
        """Bytes [begin, end) of a weight. into: Memory for them."""
        data = self._parts(self.owners[name])[name][begin:end]
        if into is None:
            return data
        into[:] = data
        return into

    def close(self) -> None:
        """Forget the weights that are in memory."""
        self._parts.cache_clear()

    def _parts_of(self, owner: str) -> dict[str, Bytes]:
        import torch

        entry = self._checked.entries[owner]
        raw = torch.from_numpy(
            np.concatenate([window.data for window in self._checked.windows(owner)])
        )
        parts = self._revert(owner, raw.view(self._dtypes[entry.dtype]).view(entry.shape))
        return {
            name: part.contiguous().view(-1).view(torch.uint8).numpy()
            for name, part in parts.items()
        }
