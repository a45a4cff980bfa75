"""The records of a model compared with its module tree: what changed, by name, under every wrapper.

How to read a failure: both sides are fields of `InventoryChanges`; only fields that hold names are
shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dist_ema.sharding.discovery import find_shards
from dist_ema.sharding.parameters import Parameters
from dist_ema.sharding.tree_changes import compare_inventory
from tests import _deepspeed
from tests._models import Block, Net, batch
from tests._oracle import Training
from tests._ranks import run_ranks
from tests._wrappers import WRAPPERS, net, wrap

Changes = dict[str, set[str]]


class Tree(nn.Module):
    """Two layers of one shape, a tied pair, a shared module, a frozen layer, buffers of three
    sorts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = nn.Linear(4, 4), nn.Linear(4, 4)
        self.emb, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.emb.weight
        self.shared = nn.ModuleList([nn.Linear(2, 2)] * 2)
        self.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_buffer("scale", None)


class Seen:
    """The records of a model, and what changed since."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shards = model, find_shards(model).shards

    @property
    def changes(self) -> Changes:
        found = compare_inventory(self.model, self.shards)
        return {field: set(names) for field, names in asdict(found).items() if names}


def replace_module(m: Any) -> None:
    m.body = nn.Linear(4, 4)


def replace_frozen(m: Any) -> None:
    m.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)


def exchange(m: Any) -> None:
    m.body, m.neck = m.neck, m.body


def replace_shared(m: Any) -> None:
    m.shared[1] = nn.Linear(2, 2)


def tie(m: Any) -> None:
    m.neck.weight = m.body.weight


def untie(m: Any) -> None:
    m.out.weight = nn.Parameter(torch.ones(5, 4))


def inject(m: Any) -> None:
    m.body = nn.Sequential(m.body)


def delete(m: Any) -> None:
    del m.neck, m.frozen


def delete_tied(m: Any) -> None:
    del m.out


def delete_owner(m: Any) -> None:
    del m.emb


def drop_bias(m: Any) -> None:
    m.body.bias = None


def replace_norm(m: Any) -> None:
    m.norm = nn.BatchNorm1d(4, affine=False)


def drop_buffers(m: Any) -> None:
    del m.cache
    m.norm.running_mean = None


def keep_the_cache(m: Any) -> None:
    m.register_buffer("cache", m.cache, persistent=True)


def flip(m: Any) -> None:
    m.frozen.requires_grad_(True)
    m.body.bias.requires_grad_(False)


def compile_and_wrap(m: Any) -> None:
    m.body = torch.compile(m.body, backend="eager")
    m.neck = nn.parallel.DataParallel(m.neck)


def write_and_assign(m: Any) -> None:
    """No change of the tree: values, storages, and the tensors of buffers."""
    m.body.weight.data = torch.zeros(4, 4)
    m.norm.running_mean = torch.ones(7)
    m.cache = None


EDITS: dict[str, tuple[Callable[[Any], None], Changes]] = {
    "module": (replace_module, {"replaced": {"body.weight", "body.bias"}}),
    "frozen": (
        replace_frozen,
        {"replaced": {"frozen.weight"}, "replaced_frozen": {"frozen.weight"}},
    ),
    "exchange": (
        exchange,
        {"retied": {"body.weight", "body.bias", "neck.weight", "neck.bias"}},
    ),
    "shared": (replace_shared, {"retied": {"shared.1.weight", "shared.1.bias"}}),
    "tie": (tie, {"retied": {"neck.weight"}}),
    "untie": (untie, {"retied": {"out.weight"}}),
    "inject": (
        inject,
        {"gone": {"body.weight", "body.bias"}, "retied": {"body.0.weight", "body.0.bias"}},
    ),
    "delete": (delete, {"gone": {"neck.weight", "neck.bias", "frozen.weight"}}),
    "delete tied": (delete_tied, {"retied": {"out.weight"}}),
    "delete owner": (delete_owner, {"gone": {"emb.weight"}}),
    "bias": (drop_bias, {"gone": {"body.bias"}}),
    "new": (
        lambda m: m.add_module("new", nn.Linear(2, 2)),
        {"new_trainable": {"new.weight", "new.bias"}},
    ),
    "new frozen": (
        lambda m: m.register_parameter("new", nn.Parameter(torch.ones(2), requires_grad=False)),
        {"new_frozen": {"new"}},
    ),
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.body),
        {
            "gone": {"body.weight"},
            "new_trainable": {f"body.parametrizations.weight.original{i}" for i in (0, 1)},
        },
    ),
    "prune": (
        lambda m: prune.random_unstructured(m.body, "weight", amount=0.5),
        {
            "gone": {"body.weight"},
            "retied": {"body.weight_orig"},
            "new_buffers": {"body.weight_mask"},
        },
    ),
    "norm": (
        replace_norm,
        {
            "gone": {"norm.weight", "norm.bias"},
            "replaced_buffers": {
                f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
            },
        },
    ),
    "new buffer": (lambda m: m.register_buffer("new", torch.ones(2)), {"new_buffers": {"new"}}),
    "filled": (lambda m: m.register_buffer("scale", torch.ones(2)), {"new_buffers": {"scale"}}),
    "dropped buffers": (drop_buffers, {"gone_buffers": {"cache", "norm.running_mean"}}),
    "persistence": (keep_the_cache, {"replaced_buffers": {"cache"}}),
    "flip": (flip, {"unfrozen": {"frozen.weight"}, "frozen": {"body.bias"}}),
    "wrapped": (compile_and_wrap, {}),
    "written": (write_and_assign, {}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_changed_is_named(edit: str) -> None:
    change, want = EDITS[edit]
    seen = Seen(Tree())
    assert seen.changes == {}
    change(seen.model)
    assert seen.changes == want


def test_tied_buffers() -> None:
    """A module may assign its own buffer at every step; a tied one leaves the pair that way."""
    model = nn.ModuleList([nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False)])
    model[1].running_mean = model[0].running_mean
    seen = Seen(model)
    assert seen.changes == {}
    model[1].running_mean = torch.ones(2)
    assert seen.changes == {"replaced_buffers": {"1.running_mean"}}


def test_lists_of_parameters() -> None:
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    seen = Seen(Parameters([("w", weight), ("b", bias)]))
    bias.requires_grad_(False)
    assert seen.changes == {"frozen": {"b"}}
    always = Seen(Parameters([weight, bias], average_frozen=True))
    weight.requires_grad_(False)
    assert always.changes == {}


def under(kind: str) -> None:
    """No change by training, nor by a forward that leaves weights unsharded; then edits."""
    zero = kind.startswith("zero")
    run = Training(kind, lambda: net(kind))
    seen = Seen(run.model)
    run.train(2)
    assert seen.changes == {}, kind
    core = run.model.module.core if zero or kind.startswith("ddp") else run.model.core
    core = getattr(core, "_fsdp_wrapped_module", core)
    core.frozen.requires_grad_(True)
    assert seen.changes == {"unfrozen": {"core.frozen.weight", "core.frozen.bias"}}, kind
    core.frozen.requires_grad_(False)
    with torch.no_grad():
        run.model(batch(0, 0)[0])
    assert seen.changes == {}, kind
    core.unused = nn.Linear(3, 3)
    del core.blocks[1]
    first = getattr(core.blocks[0], "_fsdp_wrapped_module", core.blocks[0])
    first.up.weight = nn.Parameter(torch.ones(5, 6))
    names = [f"core.blocks.1.{name}" for name, _ in Block(6, 4).named_parameters()]
    replaced = {"core.unused.weight", "core.unused.bias", "core.blocks.0.up.weight"}
    assert seen.changes == {"replaced": replaced, "gone": set(names)}, kind


def every_wrapper(kinds: list[str]) -> None:
    for kind in kinds:
        under(kind)


def wrapped_before() -> None:
    """Under compilation and activation checkpointing; as a list of what FSDP2 shards."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    for kind in ("ddp", "fsdp1 orig", "fsdp2"):
        model = Net()
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        seen = Seen(torch.compile(wrap(kind, model), backend="eager"))
        assert seen.changes == {}
        model.core.extra = nn.Linear(2, 2)
        assert seen.changes == {"new_trainable": {"core.extra.weight", "core.extra.bias"}}
    model = wrap("fsdp2", Net())
    listed = Seen(Parameters(model.named_parameters()))
    model.core.frozen.weight.requires_grad_(True)
    with torch.no_grad():
        model(batch(0, 0)[0])
    assert listed.changes == {"unfrozen": {"core.frozen.weight"}}


@pytest.mark.multirank
def test_every_wrapper() -> None:
    four = ["fsdp1 hybrid", "hsdp", "fsdp2 tp", "fsdp2 ep"]
    two = [kind for kind in WRAPPERS if kind not in four]
    if not _deepspeed.is_installed:
        two = [kind for kind in two if not kind.startswith("zero")]
    run_ranks(2, every_wrapper, two)
    run_ranks(4, every_wrapper, four)
    run_ranks(2, wrapped_before)
