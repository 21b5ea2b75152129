"""The laws of the house: who imports whom, what starts fast, what is public, one tree of errors."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import darseg
from conftest import REPOSITORY
from wording import read_snapshot, says

sys.path.insert(0, str(REPOSITORY / "scripts"))
from lengths import FILE, FUNCTION, POSITIONAL, files, functions, positional_calls

SOURCE = REPOSITORY / "src" / "darseg"
FRONT_ROOMS = ("report", "view", "init", "annotate", "demo")
ROOMS = (
    ("data",),
    ("model",),
    ("pseudo", "training"),
    ("methods",),
    ("run",),
    ("experiment",),
    FRONT_ROOMS,
    ("cli",),
)
"""Each room imports only rooms before it; rooms that stand together do not know each other."""
FIRST_LINE = 100
"""Characters that the first line of a docstring must stay below."""
FRONT = {"__init__.py", "__main__.py"}  # the package itself: names things, does nothing
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0] if len(module.parts) > 1 else module.stem


def imported(text: str) -> Iterator[str]:
    """The modules of darseg that a source text imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "darseg")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "darseg":
                yield from (f"darseg.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("darseg."):
                yield str(node.module)


def place_of(room: str) -> int | None:
    """Where a room stands in the law's order, None for an unknown one."""
    return next((place for place, rooms in enumerate(ROOMS) if room in rooms), None)


def breach(room: str, other: str) -> bool:
    """Whether `room` may not import from `other`."""
    if other == room or other in {"errors", "choices", "__version__"}:
        return False
    if other == "config":
        return room not in ("run", "experiment", "cli", *FRONT_ROOMS)
    here, there = place_of(room), place_of(other)
    return here is None or there is None or there >= here  # config imports nothing but errors


def is_plain(text: str) -> bool:
    """Whether a source text imports nothing but the standard library and darseg.errors."""
    nodes = list(ast.walk(ast.parse(text)))
    roots = {
        alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    return roots <= {*sys.stdlib_module_names, "darseg"} and set(imported(text)) <= {"darseg.errors"}


@pytest.mark.parametrize("module", [m for m in MODULES if str(m) not in FRONT], ids=Path.as_posix)
def test_a_room_imports_only_rooms_to_its_left(module: Path) -> None:
    names = set(imported((SOURCE / module).read_text())) - {"darseg"}
    wrong = [name for name in names if breach(room_of(module), name.split(".")[1])]
    if room_of(module) == "config":
        # The recipe shares values and their bounds with the rooms, so it may import a room's module that is only such
        # values: `pseudo/labeling`. Anything slower would make every check of a recipe wait for it.
        wrong = [
            name
            for name in wrong
            if not is_plain((SOURCE.parent / f"{name.replace('.', '/')}.py").read_text())
        ]
    assert not wrong, f"{module} may not import {wrong}"


def without_type_checking(text: str) -> str:
    """The source text without imports that only type checkers see."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Inside functions neither: an import there only hides the circle."""
    paths = {".".join(("darseg", *m.with_suffix("").parts)): m for m in MODULES if m.stem not in FRONT}
    graph = {
        name: paths.keys() & set(imported(without_type_checking((SOURCE / path).read_text())))
        for name, path in paths.items()
    }
    assert "darseg.model.network" in graph["darseg.model.predict"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_law_would_notice() -> None:
    text = "def f():\n    from darseg.run.rounds import train\n    import darseg.pseudo.assign\nfrom darseg import config"
    assert sorted(imported(text)) == ["darseg.config", "darseg.pseudo.assign", "darseg.run.rounds"]
    pairs = [
        ("model", "run"),
        ("training", "pseudo"),
        ("data", "config"),
        ("errors", "data"),
        ("data", "new"),
        ("report", "view"),
        ("pseudo", "training"),
        ("methods", "run"),
        ("run", "experiment"),
        ("experiment", "report"),
        ("config", "data"),
    ]
    assert all(breach(*pair) for pair in pairs)
    plain = "from dataclasses import dataclass\nfrom darseg.errors import faults"
    assert is_plain(plain)
    slow = (
        "import numpy as np",
        "def f():\n    from torch import nn",
        "from darseg.data.files import write_whole",
    )
    assert not any(is_plain(f"{plain}\n{line}") for line in slow)
    assert not breach("run", "config") and not breach("pseudo", "data") and not breach("cli", "demo")
    assert not breach("experiment", "config") and not breach("report", "experiment")


def test_every_module_is_in_a_room_of_the_readmes_map() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    shown = readme[readme.index("src/darseg/\n") :]
    missing = [m for m in MODULES if m.name not in FRONT and m.stem not in shown]
    assert not missing


def test_help_loads_nothing_slow() -> None:
    code = (
        "import sys; sys.argv = ['darseg', '--help']\n"
        "from darseg.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "slow = {'torch', 'cv2', 'numpy', 'pydantic', 'yaml', 'tensorboard', 'timm'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in ("demo", "train", "evaluate", "predict", "check", "plan"))


def test_public_names_are_there_and_documented() -> None:
    for name in darseg.__all__:
        value = getattr(darseg, name)
        assert value is not None
        if callable(value):
            assert (value.__doc__ or "").strip(), f"darseg.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        darseg.nonsense  # noqa: B018


def test_all_errors_grow_on_one_tree() -> None:
    errors = importlib.import_module("darseg.errors")
    kinds = [value for value in vars(errors).values() if getattr(value, "__module__", "") == "darseg.errors"]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 8 and all(issubclass(kind, errors.DarsegError) for kind in kinds)
    assert all(kind.__name__ in errors.__doc__ for kind in kinds)


def test_the_wording_file_names_tests_that_are_there() -> None:
    functions = {
        f"{path.name}::{node.name}"
        for path in (REPOSITORY / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    stale = [name for name in read_snapshot() if re.split(r"[\[ ]", name)[0] not in functions]
    assert not stale, f"delete these entries of tests/wording.txt: {stale}"


def test_what_differs_between_machines_is_left_out_of_the_wording(tmp_path: Path) -> None:
    says(f"{tmp_path}/a.png: 12 of 34.56 s", "a.png", "12", vary=[r"\d+\.\d+ s"])
    with pytest.raises(AssertionError, match=r"'b\.png'"):
        says(f"{tmp_path}/a.png", "b.png")


def prints(text: str) -> int:
    """How often a source text calls print."""
    calls = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return sum(isinstance(called, ast.Name) and called.id == "print" for called in calls)


def test_only_say_prints() -> None:
    """It shows control characters of foreign names as escapes; so does the journal, for the rooms."""
    printing = {str(path.relative_to(SOURCE)): prints(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert {name: count for name, count in printing.items() if count} == {"cli/tables.py": 1}


@pytest.mark.parametrize(
    ("measure", "limit"), [(functions, FUNCTION), (files, FILE), (positional_calls, POSITIONAL)]
)
def test_limits_of_length(measure: Callable[[Path], Iterator[tuple[int, str]]], limit: int) -> None:
    measured = list(measure(SOURCE))
    above = [f"{name}: {number}" for number, name in measured if number > limit]
    assert len(measured) > 100 and not above, f"above the limit of {limit}: {above}"


def test_the_limits_would_notice(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    body = "\n".join(f"    x = {line}" for line in range(70))
    (tmp_path / "room" / "long.py").write_text(
        f"def f(a, b, c, d):\n{body}\n\n\nf(1, 2, 3, 4)\n" + "\n" * 400
    )
    assert list(functions(tmp_path)) == [(71, "room/long.py:1 f")]
    assert list(files(tmp_path)) == [(474, "room/long.py")]
    assert list(positional_calls(tmp_path)) == [(4, "room/long.py:74 f")]


def test_first_lines_of_docstrings_fit() -> None:
    """STYLE: a docstring's first line says what the function returns or does, in under 100 characters."""
    long = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if len(first) >= FIRST_LINE:
                    name = getattr(node, "name", "module")
                    long.append(f"{path.relative_to(SOURCE)} {name}: {len(first)}")
    assert len(long) < 500 and not long, "\n".join(long)


def test_the_lowest_versions_that_ci_installs_are_those_of_the_package() -> None:
    """constraints-min.txt has exactly the lower bounds; opencv's releases have a fourth number."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for name in ("coco", "onnx", "sbd", "timm") for line in extras[name]),
    ]
    lines = (REPOSITORY / "constraints-min.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = dict(line.split(">=") for line in wanted)
    assert bounds.keys() == exact.keys()
    assert all(
        version == exact[name] or exact[name].startswith(f"{version}.") for name, version in bounds.items()
    )
