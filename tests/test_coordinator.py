"""Checking in: what it costs, who is named, who is waited for, and that an error anywhere is an
error everywhere.

How to read a failure: up to 64 ranks are threads on one HashStore, each with a real `Board`;
`spread` returns what each rank returned or raised. Real processes follow at the end, each verb of
EMA with a rank that is late, elsewhere, or dead.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA
from dist_ema.averaging.swap import WeightSwap
from dist_ema.checkpoint import location
from dist_ema.distributed import coordinator, messages, waiting
from dist_ema.distributed.connections import Connections
from dist_ema.distributed.coordinator import StoreCoordinator
from dist_ema.distributed.diagnosis import Exchange, digest
from dist_ema.distributed.ranks import Ranks
from dist_ema.sharding import ownership, torch_internals
from tests._models import Net
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

FOREVER = 1e9


class Counted:
    """A store that notes every call of this rank but the looks of one that waits: (operation, key),
    and the bytes that were read.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store, self.calls, self.read = store, list[tuple[str, str]](), 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(key: Any, *args: Any) -> Any:
            result = getattr(self._store, name)(key, *args)
            looks = name == "check" or args == (0,) or (name == "get" and key.endswith("/count"))
            if not looks:
                self.calls.append((name, str(key)))
                values = result if isinstance(result, list) else [result]
                self.read += sum(len(value) for value in values if isinstance(value, bytes))
            return result

        return call


class World:
    """`size` boards on one store, and threads to use them."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.store = dist.HashStore()
        self.counted = [Counted(self.store) for _ in range(size)]
        self.boards = [
            StoreCoordinator(store, range(10, 10 + size), i, timeout)
            for i, store in enumerate(self.counted)
        ]  # type: ignore[arg-type]

    def spread(self, work: Callable[[StoreCoordinator], Any]) -> list[Any]:
        """Do it on all ranks at once. Returns what each returned or raised."""
        results: list[Any] = [None] * len(self.boards)

        def one(i: int) -> None:
            try:
                results[i] = work(self.boards[i])
            except BaseException as error:
                results[i] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(self.boards))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for counted in self.counted:
            counted.seen, counted.calls = counted.calls, []  # type: ignore[attr-defined]
        return results

    def operations(self) -> Counter[str]:
        """By all ranks, in the last `spread`."""
        return Counter(name for counted in self.counted for name, _ in counted.seen)  # type: ignore[attr-defined]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming who is missing needs no two seconds among threads."""
    monkeypatch.setattr(waiting, "GRACE", 0.6)


# --- what it costs --------------------------------------------------------------------------------


def test_entering_costs_one_operation_per_rank() -> None:
    """64 ranks enter: each adds to one counter. No rank reads names, and none publishes."""
    world = World(64)

    def enter(board: StoreCoordinator) -> Any:
        board.begin("save")
        return board.run_on_all("save", lambda: board.rank)

    assert world.spread(enter) == list(range(64))
    assert world.operations() == {"add": 64}
    world.spread(enter)
    assert world.operations() == {"add": 64, "delete_key": 1}, "the one before is forgotten"
    assert (
        world.spread(lambda board: board.count_on_all("save", lambda: board.rank > 9)) == [54] * 64
    )


@pytest.mark.parametrize("size", [8, 64, 512])
def test_values_are_combined_on_the_way(size: int) -> None:
    """No rank reads more than FAN_IN messages and the answer, whatever the number of ranks."""
    world = World(size)

    def add_up(board: StoreCoordinator) -> Any:
        return board.run_and_reduce("save", lambda: board.rank, sum, lambda total: total + 1)

    total = sum(range(size)) + 1
    for _ in range(2):
        assert world.spread(add_up) == [(rank, total) for rank in range(size)]
        for counted in world.counted:
            assert len(counted.seen) <= 7, counted.seen  # type: ignore[attr-defined]
        assert world.operations()["get"] == size - 1
    assert max(counted.read for counted in world.counted) <= 2 * 600
    assert (
        world.spread(lambda board: board.run_on_first("save", lambda: {"by": board.rank}))
        == [{"by": 0}] * size
    )
    assert world.operations()["get"] == size - 1


