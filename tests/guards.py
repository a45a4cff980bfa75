"""Every guard of a living model deleted once: each must turn a seed or a test red.

    python -m tests.guards                         all of them, two at a time
    python -m tests.guards averages adopt          those whose line has all of these words
    python -m tests.guards --record FILE           keep in a file which checks reach which guards

GUARDS has a line for each, under its file: a function ("_": any) and a text. The smallest statement
of the function that contains the text is deleted in a copy of the project, or the text is replaced
by what follows "=>". Every other statement of ROOMS that raises or warns is a guard too.

First every check runs in a copy whose guards tell that they are reached. Then each guard is
deleted, and only the checks that reach it run: seeds of `tests.host_programs`, tests of the files
after "@", the others, the quick ones first. The check that turns red must be green with the guard.

How to read a failure: a guard that stays GREEN has no test, or is dead code. One that is GONE was
moved or written otherwise; then its line here moves too. DOUBTFUL is a red of the deletion itself
(a name that is missing then, a hang) or one that comes and goes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch.distributed.fsdp  # noqa: F401

__all__ = ["GUARDS", "Guard", "guards"]

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-q", "-n", "0", "-p", "no:cacheprovider", "--timeout", "120", "-rN", "--tb", "short"]
LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND
FEW = 10  # seeds, and tests, that run first
BAD = ("GREEN", "GONE", "DOUBTFUL")
DOUBTFUL = re.compile(r"(Name|UnboundLocal|Syntax|Indentation|Import)Error|Timeout|it hung|^in ")
# Beside the files that the lines of guards name.
TESTS = (
    *("living_storages", "living_tree", "living_swap", "living_buffers", "living_guards"),
    *("living_optimizers", "living_caches", "living_subclasses", "living_texts"),
    *("into", "swap", "several", "parameters", "consistency", "publish", "average", "batchnorm"),
)
ROOMS = ("dist_ema/averaging", "dist_ema/sharding", "dist_ema/verbs")

GUARDS = """
averaging/averages.py
    adopt             self._rebind()
    adopt             refuse_shared(
    adopt             self.swaps.watch
    adopt             self.mark()  @optimizer_hooks,engines,metrics
    _replan           self.teacher.adopt
    _replan           further = self.teacher.addressed
    _replan           roots.append
    _replan           roots = []  @living_ranks
    refuse            inside ema.swap()  @swap
    refuse            inside the swap of another  @living_guards,reliability
    refuse            reads & Reads.LIVE and => False and  @living_guards,swap
    refuse            reads & Reads.WHOLE_MODEL and => False and  @living_guards,swap
    refuse            {why}  @swap,discovery
    refuse            ema.swap() that failed  @swap_faults
    ready             self.reshard()  @swap
    ready             self.settle()
    ready             self.follow
    ready             self.teacher.copy_frozen()  @into
    ready             self.copy_live()  @optimizer_hooks
    settle            end_read()  @emulated
    settle            self._await_teacher_reads()  @emulated
    follow            self.adopt
    follow            self._rebind()
    follow            refuse_shared
    follow            self._replan()
    _rebind           self._inventory.rebind_moved()
    _rebind           self.teacher.follow
    before_step       self.refuse  @swap
    before_step       {', '.join(written  @emulated
    before_step       is_stale |=  @into
    begin             self.follow
    move              number < 2 or =>
    move              or self._watch.changed() =>
    move              refuse_unfrozen  @living_ranks
    move              self.follow
    move              self._watch.begin_read()  @emulated
    move_by           self.refuse  @living_storages
    move_by           self.settle  @compat_modules
    move_by           self.follow  @living_storages
    note_swap         self.mark()  @optimizer_hooks,engines
    pull              self.mark()  @living_storages
    pull              self.ready()  @living_storages
    set_clock         self.mark()  @optimizer_hooks
    resume            self.forget_mark()  @optimizer_hooks,reader
    copy_live         self.teacher.forget_copies()  @into
    _after_move       copy_frozen  @into
    _after_move       copy_buffers  @into
averaging/inventory.py
    walk_tree         no longer shares memory
    walk_tree         changes.replaced_buffers) => ())  @living_buffers,living_tree
    _refuse_replaced  of the teacher is another object  @into
    walk_tree         is gone from the model  @living_tree,reliability
    walk_tree         changes.gone_buffers) => ())  @living_buffers,living_tree
    walk_tree         is tied otherwise  @living_tree
    walk_tree         is new and trainable  @living_storages
    walk_tree         adopted + changes.replaced_buffers + changes.gone_buffers => ()  @living_tree
    walk_tree         self.refuse_unfrozen()  @living_tree,discovery
    rebind_moved      or state.layout_changed =>
    rebind_moved      forget_reshaped_buffers  @living_buffers
    refuse_unfrozen   became trainable  @living_tree
    adopt             self._refuse_hopeless  @discovery
    adopt             forget_buffers  @living_buffers,living_tree
    _refuse_hopeless  is not dense  @discovery
    _refuse_hopeless  float8 cannot  @discovery
    _held_alike       and old.shape == new.shape and not alike => and False  @living_tree
    _held_alike       or old.kind == new.kind == "buffer" =>  @living_buffers,living_tree
    _kept             (shard.name, *shard.aliases) => (shard.name,)  @living_tree
