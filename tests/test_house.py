"""The house keeps its rules: floors, doors, names, sizes, and a README that runs.

How to read a failure: every rule is a function that returns sentences, one per breach, with file and line. Each rule is
also shown a synthetic breach, so a rule that has stopped seeing anything turns red too.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dist_ema

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "dist_ema"

FLOORS = {
    -1: "compiled",
    0: "schedule kernels fused executors shards format commit ranks console elements figure pickles archives behind",
    1: "teacher layout clock wire engine sink card profiles distcp foreign checkpoint series",
    2: "swap gather artifact resume dcp agree attach average telemetry source",
    3: "ema combine manifest",
    4: "posthoc recipes.__init__ recipes.batchnorm recipes.distill recipes.fixres",
    5: "offline.__init__ offline.inspect offline.verify offline.export offline.diff offline.average offline.plan "
    "offline.reconstruct offline.convert offline.doctor offline.patient compat.copied compat.listed",
    6: "cli.inspect cli.verify cli.export cli.diff cli.average cli.plan cli.reconstruct cli.convert cli.doctor "
    "integrations.__init__ integrations.accelerate integrations.transformers integrations.lightning "
    "compat.__init__ compat.swa_utils compat.timm compat.ema_pytorch compat.yolo compat.diffusers compat.torch_ema "
    "compat.ldm compat.shadow compat.contrib",
    7: "cli.__init__",
    8: "__init__ __main__",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}
MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts): path
    for path in sorted(HOUSE.rglob("*.py"))
}


# --- the law of stairs -------------------------------------------------------------------------------------------


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """(line, module as dotted path, name taken from it) of every import, wherever in the file it stands."""
    package = ["dist_ema", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, source, alias.name) for alias in node.names)


def room(source: str, name: str | None) -> str | None:
    """The module of the house that an import reaches; None if it leads out of the house."""
    if source.split(".")[0] != "dist_ema":
        return None
    inside = source.removeprefix("dist_ema").lstrip(".")
    deeper = f"{inside}.{name}" if inside and name else name or inside
    reached = deeper if _door(deeper) in FLOOR else inside
    return _door(reached) if reached else "__init__"


def _door(path: str) -> str:
    """A folder is entered through its __init__."""
    return path if path in FLOOR else f"{path}.__init__" if f"{path}.__init__" in FLOOR else path


def stairs(module: str, source: str) -> list[str]:
    """Breaches of the law: only strictly lower floors, and no import that a parser cannot see."""
    if module not in FLOOR:
        return [f"{module} stands on no floor: add it to FLOORS"]
    tree, said = ast.parse(source), []
    for line, origin, name in imported(module, tree):
        target = room(origin, name)
        if target is not None and FLOOR.get(target, 99) >= FLOOR[module]:
            said.append(
                f"{module}:{line} (floor {FLOOR[module]}) imports {target} (floor {FLOOR.get(target)})"
            )
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.split(".")[-1] in ("import_module", "__import__") and module != "__init__":
            said.append(f"{module}:{node.lineno} imports by a name made at run time: {called}()")  # type: ignore[attr-defined]
    return said


@pytest.mark.parametrize("module", MODULES)
def test_stairs(module: str) -> None:
    """The law of stairs: a module imports only from floors below its own."""
    assert stairs(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layout", "from .clock import Clock"),
        ("layout", "def f():\n    from .ema import EMA"),
        ("layout", "if TYPE_CHECKING:\n    from .ema import EMA"),
        ("layout", "import dist_ema.ema as e"),
        ("layout", "from dist_ema import swap"),
        ("layout", "from dist_ema import EMA"),
        ("layout", "from . import shards, swap"),
        ("layout", "from . import __version__"),
        ("layout", "from .nowhere import x"),
        ("layout", "from .layout import x"),
        ("layout", "import importlib\nimportlib.import_module('dist_ema.ema')"),
        ("layout", "__import__('dist_ema.ema')"),
        ("utils", ""),
    ],
)
def test_stairs_sees(module: str, source: str) -> None:
    """The checker of the law finds sideways, upward, hidden and unknown imports."""
    assert len(stairs(module, source)) == 1


def test_stairs_allows() -> None:
    """The checker of the law lets downward and outside imports pass."""
    ours = "from . import shards\nfrom .ranks import Ranks\nimport dist_ema.format\nfrom dist_ema import commit"
    assert stairs("layout", f"import os\nimport torch\n{ours}") == []


# --- the door ----------------------------------------------------------------------------------------------------


def foreign(path: str) -> bool:
    """A wrapper or a private name of torch. `_foreach_*` is torch's documented name for list kernels."""
    if re.match(r"torch\.(distributed\.fsdp|nn\.parallel)(\.|$)", path):
        return True
    parts = path.split(".")
    private = [
        part for part in parts if part.startswith("_") and not re.match(r"__\w+__$|_foreach_", part)
    ]
    return parts[0] == "torch" and bool(private)


