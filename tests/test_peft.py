"""Adapters: what is saved and exported opens in peft, resumes, and merges as peft merges it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_ema import EMA, follow, load_file
from dist_ema.checkpoint.manifest import read
from dist_ema.cli import main
from dist_ema.offline.export import export

from ._ranks import run_ranks
from ._wrappers import wrap
from .test_watch import first_weight, serving
from .test_watch import publish as publish_versions

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("default")  # peft warns of its own plans

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},  # also of modules that no adapter sits on
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).tanh())


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(**options: Any) -> Any:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["up", "down"]}
    config = peft.LoraConfig(init_lora_weights=False, **settings | options)
    return peft.get_peft_model(base(), config)


def train(model: nn.Module, published: str = "", **options: Any) -> EMA:
    ema = EMA(model, 0.5, **options)
    handle = ema.publish(published, every=3, dtype=None) if published else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    ema.attach(optimizer)
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    return ema


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", FORMS)
def test_peft_opens_it(form: str, tmp_path: Path) -> None:
    """A save, an export and save_pretrained have the same files and names, and give the average."""
    model = adapted(**FORMS[form])
    ema = train(model, f"{tmp_path}/published")
    ema.save(tmp_path / "saved")
    ema.save(tmp_path / "saved")  # over its own adapter_config.json
    ema.export(tmp_path / "exported")
    with ema.swap():
        average = copy.deepcopy(model.state_dict())
        model.save_pretrained(tmp_path / "pefts")
    names = {"adapter_model.safetensors", "adapter_config.json", "ema.json"}
    for folder in ("saved", "exported", "published/version-000001"):
        assert {each.name for each in (tmp_path / folder).iterdir()} == names
        assert equal(load_file(tmp_path / folder), load_file(tmp_path / "pefts"))
        configs = [
            json.loads((tmp_path / each / "adapter_config.json").read_text())
            for each in (folder, "pefts")
        ]
        assert configs[0] == configs[1]
        opened = peft.PeftModel.from_pretrained(base(), tmp_path / folder)
        assert all(
            torch.equal(value, average[name])
            for name, value in opened.state_dict().items()
            if form == "modules_to_save" or "norm" not in name
        ), "BatchNorm's statistics are the base model's, which peft does not save"
        assert main(["verify", str(tmp_path / folder)]) == 0
        with pytest.raises(ValueError, match="holds an adapter, which peft opens as it is"):
            export(tmp_path / folder, tmp_path / "out")
    (version,) = follow(tmp_path / "published", timeout=0)
    version.load_into(model)
    assert all(torch.equal(v, average[n]) for n, v in model.state_dict().items() if "lora_" in n)


@pytest.mark.parametrize("form", FORMS)
def test_resumes(form: str, tmp_path: Path) -> None:
    ema = train(adapted(**FORMS[form]))
    ema.save(tmp_path / "saved")
    again = EMA(adapted(**FORMS[form]), 0.5)
    again.load(tmp_path / "saved")
    assert again.now == 3
    averaged = set(ema.names())
    ours, theirs = ema.gather(), again.gather()
    assert equal({n: ours[n] for n in averaged}, {n: theirs[n] for n in averaged})


@pytest.mark.parametrize("form", FORMS)
def test_merged(form: str, tmp_path: Path) -> None:
    """As merge_and_unload of the average; the model keeps its bits, and nothing warns."""
    model = adapted(**FORMS[form])
    ema = train(model)
    before = copy.deepcopy(model.state_dict())
    with ema.swap():
        expected = copy.deepcopy(model).merge_and_unload().state_dict()
    addresses = [p.data_ptr() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.export(tmp_path, merged=True)
    assert equal(load_file(tmp_path), expected)
    assert equal(model.state_dict(), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_a_merged_model_replaces_the_adapter(tmp_path: Path) -> None:
    """A loader that finds both would add the adapter a second time."""
    ema = train(adapted())
    ema.export(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    ema.export(tmp_path, merged=True)
    assert {each.name for each in tmp_path.iterdir()} == {
        "model.safetensors",
        "ema.json",
        "tokenizer.json",
    }


def test_several_adapters(tmp_path: Path) -> None:
    """Exported as save_pretrained lays them out; saved as one where one trains."""
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    ema = train(model)
    ema.export(tmp_path / "exported")
    ema.save(tmp_path / "saved")
    with ema.swap():
        model.save_pretrained(tmp_path / "pefts")
        average = copy.deepcopy(model.state_dict())
    for folder in ("", "other"):
        assert equal(
            load_file(tmp_path / "exported" / folder), load_file(tmp_path / "pefts" / folder)
        )
    assert equal(load_file(tmp_path / "saved"), load_file(tmp_path / "exported"))
    opened = peft.PeftModel.from_pretrained(base(), tmp_path / "exported")
    opened.load_adapter(tmp_path / "exported" / "other", "other")
    assert all(
        torch.equal(value, average[name])
        for name, value in opened.state_dict().items()
        if "lora_" in name
    )


def test_two_adapters_that_train(tmp_path: Path) -> None:
    """The save holds what is averaged, under the model's names, and resumes."""
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    ema = train(model)
    ema.save(tmp_path)
    assert load_file(tmp_path).keys() == set(ema.names())
    assert any(".other." in name for name in ema.names())
    again = EMA(model, 0.5)
    again.load(tmp_path)
    assert again.now == 3


