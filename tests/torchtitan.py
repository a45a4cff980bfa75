"""docs/torchtitan.md with torchtitan's own parts, on two FSDP2 ranks of the CPU.

    python -m tests.torchtitan     where torchtitan can be imported

What is left out is the trainer's constructor, which needs an accelerator: it is replaced by one
that builds the optimizer container and the checkpoint manager from the config as torchtitan does.
"""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ._ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


def page(folder: str) -> dict[str, Any]:
    """What the page's first block defines."""
    text = (ROOT / "docs/torchtitan.md").read_text()
    blocks = re.findall(r"^```python.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    path = Path(tempfile.mkdtemp(dir=folder), "page.py")
    path.write_text(blocks[0])
    return runpy.run_path(str(path), run_name="page")


def rank(folder: str) -> None:
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.trainer import Trainer

    def build(self: Any, config: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        for module in (model[0], model[2], model):
            fully_shard(module)
        self.config, self.model_parts = config, [model]
        self.optimizers = config.optimizer.build(model_parts=[model])
        self.lr_schedulers = config.lr_scheduler.build(
            optimizers=self.optimizers, training_steps=10
        )
        self.checkpointer = config.checkpoint.build(
            dataloader=None, model_parts=[model], optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers, states={}, sd_adapter=None, base_folder=folder,
        )  # fmt: skip

    Trainer.__init__ = build
    plain = Trainer.Config(
        optimizer=default_adamw(lr=0.1),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=1),
    )
    config = page(folder)["with_ema"](plain, half_life=3)
    trainer = config.build()
    (model,) = trainer.model_parts
    oracle = [p.full_tensor().double() for p in model.parameters()]
    for step in range(1, 8):
        data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()
        live = [p.full_tensor().detach().double() for p in model.parameters()]
        kept = 0.5 ** (1 / 3)
        oracle = [kept * a + (1 - kept) * b for a, b in zip(oracle, live, strict=True)]
    assert trainer.ema.now == 7
    trainer.checkpointer.save(7)
    again = config.build()
    assert again.checkpointer.load(step=7)
    assert again.ema.now == 7
    for each in (trainer, again):
        with each.ema.swap():
            found: list[Tensor] = [p.full_tensor() for p in each.model_parts[0].parameters()]
        for value, expected in zip(found, oracle, strict=True):
            torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=1e-6)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, rank, folder)
    print("the average of torchtitan's parts equals float64, and comes back from its checkpoint")


if __name__ == "__main__":
    main()