def leaks(module: str, source: str) -> list[str]:
    """Where a module names wrappers or private torch: by import, or by attributes of an imported torch module."""
    tree = ast.parse(source)
    paths = [
        (line, f"{origin}.{name}" if name else origin)
        for line, origin, name in imported(module, tree)
    ]
    said = [f"{module}:{line} imports {path}" for line, path in paths if foreign(path)]
    known = bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            root, *rest = ast.unparse(node).split(".")
            # NOTE: only modules are followed; what a class of torch has (Tensor._version) is its own affair.
            if (
                root in known
                and known[root].split(".")[-1].islower()
                and foreign(".".join([known[root], *rest]))
            ):
                said.append(f"{module}:{node.lineno} names {ast.unparse(node)}")
    return said


def bound(tree: ast.AST) -> dict[str, str]:
    """The dotted path behind every name that an import binds."""
    known = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            path = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            whole = alias.asname or isinstance(node, ast.ImportFrom)
            known[alias.asname or alias.name.split(".")[0]] = path if whole else path.split(".")[0]
    return known


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module not in ("shards", "offline.patient")]
)
def test_wrappers_stay_in_shards(module: str) -> None:
    """Only shards.py may name FSDP, DDP or private torch: everything behind it is plain tensors and regions."""
    assert leaks(module, MODULES[module].read_text()) == []


def test_shards_would_leak() -> None:
    """The checker sees the one module that must name wrappers; if it does not, it sees nothing anywhere."""
    assert len(leaks("shards", MODULES["shards"].read_text())) >= 5


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed.fsdp",
        "import torch.distributed.fsdp as f",
        "from torch.distributed.fsdp import FSDPModule",
        "from torch.distributed import fsdp",
        "from torch.nn.parallel import DistributedDataParallel",
        "def f():\n    from torch.nn import parallel as p",
        "from torch.distributed.distributed_c10d import _get_default_store",
        "from torch.distributed.fsdp._common_utils import TrainingState",
        "import torch._inductor.config",
        "import torch\ntorch._inductor.config.freezing",
        "from torch import nn\nnn.parallel.DistributedDataParallel",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
    ],
)
def test_leaks_seen(source: str) -> None:
    """The checker of the door finds imports and attribute chains, in functions too."""
    assert leaks("layout", source)


def test_leaks_allows() -> None:
    """Public torch, dunders, list kernels, and private names of our own pass the door."""
    ours = "from .x import _y\nimport sys\nsys._getframe()"
    torchs = "import torch\nfrom torch import Tensor\ntorch.__version__\ntorch._foreach_copy_\nTensor._make_subclass"
    assert leaks("layout", f"{ours}\n{torchs}") == []


# --- names -------------------------------------------------------------------------------------------------------