def test_a_base_that_trains_is_saved_whole(tmp_path: Path) -> None:
    model = adapted()
    model.base_model.model.norm.weight.requires_grad_(True)
    ema = train(model)
    ema.save(tmp_path / "saved")
    assert load_file(tmp_path / "saved").keys() == model.state_dict().keys()


def infused() -> Any:
    return peft.get_peft_model(
        base(), peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    )


@pytest.mark.parametrize("make", [adapted, infused])
def test_a_swap_of_a_model_with_merged_adapters_is_refused(make: Any, tmp_path: Path) -> None:
    """It would compute with live adapters, and an export would hold both."""
    model = make()
    ema = train(model)
    model.eval()
    x = torch.linspace(-1, 1, 8).view(2, 4)
    with ema.swap():
        want = model(x)
    model.merge_adapter()
    verbs = {"swap": lambda: ema.swap().__enter__(), "out": lambda: ema.export("out", merged=True)}
    for verb in verbs.values():
        with pytest.raises(
            RuntimeError, match=r"merged into .*model\.up.*unmerge_adapter\(\) before"
        ):
            verb()
    model.unmerge_adapter()
    with ema.swap():
        assert torch.allclose(model(x), want, atol=1e-5)
    ema.export(tmp_path / "out", merged=True)
    plain = base()
    plain.load_state_dict(load_file(tmp_path / "out"))
    assert torch.allclose(plain.eval()(x), want, atol=1e-5)


def test_adapters_that_are_left_merged_are_named() -> None:
    """peft writes through `.data`. Warnings are errors here, so that an undone merge is none."""
    model = adapted()
    ema = train(model)
    with ema.swap():
        model.merge_adapter()
        model.unmerge_adapter()
    named = pytest.warns(UserWarning, match=r"merged into .*model\.up.*keep those of the average")
    with named, ema.swap():
        model.merge_adapter()


def test_merged_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="merged=True needs a PeftModel, got Net"):
        EMA(base()).export(tmp_path, merged=True)
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompt)
    with pytest.raises(ValueError, match="PROMPT_TUNING adds no weights to others"):
        EMA(model).export(tmp_path, merged=True)


def test_an_adapter_that_is_saved_whole_is_merged(tmp_path: Path) -> None:
    """AdaLoRA, of which peft computes what it writes: none of its own weights is in the model."""
    settings: dict[str, Any] = {"target_modules": ["up"], "init_r": 2, "target_r": 2}
    model = peft.get_peft_model(base(), peft.AdaLoraConfig(**settings, total_step=9))
    ema = EMA(model, 0.5)
    with ema.swap():
        expected = copy.deepcopy(model).merge_and_unload().state_dict()
    ema.export(tmp_path, merged=True)
    assert equal(load_file(tmp_path), expected)


