"""The house keeps its rules: contracts, doors, names, sizes, and a README that runs.

How to read a failure: every rule is a function that returns sentences, one per breach, with file
and line. Each rule is also shown a synthetic breach, so a rule that has stopped seeing anything
turns red too.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_ema

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "dist_ema"

MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts): path
    for path in sorted(HOUSE.rglob("*.py"))
}


# --- imports -------------------------------------------------------------------------------------


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """(line, module as dotted path, name taken from it) of every import, wherever in the file it
    stands.
    """
    package = ["dist_ema", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, source, alias.name) for alias in node.names)


def test_contracts_hold() -> None:
    """The package contracts of pyproject.toml hold: import-linter."""
    assert linted(ROOT).returncode == 0


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("averaging/clock.py", "from ..checkpoint import atomic", "Packages import only"),
        ("sharding/records.py", "from ..averaging import clock", "Packages import only"),
        ("foreign/recognise.py", "def f():\n    from ..ema import EMA", "Packages import only"),
        ("checkpoint/crc32.py", "from ..cli import console", "Packages import only"),
        ("schedules/decays.py", "import torch", "never imports torch"),
        ("offline/diff.py", "from ..sharding import records", "never imports torch"),
        ("sharding/geometry.py", "import triton", "A GPU compiler"),
        ("compat/yolo.py", "from ..offline import diff", "Other people's loops"),
        ("nowhere.py", "", "Packages import only"),
    ],
)
def test_contracts_see(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """A synthetic breach of each contract turns it red, hidden in a function too."""
    shutil.copytree(HOUSE, tmp_path / "dist_ema", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "dist_ema" / module, "a") as file:
        file.write(f"\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1
    broken = [text for text in done.stdout.splitlines() if "BROKEN" in text]
    assert any(contract in text for text in broken) or "Exhaustive" in done.stdout + done.stderr, (
        done
    )


def linted(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the tree at `root`."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)


# --- the door -------------------------------------------------------------------------------------


def foreign(path: str) -> bool:
    """A wrapper or a private name of torch.

    `_foreach_*` is torch's documented name for list kernels.
    """
    if re.match(r"torch\.(distributed\.fsdp|nn\.parallel)(\.|$)", path):
        return True
    parts = path.split(".")
    private = [
        part for part in parts if part.startswith("_") and not re.match(r"__\w+__$|_foreach_", part)
    ]
    return parts[0] == "torch" and bool(private)


def leaks(module: str, source: str) -> list[str]:
    """Where a module names wrappers or private torch: by import, or by attributes of an imported
    torch module.
    """
    tree = ast.parse(source)
    paths = [
        (line, f"{origin}.{name}" if name else origin)
        for line, origin, name in imported(module, tree)
    ]
    said = [f"{module}:{line} imports {path}" for line, path in paths if foreign(path)]
    known = bound(tree)
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"[\w.]+", text):
            root, *rest = text.split(".")
            # NOTE: only modules are followed; what a class of torch has (Tensor._version) is its
            # own affair.
            if (
                root in known
                and known[root].split(".")[-1].islower()
                and foreign(".".join([known[root], *rest]))
            ):
                said.append(f"{module}:{node.lineno} names {text}")
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
    "module",
    [
        module
        for module in MODULES
        if not module.startswith("sharding.") and module != "offline.doctor_worker"
    ],
)
def test_wrappers_stay_in_sharding(module: str) -> None:
    """Only sharding/ may name FSDP, DDP or private torch: everything behind it is plain tensors and
    regions.
    """
    assert leaks(module, MODULES[module].read_text()) == []


def test_sharding_would_leak() -> None:
    """The checker sees the one module that must name wrappers; if it does not, it sees nothing
    anywhere.
    """
    names = [name for name in MODULES if name.startswith("sharding.")]
    assert sum(len(leaks(name, MODULES[name].read_text())) for name in names) >= 5


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
    assert leaks("sharding.x", source)


def test_leaks_allows() -> None:
    """Public torch, dunders, list kernels, and private names of our own pass the door."""
    ours = "from .x import _y\nimport sys\nsys._getframe()"
    torchs = "import torch\nfrom torch import Tensor\n"
    torchs += "torch.__version__\ntorch._foreach_copy_\nTensor._make_subclass"
    assert leaks("sharding.x", f"{ours}\n{torchs}") == []


# --- names ----------------------------------------------------------------------------------------


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
    """`__all__` is sorted, exists, and holds every public def and class and all that another room
    imports.
    """
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
    assert "Shard" in TAKEN["sharding.records"]
    assert sorted(["b", "Ab", "C", "AA"], key=rank) == ["AA", "C", "Ab", "b"]


def test_front_door_is_lazy() -> None:
    """`import dist_ema` and the schedules must not import torch: PEP 562 in __init__.py,
    `_ROOMS`.
    """
    code = (
        "import sys, json, dist_ema; bare = sorted({'torch', 'numpy'} & set(sys.modules)); "
        "dist_ema.HalfLife(3); print(json.dumps([bare, 'torch' in sys.modules, dir(dist_ema)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare, heavy, names = json.loads(done.stdout)
    assert (bare, heavy) == ([], False)
    assert set(names) == {*dist_ema.__all__, "__version__"}


HEAVY = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"]
HEAVY += ["torch._dynamo", "torch._inductor", "sympy", "triton", "numba", "rich", "matplotlib"]


def test_ema_imports_no_wrapper(tmp_path: Path) -> None:
    """`from dist_ema import EMA` and the verbs on a plain model import no wrapper, DCP or compiler:
    beyond torch that is 0.1 s, and with FSDP and DTensor it was 0.9 s."""
    code = f"""