def public(tree: ast.Module) -> set[str]:
    """Public functions and classes at the top level of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")
    }


def listed(tree: ast.Module) -> list[str] | None:
    """What `__all__` says; None if the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def rank(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order that ruff's RUF022 writes."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def taken(modules: dict[str, Path]) -> dict[str, set[str]]:
    """What the rooms take from each other by `from .room import name`."""
    result: dict[str, set[str]] = {}
    for module, path in modules.items():
        for _, origin, name in imported(module, ast.parse(path.read_text())):
            source = origin.removeprefix("dist_ema.")
            if origin.startswith("dist_ema.") and source in modules and name:
                result.setdefault(source, set()).add(name)
    return result


TAKEN = taken(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__main__"])
def test_all_is_complete(module: str) -> None:
    """`__all__` is sorted, exists, and holds every public def and class and all that another room imports."""
    tree = ast.parse(MODULES[module].read_text())
    names = listed(tree)
    assert names is not None, f"{module} has no __all__"
    assert names == sorted(set(names), key=rank)
    missing = public(tree) | TAKEN.get(module, set()) if module != "__init__" else set()
    assert missing - set(names) == set()
    here = importlib.import_module("dist_ema" if module == "__init__" else f"dist_ema.{module}")
    assert [name for name in names if not hasattr(here, name)] == []


def test_all_is_read() -> None:
    """The reader of names sees defs, classes and imports by other rooms."""
    tree = ast.parse(
        "__all__ = ['A', 'b']\nclass A: ...\ndef b(): ...\ndef _c(): ...\nasync def d(): ..."
    )
    assert (listed(tree), public(tree)) == (["A", "b"], {"A", "b", "d"})
    assert listed(ast.parse("x = 1")) is None
    assert "Shard" in TAKEN["shards"]
    assert sorted(["b", "Ab", "C", "AA"], key=rank) == ["AA", "C", "Ab", "b"]


def test_front_door_is_lazy() -> None:
    """`import dist_ema` and the schedules must not import torch: PEP 562 in __init__.py, `_ROOMS`."""
    code = (
        "import sys, json, dist_ema; bare = sorted({'torch', 'numpy'} & set(sys.modules)); "
        "dist_ema.HalfLife(3); print(json.dumps([bare, 'torch' in sys.modules, dir(dist_ema)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare, heavy, names = json.loads(done.stdout)
    assert (bare, heavy) == ([], False)
    assert set(names) == {*dist_ema.__all__, "__version__"}


def test_front_door_refuses() -> None:
    """A name that is not public raises AttributeError with the name in it."""
    with pytest.raises(AttributeError, match="has no attribute 'Average'"):
        dist_ema.Average  # noqa: B018


def test_front_door_is_typed() -> None:
    """What type checkers see under TYPE_CHECKING is what `__all__` lists."""
    tree = ast.parse(MODULES["__init__"].read_text())
    seen = {
        name for _, source, name in imported("__init__", tree) if source.startswith("dist_ema.")
    }
    assert seen == set(dist_ema.__all__)


# --- numbers and settings ----------------------------------------------------------------------------------------


def test_version() -> None:
    """The version in __init__.py is the one that the first heading of the CHANGELOG names."""
    heading = next(
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    )
    found = re.search(r"\d+\.\d+\.\d+\S*", heading)
    assert found is not None, f"no version in {heading!r}"
    assert found[0] == dist_ema.__version__


def test_warnings_are_errors(pytestconfig: pytest.Config) -> None:
    """`filterwarnings = ["error"]` in pyproject.toml: first, so that what follows can only except by name."""
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)


# --- the README --------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """(line, code, reason not to run it) of every python block. Raises ValueError for a reason left out."""
    lines, result = text.splitlines(), []
    for i, line in enumerate(lines):
        if not re.match(r"```python\b", line):
            continue
        above = lines[i - 1].strip() if i else ""
        reason = re.fullmatch(r"<!-- not run: (\S.*?) *-->", above)
        if above.startswith("<!-- not run") and reason is None:
            raise ValueError(
                f"README.md:{i}: say why, as in <!-- not run: needs a GPU -->, got {above!r}."
            )
        end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
        result.append((i + 2, "\n".join(lines[i + 1 : end]), reason[1] if reason else None))
    return result


BLOCKS = blocks((ROOT / "README.md").read_text())


def test_readme_shows_code() -> None:
    """The README teaches by code that runs: at least one block does."""
    assert [line for line, _, reason in BLOCKS if reason is None]


@pytest.mark.parametrize(
    ("line", "code", "reason"), BLOCKS, ids=[f"line{line}" for line, _, _ in BLOCKS]
)
def test_readme_runs(
    line: int, code: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every python block of the README runs by itself in an empty folder."""
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    # NOTE: empty lines first, so that a traceback names the line of the README.
    exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), {"__name__": "readme"})


def test_every_other_page_is_run_or_says_so() -> None:
    """A python block of the docs is part of a page that a test runs from top to bottom, or is marked `no-run`."""
    run = {"accelerate.md", "lightning.md", "transformers.md", "recipes.md"}
    assert {
        page.name for page in ROOT.glob("docs/**/*.md") if "```python\n" in page.read_text()
    } == run
    said = "".join(
        path.read_text() for path in ROOT.glob("tests/test_*.py") if path != Path(__file__)
    )
    assert all(f'"{name}"' in said for name in run)


def test_blocks_are_read() -> None:
    """The reader of the README finds blocks, lines and reasons, and demands a reason."""
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n<!-- not run: needs a GPU -->\n```python\ny\nz\n```"
    assert blocks(text) == [(3, "x = 1", None), (10, "y\nz", "needs a GPU")]
    for bad in ("<!-- not run -->", "<!-- not run: -->", "<!-- not run:  -->"):
        with pytest.raises(ValueError, match="say why"):
            blocks(f"{bad}\n```python\n```")


def links(page: Path) -> list[str]:
    """Where a page leads to, code left out; '#section' belongs to the link."""
    return re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    ours = [link.partition("#")[0] for link in links(page) if not link.startswith(("http", "#"))]
    assert [link for link in ours if not (page.parent / link).exists()] == []


def test_both_start_pages_say_the_same() -> None:
    """The same code and the same ways on, in either language."""
    english, chinese = ROOT / "docs" / "index.md", ROOT / "docs" / "index.zh.md"
    assert set(links(english)) <= set(links(chinese))
    codes = []
    for page in (english, chinese):
        lines = page.read_text().partition("```diff")[2].partition("```")[0].splitlines()
        codes.append([line.partition("#")[0].rstrip() for line in lines])
    assert codes[0] == codes[1]


# --- style -------------------------------------------------------------------------------------------------------

LONGEST = 60
VAGUE = {"utils", "util", "common", "helpers", "helper", "core", "base", "manager"}
# In two parts each, because this file is in the tree that is searched.
ABSOLUTE = re.compile(r"(?<![\w.~>-])/" + r"(home|root|tmp|Users|work)(/\w|\b(?![\w-]))")


def long_functions(source: str) -> list[str]:
    """Functions of more than LONGEST lines, docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found: list[Any] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    sizes = [(node.name, node.end_lineno - node.lineno + 1) for node in found]
    return [f"{name} has {size} lines" for name, size in sizes if size > LONGEST]


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    """No function over 60 lines."""
    assert long_functions(MODULES[module].read_text()) == []


def test_long_functions_are_seen() -> None:
    """The measure counts from `def` to the last line, in classes too, and allows exactly 60."""
    body = "    def f(self):\n" + "        x = 1\n" * (LONGEST - 1)
    assert long_functions(f"class A:\n{body}") == []
    assert long_functions(f"class A:\n{body}        x = 2\n") == ["f has 61 lines"]


def test_modules_are_named() -> None:
    """A module says what it holds: no utils, no helpers."""
    assert {module: part for module in MODULES for part in module.split(".") if part in VAGUE} == {}


def tracked() -> list[Path]:
    """What git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_absolute_paths() -> None:
    """Nothing in the tree depends on one machine: no absolute home, work or temporary path."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    said = []
    for path in tracked():
        text = path.read_bytes().decode(errors="ignore")
        lines = enumerate(text.splitlines(), 1)
        said += [
            f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
            for i, line in lines
            if ABSOLUTE.search(line)
        ]
    assert said == []


def test_absolute_paths_are_seen() -> None:
    """The pattern finds paths of one machine, and leaves relative ones, links and lists of words alone."""
    for bad in (
        "/" + "root/x",
        "cd /" + "tmp",
        "'/" + "home/me'",
        "=/" + "Users/a",
        "/" + "work/main",
    ):
        assert ABSOLUTE.search(bad), bad
    for good in (
        "run/tmp/x",
        ".tmp-1",
        "https://x.org/home/a",
        "a/root",
        "/" + "tmpfs",
        "/" + "workers/1",
    ):
        assert not ABSOLUTE.search(good), good
