"""A model in stages, and its pipeline beside a plain twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from tests._models import Experts
from tests._oracle import Oracle, snapshot

WIDTH, LAYERS, MICROBATCHES = 6, 4, 4


class Layer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("expert_bias", torch.zeros(3))
        self.experts = Experts(WIDTH, 4, experts) if experts else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x + torch.tanh(self.linear(self.norm(x))))


class Model(nn.Module):
    """A model whose stages are copies of it without the layers of the others."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.emb: nn.Module | None = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleDict({str(i): Layer(experts) for i in range(LAYERS)})
        self.head: nn.Module | None = nn.Linear(WIDTH, 7)
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.emb is None else self.emb(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(x)

    def keep(self, stage: int, stages: int) -> Model:
        """Only what the stage runs."""
        first, last = LAYERS * stage // stages, LAYERS * (stage + 1) // stages
        for i in set(range(LAYERS)) - set(range(first, last)):
            del self.layers[str(i)]
        self.emb = self.emb if stage == 0 else None
        self.head = self.head if stage == stages - 1 else None
        return self


def make(stage: int | None = None, stages: int = 1, experts: int = 0) -> Model:
    torch.manual_seed(0)
    model = Model(experts)
    return model if stage is None else model.keep(stage, stages)


def batch(step: int, lane: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + lane)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 7, (8,), generator=generator)


class Pipeline:
    """The stages of this rank, trained beside a plain twin that sees all batches.

    kind: how each stage is wrapped: "none", "ddp", "tp", "fsdp2" or "fsdp2 tp".
    local: stages per rank, run interleaved if there are several.
    depth: ranks in a row, one for each stage or group of stages.
    order: of the dimensions of the mesh.
    experts: in each layer.
    """

    def __init__(
        self,
        kind: str = "none",
        local: int = 1,
        depth: int = 2,
        order: Sequence[str] = ("pp", "dp", "tp"),
        experts: int = 0,
    ) -> None:
        sizes = {"pp": depth, "tp": 2 if "tp" in kind else 1}
        sizes["dp"] = dist.get_world_size() // depth // sizes["tp"]
        mesh = init_device_mesh(
            "cpu", tuple(sizes[each] for each in order), mesh_dim_names=tuple(order)
        )
        rank, self.lane = (mesh[each].get_local_rank() for each in ("pp", "dp"))
        self.lanes, count = sizes["dp"], depth * local
        numbers = [rank + i * depth for i in range(local)]
        self.model = [wrapped(kind, make(number, count, experts), mesh) for number in numbers]
        group = mesh["pp"].get_group()
        run = [
            PipelineStage(part, number, count, torch.device("cpu"), group=group)
            for part, number in zip(self.model, numbers, strict=True)
        ]
        self.schedule: Any = (
            Schedule1F1B(run[0], MICROBATCHES, loss_fn=F.cross_entropy)
            if local == 1
            else ScheduleInterleaved1F1B(run, MICROBATCHES, loss_fn=F.cross_entropy)
        )
        self.is_first, self.is_last = rank == 0, rank == depth - 1
        self.optimizers = [_optimizer(part) for part in self.model]
        self.twin = make(experts=experts)
        self.twin_optimizer, self.step = _optimizer(self.twin), 0

    def train(self, steps: int, after: Any = lambda: None) -> None:
        for _ in range(steps):
            inputs, labels = batch(self.step, self.lane)
            self.run(inputs, labels)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            pairs = [batch(self.step, lane) for lane in range(self.lanes)]
            (sum(F.cross_entropy(self.twin(x), y) for x, y in pairs) / self.lanes).backward()
            self.twin_optimizer.step()
            self.twin_optimizer.zero_grad()
            self.step += 1
            after()

    def run(self, inputs: Tensor, labels: Tensor) -> None:
        given = (inputs,) if self.is_first else ()
        self.schedule.step(*given, **({"target": labels} if self.is_last else {}))

    @torch.no_grad()
    def probe(self) -> Tensor | None:
        """What the pipeline computes now, on the ranks of the last stage."""
        inputs, labels = batch(10_000, 0)
        given = (inputs,) if self.is_first else ()
        if not hasattr(self.schedule, "eval"):  # an older torch
            return None
        output = self.schedule.eval(*given, **({"target": labels} if self.is_last else {}))
        return output if self.is_last else None

    def snapshot(self) -> list[Tensor]:
        return [tensor for part in self.model for tensor in snapshot(part)]

    @torch.no_grad()
    def lent(self, oracle: Oracle) -> Tensor:
        """What one process computes with the float64 average."""
        weights = {name: value.float() for name, value in oracle.average.items()}
        return torch.func.functional_call(self.twin, weights, batch(10_000, 0)[0])


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def wrapped(kind: str, part: Model, mesh: DeviceMesh) -> nn.Module:
    """A stage over the ranks that hold it: mesh["dp"] and mesh["tp"]."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(part, process_group=mesh["dp"].get_group())
    if "tp" in kind:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        plan = {"layers.*.linear": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(part, mesh["tp"], plan)
    if "fsdp2" in kind:
        from torch.distributed.fsdp import fully_shard

        for layer in part.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(part, mesh=mesh["dp"])
    return part
