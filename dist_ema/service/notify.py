"""`notify`: an inference server (SGLang, vLLM) is told, in its own terms, of a version. No torch.

SGLang takes {"model_path", "weight_version"} at /update_weights_from_disk, and answers with
"success" and a "message". vLLM takes {"method": "reload_weights", "kwargs": {"weights_path"}} at
/collective_rpc, and its cached prefixes are dropped after it by /reset_prefix_cache.

Adapters go to SGLang's /load_lora_adapter or vLLM's /v1/load_lora_adapter under one name, so that
requests need not change. vLLM replaces an adapter of that name in place. SGLang refuses a name that
is taken, so the adapter before is unloaded first.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

from ..text import printable
from . import follow, ledger

__all__ = ["notify", "refuse_address"]

VLLM = "/collective_rpc"
ADAPTER = "/load_lora_adapter"


def refuse_address(url: str) -> None:
    """Raise ValueError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        # Both raise where http.client would, once a version is there.
        is_sent = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        is_sent = False
    if not (is_sent and parts.scheme in ("http", "https") and re.fullmatch("[!-~]*", parts.path)):
        raise ValueError(
            f"must be an address like http://host:30000/update_weights_from_disk, got {url!r}."
        )


def notify(url: str, version: follow.Version, timeout: float = 600.0) -> ledger.Outcome:
    """Have a server load a version, and wait until it has.

    Args:
        url: The URL of the server's call. One that ends in /collective_rpc is vLLM's, and one that
            ends in /load_lora_adapter takes adapters, as "ema" or as its ?lora_name= says.
        version: What to load. The server must see the same path.
        timeout: Seconds for the server to answer.

    Returns:
        The outcome, whose error holds what the server answered.
    """
    path = str(version.path.absolute())
    parts = urlsplit(url)
    takes_adapters = parts.path.endswith(ADAPTER)
    if takes_adapters != (version.path / "adapter_config.json").exists():
        content = "no adapter" if takes_adapters else "an adapter"
        return ledger.Outcome(
            error=f"version {version.number} is {content}, and adapters go to {ADAPTER} alone, got "
            f"{url}"
        )
    calls: dict[str, dict[str, Any]]
    if takes_adapters:
        name = parse_qs(parts.query).get("lora_name", ["ema"])[0]
        call = url.partition("?")[0]
        calls = {call: {"lora_name": name, "lora_path": path}}
        if parts.path.endswith("/v1" + ADAPTER):
            calls[call]["load_inplace"] = True
        else:
            # NOTE: a server that was restarted has no adapter to unload, so failing is no error.
            _post(call.replace(ADAPTER, "/unload_lora_adapter"), {"lora_name": name}, timeout)
    elif parts.path.endswith(VLLM):
        # NOTE: cached prefixes are of the weights before.
        calls = {
            url: {"method": "reload_weights", "kwargs": {"weights_path": path}},
            url.replace(VLLM, "/reset_prefix_cache"): {},
        }
    else:
        calls = {url: {"model_path": path, "weight_version": str(version.number)}}
    for to, body in calls.items():
        if error := _post(to, body, timeout):
            return ledger.Outcome(error=f"{url} did not load version {version.number}: {error}")
    return ledger.Outcome()


def _post(url: str, body: dict[str, Any], timeout: float) -> str:
    """Returns what went wrong."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        try:
            with urlopen(Request(url, data, headers), timeout=timeout) as answer:
                text = answer.read(1 << 20).decode(errors="replace")
        except HTTPError as error:  # an answer too: its body says why
            text = error.read(1 << 20).decode(errors="replace")
            return f"HTTP {error.code}: {_message(text)}"
    # HTTPException: an answer is cut short. UnicodeError: the query is not ASCII.
    except (OSError, HTTPException, UnicodeError) as error:
        return f"no answer: {error}"
    try:
        failed = json.loads(text).get("success") is False
    except (AttributeError, RecursionError, ValueError):  # an empty answer of vLLM
        failed = False
    return _message(text) if failed else ""


def _message(text: str) -> str:
    with suppress(KeyError, RecursionError, TypeError, ValueError):
        text = str(json.loads(text)["message"])
    return printable(text)[:500]