averaging/storage_watch.py
    changed           True in [tensor.requires_grad for tensor in self._frozen] or =>  @living_tree
    trained_unseen    and now[1] == before[1] =>  @optimizer_hooks,engines,metrics
    trained_unseen    now[0] != before[0] => False  @optimizer_hooks,engines,metrics
averaging/storage_watch.py
    refuse_shared     in the memory of the average
    refuse_shared     and their
    agrees            return self.state.live.data_ptr()  @into
sharding/memory_watch.py
    changed           self._table.differs() => False  @memory_watch,living_storages
    changed           self._tree.changed() or =>  @memory_watch,living_storages
    changed           or self._weights() != self._addresses =>  @memory_watch,living_storages
    changed           return self._look() != self._read => return False
    _weights          , map(_LOCAL_TENSOR, self._dtensors)) => )  @memory_watch,living_ranks
    _look             self._orders.now(read) => ()
    _look             return _address_hash(read), => return None,
    __init__          readers[id(shard.master())]  @zero
    changed           self.sizes() != self._sizes or =>  @memory_watch
    changed           or not all( => and not all(  @memory_watch
    differs           not all(map(operator.is_, locals_, self._locals)) or =>  @memory_watch
    differs           or self._loop(*self._arguments) =>  @memory_watch
    _tabulate         plain and =>  @memory_watch
    _address_hash     except (TypeError, RuntimeError) => except ZeroDivisionError
    now               [row_major, => [
    now               chain(self._permuted, read) => read
    now               chain(self._permuted, read) => self._permuted
    now               , *map(Tensor.is_conj, self._complex) =>
sharding/ownership.py
    rebind            redescribe(self.shard)  @living_buffers
    rebind            refuse_taken_over  @zero
    rebind            has no memory now  @living_storages,living_texts
    rebind            changed |=  @living_storages,to
    rebind            changed = self.layout_changed => changed = False
    moved             not self.shard.dense or =>
    assign            is sparse, quantized  @living_subclasses
sharding/discovery.py
    find_shards       _refuse_empty  @zero,living_texts
    _plain            _refuse_unfilled  @living_texts,discovery
sharding/tree_changes.py
    _compare_weights  changes["gone" if  @living_tree
    _compare_weights  changes["retied"].append(full)  @living_tree
    _compare_weights  changes["replaced"].append
    _compare_weights  changes["new_trainable"
    _compare_buffers  changes["new_buffers"]  @living_buffers,living_tree
    _compare_buffers  changes["replaced_buffers"]  @living_buffers,living_tree
    _compare_buffers  persistent != shard.persistent or =>  @living_buffers,living_tree
    _compare_buffers  changes["gone_buffers"]  @living_buffers,living_tree
sharding/derived.py
    caches_dropped    module.train(True)  @living_caches,living_buffers
    caches_dropped    parametrize._cache.clear()  @living_caches,living_buffers
    caches_dropped    module.train(False)  @living_caches,living_buffers
    caches_dropped    module.train(mode)  @living_caches,living_buffers
    caches_dropped    module.training = mode  @living_caches,living_buffers
    is_power_iteration_vector  return name in ("_u", "_v") => return False  @living_buffers
    is_power_iteration_vector  return any( => return False and any(  @living_buffers
    refreshed_vectors  register_forward_pre_hook(_iterate)  @living_buffers
    refreshed_vectors  partial(_iterate_old, norm)  @living_buffers
    refreshed_vectors  vector.copy_(value)  @living_buffers
averaging/swap.py
    enter             clear_autocast_cache  @swap,living_caches
    leave             clear_autocast_cache  @swap,living_caches
    leave             when_outermost(self._restore_alone) => when_outermost
    _enter            with derived.caches_dropped(self._weights.model): => if True:  @living_caches
    _enter            self._weights.mark()  @optimizer_hooks
    _exchange_and_restore  with derived.caches_dropped(self._weights.model): => if True:
    _leave            refuse_covered()
    _leave            self._weights.reshard()  @swap
    _leave            self._average.own_buffers |=  @living_buffers
    _leave            self.remarks = swap_writes.describe  @living_swap
    _leave            error.add_note  @living_swap
    _lost             return [ => return [] and [  @living_swap
    _close            discount  @living_swap
    _close            note_swap(False)
    __del__           self._restore_alone()  @swap,swap_interrupts
averaging/swap_writes.py
    when_outermost    inner._waiting.append
    refuse_covered    raise RuntimeError
    watch             for one, two in
    note              other.writes += 1
averaging/swap_writes.py
    __init__          swaps.nested.clear()  @living_swap
    names             or (state.layout_changed and state.shadow is not None) =>  @living_swap
    names             state.rebind()  @living_swap
    names             old._version != expected[0] or =>  @living_swap
    names             or not _same_bits(old, state.local) =>  @living_swap
    names             written = versions(state) != expected => written = False  @living_swap
    changed_buffers   is no buffer of the model  @living_buffers,living_swap
    changed_buffers   reshaped.add  @living_buffers
    changed_buffers   in changed - reshaped => in changed  @living_buffers
averaging/teacher.py
    __init__          register_load_state_dict_pre_hook => register_forward_pre_hook  @into
    give              requires_grad_(False)  @into
    give              self._refuse_taken()  @into
    give              self._refuse_unlike  @into
    follow            of the teacher was  @living_storages,into
    follow            state.teacher_copy = new  @into
    follow            state.shadow = new  @into,living_storages
    refuse_training   the optimizer trains  @into
    copy_frozen       _copy(state)  @into
    copy_frozen       or not state.shard.dense =>  @into
    reshard           derived.caches_dropped(self.module) => torch.no_grad()  @living_caches
averaging/optimizer_hooks.py
    _before           move_to_end  @living_optimizers
    _stepped_unlisted  self._averager.bypassed +=  @living_optimizers,optimizer_hooks
    _stepped          never since  @living_optimizers
    _warn_of_wrapped_step  warnings.warn  @living_optimizers
    _that_takes_hooks  raise ValueError  @living_optimizers
    _run              is gone, so nothing  @optimizer_hooks
    _forget_dead_hooks  del hooks[key]  @optimizer_hooks
    _run              _forget_dead_hooks(getattr  @optimizer_hooks
verbs/entry.py
    warn_if_idle      warn(  @optimizer_hooks
    warn_of_unexplained_keys  warn(  @living_subclasses,living_tree
checkpoint/matching.py
    _                 state.is_copied_buffer and not own => False  @living_buffers,reader
    compare           if not state.is_copied_buffer: => if True:  @living_buffers,reader
    _                 passed_over += sorted  @living_buffers,reader
"""


@dataclass(frozen=True)
class Guard:
    """A statement that must not be deleted, or a text that must not be replaced."""

    file: Path
    function: str
    text: str
    instead: str | None
    first: tuple[str, ...]  # files of tests

    @classmethod
    def of(cls, file: str, line: str) -> Guard:
        """Of a line of GUARDS."""
        rule, _, tests = line.strip().partition("  @")
        function, rest = rule.split(maxsplit=1)
        text, arrow, instead = rest.partition(" =>")
        first = tuple(tests.split(",")) if tests else ()
        return cls(
            Path("dist_ema", file), function, text, instead.strip() if arrow else None, first
        )

    def __str__(self) -> str:
        replaced = "" if self.instead is None else f" => {self.instead}"
        return f"{self.file} {self.function}: {' '.join(self.text.split())[:90]}{replaced}"

    def find(self, source: str, tree: ast.Module) -> ast.stmt | None:
        """The smallest statement of the function that has the text."""
        found = [
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and self.function in (function.name, "_")
            for node in ast.walk(function)
            if isinstance(node, ast.stmt) and self.text in _segment(source, node)
        ]
        return min(found, key=lambda node: len(_segment(source, node)), default=None)

    def delete(self, source: str) -> str | None:
        """The source without the guard; None if it is not there.

        Raises:
            SyntaxError: Nothing that runs is left.
        """
        node = self.find(source, ast.parse(source))
        if node is None:
            return None
        lines = source.splitlines(keepends=True)
        before = "".join(lines[node.lineno - 1 : node.end_lineno])
        after = " " * node.col_offset + "pass" + "\n" * before.count("\n")
        if self.instead is not None:
            after = before.replace(self.text, self.instead, 1)
        without = "".join([*lines[: node.lineno - 1], after, *lines[node.end_lineno :]])
        compile(without, str(self.file), "exec")
        return without


def _segment(source: str, node: ast.stmt) -> str:
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


@cache
def guards() -> list[Guard]:
    """Those of GUARDS, in that order, and every other refusal and warning of the same rooms."""
    found, file = [], ""
    for line in GUARDS.strip().splitlines():
        if line.startswith(" "):
            found.append(Guard.of(file, line))
        else:
            file = line
    return found + [
        guard
        for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
        for guard in _refusals(path, found)
    ]


def _refusals(path: Path, listed: Sequence[Guard]) -> Iterator[Guard]:
    """Every statement of a file that raises or warns, but for those of `listed`."""
    file, source = path.relative_to(ROOT), path.read_text()
    tree = ast.parse(source)
    own = [guard.find(source, tree) for guard in listed if guard.file == file]
    seen = {id(inner) for node in own if node is not None for inner in ast.walk(node)}
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(function):
            if id(node) not in seen and isinstance(node, ast.stmt) and _refuses(node):
                seen.add(id(node))
                yield Guard(file, function.name, _segment(source, node), None, ())


def _refuses(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return node.exc is not None
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("warn", "_refuse"))


# --- which checks reach which guards --------------------------------------------------------------

REACHED = """
import os
import sys

FILE = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def at(number):
    os.write(FILE, number.to_bytes(2, sys.byteorder))
"""


@dataclass
class Check:
    """A test by its node id, or a program as `seed 17`. It is green where no guard is missing."""

    name: str
    seconds: float
    reached: list[int]  # places in `guards`
    ranks: bool = False  # it starts other processes


class _Marker(ast.NodeTransformer):
    """Some statements tell that they are reached."""

    def __init__(self, numbers: dict[ast.AST, list[int]]) -> None:
        self._numbers = numbers

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        reached = "__import__('dist_ema._reached', fromlist=['at']).at"
        numbers = self._numbers.get(node, ())
        calls = [ast.parse(f"{reached}({number})").body[0] for number in numbers]
        return [*calls, node] if calls else node


def _mark(copy: Path) -> None:
    """Every guard of the copy writes its number, two bytes, when it is reached."""
    for name in {guard.file for guard in guards()}:
        source = (copy / name).read_text()
        tree = ast.parse(source)
        numbers: dict[ast.AST, list[int]] = {}
        for number, guard in enumerate(guards()):
            node = guard.find(source, tree) if guard.file == name else None
            if node is not None:
                numbers.setdefault(node, []).append(number)
        (copy / name).write_text(
            ast.unparse(ast.fix_missing_locations(_Marker(numbers).visit(tree)))
        )
    (copy / "dist_ema" / "_reached.py").write_text(REACHED)


class _Recorder:
    """A pytest plugin that notes what each green test reaches, in its ranks too."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self._seconds, self._is_green = 0.0, False

    def add(self, name: str, seconds: float, is_green: bool, ranks: bool = False) -> None:
        """It has reached what the file holds since the last call."""
        reached = array("H", Path(os.environ["REACHED"]).read_bytes())
        os.truncate(os.environ["REACHED"], 0)
        if is_green:
            self.checks.append(Check(name, seconds, sorted(set(reached)), ranks))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        self._is_green |= report.when == "call" and report.passed
        if report.when == "teardown":
            ranks = "multirank" in report.keywords
            self.add(report.nodeid, self._seconds, self._is_green, ranks)
            self._seconds, self._is_green = 0.0, False


def _record(tests: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The checks, as dicts. In a marked copy."""
    with tempfile.NamedTemporaryFile() as out:
        os.environ["REACHED"] = out.name  # for ranks
        module: Any = importlib.import_module("dist_ema._reached")
        module.FILE = os.open(out.name, os.O_WRONLY | os.O_APPEND)
        recorder = _Recorder()
        for seed in seeds:
            begin = time.monotonic()
            failure = _failure_of(seed)
            recorder.add(f"seed {seed}", time.monotonic() - begin, not failure)
        if tests:  # without any, pytest runs all
            pytest.main([*PYTEST, *tests], [recorder])
        return [vars(check) for check in recorder.checks]


def _path_of(test: str) -> str:
    return f"tests/{test}" if (ROOT / "tests" / test).is_dir() else f"tests/test_{test}.py"


def _failure_of(seed: int) -> str:
    """What is silent or unclear in a program of one process."""
    return str(importlib.import_module("tests.host_programs").run(seed).failure)


# --- a guard is missing ---------------------------------------------------------------------------


class _Judge:
    """A pytest plugin that stops at the first test that is red as its guard is missing."""

    def __init__(self) -> None:
        self.red, self.doubtful = "", ""

    def take(self, name: str, failure: str) -> None:
        if DOUBTFUL.search(failure):
            self.doubtful = self.doubtful or f"{name} - {failure}"
        elif failure:
            self.red = self.red or f"{name} - {failure}"

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.take(report.nodeid, "in collection")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = crash.message.strip().splitlines() if crash else [report.longreprtext]
        failure = lines[-1] if "on rank" in lines[0] else lines[0]
        self.take(report.nodeid, failure if report.when == "call" else f"in {report.when}")
        self._session.shouldstop = bool(self.red)


def _judge(
    batches: Sequence[Sequence[str]], missing: tuple[Guard, str, str] | None = None
) -> list[str]:
    """The first of the checks that is red, and the first whose red proves nothing.

    Args:
        batches: Names of checks. Each batch of tests is one run of pytest.
        missing: A guard that is to be deleted here, and `_swap`'s sources.
    """
    judge = _Judge()
    if missing is not None:
        _swap(*missing)
    for batch in batches:
        tests = [name for name in batch if not name.startswith("seed ")]
        if tests and not judge.red:
            pytest.main([*PYTEST, *tests], [judge])
        for name in batch if not tests else ():
            if not judge.red:
                judge.take(name, _failure_of(int(name.split()[1])))
    return [judge.red, judge.doubtful]


def _swap(guard: Guard, whole: str, without: str) -> None:
    """The functions that differ between two sources of a module run as the second has them."""
    name = ".".join(guard.file.with_suffix("").parts)
    importlib.import_module(name)
    old, new = (dict(_functions(compile(source, name, "exec"))) for source in (whole, without))
    for each in gc.get_objects():
        # NOTE: what decorators wrap around a function has its name, and another file.
        if type(each) is FunctionType and each.__code__.co_filename.endswith(str(guard.file)):
            key = each.__qualname__, each.__code__.co_varnames[: each.__code__.co_argcount]
            if new.get(key) != old.get(key):
                each.__code__ = new[key]


def _functions(code: CodeType, prefix: str = "") -> Iterator[tuple[Any, CodeType]]:
    """By qualified names and arguments."""
    for inner in [const for const in code.co_consts if isinstance(const, CodeType)]:
        name = prefix + inner.co_name
        if inner.co_flags & inspect.CO_OPTIMIZED:
            yield (name, inner.co_varnames[: inner.co_argcount]), inner
            name += ".<locals>"
        yield from _functions(inner, name + ".")


def _batches(guard: Guard, reaching: Sequence[Check], limit: float) -> list[list[str]]:
    """The checks that reach the guard, in the order in which they run.

    Args:
        limit: Seconds that those take which neither the guard's line names nor come first.
    """
    reaching = sorted(reaching, key=lambda check: check.seconds)
    first = [
        each.name for each in reaching if each.name.startswith(tuple(map(_path_of, guard.first)))
    ]
    seeds = [check.name for check in reaching if check.name.startswith("seed ")][:FEW]
    rest = [check for check in reaching if check.name not in {*first[:FEW], *seeds}]
    ends = itertools.accumulate(check.seconds for check in rest)
    quick = [check.name for check, end in zip(rest, ends, strict=True) if end < limit]
    batches = [first[:FEW], seeds]
    for is_seed in (False, True):
        some = [name for name in quick if name.startswith("seed ") == is_seed]
        batches += [some[: 4 * FEW], some[4 * FEW :]]
    return [batch for batch in batches if batch]


def verdict(
    guard: Guard, number: int, copy: Path, checks: Sequence[Check], limit: float = 300
) -> str:
    """What turns red without the guard; GREEN if nothing does.

    Checks of this process come first, with the guard's function swapped. For those of several the
    file is written without it.
    """
    file = copy / guard.file
    whole = file.read_text() if file.exists() else ""
    without = guard.delete(whole)
    if without is None:
        return "GONE"
    reaching = [check for check in checks if number in check.reached]
    found = f"GREEN in the quick ones of {len(reaching)} checks"
    for ranks in (False, True):
        some = [check for check in reaching if check.ranks == ranks]
        seconds = 300 + 9 * sum(check.seconds for check in some)
        try:
            if ranks:
                file.write_text(without)
                fork = _Fork(_judge, _batches(guard, some, limit), copy=copy)
            else:
                fork = _Fork(_judge, _batches(guard, some, limit), (guard, whole, without))
            red, doubtful = fork.result(seconds) or ("", "it hangs or dies")
        finally:
            file.write_text(whole)
        if red:
            return str(red)[:200]
        found = f"DOUBTFUL: {doubtful[:200]}" if doubtful else found
    return found


def _come_and_go(found: Sequence[str]) -> list[str]:
    """Those of the verdicts whose check is red with the guard too."""
    red = {each: each.partition(" - ")[0] for each in found if not each.startswith(BAD)}
    names = set(red.values())
    tests = sorted(name for name in names if not name.startswith("seed "))
    seeds = sorted(int(name.split()[1]) for name in names.difference(tests))
    green = {check["name"] for check in _Fork(_record, tests, seeds).result(3600) or ()}
    return [each for each, name in red.items() if name not in green]


# --- processes ------------------------------------------------------------------------------------


class _Fork:
    """A call in a child, which has everything imported already. That takes longest.

    Args:
        work: What is called; its result goes through JSON.
        copy: Where the project's modules are imported from, anew.
        aloud: It prints.
    """

    def __init__(
        self, work: Callable[..., Any], *args: Any, copy: Path | None = None, aloud: bool = False
    ) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._out, self.pid = Path(name), os.fork()
        if self.pid == 0:
            os.setpgrp()
            try:
                if copy is not None:
                    _enter(copy)
                if not aloud:
                    log = os.open(os.environ.get("GUARDS_LOG", os.devnull), LOG)
                    os.dup2(log, 1)
                    os.dup2(log, 2)
                self._out.write_text(json.dumps(work(*args)))
            finally:
                sys.stdout.flush()
                os._exit(0)

    def result(self, seconds: float) -> Any:
        """None: it took longer, or died."""
        deadline = time.monotonic() + seconds
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
        text = self._out.read_text()
        self._out.unlink()
        return json.loads(text) if text else None


def _enter(copy: Path) -> None:
    """The project is the copy from now on, for this process and its ranks."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "dist_ema")]:
        del sys.modules[name]


def _copied(folder: str, name: str) -> Path:
    hidden = shutil.ignore_patterns(".*", "__pycache__", "runs", "site")
    return Path(shutil.copytree(ROOT, Path(folder, name), ignore=hidden, symlinks=True))


def _work(numbered: list[tuple[int, Guard]], copy: Path, checks: Sequence[Check]) -> list[str]:
    found = []
    for number, guard in numbered:
        found.append(verdict(guard, number, copy, checks))
        print(f"| {guard} | {found[-1]} |", flush=True)
    return found


def _import_all(folder: str, tests: Sequence[str]) -> None:
    """From a marked copy. What no program imports before it runs comes with the first."""
    copy = _copied(folder, "marked")
    _mark(copy)
    os.environ["REACHED"] = os.devnull
    _enter(copy)
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*PYTEST, "--collect-only", *tests])
    _failure_of(0)


def _recorded(tests: Sequence[str], seeds: int, jobs: int) -> list[dict[str, Any]]:
    plan = importlib.import_module("tests.host_programs").plan(list(range(seeds)))
    plain = plan["none", 1]  # needs no other process
    forks = [_Fork(_record, tests[job::jobs], plain[job::jobs]) for job in range(jobs)]
    return [check for fork in forks for check in fork.result(7200) or ()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="of the lines to check")
    parser.add_argument("--seeds", type=int, default=100, help="host programs to draw from")
    parser.add_argument("--jobs", type=int, default=2, help="at once")
    parser.add_argument("--record", type=Path, help="a file, kept, of what reaches what")
    options = parser.parse_args()
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    numbered = [
        (number, guard)
        for number, guard in enumerate(guards())
        if all(word in str(guard) for word in options.words)
    ]
    names = [*TESTS, *(name for guard in guards() for name in guard.first)]
    tests = list(dict.fromkeys(map(_path_of, names)))
    record = options.record and options.record.absolute()
    with tempfile.TemporaryDirectory() as folder:
        _import_all(folder, tests)
        if record and record.exists():
            known = json.loads(record.read_text())
        else:
            known = _recorded(tests, options.seeds, options.jobs)
            if record:
                record.write_text(json.dumps(known))
        checks = [Check(**each) for each in known]
        forks = [
            _Fork(_work, numbered[k :: options.jobs], _copied(folder, str(k)), checks, aloud=True)
            for k in range(options.jobs)
        ]
        shares = [fork.result(86400) for fork in forks]
        found = [
            each
            for share in shares
            for each in (["DOUBTFUL: its process died"] if share is None else share)
        ]
        doubtful = _come_and_go(found)
    for each in doubtful:
        print(f"DOUBTFUL, red with the guard too: {each}")
    bad = doubtful + [each for each in found if each.startswith(BAD)]
    print(f"{len(found) - len(bad)} of {len(found)} guards are red when they are missing")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
