"""transformers: the script of docs/transformers.md, killed and resumed; what the callback reports,
loads and refuses.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from dist_ema import EMA, follow, load_file
from dist_ema.integrations.transformers import EMACallback
from dist_ema.offline import export as offline

from .living import Naive
from .loops import Launcher, same_files, script_of

pytestmark = pytest.mark.filterwarnings("default")  # the framework warns of its own plans


class Net(nn.Module):
    """y = w x, with a loss that a test can make raise, and a record of the weights that evaluations
    saw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.seen: list[Tensor] = []
        self.broken = False

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not self.training:
            if self.broken:
                raise KeyError("a broken evaluation")
            self.seen.append(self.w.detach().clone())
        y = x @ self.w
        return {"loss": (y - labels).square().mean(), "logits": y}


def rows(count: int) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return [{"x": each, "labels": each @ torch.tensor([1.0, -2.0])} for each in x]


def trainer(folder: Path, callback: EMACallback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4,
        "learning_rate": 0.1, "logging_steps": 4, "gradient_accumulation_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "label_names": ["labels"],
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **arguments | options)
    return Trainer(Net(), args, train_dataset=rows(64), eval_dataset=rows(16), callbacks=[callback])


def history(made: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in made.state.log_history if key in entry]


def test_both_metrics(tmp_path: Path) -> None:
    """Live first, then the average; predictions are the average's; logs say the decay; updates are
    steps.
    """
    folder = tmp_path / "published"
    callback = EMACallback(decay=0.5, publish={"folder": str(folder), "every": 5, "dtype": None})
    made = trainer(tmp_path, callback)
    made.compute_metrics = lambda _: {"kind": "text", "each": [1.0], "none": None, "half": 0.5}
    made.train()
    assert callback.ema is not None
    assert callback.ema.now == 8
    (version,) = follow(folder)  # until the stop file that the end of the training left
    assert version.step == 5
    metrics = version.metadata["metrics"]
    assert metrics["loss"] == history(made, "loss")[0]
    assert metrics["eval_ema_half"] == 0.5
    assert not {"eval_kind", "eval_each", "eval_none"} & metrics.keys(), "no numbers"
    live, average = made.model.seen[0], made.model.seen[-1]
    assert not torch.equal(live, average)
    assert torch.equal(average, callback.ema.gather()["w"])
    assert torch.equal(made.model.seen[-3], made.model.w.detach()), (
        "2 batches of evaluation under each"
    )
    assert len(history(made, "eval_loss")) == len(history(made, "eval_ema_loss")) == 2
    assert history(made, "eval_loss") != history(made, "eval_ema_loss")
    assert history(made, "ema_updates") == [4, 8]
    output = made.predict(rows(16))
    assert {"test_loss", "test_ema_loss"} <= output.metrics.keys()
    expected = torch.stack([row["x"] for row in rows(16)]) @ average
    torch.testing.assert_close(torch.tensor(output.predictions), expected)


def test_trainers_in_turn(tmp_path: Path) -> None:
    """One callback for two trainers, one after the other: each evaluates once under each weights.
    Two callbacks of one trainer would save to one folder, and are refused.
    """
    callback = EMACallback(decay=0.5)
    one, other = trainer(tmp_path / "a", callback), trainer(tmp_path / "b", callback)
    for made in (one, other, one):
        made.train()
        assert len(history(made, "eval_loss")) == len(history(made, "eval_ema_loss"))
    with pytest.raises(RuntimeError, match="Give each trainer a callback of its own"):
        other.evaluate()
    one.add_callback(EMACallback(decay=0.9))
    with pytest.raises(ValueError, match="takes one EMACallback"):
        one.train()


@pytest.mark.parametrize("metric", ["eval_schema_loss", "eval_ema_schema_loss", "ema_schema_loss"])
def test_the_best_wins(metric: str, tmp_path: Path) -> None:
    """The first evaluation is made the best: the model ends as what won then, live or average, and
    so does the EMA.
    """
    callback = EMACallback(decay=0.9)
    made = trainer(
        tmp_path,
        callback,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
    )
    made.compute_metrics = lambda said: {
        "schema_loss": float(((said.predictions - said.label_ids) ** 2).mean())
    }
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    saved = load_file(tmp_path / "checkpoint-4" / "ema")["w"]
    live = load_file(tmp_path / "checkpoint-4" / "model.safetensors")["w"]
    assert not torch.equal(saved, live)
    assert torch.equal(made.model.w.detach(), live if metric == "eval_schema_loss" else saved)
    assert callback.ema is not None
    assert torch.equal(callback.ema.gather()["w"], saved)


def test_only_the_average(tmp_path: Path) -> None:
    """live=False: one evaluation, under the usual name."""
    made = trainer(tmp_path, EMACallback(decay=0.5, live=False))
    made.train()
    assert not history(made, "eval_ema_loss")
    assert torch.equal(made.model.seen[-1], load_file(tmp_path / "checkpoint-8" / "ema")["w"])


