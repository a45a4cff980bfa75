"""What the multi-process tests share: ranks that report through files, awkward models, every wrapper, the oracle.

How to read a failure: `run_ranks` raises with the traceback of the first rank that failed; a rank that died without a
word is named with its exit code. Inside a rank a check is a plain assert.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")
Call = Callable[..., tuple[int, str, str]]  # `dist-ema`: exit code, stdout, stderr
# What torch imports late, and a rank would spend most of its time on.
PRELOAD = ["tests.kit", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
PRELOAD += ["torch.distributed.tensor.parallel"]


# --- ranks -------------------------------------------------------------------------------------------------------


def run_ranks(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    timeout: float = 150.0,
    allow_dead: bool = False,
    method: str = "forkserver",
) -> list[Any]:
    """Run `work(*args)` on `world` gloo ranks and return what each returned (None for a dead one, if allowed).

    method: "spawn" for ranks in which nothing is imported yet.
    """
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        place = f"{work.__module__}:{work.__qualname__}"
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, place, args), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        return [_read(Path(folder), rank, codes[rank], allow_dead) for rank in range(world)]


def _read(folder: Path, rank: int, code: int | None, allow_dead: bool) -> Any:
    path = folder / f"result-{rank}.pt"
    if not path.exists():
        if allow_dead:
            return None
        raise AssertionError(f"rank {rank} left no result (exit code {code}; None: it hung)")
    kind, value = torch.load(path, weights_only=False)
    if kind == "error":
        raise AssertionError(f"on rank {rank}:\n{value}")
    return value


def _rank(rank: int, world: int, folder: str, place: str, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    _allow_torch_warnings()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        module, name = place.split(":")
        outcome = ("value", getattr(importlib.import_module(module), name)(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    torch.save(outcome, f"{folder}/part-{rank}.pt")
    os.rename(f"{folder}/part-{rank}.pt", f"{folder}/result-{rank}.pt")
    if outcome[0] == "value":
        with contextlib.suppress(Exception):
            dist.barrier()
    os._exit(0)  # gloo aborts now and then in a normal exit, after everything passed


def _allow_torch_warnings() -> None:
    """torch warns of its own plans inside FSDP1, DTensor and DCP; ours stay errors."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    # torch 2.8, now and then
    warnings.filterwarnings("ignore", message="Deallocating Tensor that still has live PyObject")
    warnings.filterwarnings(
        "ignore", message=r".*(NO_SHARD|FSDP|barrier\(\)|device_id|grad\.sizes).*"
    )


def raises(kind: type[BaseException], *words: str) -> contextlib.AbstractContextManager[None]:
    """Inside a rank: the block must raise `kind`, and the message must hold all words."""

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        try:
            yield
        except kind as error:
            assert all(word in str(error) for word in words), f"{error} lacks one of {words}"
        else:
            raise AssertionError(f"{kind.__name__} was not raised")

    return guard()


# --- models ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """up: [hidden, width], down: [width, hidden], with a norm that tensor parallel replicates."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Core(nn.Module):
    """Awkward on purpose: dim 0 of 7, 5, 3 and 1 (not divisible by, or smaller than, the world), tied weights, a frozen
    layer, a layer without gradient, an integer and a floating buffer."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList([Block(6, hidden), Block(6, 4)])
        self.frozen = nn.Linear(6, 6)
        self.unused = nn.Linear(3, 3)
        self.gate = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        x = x * torch.sigmoid(self.gate(x)) + self.frozen(x)
        if self.training:
            self.seen += 1
        return self.head(x)


class Net(nn.Module):
    """The core, and a scalar outside every FSDP group, which would refuse it."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.core = Core(hidden)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.core(tokens) * self.scale


class Tied(nn.Module):
    """What offline tests save: a tied head, a BatchNorm, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.head = (
            nn.Embedding(7, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 7, bias=False),
        )
        self.head.weight = self.emb.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.emb(x)))


class Images(nn.Module):
    """Convolutions for channels_last, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))