def test_messages_of_all_in_their_order() -> None:
    world = World(9)
    found = world.spread(lambda board: board.gather("EMA", str(board.rank), "".join))
    assert found == ["012345678"] * 9
    assert max(counted.read for counted in world.counted[1:]) < 100, "the first rank reads them"


def test_is_same() -> None:
    """Guards the name of the exchange in the keys: what was said before does not count."""
    world = World(6)
    for odd in ({}, {4: "b"}, {0: "b", 1: "b", 2: "b", 3: "b", 4: "b", 5: "b"}):

        def work(board: StoreCoordinator, odd: dict[int, str] = odd) -> bool:
            return board.is_same("weights", odd.get(board.rank, "a"))

        same = world.spread(lambda board: board.count_on_all("EMA", lambda: work(board)))
        assert same == [6 if len(odd) != 1 else same[0]] * 6
        assert (same[0] < 6) == (len(odd) == 1)


def test_no_keys_stay() -> None:
    world = World(5)

    def many(board: StoreCoordinator) -> list[Any]:
        found = []
        for i in range(50):
            board.begin("save")
            board.run_on_all("save", lambda: board.is_same("it", 3))
            found.append(board.run_and_reduce("save", lambda: [board.rank], _joined)[1])
            found.append(board.run_on_first("save", lambda i=i: i))  # type: ignore[misc]
        return found

    everyone = list(range(5))
    found = world.spread(many)
    assert all(sorted(each) == everyone for each in found[0][::2])
    assert found == [found[0]] * 5
    assert found[0][1::2] == list(range(50))
    assert world.store.num_keys() < 14


def _joined(lists: list[list[int]]) -> list[int]:
    return [value for each in lists for value in each]


