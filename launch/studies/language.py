"""A small GPT on the source code of Python's standard library: two ranks, FSDP2, a constant
learning rate, averages.

Three questions to one run. How far do averages of several horizons come down to a run whose
learning rate decays? The decayed runs branch off checkpoints of the constant one, and end where its
averages are looked at. And what would an average of another width have been? Two stored Power
profiles are mixed into it afterwards.

[Note: going on] Model, optimizer and averages are saved together every `gpt_every` steps, the rows
so far with them; the batch of a step is drawn from its number. So a killed run goes on with the
same bits.
"""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
import train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from dist_ema import EMA, Debiased, Power, load_file
from dist_ema.posthoc import Snapshots

from . import files
from .digits import Tick
from .sizes import GPT_COST, Size

__all__ = ["SIGMAS", "STORED", "WINDOWS", "work"]

WINDOWS = (10, 30, 100, 300)  # steps
STORED = (0.05, 0.10)
TRACKED = 0.15  # a width that is tracked and mixed, to be compared
SIGMAS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.24)
CONTEXT, RATE, WARM = 128, 3e-3, 50
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}


# --- the task -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, t, 3, c // 32, 32).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        added: Tensor = self.down(F.gelu(self.up(self.second(x))))
        return x + added


class Gpt(nn.Module):
    """Bytes in, logits of the next byte out: [N, T] -> [N, T, 256]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.byte(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def corpus() -> tuple[Tensor, Tensor]:
    """(training, validation) as bytes. Every tenth file is for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)
    )
    texts = [path.read_bytes() for path in paths]
    seen = b"".join(text for i, text in enumerate(texts) if i % 10)
    return torch.tensor(bytearray(seen)), torch.tensor(bytearray(b"".join(texts[::10])))


def windows(text: Tensor, at: Tensor) -> Tensor:
    """[len(at), CONTEXT + 1] bytes that begin there."""
    return text[at[:, None] + torch.arange(CONTEXT + 1)].long()


def next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# --- one run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What two ranks train. folder: of this experiment alone, kept until its result is written."""

    size: Size
    folder: Path
    rank: int
    world: int
    model: nn.Module
    optimizer: torch.optim.AdamW
    tick: Tick

    @staticmethod
    def build(size: Size, folder: Path, tick: Tick) -> Run:
        torch.manual_seed(0)
        model = Gpt(size.gpt_width, size.gpt_layers)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in [*model.blocks, model]:
            fully_shard(module, mesh=mesh)
        for module in model.modules():  # torch 2.8: gloo takes an average of gradients for a sum
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        return Run(size, folder, dist.get_rank(), dist.get_world_size(), model, optimizer, tick)

    def step(self, number: int, rate: float) -> None:
        """The step with that number, counted from 1; ranks share its batch."""
        text = corpus()[0]
        at = torch.randint(
            0, len(text) - CONTEXT, (self.size.gpt_batch,), generator=train.draw(7, number)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, number / WARM)
        next_byte_loss(self.model, windows(text, at[self.rank :: self.world])).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rank == 0:
            self.tick(GPT_COST)

    def loss(self) -> float:
        """Of validation, in nats per byte. *Collective*."""
        total = validate(self.model, self.size, self.rank, self.world)
        dist.all_reduce(total)
        return float(total / self.world)

    def save(self) -> Path:
        """Model and optimizer, complete once `keep` has renamed the folder. *Collective*."""
        unfinished = self.folder / ".unfinished"
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        with train.quiet():
            dcp.save(self._state(), checkpoint_id=unfinished / "live")
        return unfinished

    def load(self, place: Path) -> None:
        """*Collective*. Before an EMA is attached: set_state_dict steps a fresh optimizer."""
        state = self._state()
        with train.quiet():
            dcp.load(state, checkpoint_id=place / "live")
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


@torch.no_grad()
def validate(model: nn.Module, size: Size, rank: int = 0, world: int = 1) -> Tensor:
    """The mean over this rank's windows, in float64."""
    text = corpus()[1]
    at = torch.linspace(0, len(text) - CONTEXT - 1, size.gpt_windows).long()[rank::world]
    parts = [
        next_byte_loss(model, windows(text, some)).double() * len(some) for some in at.split(32)
    ]
    return torch.stack(parts).sum() / len(at)


# --- the constant learning rate, and its averages -------------------------------------------------


def names() -> list[str]:
    return [f"window {window}" for window in WINDOWS] + [f"sigma_rel {TRACKED}"]


