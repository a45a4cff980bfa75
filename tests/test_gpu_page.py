"""`make gpu`: what it says without a GPU, its page, and the kernels compiled ahead of time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "launch" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--out", str(tmp_path / "page.md")]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_page_says_what_failed(gpu: Any) -> None:
    parts = [
        gpu.run("Good", [sys.executable, "-c", "print('fine')"]),
        gpu.run("Bad", [sys.executable, "-c", "print('3 failed'); raise SystemExit(1)"]),
        gpu.run("Slow", [sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1),
    ]
    text = gpu.page("Some chip", parts, [("sm_90", "float32", "float32", "0", "48", "0", "8", "4")])
    assert "Some chip" in text
    assert torch.__version__ in text
    for outcome in ("fine", "passed", "3 failed", "exit code 1", "exit code 124", "| 48 | 0 | 8 |"):
        assert outcome in text, outcome


def test_a_kernel_ahead_of_time() -> None:
    """Wide accesses and no spills, in a process that does not interpret Triton."""
    pytest.importorskip("triton")
    program = (
        "import sys; sys.path.insert(0, 'launch'); import gpu; "
        "print(*gpu._figures('gfx942', 'float32', 'float32', 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    registers, spills, loads, stores, per_element = done.stdout.split()
    assert 0 < int(registers) <= 128
    assert (spills, loads, stores) == ("0", "4", "2")
    assert 4 < float(per_element) < 20, "it loads, subtracts, selects, multiplies and stores"


NVIDIA = """
.text.update_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   STG.E desc[UR6][R2.64], R1 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   FADD R1, R1, R1 ;
        /*0050*/                   BRA `(.L_x_1) ;
        /*0060*/                   FADD R1, R1, R1 ;
.L_x_1:
        /*0070*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*0080*/               @P1 EXIT ;
        /*0090*/                   BRA `(.L_x_0) ;
"""
AMD = """
\tv_add_u32_e32 v0, v1, v2
\ts_cbranch_scc1 .LBB0_2
\tglobal_store_dword v0, v1, s[2:3]
\ts_endpgm
.LBB0_2:                                ; %wide
\tv_add_u32_e32 v0, v1, v2
\tglobal_store_dwordx4 v0, v[0:3], s[2:3]
\ts_endpgm
"""


def test_instructions_are_those_of_the_wide_way(gpu: Any) -> None:
    """Over jumps, taken or not, and through no shorter way without a wide store."""
    assert gpu.instructions(NVIDIA) == 6
    assert gpu.instructions(AMD) == 5
    with pytest.raises(ValueError, match="no wide store"):
        gpu.instructions(AMD.replace("dwordx4", "dwordx2"))
