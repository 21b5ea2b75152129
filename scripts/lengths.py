"""Print the longest functions and files of darseg, and calls of its own code with many positional arguments.

    python scripts/lengths.py [SOURCE_FOLDER]

tests/test_house.py keeps the limits.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION, FILE, POSITIONAL = 60, 450, 3
"""Most lines of a function and of a file; most positional arguments of a call of our own functions and classes."""

NAMES_OF_OTHERS = {"view", "forward", "zeros"}
"""Methods of ours whose names PyTorch's tensors and modules have, too: their calls cannot be told apart."""

SHOWN = 12


def functions(source: Path) -> Iterator[tuple[int, str]]:
    """Lines and "file:line name" of every function below a folder."""
    for path, tree in trees(source):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield lines, f"{path.relative_to(source)}:{node.lineno} {node.name}"


def files(source: Path) -> Iterator[tuple[int, str]]:
    """Lines and name of every file below a folder."""
    for path, _ in trees(source):
        yield len(path.read_text().splitlines()), path.relative_to(source).as_posix()


def positional_calls(source: Path) -> Iterator[tuple[int, str]]:
    """Positional arguments and "file:line name" of every call of a function, class or method that darseg defines."""
    parsed = list(trees(source))
    methods = {
        item.name
        for _, tree in parsed
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
    } - NAMES_OF_OTHERS
    for path, tree in parsed:
        own = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        own |= {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("darseg")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            if called in own or (isinstance(node.func, ast.Attribute) and node.func.attr in methods):
                called = called or f".{node.func.attr}"
                yield len(node.args), f"{path.relative_to(source)}:{node.lineno} {called}"


def trees(source: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file below a folder, parsed."""
    for path in sorted(source.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def main() -> None:
    """Print a table for each limit."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "darseg")
    for title, limit, measured in (
        ("lines of functions", FUNCTION, functions(source)),
        ("lines of files", FILE, files(source)),
        ("positional arguments of calls", POSITIONAL, positional_calls(source)),
    ):
        ranked = sorted(measured, reverse=True)
        above = sum(number > limit for number, _ in ranked)
        print(f"\n{title}: {len(ranked)}, {above} above the limit of {limit}")
        for number, name in ranked[:SHOWN]:
            print(f"{number:6} {name}")


if __name__ == "__main__":
    main()