def batch(step: int, rank: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """tokens and labels of one rank at one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, 7, (size, 4), generator=generator)
    return tokens, torch.randint(0, 7, (size, 4), generator=generator)


def draw(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers [n], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(n, dtype=wide, generator=generator).to(dtype)


def image_batch(step: int, rank: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(
        0, 7, (size,), generator=generator
    )


# --- wrappers ----------------------------------------------------------------------------------------------------


def wrap(kind: str, model: nn.Module) -> nn.Module:
    """`model` under one of the wrappers of the parity table."""
    return WRAPPERS[kind](model)


def _ddp(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, **options)


class Frozen(nn.Linear):
    """Wrapped alone under FSDP1: a flat parameter cannot be half frozen."""


def _fsdp1(model: nn.Module, orig: bool, strategy: str = "FULL_SHARD", **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def shard(module: nn.Module) -> nn.Module:
        policy, kind = ModuleWrapPolicy({Block, Frozen}), getattr(ShardingStrategy, strategy)
        return FSDP(
            module,
            auto_wrap_policy=policy,
            sharding_strategy=kind,
            use_orig_params=orig,
            device_id=CPU,
            **options,
        )

    if not isinstance(model, Net):
        return shard(model)
    model.core.frozen.__class__ = Frozen
    model.core = shard(model.core)
    return model


def _fsdp2(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    root = model.core if isinstance(model, Net) else model
    for block in getattr(root, "blocks", []):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(root, mesh=mesh, **options)
    for module in root.modules():
        if hasattr(
            module, "set_force_sum_reduction_for_comms"
        ):  # torch 2.8: gloo takes an average for a sum
            module.set_force_sum_reduction_for_comms(True)
    return model


def _hsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    return _fsdp2(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor = mesh["tensor"]
    for block in model.core.blocks:
        parallelize_module(block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        distribute_module(
            block.norm,
            tensor,
            input_fn=lambda _, inputs, mesh: (
                DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),
            ),
            output_fn=lambda _, output, __: output.to_local(),
        )
    return _fsdp2(model, mesh["data"])


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "ddp": _ddp,
    "ddp whole": _ddp,
    "ddp static": lambda model: _ddp(model, gradient_as_bucket_view=True),
    "fsdp1 flat": lambda model: _fsdp1(model, orig=False),
    "fsdp1 orig": lambda model: _fsdp1(model, orig=True),
    "fsdp1 grad_op": lambda model: _fsdp1(model, orig=True, strategy="SHARD_GRAD_OP"),
    "fsdp1 no_shard": lambda model: _fsdp1(model, orig=True, strategy="NO_SHARD"),
    "fsdp1 hybrid": lambda model: _fsdp1(model, True, "HYBRID_SHARD", device_mesh=_mesh22()),
    "fsdp2": _fsdp2,
    "fsdp2 kept": lambda model: _fsdp2(model, reshard_after_forward=False),
    "fsdp2 offload": lambda model: _fsdp2(model, offload_policy=_offload()),
    "hsdp": _hsdp,
    "fsdp2 tp": _tensor_parallel,
}


def _mesh22() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))


def _offload() -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=False)  # pinning needs an accelerator


# --- training, and the oracle ------------------------------------------------------------------------------------


class Training:
    """A wrapped model, and a plain twin in the same process that sees the whole batch of all data ranks."""

    def __init__(
        self, kind: str, make: Callable[[], nn.Module] = Net, data: Callable[..., Any] = batch
    ) -> None:
        torch.manual_seed(0)
        self.twin = make()
        torch.manual_seed(0)
        self.model = wrap(kind, make())
        self.kind, self.data, self.step = kind, data, 0
        world, rank = dist.get_world_size(), dist.get_rank()
        # Ranks that share a tensor parallel group see one batch; a world of one process each sees all of them.
        self.lanes = {"fsdp2 tp": world // 2, "none": 1}.get(kind, world)
        self.lane = {"fsdp2 tp": rank // 2, "none": 0}.get(kind, rank)
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.05, momentum=0.5
        )
        self.twin_optimizer = torch.optim.SGD(
            [p for p in self.twin.parameters() if p.requires_grad], lr=0.05, momentum=0.5
        )

    def train(self, steps: int, after: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            self._one(self.model, self.optimizer, [self.lane])
            self._one(self.twin, self.twin_optimizer, range(self.lanes))
            self.step += 1
            after()

    def _one(self, model: nn.Module, optimizer: torch.optim.Optimizer, lanes: Any) -> None:
        batches = [self.data(self.step, lane) for lane in lanes]
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        output = model(inputs)
        F.cross_entropy(output.flatten(0, -2), labels.flatten()).backward()
        if model is self.model and self.kind not in ("none",):
            self._reduce_lone_gradients()
        optimizer.step()
        optimizer.zero_grad()

    def _reduce_lone_gradients(self) -> None:
        """The scalar outside FSDP's groups is the user's to reduce."""
        if "ddp" in self.kind:
            return
        for name, p in self.model.named_parameters():
            if name.endswith("scale") and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def probe(self) -> Tensor:
        """What the wrapped model computes now, in eval mode, without gradient, warming its roots."""
        return self._probe(self.model)

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        mode = model.training
        model.eval()
        output = model(self.data(10_000, 0)[0])
        model.train(mode)
        return output.float().clone()

    @torch.no_grad()
    def twin_with(self, weights: dict[str, Tensor]) -> Tensor:
        """What the plain twin computes with these weights."""
        kept = {name: p.clone() for name, p in self.twin.named_parameters()}
        for name, p in self.twin.named_parameters():
            p.copy_(weights.get(name, p))
        output = self._probe(self.twin)
        for name, p in self.twin.named_parameters():
            p.copy_(kept[name])
        return output


class Oracle:
    """Twenty lines of float64 over full weights in one process: what every average must equal."""

    def __init__(self, twin: nn.Module, schedule: Any) -> None:
        self._twin, self._schedule, self.now = twin, schedule, 0.0
        self.average = {name: p.detach().double().clone() for name, p in self._trained()}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._twin.named_parameters() if p.requires_grad]

    def update(self, elapsed: float = 1.0) -> None:
        self.now += elapsed
        decay = self._schedule(self.now, elapsed)
        for name, p in self._trained():
            self.average[name] = decay * self.average[name] + (1 - decay) * p.detach().double()

    def error(self, weights: dict[str, Tensor]) -> float:
        """The largest difference to these full weights, relative to 1 or the weight."""
        return max(
            ((weights[name].double() - want).abs() / want.abs().clamp(min=1)).max().item()
            for name, want in self.average.items()
        )


def snapshot(model: nn.Module) -> list[Tensor]:
    """Bit copies of everything that the shards of `model` hold here, in its storage."""
    from dist_ema.sharding import discovery

    return [shard.read().clone() for shard in discovery.find_shards(model).shards]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Collectives:
    """Count the collectives of this process while the block runs."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
        "send",
        "recv",
        "barrier",
    )

    def __enter__(self) -> Collectives:
        self.count, self._kept = 0, {}
        for name in self.NAMES:
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._kept[name]))
        return self

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return call(*args, **kwargs)

        return counted

    def __exit__(self, *_: Any) -> None:
        for name, call in self._kept.items():
            setattr(dist, name, call)
