"""Everything that a GPU can tell, in one command, for whoever has one for ten minutes.

    make gpu                             the tests that need a GPU, the bench, the kernels; a page
    python launch/gpu.py --kernels       the kernels alone, compiled ahead of time; needs no GPU

The page, docs/benchmarks-gpu.md, names the chip, the versions and the commit. It is written even
where a part failed, and says which. The exit code is 0 where all went well, 1 where a part failed,
2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_ema.averaging.kernels import gpu_launch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks-gpu.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
KINDS = (  # live, shadow, levels of the numbering
    ("float32", "float32", 0),
    ("bfloat16", "float32", 0),
    ("bfloat16", "bfloat16", 1),
    ("bfloat16", "bfloat16", 3),
)
# A wide access moves 16 bytes: in PTX four words or eight halves, on AMD four dwords.
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.[bu]32|global_load_dwordx4|global_load_b128")
WIDE_STORE = re.compile(r"st\.global\S*\.v4\.[bu]32|global_store_dwordx4|global_store_b128")
# Of disassembled code: a label; an instruction of NVIDIA with its predicate, or one of AMD.
LABEL = re.compile(r"\s*(\.L\w+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@\S+ )?\s*(\S.*);|\s+()([a-z]\w+.*)")
JUMP = re.compile(r"BRA|s_c?branch")
END = re.compile(r"EXIT|s_endpgm")
WIDE = re.compile(r"STG\S*\.128|global_store_dwordx4|global_store_b128")


@dataclass(frozen=True)
class Part:
    """One command of the report."""

    title: str
    command: list[str]
    code: int
    output: str


# --- kernels, ahead of time -----------------------------------------------------------------------


def kernel_rows() -> Iterator[tuple[str, ...]]:
    """What the columns of `kernel_table` hold, of each kernel."""
    for target in TARGETS:
        for live, shadow, levels in KINDS:
            try:
                found = _figures(target, live, shadow, levels)
            except Exception as error:  # a compiler that does not know the chip
                problem = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
                found = (problem, "", "", "", "")
            yield target, live, shadow, str(levels), *found


def _figures(target: str, live: str, shadow: str, levels: int) -> tuple[str, ...]:
    compiled = _compile(target, live, shadow, levels)
    if target.startswith("gfx"):
        text = code = compiled.asm["amdgcn"]
        registers = _search(r"\.vgpr_count:\s+(\d+)", text)
        spills = _search(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text = compiled.asm["ptx"]
        report, code = _assemble(text)
        registers = _search(r"Used (\d+) registers", report)
        spills = _search(r"(\d+) bytes spill stores", report)
    wide = [str(len(pattern.findall(text))) for pattern in (WIDE_LOAD, WIDE_STORE)]
    lanes = gpu_launch.WARPS * (64 if target.startswith("gfx") else 32)
    per_element = f"{instructions(code) * lanes / gpu_launch.BLOCK:.1f}"
    return registers, spills, *wide, per_element


def instructions(code: str) -> int:
    """Instructions on the shortest way through disassembled code that has a wide store on it.

    That is what a thread executes for a whole block of a long, aligned tensor. Subroutines, as of
    a long division, are not followed.
    """
    steps: list[tuple[str, str]] = []  # (predicate, instruction)
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(steps)
        elif found := INSTRUCTION.match(line):
            steps.append((found[1] or "", found[2] or found[4]))
    reached = {(0, False)}
    seen: set[tuple[int, bool]] = set()
    for count in itertools.count(1):
        following: set[tuple[int, bool]] = set()
        for place, stored in reached - seen:
            predicate, instruction = steps[place]
            stored = stored or bool(WIDE.match(instruction))
            jump = JUMP.match(instruction)
            if END.match(instruction) and stored:
                return count
            if jump:
                following.add((labels[instruction.split()[-1].strip("`()")], stored))
            if predicate or "cbranch" in instruction or not (jump or END.match(instruction)):
                following.add((place + 1, stored))
        seen |= reached
        reached = {each for each in following if each[0] < len(steps)}
        if not reached:
            break
    raise ValueError("no wide store can be reached")


def _compile(target: str, live: str, shadow: str, levels: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_ema.averaging.kernels import gpu_triton

    types = {name: gpu_triton.TYPES[getattr(torch, name)] for name in (live, shadow)}
    constants = {
        "live_type": types[live],
        "shadow_type": types[shadow],
        "averages": 1,
        "levels": levels,
        "huge": False,
        "guard": False,
        "block": gpu_launch.BLOCK,
        "resident": False,
    }
    kernel = gpu_triton.update_kernel
    pointers = {"blocks": "*i32", "tensors": "*i64", "columns": "*i32", "weights": "*fp32"}
    signature = (
        pointers | {"head": "i32", "programs": "i32"} | dict.fromkeys(constants, "constexpr")
    )
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, constants, attributes)
    if target.startswith("gfx"):
        chip = GPUTarget("hip", target, 64)
    else:
        chip = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {"num_warps": gpu_launch.WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=chip, options=options)


def _assemble(text: str) -> tuple[str, str]:
    """What ptxas reports of PTX, and the machine's code."""
    from triton import knobs

    chip = _search(r"\.target (\w+)", text)
    # The newer of the two that Triton brings assembles for every chip.
    tool = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", f"{folder}/kernel.cubin"
        source.write_text(text)
        assembler = [tool, "-v", f"--gpu-name={chip}", str(source), "-o", binary]
        disassembler = [knobs.nvidia.nvdisasm.path, "-c", binary]
        reports, code = (
            subprocess.run(command, capture_output=True, text=True, check=True)
            for command in (assembler, disassembler)
        )
        return reports.stderr, code.stdout


