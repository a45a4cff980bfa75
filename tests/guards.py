"""Every guard of a living model deleted once: each must turn a test or a seed red.

    python -m tests.guards                         all of them, two at a time: half an hour
    python -m tests.guards averages adopt          those whose line has all of these words
    python -m tests.guards --seeds 60              host programs too, for what no test turns red

GUARDS has a line for each, under its file: a function ("_": any) and a text. The smallest statement
of the function that contains the text is deleted in a copy of the project, or the text is replaced
by what follows "=>". The tests of a living model run on the copy, those after "@" first.

How to read a failure: a guard that stays GREEN has no test, or is dead code. One that is GONE was
moved or written otherwise; then its line here moves too.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed.fsdp  # noqa: F401

__all__ = ["GUARDS", "Guard", "guards"]

TIMEOUT = 900  # seconds
ROOT = Path(__file__).resolve().parent.parent
# Those of one process first; files that a guard's line names run before all others.
TESTS = (
    *("living_storages", "living_tree", "living_swap", "living_buffers", "living_guards"),
    *("living_optimizers", "living_caches", "living_subclasses", "living_texts"),
    *("into", "swap", "several"),
)

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
    move              refuse_unfrozen
    move              self.follow
    move              self._watch.begin_read()  @emulated
    move_by           self.refuse  @living_guards
    move_by           self.settle  @compat_modules
    move_by           self.follow  @compat_modules
    note_swap         self.mark()  @optimizer_hooks,engines
    pull              self.mark()  @compat_modules
    pull              self.ready()  @compat_modules
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
    adopt             if name in states => if True  @living_buffers,living_tree
    _refuse_hopeless  is not dense  @discovery
    _refuse_hopeless  float8 cannot  @discovery
    _held_alike       and old.shape == new.shape and not alike => and False  @living_tree
    _held_alike       or old.kind == new.kind == "buffer" =>  @living_buffers,living_tree
    _kept             (shard.name, *shard.aliases) => (shard.name,)  @living_tree
averaging/storage_watch.py
    changed           True in [tensor.requires_grad for tensor in self._frozen] or =>  @living_tree
    end_read          and param.shard.kind != "buffer" =>  @emulated
    trained_unseen    and now[1] == before[1] =>  @optimizer_hooks,engines,metrics
    trained_unseen    now[0] != before[0] => False  @optimizer_hooks,engines,metrics
averaging/shared_memory.py
    refuse_shared     in the memory of the average
    refuse_shared     and their
    agrees            return self.state.live.data_ptr()  @into
sharding/memory_watch.py
    changed           self._tree.changed() or =>
    changed           or self._look() != self._seen =>
    _look             map(_LOCAL_TENSOR, self._dtensors), read] => read]  @living_ranks
    _look             , read] => ]
    _look             self._orders.now(read) => ()
    __init__          readers[id(shard.master())]  @zero
    __init__          self._whole.append(registered.values()) => pass
    __init__          self._owners += [registered] * len(known) => known = []
    _addresses        except (TypeError, RuntimeError) => except ZeroDivisionError
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
    _leave            self.remarks = describe  @living_swap
    _leave            error.add_note  @living_swap
    _lost             return [ => return [] and [  @living_swap
    _close            discount  @living_swap
    _close            note_swap(False)
    __del__           self._restore_alone()  @swap,swap_interrupts
averaging/swap_registry.py
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
    __init__          finalize(self, self._hooks.close)  @optimizer_hooks
verbs/remarks.py
    warn_if_idle      warn(  @optimizer_hooks
    warn_of_unexplained_keys  warn(  @living_subclasses,living_tree
checkpoint/matching.py
    _                 state.is_copied_buffer and not own => False  @living_buffers,reader
    _                 report.passed_over if state.is_copied_buffer else =>  @living_buffers,reader
"""


