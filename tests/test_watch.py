"""`dist-ema watch`: every version once, whoever dies; servers get what their contracts say.

How to read a failure: commands append a line to `ran` for each time they run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.checkpoint import leases, pointers, versions
from dist_ema.cli import main
from dist_ema.service import ledger, notify, watch
from dist_ema.service.follow import Version, follow, open_version


def publish(folder: Path, count: int, model: nn.Module | None = None, **options: Any) -> EMA:
    """Versions 1, 2 ... at steps 1, 2 ..., and the stop file."""
    model = nn.Linear(4, 3) if model is None else model
    weight = next(each for each in model.parameters() if each.requires_grad)
    ema = EMA(model, 0.5)
    handle = ema.publish(folder, **{"every": 1, "keep": 100, "dtype": None} | options)
    for step in range(1, count + 1):
        with torch.no_grad():
            weight.add_(1.0)
        handle.metrics["loss"] = 10.0 / step
        ema.update()
        handle.wait()
    handle.remove(stop=True)
    return ema


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# --- the ledger ----------------------------------------------------------------------------------


def test_several_watchers_share_a_ledger(tmp_path: Path) -> None:
    """Two watchers with two jobs each: every version runs once, and is recorded once."""
    folder, ran = tmp_path / "published", []
    publish(folder, 8)

    def work(version: Version) -> ledger.Outcome:
        assert load_file(version.path)
        ran.append(version.number)
        return ledger.Outcome({"loss": abs(version.number - 5)})

    watchers = []
    for _ in range(2):
        book = ledger.Ledger(tmp_path / "ledger", "eval", metric="loss")
        watcher = watch.Watch(folder, work, book, jobs=2, poll=0.01)
        watchers.append(threading.Thread(target=watcher.run))
    for thread in watchers:
        thread.start()
    for thread in watchers:
        thread.join()
    assert sorted(ran) == list(range(1, 9))
    records = ledger.read_records(tmp_path / "ledger")
    assert [(each.version, each.step, each.state) for each in records] == [
        (number, number, ledger.DONE) for number in range(1, 9)
    ]
    assert (folder / pointers.BEST).read_text() == "version-000005\n"
    assert leases.read_all(folder) == {}
    again = ledger.Ledger(tmp_path / "ledger", "eval")
    watch.Watch(folder, work, again, timeout=0, poll=0.01).run()
    assert len(ran) == 8, "a watcher that starts again does nothing twice"
    watch.Watch(folder, work, ledger.Ledger(tmp_path / "ledger", "other"), newest=True).run()
    assert ran[8:] == [8], "another task, the newest version alone"
    (tmp_path / "text").write_text("no ledger at all, but long enough to be looked at" * 9)
    with pytest.raises(OSError, match="ledger .*text cannot be used"):
        ledger.Ledger(tmp_path / "text", "eval")


def test_claims_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose beat stands still goes to another watcher, and only that one records."""
    publish(tmp_path / "published", 1)
    version = open_version(tmp_path / "published" / "version-000001")
    assert version is not None
    clock = 100.0
    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock)
    first, second = (ledger.Ledger(tmp_path / "ledger", "eval", expiry=5.0) for _ in range(2))
    assert first.claim(version)
    assert not first.claim(version)
    assert not second.claim(version), "seen for the first time"
    clock += 6
    first.beat()
    assert not second.claim(version), "it lives"
    clock += 4
    assert not second.claim(version)
    clock += 2
    assert second.claim(version), "6 s without a beat"
    assert first.finish(version, ledger.Outcome({"loss": 1.0}), 1, 0.0) is None
    record = second.finish(version, ledger.Outcome({"loss": 2.0}), 1, 0.0)
    assert record is not None
    assert record.metrics == {"loss": 2.0}
    assert second.finish(version, ledger.Outcome(), 1, 0.0) is None, "once"
    third = ledger.Ledger(tmp_path / "ledger", "third", expiry=5.0)
    assert third.claim(version)
    third.give_back()
    assert ledger.Ledger(tmp_path / "ledger", "third").claim(version)
    version.release()