import json, sys, torch
before = set(sys.modules)
from dist_ema import EMA
ema = EMA(torch.nn.Linear(3, 2))
ema.update()
with ema.swap():
    pass
ema.gather(), ema.save({str(tmp_path / "ema-1")!r}), ema.load({str(tmp_path / "ema-1")!r})
loaded = sorted(set(sys.modules) - before)
print(json.dumps([[m for m in loaded if m == h or m.startswith(h + ".")][:3] for h in {HEAVY}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert dict(zip(HEAVY, json.loads(done.stdout), strict=True)) == {name: [] for name in HEAVY}


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


# --- numbers and settings -------------------------------------------------------------------------


def test_version() -> None:
    """The version in __init__.py is the one that the first heading of the CHANGELOG names."""
    heading = next(
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    )
    found = re.search(r"\d+\.\d+\.\d+\S*", heading)
    assert found is not None, f"no version in {heading!r}"
    assert found[0] == dist_ema.__version__


def test_warnings_are_errors(pytestconfig: pytest.Config) -> None:
    """`filterwarnings = ["error"]` in pyproject.toml: first, so that what follows can only except
    by name.
    """
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)


# --- the README -----------------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[int, str, str | None]]:
    """(line, code, reason not to run it) of every python block.

    Raises ValueError for a reason left out.
    """
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
    """A python block of the docs is part of a page that a test runs from top to bottom, or is
    marked `no-run`.
    """
    run = {"accelerate.md", "lightning.md", "transformers.md", "recipes.md", "schedules.md"}
    assert {
        page.name for page in ROOT.glob("docs/**/*.md") if "```python\n" in page.read_text()
    } == run
    said = "".join(
        path.read_text() for path in ROOT.glob("tests/test_*.py") if path != Path(__file__)
    )
    assert all(f'"{name}"' in said for name in run)


def test_blocks_are_read() -> None:
    """The reader of the README finds blocks, lines and reasons, and demands a reason."""
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n"
    text += "<!-- not run: needs a GPU -->\n```python\ny\nz\n```"
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


# --- style ----------------------------------------------------------------------------------------

LONGEST = 60
VAGUE = {"utils", "util", "common", "helpers", "helper", "core", "base", "manager"}
# In two parts each, because this file is in the tree that is searched.
ABSOLUTE = re.compile(r"(?<![\w.~>-])/" + r"(home|root|tmp|Users|work)(/\w|\b(?![\w-]))")


def long_functions(source: str) -> list[str]:
    """Functions of more than LONGEST lines, docstrings left out."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            prose = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            sizes.append((node.name, (node.end_lineno or 0) - node.lineno + 1 - prose))
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
    """The pattern finds paths of one machine, and leaves relative ones, links and lists of words
    alone.
    """
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


# --- words and reach -----------------------------------------------------------------------------

COLUMNS = 100
REACHES = 20
OLD_WORDS = {
    "said",
    "told",
    "odd",
    "mine",
    "theirs",
    "hands",
    "twin",
    "loan",
    "lend",
    "lent",
    "scribe",
    "gate",
    "duty",
    "sink",
    "telemetry",
    "agree",
    "look",
    "piece",
    "pieces",
    "bucket",
    "hole",
    "slot",
}


RETIRED = {"Behind", "Board", "Copied", "Found", "Job", "Line", "Listed", "Part", "Place", "Reader"}
RETIRED |= {"Ready", "Report", "Source", "Tree"}


def old_words(source: str) -> list[str]:
    """Identifiers with a word of OLD_WORDS in them, as 'line: identifier'."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "name", "arg", "asname"):
            name = getattr(node, field, None)
            words = (
                re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) if isinstance(name, str) else []
            )
            if OLD_WORDS & {word.lower() for word in words}:
                found.add(f"{getattr(node, 'lineno', 0)}: {name}")
    return sorted(found)


def retired_classes(source: str) -> list[str]:
    """Classes whose whole name the glossary replaced, private or not."""
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return [node.name for node in classes if node.name.strip("_") in RETIRED]


@pytest.mark.parametrize("module", MODULES)
def test_no_old_words(module: str) -> None:
    """No identifier holds a word that the glossary replaced, and no class has such a name."""
    source = MODULES[module].read_text()
    assert (old_words(source), retired_classes(source)) == ([], [])


def test_old_words_are_seen() -> None:
    """Names are split at underscores and capitals; a longer word that holds an old one passes."""
    for bad in (
        "said = 1",
        "class ScribeJob: ...",
        "def f(its_twin): ...",
        "x.SINK",
        "import a as odd",
    ):
        assert old_words(bad), bad
    assert retired_classes("class _Tree: ...\nclass ObjectTree: ...") == ["_Tree"]
    assert old_words("aside = oddity = delegate = navigate = 'said'") == []


def wide_lines(source: str) -> list[int]:
    """Numbers of the lines over COLUMNS characters."""
    return [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]


@pytest.mark.parametrize("module", MODULES)
def test_no_wide_lines(module: str) -> None:
    """Code, strings, docstrings and comments keep to COLUMNS columns."""
    assert wide_lines(MODULES[module].read_text()) == []


def own_buffer_keys(sources: dict[str, str]) -> set[str]:
    """The modules with the key "own_buffers" in quotes."""
    return {name for name, source in sources.items() if re.search("([\"'])own_buffers\\1", source)}


def test_own_buffers_have_owners() -> None:
    """At most 3 modules know the key of the manifest: everyone else asks `Manifest`."""
    found = own_buffer_keys({name: path.read_text() for name, path in MODULES.items()})
    assert len(found) <= 3, found


def test_own_buffer_keys_are_seen() -> None:
    """Either quote counts; an attribute or an argument does not."""
    sources = {"a": 'x["own_buffers"]', "b": "x['own_buffers']", "c": "x.own_buffers"}
    assert own_buffer_keys(sources) == {"a", "b"}


def test_wide_lines_are_seen() -> None:
    """A line of exactly COLUMNS characters passes, one more does not."""
    assert wide_lines(f"{'x' * COLUMNS}\n{'x' * (COLUMNS + 1)}") == [2]


def private_names(source: str) -> set[str]:
    """The `_names` that a module defines: functions, classes, variables, attributes of self."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            names.add(node.attr)
    return {name for name in names if re.match(r"_[^_]", name)}


def reaches(source: str, private: set[str]) -> set[int]:
    """Lines that take a private name of the package: by attribute, by import or as a string."""
    # Tensor and pickle have private names that the package has too; those are not ours.
    names = private - private_names(source) - {*dir(torch.Tensor), *dir(pickle)}
    lines = set()
    for node in ast.walk(ast.parse(source)):
        taken = [getattr(node, field, None) for field in ("attr", "name", "value")]
        if any(isinstance(name, str) and name in names for name in taken):
            lines.add(node.lineno)  # type: ignore[attr-defined]
    return lines


def test_tests_use_public_names() -> None:
    """Tests reach into the package on at most REACHES lines: what they need is public there."""
    private = set().union(*(private_names(path.read_text()) for path in MODULES.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.glob("tests/**/*.py"))
        for line in sorted(reaches(path.read_text(), private))
    ]
    assert len(found) <= REACHES, found


def test_reaches_are_seen() -> None:
    """Attributes, imports and strings count; names of a test's own and of torch do not."""
    private = private_names(
        "def _f(): ...\nclass A:\n    def __init__(self): self._alpha = 1\n_N = 2"
    )
    assert private == {"_f", "_alpha", "_N"}
    assert reaches("ema._alpha\nfrom room import _f\nsetattr(room, '_N', 3)", private) == {1, 2, 3}
    assert reaches("def _f(): ...\nroom._f\nema.plan\nx._version", private | {"_version"}) == set()


def own_privates(source: str) -> list[str]:
    """`._name` of what is called ema or _ema, or of an attribute with that name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            owner = ast.unparse(node.value)
            if re.search(r"(^|[._])ema$", owner):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith(("compat", "integrations"))]
)
def test_drop_ins_use_the_extension_api(module: str) -> None:
    """compat and integrations take no private attribute of an EMA."""
    assert own_privates(MODULES[module].read_text()) == []


def test_own_privates_are_seen() -> None:
    """The EMA of a drop-in is called ema, wherever it hangs; its public attributes pass."""
    for bad in ("ema._average", "self.ema._ranks.size", "f(self._ema._x)", "their_ema._x"):
        assert own_privates(bad), bad
    assert own_privates("ema.weights\nself._ema.update()\nlive._replace()\nschema._x") == []