@dataclass(frozen=True)
class Guard:
    """A statement that must not be deleted, or a text that must not be replaced."""

    file: Path
    function: str
    text: str
    instead: str | None
    tests: tuple[str, ...]

    @classmethod
    def of(cls, file: str, line: str) -> Guard:
        """Of a line of GUARDS."""
        rule, _, tests = line.strip().partition("  @")
        function, rest = rule.split(maxsplit=1)
        text, arrow, instead = rest.partition(" =>")
        first = tuple(tests.split(",")) if tests else ()
        return cls(
            Path("dist_ema", file),
            function,
            text,
            instead.strip() if arrow else None,
            (*first, *(test for test in TESTS if test not in first)),
        )

    def __str__(self) -> str:
        replaced = "" if self.instead is None else f" => {self.instead}"
        return f"{self.file} {self.function}: {self.text}{replaced}"

    def delete(self, source: str) -> str | None:
        """The source without the guard; None if it is not there."""
        found = [
            node
            for function in ast.walk(ast.parse(source))
            if isinstance(function, ast.FunctionDef) and self.function in (function.name, "_")
            for node in ast.walk(function)
            if isinstance(node, ast.stmt) and self.text in _segment(source, node)
        ]
        if not found:
            return None
        node = min(found, key=lambda node: len(_segment(source, node)))
        lines = source.splitlines(keepends=True)
        before = "".join(lines[node.lineno - 1 : node.end_lineno])
        after = " " * node.col_offset + "pass\n"
        if self.instead is not None:
            after = before.replace(self.text, self.instead, 1)
        return "".join([*lines[: node.lineno - 1], after, *lines[node.end_lineno :]])


def _segment(source: str, node: ast.stmt) -> str:
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def guards(words: Sequence[str] = ()) -> Iterator[Guard]:
    """Those whose text has all the words."""
    file = ""
    for line in GUARDS.strip().splitlines():
        if not line.startswith(" "):
            file = line
            continue
        guard = Guard.of(file, line)
        if all(word in str(guard) for word in words):
            yield guard


def check(guard: Guard, copy: Path, seeds: int) -> str:
    """What turns red without the guard; GREEN if nothing does."""
    file = copy / guard.file
    whole = file.read_text() if file.exists() else ""
    without = guard.delete(whole)
    if without is None:
        return "GONE"
    file.write_text(without)
    try:
        red = re.findall(r"^(?:FAILED|ERROR) (.+)", _forked(_pytest, copy, guard.tests), re.M)
        if not red and seeds:
            red = re.findall(r"^seed .*", _forked(_programs, copy, (str(seeds),)), re.M)
    finally:
        file.write_text(whole)
    return red[0] if red else "GREEN"


def _pytest(tests: tuple[str, ...]) -> None:
    for test in tests:
        path = Path("tests", test)
        path = path if path.is_dir() else path.with_name(f"test_{test}.py")
        if pytest.main(["-xq", "-n", "0", "-p", "no:cacheprovider", str(path)]) in (1, 2):
            return


def _programs(seeds: tuple[str, ...]) -> None:
    sys.argv = ["host_programs", "--seeds", *seeds]
    runpy.run_module("tests.host_programs", run_name="__main__")


def _forked(run: Callable[[tuple[str, ...]], None], copy: Path, given: tuple[str, ...]) -> str:
    """What `run` prints in the copy. A fork has torch imported already, which takes longest."""
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.setpgrp()
            for number in (1, 2):
                os.dup2(out.fileno(), number)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
            for name in [
                name for name in sys.modules if name.split(".")[0] in ("tests", "dist_ema")
            ]:
                del sys.modules[name]
            try:
                run(given)
            finally:
                sys.stdout.flush()
                os._exit(0)
        deadline = time.monotonic() + TIMEOUT
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "FAILED by its timeout"  # one that hangs without its guard is red too
        out.seek(0)
        return out.read()


def _work(chosen: list[Guard], copy: Path, seeds: int) -> bool:
    """Print what each turns red. Returns whether all do."""
    found = []
    for guard in chosen:
        found.append(check(guard, copy, seeds))
        print(f"| {guard} | {found[-1]} |", flush=True)
    return not {"GREEN", "GONE"}.intersection(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="of the lines to check")
    parser.add_argument("--seeds", type=int, default=0, help="host programs for what stays green")
    parser.add_argument("--jobs", type=int, default=2, help="at once")
    arguments = parser.parse_args()
    chosen = list(guards(arguments.words))
    for test in TESTS:  # for what they import
        importlib.import_module(f"tests.test_{test}")
    children = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.jobs):
            copy = Path(folder, str(number))
            hidden = shutil.ignore_patterns(".*", "__pycache__", "runs", "site")
            shutil.copytree(ROOT, copy, ignore=hidden, symlinks=True)
            child = os.fork()
            if child == 0:
                os._exit(not _work(chosen[number :: arguments.jobs], copy, arguments.seeds))
            children.append(child)
        return max(os.waitpid(child, 0)[1] for child in children) >> 8


if __name__ == "__main__":
    sys.exit(main())