def constant(run: Run) -> None:
    """Train, evaluate, snapshot and save; leaves rows.json."""
    last = newest(run.folder)
    if last:
        run.load(last)
    ema = EMA(
        run.model,
        decay=[*(Debiased(1 - 1 / window) for window in WINDOWS), Power(sigma_rel=TRACKED)],
    )
    stored = EMA(run.model, decay=[Power(sigma_rel=sigma) for sigma in STORED])
    rows: list[dict[str, Any]] = []
    if last:
        ema.load(last / "ema")
        stored.load(last / "stored")
        rows = json.loads((last / "rows.json").read_text())
    ema.attach(run.optimizer)
    stored.attach(run.optimizer)
    done = rows[-1]["step"] if rows else 0
    if run.rank == 0:
        run.tick(GPT_COST * done)
        # Only finished ones: a killed run may leave an unfinished, hidden one beside them.
        snapshots = (run.folder / "snapshots").glob("[0-9]*")
        for late in [each for each in snapshots if int(each.name) > done]:
            shutil.rmtree(late)
    dist.barrier()
    for number in range(done + 1, run.size.gpt_steps + 1):
        run.step(number, RATE)
        stored.snapshot(run.folder / "snapshots", every=run.size.gpt_every)
        if number % run.size.gpt_every == 0:
            rows.append({"step": number, "live": run.loss(), **averaged(run, ema)})
            keep(run, number, rows, ema, stored)
    ema.detach()
    stored.detach()


def averaged(run: Run, ema: EMA) -> dict[str, float]:
    losses = {}
    for number, name in enumerate(names()):
        with ema.swap(number):
            losses[name] = run.loss()
    return losses


def keep(run: Run, number: int, rows: list[dict[str, Any]], ema: EMA, stored: EMA) -> None:
    """One checkpoint, whole or not at all ([Note: going on]). *Collective*.

    Older ones are removed, except where a branch starts.
    """
    place = run.save()
    ema.save(place / "ema")
    stored.save(place / "stored")
    if run.rank == 0:
        files.write(place / "rows.json", rows)
        place.rename(run.folder / f"step-{number:06}")
        starts = {end - run.size.gpt_decay for end in run.size.gpt_ends}
        for old in sorted(run.folder.glob("step-*"))[:-1]:
            if int(old.name[5:]) not in starts:
                shutil.rmtree(old)
    dist.barrier()


def newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


# --- branches, and the sweep ----------------------------------------------------------------------


def branch(run: Run, end: int) -> list[dict[str, Any]]:
    """From a checkpoint of the constant run; the learning rate falls linearly to 0 at `end`."""
    decay = run.size.gpt_decay
    run.load(run.folder / f"step-{end - decay:06}")
    rows = []
    for number in range(end - decay + 1, end + 1):
        run.step(number, RATE * (end - number + 1) / (decay + 1))
        if number % run.size.gpt_every == 0:
            rows.append({"step": number, "live": run.loss()})
    return rows


def sweep(run: Run) -> list[dict[str, Any]]:
    """This rank's share of the widths: mixed from the stored averages, evaluated in one process."""
    store, rows = Snapshots(run.folder / "snapshots"), []
    model = Gpt(run.size.gpt_width, run.size.gpt_layers)
    for sigma in SIGMAS[run.rank :: run.world]:
        target, place = Power(sigma_rel=sigma), run.folder / f"mixed-{sigma}"
        fit = store.fit(target)
        store.write(place, target, fit, force=True)
        model.load_state_dict(load_file(place))
        rows.append(
            {"sigma_rel": sigma, "loss": float(validate(model, run.size)), "residual": fit.residual}
        )
    return rows


# --- from start to end ----------------------------------------------------------------------------


def work(rank: int, world: int, size: Size, folder: Path, tick: Tick) -> dict[str, Any]:
    """All of it on one of two ranks, or what a killed run left undone. *Collective*."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    run = Run.build(size, folder, tick)
    constant(run)
    last = newest(folder)
    assert last is not None
    branches = {}
    for end in dict.fromkeys(size.gpt_ends):
        done = folder / f"branch-{end}.json"
        if not done.exists():
            rows = branch(run, end)
            if rank == 0:
                files.write(done, rows)
            dist.barrier()
        elif rank == 0:
            tick(GPT_COST * size.gpt_decay)
        branches[str(end)] = json.loads(done.read_text())
    files.write(folder / f"sweep-{rank}.json", sweep(run))
    dist.barrier()
    mixed = [
        row
        for each in range(world)
        for row in json.loads((folder / f"sweep-{each}.json").read_text())
    ]
    parameters = sum(
        parameter.numel() for parameter in Gpt(size.gpt_width, size.gpt_layers).parameters()
    )
    facts = {"parameters": parameters, "bytes": [len(text) for text in corpus()], "world": world}
    rows = json.loads((last / "rows.json").read_text())
    return facts | {
        "rows": rows,
        "branches": branches,
        "sweep": sorted(mixed, key=lambda row: row["sigma_rel"]),
    }