def test_a_killed_watcher(tmp_path: Path) -> None:
    """SIGKILL inside a command: the next watcher runs it again and records it once."""
    folder, ran, go = tmp_path / "published", tmp_path / "ran", tmp_path / "go"
    publish(folder, 3)
    command = f"echo {{version}} >> {ran}; while [ ! -e {go} ]; do sleep 0.05; done"
    arguments = ["watch", str(folder), "--exec", command, "--expiry", "0.5"]
    killed = subprocess.Popen([sys.executable, "-m", "dist_ema", *arguments])
    while lines(ran) != ["1"]:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    go.touch()
    assert main(arguments) == 0
    assert sorted(lines(ran)) == ["1", "1", "2", "3"]
    records = ledger.read_records(folder / ledger.NAME)
    assert [(each.version, each.state) for each in records] == [(i, "done") for i in (1, 2, 3)]


# --- the command ---------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Placeholders, metrics, retries, failures, the best version, the table, JSON, the plot."""
    folder = tmp_path / "a 'folder'"
    script = tmp_path / "eval.py"
    script.write_text(
        "import json, os, sys\n"
        "path, step, tried = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
        "assert os.path.exists(f'{path}/ema.json')\n"
        "if step == 2 and not os.path.exists(tried):\n"
        "    open(tried, 'w').close(); sys.exit('not\\x1b yet')\n"
        "sys.stdout.buffer.write(b'\\xff no text\\n'); sys.stdout.flush()\n"
        "print(json.dumps({'loss': 7})); print(json.dumps({'loss': (step - 3) ** 2}))\n"
        "print('done {}', float('nan'))\n"
    )
    command = f"{sys.executable} {script} {{path}} {{step}} {tmp_path / 'tried'}"
    publish(folder, 4)
    common = ["watch", str(folder), "--metric", "loss"]
    assert main([*common, "--exec", command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["metrics"]["loss"] for each in records] == [4, 1, 0, 1]
    assert [each["attempts"] for each in records] == [1, 2, 1, 1]
    assert (folder / pointers.BEST).read_text() == "version-000003\n"
    publish(folder, 3, keep=1)
    assert list(versions.numbered(folder)) == [3, 7], "the best stays"
    assert main([*common, "--exec", "echo boom >&2; exit 3", "--retries", "0"]) == 1
    printed = capsys.readouterr().out
    assert "version 7, step 3: exit code 3: boom" in printed
    assert "3 best" in printed
    assert main([*common, "--plot", str(tmp_path / "loss.png")]) == 1, "one has failed"
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "version", "step", "state", "loss", "seconds", "error",
    ]  # fmt: skip
    assert main(["watch", str(folder), "--metric", "los"]) == 1
    assert "no version has the metric 'los'" in capsys.readouterr().err
    other = ["watch", str(folder), "--metric", "loss", "--task", "other", "--timeout", "0"]
    assert main([*other, "--exec", "echo '{\"lose\": 1}'"]) == 1
    assert "lose 1, without 'loss' (" in capsys.readouterr().out
    assert main(["watch", str(folder)]) == 1
    assert capsys.readouterr().out.startswith("task   version"), "which task a row is of"
    assert main([*other, "--exec", "exit 3", "--task", "third", "--retries", "0"]) == 1
    assert "exit code 3 (" in capsys.readouterr().out
    for verb in (["watch", "--exec", "true"], ["board", "--serve", "0"]):
        assert main([*verb, str(folder / "version-000007")]) == 1
        assert "is one saved model. Name the folder that" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is one saved model"):
        follow(folder / "version-000007")
    assert main(["watch", str(tmp_path / "nothing")]) == 1
    assert "nothing was watched there yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*common, "--notify", "localhost:3000"])
    assert "must be an address like http" in capsys.readouterr().err


def test_what_a_command_prints(tmp_path: Path) -> None:
    """Numbers that no float holds and JSON without an end are no metrics, and end no watcher."""
    for line, metrics in {
        '{"loss": 1, "n": 1%s}' % ("0" * 400): {"loss": 1},
        '{"loss": 2}\n' + "[" * 100_000: {"loss": 2},
    }.items():
        (tmp_path / "printed").write_text(line)
        outcome = watch.run_shell("cat {path}", {"path": tmp_path / "printed"})
        assert outcome == ledger.Outcome(metrics), line[:20]


def test_names_in_braces_in_a_path(tmp_path: Path) -> None:
    """Only those of the command are replaced, not those of a folder's name."""
    folder = tmp_path / "{step} {version}"
    publish(folder, 1)
    version = open_version(folder / "version-000001")
    assert version is not None
    outcome = watch.run_command("test -d {path} && echo '{\"step\":' {step} '}' {}", version)
    version.release()
    assert outcome.error == ""


