"""Anchors in reinforcement learning: the reference is the average of the policy, in TRL and in a
loop, as a model or as a second adapter. What TRL's own callbacks get wrong is right here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA

from ._ranks import run_ranks
from ._wrappers import wrap
from .loops import Launcher

pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own plans


def reference_adapter(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the adapter `ref` under the names of those of `default`."""
    named = getattr(model, "module", model).named_parameters()  # DDP would prefix the names
    return [(name.replace(".ref.", ".default."), p) for name, p in named if ".ref." in name]


class Oracle:
    """The float64 average of some weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.average = [weight.detach().double() for weight in weights]

    def step(self) -> None:
        pairs = zip(self.average, self.weights, strict=True)
        self.average = [0.9 * old + 0.1 * new.detach().double() for old, new in pairs]

    def check(self, reference: list[Tensor]) -> None:
        assert len(reference) == len(self.average)
        assert not all(map(torch.equal, reference, self.weights))
        for value, average in zip(reference, self.average, strict=True):
            torch.testing.assert_close(value.detach().double(), average, rtol=1e-5, atol=1e-6)


def grpo(folder: Path, adapter: bool) -> Any:
    """A GRPO trainer of a tiny model, with an anchor callback: (trainer, callback)."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")

    class Anchor(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        """The callback of docs/rl.md, and the oracle beside it."""

        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            reference = reference_adapter(model) if adapter else trainer.ref_model
            only = r"lora_.*\.default\." if adapter else None
            self.ema = EMA(model, 0.9, into=reference, only=only)
            self.ema.attach(optimizer)
            self.oracle = Oracle([p for p in model.parameters() if p.requires_grad])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.oracle.step()

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special))
    vocabulary = {str(i): i for i in range(16)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0"
    )
    model.save_pretrained(folder / "base")
    policy: Any = str(folder / "base")
    if adapter:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        policy = peft.get_peft_model(model, config)
    callback = Anchor()
    arguments = trl.GRPOConfig(
        output_dir=str(folder), max_steps=20, report_to=[], use_cpu=True, bf16=False, beta=0.1,
        num_generations=2, per_device_train_batch_size=2, max_completion_length=4,
        learning_rate=0.01, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["3 4 5", "6 7"] * 32}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    return trainer, callback


def test_grpo(tmp_path: Path) -> None:
    """20 steps of TRL: the reference model is the float64 average of the policy."""
    trainer, callback = grpo(tmp_path, adapter=False)
    trainer.train()
    assert callback.ema.now == 20
    callback.oracle.check(list(trainer.ref_model.parameters()))
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_grpo_adapter(tmp_path: Path) -> None:
    """TRL's reference adapter over the shared base, which stays as it is."""
    trainer, callback = grpo(tmp_path, adapter=True)
    model = trainer.model
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    trainer.train()
    reference = reference_adapter(model)
    callback.oracle.check([p for _, p in reference])
    assert not any(p.requires_grad for _, p in reference)
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in base.items())


ON_RANKS = """
import os
from pathlib import Path
import torch
import torch.distributed as dist
from tests.test_rl import grpo, reference_adapter
run, rank = Path(os.environ["RUN"]), int(os.environ["RANK"])
trainer, callback = grpo(run / f"rank-{rank}", adapter=os.environ["ADAPTER"] == "yes")
trainer.train()
assert (dist.get_world_size(), callback.ema.now) == (2, 20)
named = reference_adapter(trainer.model)
reference = [p for _, p in named] or list(trainer.ref_model.parameters())
callback.oracle.check(reference)
for value in reference:
    first = value.detach().clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, value)
dist.barrier()
(run / f"done-{rank}").touch()
"""


@pytest.mark.slow
def test_grpo_on_two_ranks(tmp_path: Path) -> None:
    """As above under DDP: on each rank, and the same on both; as a model and as an adapter."""
    pytest.importorskip("trl")
    script = tmp_path / "train.py"
    script.write_text(ON_RANKS)
    with Launcher("trl", "peft", ACCELERATE_USE_CPU="1") as launcher:
        for adapter in ("no", "yes"):
            job = launcher.start(script, tmp_path / adapter, ADAPTER=adapter)
            job.wait(tmp_path / adapter / "done-0")
            assert (tmp_path / adapter / "done-1").exists(), job.log.read_text()[-6000:]


class Adapted(nn.Module):
    """A frozen base with two adapters named as PEFT names them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({k: nn.Linear(4, 1, bias=False) for k in ("default", "ref")})
        self.lora_B = nn.ModuleDict({k: nn.Linear(1, 3, bias=False) for k in ("default", "ref")})

    def forward(self, x: Tensor, adapter: str = "default") -> Tensor:
        return self.base(x) + self.lora_B[adapter](self.lora_A[adapter](x))


def loop(kind: str) -> list[Tensor]:
    """A plain loop; with one row of lora_A, a rank of two holds an empty shard of it."""
    model = wrap(kind, Adapted())
    trained = [p for name, p in model.named_parameters() if ".default." in name]
    reference = reference_adapter(model)
    ema = EMA(model, 0.9, only=r"lora_.*\.default\.", into=reference)
    optimizer = torch.optim.SGD(trained, 0.1)
    ema.attach(optimizer, overlap=False)
    for step in range(20):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    full = [getattr(p, "full_tensor", p.detach)() for p in (*trained, *dict(reference).values())]
    ema.detach()
    with pytest.raises(ValueError, match=r"the optimizer trains .*lora_A\.default"):
        ema.attach(torch.optim.SGD([p for _, p in reference], 0.1))
    return [value.detach().clone() for value in full]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_second_adapter_on_ranks(kind: str) -> None:
    """As in one process, where it is the float64 average; the optimizer may not train it."""
    alone, ranks = loop("none"), run_ranks(2, loop, kind)
    for values in ranks:
        for value, expected in zip(values, alone, strict=True):
            torch.testing.assert_close(value, expected)
    torch.manual_seed(0)
    model = Adapted()
    trained = [p for name, p in model.named_parameters() if ".default." in name]
    oracle, optimizer = Oracle([*trained]), torch.optim.SGD(trained, 0.1)
    for step in range(20):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
    oracle.check(alone[len(trained) :])


def test_a_reference_that_does_not_fit_is_refused() -> None:
    """A callback that zips parameters would average the wrong ones, or the shorter list."""
    policy, reference = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"the teacher has no 0\.bias, which the model has"):
        EMA(policy, into=reference)
    larger = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 2\) in the model and \(3, 2\) in"):
        EMA(policy, into=larger)
    fitting = nn.Sequential(nn.Linear(2, 2))
    ema = EMA(policy, into=fitting)
    with pytest.raises(ValueError, match="another EMA"):
        EMA(policy, into=list(fitting.named_parameters()))
    assert ema.now == 0


def test_the_rate_is_that_of_the_reference() -> None:
    """decay is what the reference keeps: at 0.99 it stays near where it was."""
    policy, reference = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(policy.weight)
    ema = EMA(policy, 0.99, into=reference)
    nn.init.ones_(policy.weight)
    ema.update()
    assert reference.weight.item() == pytest.approx(0.01)