def _search(pattern: str, text: str) -> str:
    """The first group of what is found, else "?"."""
    found = re.search(pattern, text)
    return found.group(1) if found else "?"


# --- the page -------------------------------------------------------------------------------------


def run(title: str, command: list[str], timeout: float = 1800.0) -> Part:
    """Run one command; its output is shown when it ends, and kept."""
    print(f"{title}: {shlex.join(command)}", flush=True)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        part = Part(title, command, done.returncode, done.stdout)
    except subprocess.TimeoutExpired:
        part = Part(title, command, 124, f"not done after {timeout:g} seconds")
    print(part.output, flush=True)
    return part


def page(chip: str, parts: list[Part], kernels: list[tuple[str, ...]]) -> str:
    """The whole page, in Markdown."""
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"Written by `make gpu` on {datetime.date.today()}: {chip}, torch {torch.__version__}, "
        f"Triton {_version('triton')}, commit {_commit()}.",
        "",
    ]
    for part in parts:
        outcome = "passed" if part.code == 0 else f"failed with exit code {part.code}"
        lines += [f"## {part.title}", "", f"`{shlex.join(part.command)}` {outcome}.", ""]
        lines += ["```text", part.output.strip()[-12_000:], "```", ""]
    lines += ["## Kernels, compiled ahead of time", "", *kernel_table(kernels)]
    return "\n".join(lines) + "\n"


def kernel_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown."""
    header = ("target", "live", "shadow", "levels", "registers", "spilled bytes")
    columns = (*header, "wide loads", "wide stores", "instructions per element")
    table = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="print the kernels' table, and end")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.kernels:
        print("\n".join(kernel_table(list(kernel_rows()))))
        return 0
    if not torch.cuda.is_available():
        print(
            f"no GPU here: torch {torch.__version__} finds no CUDA or ROCm device, so nothing was "
            "run and no page was written. `python launch/gpu.py --kernels` compiles the kernels "
            "ahead of time on any machine.",
            file=sys.stderr,
        )
        return 2
    if not chosen.out.parent.is_dir():
        parser.error(f"--out {chosen.out}: there is no folder {chosen.out.parent}")
    bench = [sys.executable, "launch/bench.py", "--device", "cuda"]
    parts = [
        run("Tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs"]),
        run("fp32 weights", bench),
        run("bf16 weights", [*bench, "--dtype", "bfloat16", "--only", "update"]),
        run("4,000 small tensors", [*bench, "--model", "many", "--only", "update"]),
        run("1B parameters", [*bench, "--model", "llama1b", "--only", "update"]),
    ]
    text = page(torch.cuda.get_device_name(), parts, list(kernel_rows()))
    chosen.out.write_text(text)
    print(f"{chosen.out} is written.")
    return int(any(part.code for part in parts))


if __name__ == "__main__":
    sys.exit(main())