# --- servers -------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An inference server: it loads the folder that it is told, by SGLang's or vLLM's contract.

    Attributes:
        adapters: What is loaded by name. SGLang refuses a name that is taken.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.loaded: list[tuple[str, float]] = []
        self.asked: list[tuple[str, Any]] = []
        self.adapters: dict[str, float] = {}
        self.refusals = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        self.server.asked.append((self.path, body))
        if self.path == "/update_weights_from_disk":
            assert body.keys() == {"model_path", "weight_version"}
            self._load(body["model_path"], body["weight_version"])
        elif self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self._load(body["kwargs"]["weights_path"], "")
        elif self.path == "/no-server-of-http":
            self.wfile.write(b"nonsense\r\n\r\n")
        elif self.path == "/deep":
            self._answer(400, b"[" * 100_000)
        elif self.path.endswith("load_lora_adapter"):
            self._change_adapter(body["lora_name"], body)
        else:
            self._answer(200, b"")

    def _change_adapter(self, name: str, body: dict[str, Any]) -> None:
        adapters = self.server.adapters
        loads, vllm = "unload" not in self.path, self.path.startswith("/v1/")
        if (name in adapters) is loads and not (vllm and body.get("load_inplace")):
            message = f"LoRA with name {name} {'already exists' if loads else 'does not exist'}"
            self._answer(400, json.dumps({"success": False, "message": message}).encode())
        elif loads:
            adapters[name] = first_weight(body["lora_path"])
            # NOTE: vLLM answers with a sentence, SGLang with JSON.
            self._answer(200, b"Success: added." if vllm else b'{"success": true}')
        else:
            del adapters[name]
            self._answer(200, b'{"success": true}')

    def _load(self, path: str, version: str) -> None:
        if self.server.refusals:
            self.server.refusals -= 1
            message = "Failed to update weights: boom. Rolling back to original weights."
            self._answer(400, json.dumps({"success": False, "message": message}).encode())
            return
        self.server.loaded.append((version, float(load_file(path)["weight"][0, 0])))
        self._answer(200, b'{"success": true, "message": "Succeeded.", "results": [null]}')

    def _answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def first_weight(folder: Path | str) -> float:
    """Of an adapter: one element of its first matrix."""
    return float(load_file(folder)["base_model.model.0.lora_A.weight"][0, 0])


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_servers_are_notified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest version, each once; a refusal is retried; a rollback is reported."""
    folder = tmp_path / "published"
    publish(folder, 3)
    wanted = float(load_file(folder / "version-000003")["weight"][0, 0])
    with serving() as server:
        host = f"http://127.0.0.1:{server.server_address[1]}"
        sglang = ["watch", str(folder), "--notify", f"{host}/update_weights_from_disk"]
        server.refusals = 1
        assert main(sglang) == 0
        assert server.loaded == [("3", wanted)]
        assert len(server.asked) == 2, "refused once"
        assert main(sglang) == 0
        assert len(server.asked) == 2, "it has version 3 already"
        vllm = ["watch", str(folder), "--notify", f"{host}/collective_rpc"]
        assert main(vllm) == 0
        assert server.loaded[1:] == [("", wanted)]
        assert server.asked[3] == ("/reset_prefix_cache", {})
        publish(folder, 1)
        server.refusals = 3
        capsys.readouterr()
        assert main(sglang) == 1
        printed = capsys.readouterr().out
        assert "did not load version 4: HTTP 400" in printed
        assert "Rolling back to original weights" in printed
        other = ["watch", str(folder), "--notify", f"{host}/no-server-of-http", "--retries", "0"]
        assert main(other) == 1
        assert "no answer: nonsense" in capsys.readouterr().out
        other[3] = f"{host}/deep"
        assert main(other) == 1
        assert "did not load version 4: HTTP 400: [[[" in capsys.readouterr().out
    assert main([*vllm, "--retries", "0"]) == 1
    assert "no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "url", ["http://h/größe", "http://h/a b", "http://h:port/x", "http://[::1/x", "http://a..b/x"]
)
def test_addresses_that_cannot_be_sent(url: str) -> None:
    """They are refused before anything is watched."""
    with pytest.raises(ValueError, match="must be an address like http"):
        notify.refuse_address(url)


def test_a_lease_that_cannot_be_written(tmp_path: Path) -> None:
    """The error says why a reader writes, and where."""
    publish(tmp_path, 1)
    held = tmp_path / leases.LEASES
    if held.exists():
        held.rename(tmp_path / "moved")
    held.touch()
    with pytest.raises(OSError, match=r"a reader leaves a lease here.*\.leases"):
        open_version(tmp_path / "version-000001")