class Scored(nn.Module):
    """What a Trainer trains: rows with labels in, a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = base()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - labels).square().mean()}


def test_trainer(tmp_path: Path) -> None:
    """checkpoint-N/ema is an adapter that peft opens, and the training resumes from it."""
    transformers = pytest.importorskip("transformers")
    from dist_ema.integrations.transformers import EMACallback

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    rows = [{"x": torch.ones(4), "labels": torch.zeros(3)} for _ in range(64)]
    averages = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = peft.get_peft_model(Scored(), peft.LoraConfig(r=2, target_modules=["up"]))
        callback = EMACallback(decay=0.5)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert callback.ema is not None
        assert callback.ema.now == 4
        averages.append(load_file(tmp_path / "checkpoint-4" / "ema"))
        opened = peft.PeftModel.from_pretrained(Scored(), tmp_path / "checkpoint-4" / "ema")
    assert equal(*averages)
    lora = {name: value for name, value in opened.state_dict().items() if "lora_" in name}
    with callback.ema.swap():
        assert equal(lora, {name: model.state_dict()[name] for name in lora})


def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    from dist_ema.integrations.transformers import EMACallback

    def gpt() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))

    vocabulary = {str(i): i for i in range(16)}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "1", "pad_token": "2", "unk_token": "0"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    callback = EMACallback(decay=0.5)
    trainer = trl.SFTTrainer(
        gpt(),
        trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, max_length=8,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["3 4 5 6"] * 32}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM"),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.ema is not None
    assert all("lora_" in name for name in callback.ema.names())
    opened = peft.PeftModel.from_pretrained(gpt(), tmp_path / "checkpoint-2" / "ema")
    with callback.ema.swap():
        held = trainer.model.state_dict()
        for name, value in opened.state_dict().items():
            torch.testing.assert_close(value, held[name].float())


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from dist_ema.integrations.accelerate import register

    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(adapted())
    ema = train(model)
    register(accelerator, ema)
    accelerator.save_state(str(tmp_path))
    peft.PeftModel.from_pretrained(base(), tmp_path / "ema")
    ema.reset()
    accelerator.load_state(str(tmp_path))
    assert ema.now == 3


def full(weight: Any) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def rank(kind: str, folder: str) -> None:
    model = wrap(kind, adapted(use_dora=kind == "ddp"))
    ema = train(model, f"{folder}/published")
    ema.save(f"{folder}/saved")
    ema.export(f"{folder}/exported")
    if kind.startswith("fsdp1"):
        with pytest.raises(ValueError, match="flat part of a weight here"):
            ema.export(f"{folder}/merged", merged=True)
    else:
        before = {name: full(p).clone() for name, p in model.named_parameters()}
        ema.export(f"{folder}/merged", merged=True)
        assert all(torch.equal(full(p), before[name]) for name, p in model.named_parameters())
    ema.load(f"{folder}/saved")
    fresh = wrap(kind, adapted(use_dora=kind == "ddp"))
    for version in follow(f"{folder}/published", timeout=0):
        version.load_into(fresh)
    mean, loaded = ema.gather(), EMA(fresh).gather()
    assert all(torch.equal(mean[name], loaded[name]) for name in mean if "lora_" in name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp1 orig"])
def test_ranks(kind: str, tmp_path: Path) -> None:
    """As in one process: the folders, and the merged model."""
    run_ranks(2, rank, kind, str(tmp_path))
    ema = train(adapted(use_dora=kind == "ddp"))
    ema.export(tmp_path / "alone")
    alone = load_file(tmp_path / "alone")
    for folder in ("saved", "exported", "published/version-000001"):
        written = load_file(tmp_path / folder)
        assert written.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(written[name], alone[name])
        opened = peft.PeftModel.from_pretrained(base(), tmp_path / folder)
        found = read(tmp_path / folder)
        assert found is not None
        assert found.weights == "adapter"
    if not kind.startswith("fsdp1"):
        merged, expected = load_file(tmp_path / "merged"), opened.merge_and_unload().state_dict()
        for name in merged:
            if "running" not in name and "batches" not in name:
                torch.testing.assert_close(merged[name], expected[name])


def test_servers_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under one name: SGLang's is unloaded first, vLLM's is replaced in place."""
    folder = tmp_path / "published"
    config = peft.LoraConfig(r=2, target_modules=["0"])
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    with serving() as server:
        host = f"http://127.0.0.1:{server.server_address[1]}"
        addresses = (f"{host}/load_lora_adapter", f"{host}/v1/load_lora_adapter?lora_name=policy")
        for number in (1, 2):
            publish_versions(folder, 1, adapted)
            weight = first_weight(folder / f"version-{number:06}")
            for address, name in zip(addresses, ("ema", "policy"), strict=True):
                assert main(["watch", str(folder), "--notify", address]) == 0
                assert server.adapters[name] == weight
        whole = ["watch", str(folder), "--retries", "0", "--notify", f"{host}/collective_rpc"]
        capsys.readouterr()
        asked = len(server.asked)
        assert main(whole) == 1
        assert "version 2 is an adapter, and adapters go to /load_lora" in capsys.readouterr().out
        publish_versions(tmp_path / "whole", 1)
        assert main(["watch", str(tmp_path / "whole"), "--notify", addresses[0]]) == 1
        assert "version 1 is no adapter" in capsys.readouterr().out
        assert len(server.asked) == asked, "neither was sent"
