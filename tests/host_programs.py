"""Programs that nobody thought of: seeded training programs around an EMA, judged by a naive
average.

A seed draws a model, a wrapper, an engine, a dtype and 30 actions. The reference is a float64 copy
made anew from `state_dict()` at every step. Every outcome of an action is *equal* to the reference,
or *raised*: an error that names a weight of the action. The rest is *silent* (a wrong number) or
*unclear* (an error that names nothing).

    python -m tests.host_programs --seeds 300              # a table of outcomes
    python -m tests.host_programs --seed 17 --trace        # one program, action by action
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import math
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import spectral_norm

from dist_ema import EMA, load_file
from tests._ranks import run_ranks

__all__ = ["ACTIONS", "WRAPPERS", "Outcome", "run"]

WIDTH, ACTIONS_PER_SEED = 6, 30
WRAPPERS = ["none", "ddp", "fsdp1 orig", "fsdp1 flat", "fsdp2"]
ENGINES: dict[str, dict[str, Any]] = {
    "beside": {},
    "host": {"device": "cpu"},
    "averaged buffers": {"buffers": "average"},
    "whole": {"split": False},
}


# --- models --------------------------------------------------------------------------------------


class Low(nn.Module):
    """A frozen layer with an adapter of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, WIDTH) * 0.1)
        self.lora_b = nn.Parameter(torch.randn(WIDTH, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class Growing(nn.Module):
    """A buffer that is longer after every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(self.bank) < 40:
            self.bank = torch.cat([self.bank, x.detach()[:1].to(self.bank.dtype)])
        return x


class Host(nn.Module):
    """What the actions edit: `body` and `head`, parts drawn by the seed, a list, a frozen layer."""

    def __init__(self, parts: list[str]) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, WIDTH, max_norm=1.0 if "max_norm" in parts else None)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.parts = nn.ModuleDict()
        if "norm" in parts:
            self.parts["norm"] = nn.BatchNorm1d(WIDTH)
        if "spectral" in parts:
            self.parts["spectral"] = spectral_norm(nn.Linear(WIDTH, WIDTH))
        if "lora" in parts:
            self.parts["lora"] = Low()
        if "growing" in parts:
            self.parts["growing"] = Growing()
        self.extra = nn.ModuleDict()
        self.head = nn.Linear(WIDTH, 7, bias=False)
        if "tied" in parts:
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.body(self.emb(tokens))))
        for part in [*self.parts.values(), *self.extra.values()]:
            x = part(x)
        return self.head(x)


def wrapped(kind: str, model: Host) -> nn.Module:
    if kind == "none":
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.body)
        return fully_shard(model)
    from torch.distributed.fsdp import FullyShardedDataParallel

    orig = kind.endswith("orig")
    return FullyShardedDataParallel(
        model,
        use_orig_params=orig,
        device_id=torch.device("cpu"),
        ignored_modules=None if orig else frozen_modules(model),
    )


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """A flat parameter cannot be half frozen."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]


# --- the reference -------------------------------------------------------------------------------


def full(model: nn.Module) -> dict[str, Tensor]:
    """The complete state in float64, made anew, on every rank."""
    if dist.is_initialized() and dist.get_world_size() >= 1 and not isinstance(model, Host):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    else:
        state = model.state_dict()
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }
    return {
        bare(name): value.detach().double().clone() if value.is_floating_point() else value.clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def bare(name: str) -> str:
    for prefix in ("module.", "_fsdp_wrapped_module."):
        name = name.replace(prefix, "")
    return name


class Naive:
    """The average of what was trainable when it was seeded; the rest is live's."""

    def __init__(self, model: nn.Module, decay: float, buffers: bool) -> None:
        self.model, self.decay, self.buffers = model, decay, buffers
        self.average: dict[str, Tensor] = {}
        self.reset()

    def averaged(self, state: dict[str, Tensor]) -> set[str]:
        owner = self.model.module if hasattr(self.model, "module") else self.model
        names = {bare(name) for name, p in self.model.named_parameters(remove_duplicate=False)}
        frozen = {
            bare(name)
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if not p.requires_grad
        }
        flat = any("flat_param" in name for name in names)
        if flat:
            frozen |= {name for name in state if name.startswith(("frozen.", "parts.lora.base."))}
        buffers = {name.rsplit(".", 1)[-1] for name, _ in owner.named_buffers()}
        vectors = ("_u", "_v", "bank")
        return {
            name
            for name, value in state.items()
            if value.is_floating_point()
            and name not in frozen
            and (
                name.rsplit(".", 1)[-1] not in buffers
                or (self.buffers and not name.endswith(vectors))
            )
        }

    def reset(self) -> None:
        state = full(self.model)
        self.average = {name: state[name] for name in self.averaged(state)}

    def rescan(self, edited: set[str]) -> None:
        """Names that an action replaced are seeded from live, names that are gone are dropped."""
        state = full(self.model)
        kept = self.averaged(state) | (self.average.keys() & state.keys())
        self.average = {
            name: state[name] if name in edited or name not in self.average else self.average[name]
            for name in kept
        }

    def update(self, elapsed: int = 1) -> None:
        state, decay = full(self.model), self.decay**elapsed
        for name, old in self.average.items():
            if name in state and state[name].shape == old.shape:
                self.average[name] = decay * old + (1 - decay) * state[name]

    def complete(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        return full(self.model) | self.average | own


def difference(want: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to 1 or the weight, and where."""
    worst = (0.0, "")
    if want.keys() != got.keys():
        return math.inf, f"names {sorted(want.keys() ^ got.keys())}"
    for name, value in want.items():
        if value.shape != got[name].shape:
            return math.inf, f"{name}: {tuple(got[name].shape)} for {tuple(value.shape)}"
        if value.numel():
            scale = value.double().abs().clamp(min=1)
            off = float(((value.double() - got[name].double()).abs() / scale).nan_to_num(9e9).max())
            worst = max(worst, (off, name))
    return worst


# --- a program -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a seed: its draw, the verdict of each action, the first one that is neither
    equal nor raised.
    """

    seed: int
    title: str
    counts: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    @property
    def verdict(self) -> str:
        if self.failure:
            return self.failure.split(":")[0]
        return "raised" if self.counts.get("raised") else "equal"


class WrongNumberError(Exception):
    """A wrong number without a word."""


class Program:
    """A seed: everything is drawn at the beginning, so that all ranks do the same."""

    def __init__(self, seed: int, wrapper: str, trace: bool, without: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.seed, self.wrapper, self.trace = seed, wrapper, trace
        self.without = without
        choices = ["norm", "tied", "max_norm", "spectral", "lora", "growing"]
        if "fsdp" in wrapper:
            choices = ["norm", "lora"]
        parts = [part for part in choices if self.random.random() < 0.5]
        self.engine = self.random.choice(sorted(ENGINES))
        self.dtype = self.random.choice([torch.float32, torch.float32, torch.bfloat16])
        self.decay = self.random.choice([0.5, 0.8, 0.95])
        self.title = (
            f"{wrapper}, {self.engine}, {str(self.dtype)[6:]}, {'+'.join(parts) or 'plain'}"
        )
        torch.manual_seed(seed)
        self.model = wrapped(wrapper, Host(parts).to(self.dtype))
        options = ENGINES[self.engine]
        self.ema = EMA(self.model, self.decay, **options)
        self.naive = Naive(self.model, self.decay, options.get("buffers") == "average")
        self.own: dict[str, Tensor] = {}  # recalibrated buffers
        self.edited: set[str] = set()  # names that an edit replaced, until rescan
        self.folder = Path(self.shared(tempfile.mkdtemp() if self.first else None))
        self.saved: tuple[dict[str, Tensor], dict[str, Tensor], int] | None = None
        self.steps = 0
        self.missed = 0  # steps whose update raised
        self.renew()

    @property
    def ranks(self) -> bool:
        return dist.is_initialized()

    @property
    def first(self) -> bool:
        return not self.ranks or dist.get_rank() == 0

    @property
    def owner(self) -> Host:
        module: Any = self.model
        return module.module if self.wrapper == "ddp" else module

    @property
    def tolerance(self) -> float:
        return 1e-2 if self.dtype == torch.bfloat16 else 1e-4

    def shared(self, value: Any) -> Any:
        if not self.ranks:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def renew(self) -> None:
        self.ema.detach()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.5)
        self.ema.attach(self.optimizer)

    def backward(self) -> None:
        self.model.train()
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.steps)
        self.steps += 1
        self.model(
            torch.randint(0, 7, (9,), generator=generator)
        ).float().square().mean().backward()

    def compare(self, got: dict[str, Tensor], want: dict[str, Tensor] | None = None) -> None:
        want = self.naive.complete(self.own) if want is None else want
        worst = self.shared(difference(want, got) if self.first else None)
        if worst[0] > self.tolerance:
            raise WrongNumberError(f"off by {worst[0]:.3g} at {worst[1]}")

    # --- actions ----------------------------------------------------------------------------------

    def step(self) -> None:
        self.backward()
        try:
            self.optimizer.step()
        except RuntimeError:
            self.missed += (
                1  # the step happened, its update did not: the next one accounts for both
            )
            raise
        self.naive.update(1 + self.missed)
        self.missed = 0
        self.optimizer.zero_grad()

    def accumulate(self) -> None:
        self.backward()
        self.step()

    def skip(self) -> None:
        self.backward()
        self.optimizer.zero_grad()

    def gather(self) -> None:
        self.compare(self.ema.gather())

    def save(self) -> None:
        path = self.folder / f"save-{self.steps}"
        self.ema.save(path)
        self.compare(load_file(path))
        self.saved = (self.naive.complete(self.own), dict(self.own), self.missed)
        self.path = path

    def export(self) -> None:
        path = self.folder / f"export-{self.steps}"
        self.ema.export(path)
        self.compare(load_file(path))

    def load(self) -> None:
        if self.saved is not None:
            self.ema.load(self.path)
            self.naive.average = {name: self.saved[0][name] for name in self.naive.average}
            self.own, self.missed = dict(self.saved[1]), self.saved[2]
            self.gather()

    def reset(self) -> None:
        self.ema.reset()
        self.naive.reset()
        self.own, self.missed = {}, 0
        self.gather()

    def rescan(self) -> None:
        self.ema.rescan()
        self.naive.rescan(self.edited)
        self.edited = set()
        self.renew()
        self.gather()

    def swap(self, inside: Callable[[], None] = lambda: None) -> None:
        want, before = self.naive.complete(self.own), full(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ema.swap())
            self.compare(full(self.model), want)
            inside()
        self.compare(full(self.model), before)

    def swap_and_evaluate(self) -> None:
        """An embedding with max_norm writes in eval mode too, which the exit must name."""

        def evaluate() -> None:
            self.model.eval()
            with torch.no_grad():
                self.model(torch.arange(7))
            self.model.train()

        if self.owner.emb.max_norm is None:
            self.swap(evaluate)
            self.gather()
        else:
            self.write(evaluate)

    def swap_and_write(self) -> None:
        def scale() -> None:
            with torch.no_grad():
                for p in self.model.parameters():
                    if p.requires_grad:
                        p.mul_(1.5)

        self.write(scale)

    def swap_and_assign(self) -> None:
        """Values that come with another storage."""

        def assign() -> None:
            for p in self.model.parameters():
                if p.requires_grad:
                    p.data = p.data * 1.5

        # A flat parameter gives up what was assigned when it is gathered, so nothing reads it.
        self.write(assign, reads=self.wrapper != "fsdp1 flat")

    def swap_twice(self) -> None:
        """Another average inside ours, left in the right order or, where one rank can undo it, in
        the wrong one.
        """
        before, other = full(self.model), EMA(self.model, 0.5)
        wrong, swaps = not self.ranks, [self.ema.swap(), other.swap()]
        for swap in swaps:
            swap.__enter__()
        for swap in swaps if wrong else swaps[::-1]:
            with contextlib.suppress(RuntimeError if wrong and swap is swaps[0] else ()):
                swap.__exit__(None, None, None)
        self.compare(full(self.model), before)
        self.gather()

    def write(self, inside: Callable[[], None], reads: bool = True) -> None:
        """Named by a warning or an error; both leave live as it was, and the average is asked
        again.
        """
        before, lent, left = full(self.model), {}, {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self.ema.swap():
                    lent = full(self.model)
                    inside()
                    left = full(self.model) if reads else {}
            except RuntimeError as error:
                warnings.warn(str(error), stacklevel=1)
        self.compare(full(self.model), before)
        text = " ".join(str(each.message) for each in caught)
        changed = lent.keys() != left.keys() or difference(lent, left)[0] > 0 or not lent
        if changed and not any(name in text for name in self.names()):
            raise WrongNumberError("a write inside swap is not named")
        gathered = self.ema.gather()
        if self.first:  # kept or undone, as the docstring says: what is shown is the average now
            self.naive.average = {
                name: gathered[name].double() if name in gathered else value
                for name, value in self.naive.average.items()
            }
        self.naive.average = self.shared(self.naive.average)

    def swap_and_raise(self) -> None:
        before = full(self.model)
        with contextlib.suppress(KeyError), self.ema.swap():
            raise KeyError("evaluation failed")
        self.compare(full(self.model), before)
        self.gather()

    def swap_and_recalibrate(self) -> None:
        if "norm" not in self.owner.parts or self.naive.buffers:
            return
        norm: Any = self.owner.parts["norm"]
        with self.ema.swap(), torch.no_grad():
            norm.running_mean.add_(1)
            norm.num_batches_tracked.add_(1)
            state = full(self.model)
            names = ("running_mean", "running_var", "num_batches_tracked")
            self.own = {name: state[name] for name in state if name.endswith(names)}
        self.gather()

    def metrics(self) -> None:
        if not math.isfinite(self.ema.metrics()["distance"]):
            raise WrongNumberError("the distance is not finite")

    def to_and_back(self) -> None:
        self.model.double()
        self.model.to(self.dtype)

    def assign_data(self) -> None:
        for p in self.model.parameters():
            p.data = p.data.clone()

    def load_state_dict(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state)

    def load_assigned(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, assign=True)
        named = self.model.named_parameters(remove_duplicate=False)
        weights = {name.removeprefix("module.") for name, _ in named}
        self.edited |= set(self.naive.average) & weights  # buffers are followed
        self.renew()

    def replace(self) -> None:
        self.owner.body = nn.Linear(WIDTH, WIDTH).to(self.dtype)
        self.edited |= {"body.weight", "body.bias"}
        self.renew()

    def add(self) -> None:
        name = f"m{len(self.owner.extra)}"
        self.owner.extra[name] = nn.Linear(WIDTH, WIDTH).to(self.dtype)
        self.edited |= {f"extra.{name}.weight", f"extra.{name}.bias"}
        self.renew()

    def delete(self) -> None:
        if len(self.owner.extra):
            name = list(self.owner.extra)[-1]
            del self.owner.extra[name]
            self.edited |= {f"extra.{name}.weight", f"extra.{name}.bias"}
            self.renew()

    def freeze(self) -> None:
        """Live's from now on, or an average that goes on towards it: both are right."""
        self.owner.body.requires_grad_(False)
        self.ema.rescan()
        self.naive.rescan(self.edited)
        self.edited = set()
        self.renew()
        gathered, live = self.ema.gather(), full(self.model)
        if self.shared(
            self.first and torch.equal(gathered["body.weight"].double(), live["body.weight"])
        ):
            for name in ("body.weight", "body.bias"):
                self.naive.average.pop(name, None)
        self.gather()

    def unfreeze(self) -> None:
        if not self.owner.frozen.weight.requires_grad:
            self.edited |= {"frozen.weight", "frozen.bias"}
        self.owner.frozen.requires_grad_(True)
        self.renew()

    def second(self) -> None:
        """Another average of the same model, used and dropped."""
        other = EMA(self.model, 0.5)
        other.update()
        with other.swap():
            pass
        del other
        gc.collect()

    def drop(self) -> None:
        """`del ema`, and a new one."""
        self.ema.detach()
        del self.ema
        gc.collect()
        self.ema = EMA(self.model, self.decay, **ENGINES[self.engine])
        self.naive.reset()
        self.own, self.edited, self.saved, self.missed = {}, set(), None, 0
        self.renew()

    # --- the verdicts -----------------------------------------------------------------------------

    def names(self) -> set[str]:
        names = set(self.naive.average) | self.edited | set(full(self.model))
        names |= set(self.saved[0] if self.saved else ())
        return names | {name.rsplit(".", 1)[0] + "." for name in names if "." in name}

    def run(self) -> Outcome:
        outcome, counts = Outcome(self.seed, self.title), collections.Counter[str]()
        plan = self.random.choices(list(ACTIONS), list(ACTIONS.values()), k=ACTIONS_PER_SEED)
        plan = [action for action in plan if action not in self.without]
        if "fsdp" in self.wrapper:  # an edit of a sharded tree is another program
            edits = ("replace", "add", "delete", "freeze", "unfreeze", "load_assigned")
            plan = [action for action in plan if action not in edits]
        for number, action in enumerate(plan):
            verdict = self.judged(action)
            both: list[Any] = [None] * dist.get_world_size() if self.ranks else [verdict]
            if self.ranks:
                dist.all_gather_object(both, verdict)
            verdict = next((each for each in both if ":" in each), both[0])
            if self.trace and self.first:
                print(f"{number:3} {action:22} {verdict}", file=sys.stderr)
            counts[verdict.split(":")[0]] += 1
            if verdict.startswith("raised"):
                self.recover()
            elif ":" in verdict:
                outcome.failure = f"{verdict} (action {number}, {action})"
                break
        outcome.counts = dict(counts)
        if self.ranks:
            dist.barrier()
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)
        return outcome

    def judged(self, action: str) -> str:
        """equal; raised: ...; silent: ...; unclear: ..."""
        try:
            getattr(self, action)()
        except WrongNumberError as error:
            return f"silent: {error}"
        except (RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())
            named = any(name in message for name in self.names())
            return f"{'raised' if named else 'unclear'}: {message[:160]}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            return f"unclear: {type(error).__name__} {error} at {place}"
        return "equal"

    def recover(self) -> None:
        """As the error says: `rescan`; and if that raises too, a new EMA."""
        try:
            self.optimizer.zero_grad()
            self.rescan()
        except (RuntimeError, ValueError):
            self.drop()


# action -> how often it is drawn
ACTIONS: dict[str, int] = {
    "step": 30,
    "accumulate": 4,
    "skip": 3,
    "gather": 6,
    "save": 3,
    "export": 3,
    "load": 3,
    "reset": 1,
    "rescan": 2,
    "swap": 5,
    "swap_and_evaluate": 3,
    "swap_and_write": 2,
    "swap_and_raise": 2,
    "swap_and_assign": 1,
    "swap_twice": 1,
    "swap_and_recalibrate": 2,
    "metrics": 2,
    "to_and_back": 2,
    "assign_data": 2,
    "load_state_dict": 2,
    "load_assigned": 1,
    "replace": 2,
    "add": 2,
    "delete": 2,
    "freeze": 1,
    "unfreeze": 1,
    "second": 1,
    "drop": 1,
}


def run(
    seed: int, wrapper: str = "none", trace: bool = False, without: Sequence[str] = ()
) -> Outcome:
    """One program in this process (and with its peers)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = Program(seed, wrapper, trace, without)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            return Outcome(
                seed, wrapper, {}, f"unclear: construction: {type(error).__name__} {text}"
            )
        try:
            return program.run()
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            return Outcome(seed, program.title, {}, f"unclear: {type(error).__name__} {text}")


def run_many(
    seeds: list[int], wrapper: str, trace: bool = False, without: Sequence[str] = ()
) -> list[Outcome]:
    """Several programs in one spawn; every rank returns the same."""
    return [run(seed, wrapper, trace, without) for seed in seeds]


def plan(seeds: list[int]) -> dict[tuple[str, int], list[int]]:
    """(wrapper, world) -> seeds; half of them are plain, in this process."""
    groups: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for seed in seeds:
        draw = random.Random(f"wrapper {seed}")
        wrapper = "none" if draw.random() < 0.5 else draw.choice(WRAPPERS[1:])
        groups[wrapper, 1 if wrapper == "none" or draw.random() < 0.25 else 2].append(seed)
    return dict(groups)


def run_all(seeds: list[int], trace: bool = False, without: Sequence[str] = ()) -> list[Outcome]:
    """One spawn for each wrapper and world."""
    outcomes: list[Outcome] = []
    for (wrapper, world), group in sorted(plan(seeds).items()):
        if wrapper == "none":
            outcomes += run_many(group, wrapper, trace, without)
            continue
        timeout = 60.0 + 10 * len(group)
        try:
            outcomes += run_ranks(world, run_many, group, wrapper, trace, without, timeout=timeout)[
                0
            ]
        except AssertionError as error:
            text = str(error).strip().splitlines()[-1][:200]
            outcomes += [Outcome(seed, wrapper, {}, f"unclear: {text}") for seed in group]
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="print every action")
    parser.add_argument("--without", nargs="*", default=[], help="actions that are left out")
    options = parser.parse_args()
    seeds = (
        list(range(options.first, options.first + options.seeds))
        if options.seed is None
        else [options.seed]
    )
    outcomes = run_all(seeds, options.trace, options.without)
    table = collections.Counter((each.title.split(",")[0], each.verdict) for each in outcomes)
    verdicts = ["equal", "raised", "silent", "unclear"]
    print(f"{'wrapper':12}" + "".join(f"{verdict:>9}" for verdict in verdicts))
    for wrapper in WRAPPERS:
        print(f"{wrapper:12}" + "".join(f"{table[wrapper, verdict]:9}" for verdict in verdicts))
    for each in outcomes:
        if each.failure:
            print(f"seed {each.seed} ({each.title}): {each.failure}")
    return int(any(each.failure for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