def test_rotation_and_missing_averages(tmp_path: Path) -> None:
    callback = EMACallback(decay=0.5)
    made = trainer(tmp_path, callback, save_steps=2, save_total_limit=1)
    made.train()
    assert [path.name for path in tmp_path.glob("*")] == ["checkpoint-8"]
    (tmp_path / "checkpoint-8" / "ema").rename(tmp_path / "gone")
    again = trainer(tmp_path, EMACallback(decay=0.5), max_steps=12)
    with pytest.raises(ValueError, match=r"checkpoint-8 holds no average"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    (tmp_path / "gone").rename(tmp_path / "checkpoint-8" / "ema")
    last = EMACallback(decay=0.5)
    trainer(tmp_path, last, max_steps=12).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-8")
    )
    assert last.ema is not None
    assert last.ema.now == 12


def test_a_decay_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        EMACallback(decay=2)
    with pytest.raises(ValueError, match="one or more different schedules"):
        EMACallback(decay=[0.9, 0.9])


def test_an_evaluation_that_raises(tmp_path: Path) -> None:
    """The live weights are back, bit for bit."""
    callback = EMACallback(decay=0.5, live=False)
    made = trainer(tmp_path, callback, eval_strategy="no")
    made.train()
    live = made.model.w.detach().clone()
    made.model.broken = True
    with pytest.raises(KeyError, match="broken"):
        made.evaluate()
    assert torch.equal(made.model.w.detach(), live)


def test_outside_a_trainer() -> None:
    with pytest.raises(RuntimeError, match=r"inside transformers\.Trainer\.train"):
        EMACallback().on_train_begin(None, None, None)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """2 processes, SIGKILL in the middle: live, average and the best of both equal the
    uninterrupted run, byte for byte.
    """
    script = script_of("transformers.md", tmp_path)
    with Launcher("transformers.trainer", ACCELERATE_USE_CPU="1") as launcher:
        whole = launcher.start(script, tmp_path / "whole")
        killed = launcher.start(script, tmp_path / "killed")
        killed.kill_when(tmp_path / "killed" / "checkpoint-20" / "ema")
        a, b = tmp_path / "whole", tmp_path / "killed"
        whole.wait(a / "final" / "model.safetensors")
        launcher.start(script, b).wait(b / "final" / "model.safetensors")
    assert same_files(a, b, "checkpoint-40/ema/*")
    same_files(a, b, "checkpoint-40/model.safetensors")
    same_files(a, b, "final/model.safetensors")
    best = json.loads((a / "checkpoint-40" / "trainer_state.json").read_text())["best_global_step"]
    final, average = (
        load_file(a / "final" / "model.safetensors"),
        load_file(a / f"checkpoint-{best}" / "ema"),
    )
    assert all(torch.equal(final[name], average[name]) for name in final)


def tiny(kind: str) -> Any:
    """A model whose files have other names than it has in memory."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 16,
    }  # fmt: skip
    if kind == "fused experts":
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=0,
            bos_token_id=0,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config)
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 4, "patch_size": 2,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**sizes),
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["fused experts", "vision and language"])
def test_export_has_the_names_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    """Names and shapes of save_pretrained, the average's values, and a config.json."""
    model = tiny(kind)
    callback = EMACallback(decay=0.5)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=0.1,
    )  # fmt: skip
    row = {"input_ids": torch.arange(3, 7), "labels": torch.arange(3, 7)}
    with pytest.raises(RuntimeError, match="call it after trainer.train"):
        callback.export(tmp_path / "early")
    Trainer(model, args, train_dataset=[row] * 32, callbacks=[callback]).train()
    assert callback.ema is not None
    callback.export(tmp_path / "out")
    with callback.ema.swap():
        model.save_pretrained(tmp_path / "theirs")
        average = {name: value.clone() for name, value in model.state_dict().items()}
    ours, theirs = (load_file(tmp_path / each) for each in ("out", "theirs"))
    assert ours.keys() == theirs.keys() != average.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    opened = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(opened[name], average[name]) for name in average)
    callback.ema.export(tmp_path / "memory")
    configs = [
        json.loads((tmp_path / each / "config.json").read_text()) for each in ("memory", "theirs")
    ]
    assert configs[0] == configs[1]
    callback.ema.save(tmp_path / "saved")
    for source in ("saved", "memory"):
        offline.export(
            tmp_path / source, out := tmp_path / f"{source}-out", like=tmp_path / "theirs"
        )
        named = load_file(out)
        assert list(named) == list(theirs)
        assert all(torch.equal(named[name], theirs[name]) for name in theirs)


def test_optimizers_that_step_each_layer_in_the_backward() -> None:
    """GaLore's and APOLLO's: the Trainer's optimizer is a stand-in, whose step comes last.

    Guards `_stepped_parameters`: no warning says that the stand-in steps copies. And that a round
    forgets the steps before it, of which `gather` would warn.
    """
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p, optimizer in each.items():
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    accelerator = Accelerator(cpu=True)
    stand_in = accelerator.prepare_optimizer(LayerWiseDummyOptimizer(optimizer_dict=each))
    naive, ema = Naive(model), EMA(model, 0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.attach(stand_in)
        for _ in range(4):
            model(torch.randn(8, 4)).square().mean().backward()
            stand_in.step()
            naive.update()
            model.zero_grad()
        assert naive.error(ema.gather()) < 1e-6
    assert ema.metrics()["updates"] == 4