def test_a_world_of_one_needs_no_store() -> None:
    board = StoreCoordinator(None, [0], 0)
    assert board.run_and_reduce("save", lambda: 3, sum, str) == (3, "3")
    assert board.gather("save", 3, list) == [3]
    assert board.run_on_all("save", lambda: 4) == 4
    assert board.count_on_all("save", lambda: True) == 1
    assert board.run_on_first("save", lambda: 5) == 5
    for verb in (board.run_on_all, board.run_on_first):
        with pytest.raises(ZeroDivisionError):
            verb("save", lambda: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        board.run_on_all("save", interrupt)


def interrupt() -> None:
    raise KeyboardInterrupt


def save(board: StoreCoordinator) -> None:
    board.run_on_all("save", lambda: None)


def total(board: StoreCoordinator, verb: str) -> int:
    """The number of ranks, combined on the way."""
    return board.run_and_reduce(verb, lambda: 1, sum)[1]  # type: ignore[no-any-return]


# --- an error on one is an error on all -----------------------------------------------------------


def test_errors_are_told() -> None:
    """The rank itself raises what happened, the others whose error it was; then all are in step
    again.
    """
    world = World(6)

    def fail(board: StoreCoordinator) -> None:
        board.run_on_all("save", lambda: 1 / (board.rank - 4))

    found = world.spread(fail)
    assert isinstance(found[4], ZeroDivisionError)
    others = {str(error) for i, error in enumerate(found) if i != 4}
    assert others == {"ema.save() failed on rank 14: ZeroDivisionError: division by zero"}
    found = world.spread(lambda board: board.run_on_first("load", lambda: [][0]))
    assert isinstance(found[0], IndexError)
    assert "ema.load() failed on rank 10: IndexError: list index" in str(found[1])
    assert world.spread(lambda board: total(board, "gather")) == [6] * 6


def test_an_interrupt_is_told_and_waits_for_nobody() -> None:
    """Ctrl-C inside a verb: that rank leaves at once, also where nobody else has come; the others
    do not time out.
    """
    world = World(3)

    def work(board: StoreCoordinator) -> None:
        if board.rank != 1:
            world.boards[1].left.wait()  # type: ignore[attr-defined]
        board.run_on_all("save", interrupt if board.rank == 1 else lambda: None)

    def leave(board: StoreCoordinator) -> None:
        try:
            work(board)
        finally:
            world.boards[1].left.set()  # type: ignore[attr-defined]

    world.boards[1].left = threading.Event()  # type: ignore[attr-defined]
    found = world.spread(leave)
    assert isinstance(found[1], KeyboardInterrupt)
    assert str(found[0]) == str(found[2]) == "ema.save() failed on rank 11: KeyboardInterrupt: "


def test_an_interrupt_while_heartbeats_begin_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or this rank would seem to be at work for ever, and the others would wait."""
    start, begun = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.append(thread)
        interrupt()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        StoreCoordinator(dist.HashStore(), [0, 1], 0).heartbeats(),
    ):
        pass
    assert [thread.is_alive() for thread in begun] == [False]


@pytest.mark.parametrize("line", range(25))
def test_an_interrupt_while_an_exchange_begins_is_told(line: int) -> None:
    """At each line until it is counted: it is told where the other rank is, not where it was."""
    world, lines, gone_on = World(2, timeout=20), iter(range(25)), threading.Event()

    def trace(frame: Any, event: str, _: Any) -> Any:
        is_there = frame.f_code.co_filename in (coordinator.__file__, waiting.__file__)
        if event == "line" and is_there and next(lines, None) == line:
            raise KeyboardInterrupt
        return trace

    def work(board: StoreCoordinator) -> None:
        with board.entering("save"):
            save(board)
            if board.rank == 0:
                gone_on.set()
            elif gone_on.wait():
                sys.settrace(trace)
            total(board, "save")

    found = world.spread(work)
    assert isinstance(found[1], KeyboardInterrupt)
    assert str(found[0]) == "ema.save() failed on rank 11: KeyboardInterrupt: "
    assert world.spread(lambda board: total(board, "gather")) == [2, 2]


def test_an_interrupt_is_told_once() -> None:
    """The other rank is counted just then, and has not taken itself back when this one looks."""
    world, published, counted = World(2), threading.Event(), threading.Event()
    late, early = world.boards
    publish, add, look = early.messages.publish, late.messages.add, early.messages.counted

    def look_first(exchange: Exchange) -> messages.CounterState:
        early.messages.counted = look  # type: ignore[method-assign]
        raise KeyboardInterrupt

    def publish_and_meet(*args: Any) -> Any:
        answer = publish(*args)
        published.set()
        counted.wait()
        return answer

    def add_slowly(exchange: Exchange, n: int) -> messages.CounterState:
        count = add(exchange, n)
        counted.set()
        time.sleep(0.2)
        return count

    def work(board: StoreCoordinator) -> None:
        with board.entering("save"):
            if board is late:
                published.wait()
            save(board)

    early.messages.publish, late.messages.add = publish_and_meet, add_slowly  # type: ignore[method-assign]
    early.messages.counted = look_first  # type: ignore[method-assign]
    found = world.spread(work)
    assert isinstance(found[1], KeyboardInterrupt)
    assert str(found[0]) == "ema.save() failed on rank 11: KeyboardInterrupt: "
    assert world.spread(lambda board: total(board, "gather")) == [2, 2]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_different_verbs_at_once(order: list[int]) -> None:
    """Not by a timeout, which says something else: whoever comes to the wrong verb sees it in the
    counter. Both verbs and a rank of each are named, and the same sentence is raised everywhere.
    """
    world = World(4, timeout=30)
    turns = [threading.Event() for _ in range(5)]
    turns[0].set()

    def call(board: StoreCoordinator) -> None:
        turns[order.index(board.rank)].wait()
        threading.Timer(0.05, turns[order.index(board.rank) + 1].set).start()
        verb = "gather" if board.rank == 2 else "save"
        board.begin(verb)
        board.run_on_all(verb, lambda: None)

    found = {str(error) for error in world.spread(call)}
    assert len(found) == 1
    text = found.pop()
    assert "rank 12 is in ema.gather()" in text or "rank 12 in ema.gather()" in text
    assert "in ema.save()" in text
    assert "in the same order" in text
    assert world.spread(lambda board: total(board, "load")) == [4] * 4, "in step again"


def test_the_same_verb_begun_anew() -> None:
    """A rank that left a verb alone and calls it again does not meet the middle of it."""
    world = World(2, timeout=30)
    world.spread(lambda board: board.run_on_all("save", lambda: None))

    def call(board: StoreCoordinator) -> None:
        if board.rank == 1:
            board.begin("save")
        board.run_on_all("save", lambda: None)

    assert "rank 10 is in step 1 of ema.save() and rank 11 in ema.save()" in str(
        world.spread(call)[0]
    )


def test_the_first_rank_decides_something_else() -> None:
    world = World(2, timeout=30)
    found = world.spread(lambda b: b.run_on_first("load", lambda: 1) if b.rank == 0 else save(b))
    assert found[0] == 1
    assert "rank 10 is in ema.load() and rank 11 in ema.save()" in str(found[1])


def test_all_wait_for_different_things(quick: None) -> None:
    """Nobody is missing, and nobody can go on: the timeout says where they are."""
    world = World(2, timeout=0.4)
    found = world.spread(lambda b: save(b) if b.rank == 0 else b.run_on_first("load", lambda: 1))
    assert [
        "rank 10 is in ema.save() and rank 11 in ema.load()" in str(error) for error in found
    ] == [True, True]


# --- who is missing -------------------------------------------------------------------------------


def test_the_missing_are_named(quick: None) -> None:
    """By those who wait, on all of them, and by the late ones when they come; whoever came just in
    time is not named.
    """
    world = World(5, timeout=0.6)
    given_up = threading.Event()

    def call(board: StoreCoordinator) -> None:
        if board.rank in (0, 3):
            given_up.wait()
        if board.rank == 4:
            time.sleep(0.5)
        try:
            board.run_on_all("save", lambda: None)
        finally:
            given_up.set()

    found = {str(error) for error in world.spread(call)}
    assert found == {"ema.save() is collective, and ranks 10, 13 did not enter it within 0.6 s."}
    assert world.spread(lambda board: total(board, "load")) == [5] * 5, "in step again"


def test_a_slow_rank_is_waited_for(quick: None) -> None:
    """[Note: heartbeat]: work of four times the timeout, in every verb and in a block."""
    world = World(3, timeout=0.2)

    def work(board: StoreCoordinator) -> Any:
        board.run_on_all("save", lambda: time.sleep(0.8) if board.rank == 1 else None)
        if board.rank == 2:
            with board.heartbeats():
                time.sleep(0.8)
        board.run_on_all("save", lambda: None)
        return board.run_on_first("save", lambda: time.sleep(0.8) or 7)

    assert world.spread(work) == [7] * 3


def test_a_dead_rank_is_named(quick: None) -> None:
    """Inside a verb the sentence is another one: it did enter."""
    world = World(3, timeout=0.4)

    def work(board: StoreCoordinator) -> None:
        board.run_on_all("save", lambda: None)
        if board.rank != 1:
            board.run_on_all("save", lambda: None)

    found = world.spread(work)
    assert found[1] is None
    assert (
        str(found[0])
        == str(found[2])
        == "ema.save(): rank 11 gave no sign of life for 0.4 s. Dead, or hung?"
    )
    world = World(3, timeout=0.4)
    found = world.spread(
        lambda board: board.run_on_first("save", lambda: 1) if board.rank else None
    )
    assert "rank 10 did not enter it" in str(found[1]), "the one who decides"


@pytest.mark.parametrize("transfers", [False, True])
def test_a_rank_that_dies_while_it_answers_costs_one_timeout(quick: None, transfers: bool) -> None:
    """Its answer holds. Guards that what comes next does not wait for the timeout again."""
    world = World(2, timeout=0.4)
    exchange = Exchange(0, "save", 0, digest([]))
    world.store.set("0/answer", json.dumps({"exchange": exchange, "value": 7}))

    def work(board: StoreCoordinator) -> Any:
        board.begin("save")
        if board.rank == 1:
            answer = board.run_on_first("save", lambda: 0)
            board.timeout = FOREVER

            def wait_for_bytes() -> None:
                began = time.monotonic()
                while True:
                    board.refuse_ended_transfer(began)
                    time.sleep(0.01)

            if transfers:
                with raises(RuntimeError, "rank 10 sent and took no bytes"):
                    board.run_transfer("save", wait_for_bytes)
            else:
                with raises(RuntimeError, "rank 10 gave no sign of life"):
                    board.run_on_all("save", lambda: None)
            return answer
        return None

    assert world.spread(work) == [None, 7]


def run_beside(board: StoreCoordinator) -> list[Any]:
    """What `save` on this board returns or raises, once it has."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(save(board))
        except RuntimeError as error:
            found.append(str(error))

    threading.Thread(target=run, daemon=True).start()
    return found


def wait_until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it waits for ever"
        time.sleep(0.01)


def test_a_rank_that_comes_while_it_is_named(quick: None) -> None:
    """The answer is too late, and both go on. Guards that it is not counted once more."""
    world = World(2, timeout=0.4)
    late, early = world.boards
    others: list[list[Any]] = []
    silence = early.messages.silence

    def silence_and_come(exchange: Exchange, timeout: float) -> str:
        text = silence(exchange, timeout)
        others.append(run_beside(late))
        wait_until(lambda: early.messages.counted(exchange).ranks == 2)
        return text

    early.messages.silence = silence_and_come  # type: ignore[method-assign]
    found = run_beside(early)
    wait_until(lambda: found)
    assert [found, *others] == [[None], [None]]


def test_a_rank_that_dies_before_it_takes_its_count_back(quick: None) -> None:
    """The last rank came after the answer, or the answer after it: the one who sees that died."""
    world = World(2, timeout=0.4)
    dead, alive = world.boards
    exchange = Exchange(0, "save", 0, digest([]))
    world.store.set("0/answer", json.dumps({"error": "the answer"}))
    own = 1 + exchange.code(2) * messages.CODE
    dead.messages.add(exchange, own + messages.ANSWERED)
    alive.messages.count = lambda *_: alive.messages.add(exchange, own)  # type: ignore[method-assign, assignment]
    found = run_beside(alive)
    wait_until(lambda: found)
    assert found == ["the answer"]


def test_the_one_who_speaks_may_die_too(quick: None) -> None:
    """The first rank that waits too long names the missing; if it is gone by then, another one
    does, and names it too.
    """
    world = World(3, timeout=0.4)
    world.store.set("0/speaker", "0")
    found = world.spread(lambda board: save(board) if board.rank == 1 else None)
    assert "ranks 10, 12 did not enter it" in str(found[1])


def test_leaving_waits_and_says_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line every so often, from one rank, names who is awaited while it shows signs of life."""
    monkeypatch.setattr(waiting, "FIRST_REMINDER", 0.2)
    monkeypatch.setattr(waiting, "REMIND", 0.2)
    monkeypatch.setattr(waiting, "POLL", 0.1)
    world = World(4, timeout=0.4)

    def leave(board: StoreCoordinator) -> int:
        with board.heartbeats():
            time.sleep(1.2 if board.rank in (1, 3) else 0.0)
        return total(board, "swap")  # type: ignore[no-any-return]

    with caplog.at_level(logging.WARNING, "dist_ema"):
        assert world.spread(leave) == [4] * 4
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 6, lines
    assert all(
        line.startswith("ema.swap() has waited ") and line.endswith(" s for ranks 11, 13")
        for line in lines
    )


SERVER = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True)
print(store.port, flush=True)
time.sleep(99)
"""


def test_the_store_may_die() -> None:
    """With the process that holds it: said as that, and not after the timeout."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server, server.stdout:
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), None, False)
        threading.Timer(0.3, server.kill).start()
        with pytest.raises(
            RuntimeError,
            match=r"the key-value store of the process group is gone or .* did .*rank 0",
        ):
            StoreCoordinator(store, [0, 1], 1, FOREVER).run_on_all("save", lambda: time.sleep(1.5))


# --- every verb -----------------------------------------------------------------------------------


def verbs(ema: EMA, other: nn.Module, folder: str) -> dict[str, Callable[[], Any]]:
    """Every collective verb, each once."""

    def swap() -> None:
        with ema.swap():
            pass

    state = ema.state_dict()
    return {
        "swap": swap,
        "gather": ema.gather,
        "copy_to": lambda: ema.copy_to(other),
        "save": lambda: ema.save(f"{folder}/out"),
        "export": lambda: ema.export(f"{folder}/export"),
        "load": lambda: ema.load(f"{folder}/kept"),
        "reset": ema.reset,
        "rescan": ema.rescan,
        "metrics": lambda: ema.metrics(distance=True),
        "load_state_dict": lambda: ema.load_state_dict(state),
    }


def late_failing_elsewhere(kind: str, folder: str) -> None:
    """Each verb: one rank does not come; one rank fails; the ranks come to different verbs.

    Then all goes on.
    """
    mine = dist.get_rank() == 1
    model, other = wrap(kind, Net()), wrap(kind, Net())
    ema = EMA(model, 0.5)
    ema.save(f"{folder}/kept")
    calls = verbs(ema, other, folder)
    grace, ema.timeout, waiting.GRACE = waiting.GRACE, 0.2, 0.1
    for verb, call in calls.items():
        if mine:
            dist.barrier()
        with raises(
            RuntimeError, f"ema.{verb}() is collective, and rank 1 did not enter it within 0.2 s"
        ):
            call()
        if not mine:
            dist.barrier()
    ema.timeout, waiting.GRACE = FOREVER, grace
    ready = ema.weights.settle
    for verb, call in calls.items():
        if mine:
            ema.weights.settle = missing_file  # type: ignore[method-assign]
        with raises(
            OSError if mine else RuntimeError,
            "lost",
            *([] if mine else [f"ema.{verb}() failed on rank 1: OSError"]),
        ):
            call()
        ema.weights.settle = ready  # type: ignore[method-assign]
    parts = ownership.saved_blocks
    for verb in ("gather", "copy_to"):  # after entering, and before anything is sent
        ownership.saved_blocks = (lambda *_: missing_file()) if mine else parts  # type: ignore[assignment]
        with raises(OSError if mine else RuntimeError, "lost"):
            calls[verb]()
    ownership.saved_blocks = parts
    with raises(
        OSError if mine else RuntimeError, "lost", *([] if mine else ["EMA(...) failed on rank 1"])
    ):
        EMA(model, 0.5, only=lambda _: bool(missing_file()) if mine else True)
    names = list(calls)
    for one, two in zip(names, [*names[1:], names[0]], strict=True):
        with raises(RuntimeError, f"rank 0 is in ema.{one}() and rank 1 in ema.{two}()"):
            calls[two if mine else one]()
    for call in calls.values():
        call()


def missing_file() -> None:
    raise OSError("lost")


def different_averages() -> None:
    """which= must mean one average on all ranks, and one that there is."""
    ema = EMA(wrap("ddp", Net()), [0.5, 0.75])
    with raises(ValueError, "'Constant(decay=0.5)' on rank 0 and 'Constant(decay=0.75)' on rank 1"):
        ema.gather(dist.get_rank())
    with raises(ValueError, "there is no average 7"):
        ema.gather(7)
    ema.gather(1)


def first_rank_late() -> None:
    """The id of a new EMA does not arrive: who waits for it says so in time, and the next EMA
    works.
    """
    rank, store = dist.get_rank(), torch_internals.side_store("late")
    model = wrap("ddp", Net())
    if rank == 0:
        store.wait(["given up"])
        with raises(RuntimeError, "EMA(...) is collective, and rank 1 did not enter it within 0.4"):
            EMA(model, 0.5, timeout=0.4)
    else:
        with raises(RuntimeError, "EMA(...) is collective, and rank 0 did not come within 0.4 s"):
            EMA(model, 0.5, timeout=0.4)
        store.set("given up", "")
    EMA(model, 0.5).gather()


def first_file_of_an_unwrapped_model() -> None:
    """The ranks of the job meet in the first verb that writes: its error names that one."""
    rank, store = dist.get_rank(), torch_internals.side_store("first file")
    ema = EMA(nn.Linear(2, 2), 0.5, timeout=0.4)
    if rank == 0:
        with raises(RuntimeError, "ema.save() is collective, and rank 1 did not come within 0.4 s"):
            ema.save("nowhere")
        store.set("given up", "")
    else:
        store.wait(["given up"])
        with raises(RuntimeError, "ema.save() is collective, and rank 0 did not enter it"):
            ema.save("nowhere")  # takes the first rank's part in the process group


def two_attempts() -> None:
    """What a killed attempt left in the store is not read by the next ([Note: incarnations])."""
    rank, answers = dist.get_rank(), []
    for attempt in (1, 2):
        for _ in range(2):  # as of an EMA and its writer
            ranks = Ranks([0, 1], None, torch_internals.side_store, 20.0)
            if attempt == 2:
                time.sleep(0.0 if rank == 1 else 0.3)  # rank 1 reads before rank 0 has written
                answers.append(ranks.run_on_first("load", lambda: "new"))
                answers.append(ranks.gather("load", rank, list))
            elif rank == 0:  # rank 1 is killed before it reads
                ranks.run_on_first("load", lambda: "old")
        dist.barrier()
    assert answers == ["new", [0, 1]] * 2


def two_threads() -> None:
    """A verb beside another one is refused: the ranks would take one for the other."""
    ema, errors = EMA(wrap("ddp", Net()), 0.5, timeout=np.float32(5)), list[str]()

    def gather() -> None:
        try:
            ema.gather()
        except RuntimeError as error:
            errors.append(str(error))

    def beside() -> None:
        thread = threading.Thread(target=gather)
        thread.start()
        thread.join()

    with ema.swap():
        beside()
    (text,) = errors
    assert text.startswith("ema.gather() was called while ema.swap() runs in another thread")
    beside()
    assert len(errors) == 1


def group_destroyed(folder: str) -> None:
    """Files and `gather` travel over TCP; what is sent over the group is refused by name."""
    ema = EMA(wrap("ddp", Net()), 0.5)
    dist.destroy_process_group()
    weights = ema.gather()
    ema.save(f"{folder}/destroyed", wait=False)
    ema.load(f"{folder}/destroyed")
    assert weights.keys() == ema.gather().keys()
    with raises(RuntimeError, "ema.tensors() needs the process group", "was destroyed"):
        list(ema.tensors())
    with raises(RuntimeError, "ema.copy_to() needs the process group", "was destroyed"):
        ema.copy_to(Net())


def together(folder: str) -> None:
    for kind in ("ddp", "fsdp2"):
        late_failing_elsewhere(kind, f"{folder}/{kind}")
    different_averages()
    first_rank_late()
    first_file_of_an_unwrapped_model()
    two_attempts()
    two_threads()
    group_destroyed(folder)


DEATHS: dict[str, tuple[int, Any, str]] = {
    "swap": (1, WeightSwap, "apply"),
    "gather": (1, Connections, "send"),
    "load": (0, location, "locate"),
}


def die(folder: str) -> Any:
    """Each pair of ranks has a verb in which one of the two dies; what the other one raises, and
    whether its model is as it was.
    """
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(len(DEATHS))]
    verb = list(DEATHS)[dist.get_rank() // 2]
    victim, place, name = DEATHS[verb]
    folder = f"{folder}/{verb}"
    model = nn.parallel.DistributedDataParallel(Net(), process_group=pairs[dist.get_rank() // 2])
    ema = EMA(model, 0.5)
    ema.save(f"{folder}/kept")
    ema.timeout, waiting.GRACE = 2.0, 0.2
    before = [p.detach().clone() for p in model.parameters()]
    dist.barrier()
    if dist.get_rank() % 2 == victim:
        assert hasattr(place, name)
        setattr(place, name, lambda *_, **__: os._exit(0))
    try:
        verbs(ema, model, folder)[verb]()
    except RuntimeError as error:
        return (
            verb,
            str(error),
            all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)),
        )
    raise AssertionError(f"{verb} passed without its other rank")


@pytest.mark.multirank
def test_verbs_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, together, str(tmp_path))


@pytest.mark.multirank
def test_a_rank_that_dies_inside(tmp_path: Path) -> None:
    """The survivor raises within the timeout, says who, and what it lent is taken back."""
    found = [
        each for each in run_ranks(2 * len(DEATHS), die, str(tmp_path), allow_dead=True) if each
    ]
    assert [verb for verb, _, _ in found] == list(DEATHS)
    assert all(intact for _, _, intact in found)
    for (verb, text, _), (victim, _, _), i in zip(found, DEATHS.values(), range(9), strict=False):
        if verb != "gather":  # there it is the other end of a send that is gone
            assert f"ema.{verb}(): rank {2 * i + victim} gave no sign of life for 2 s" in text, text
