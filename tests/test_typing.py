"""The public names: type checkers know them, they load when first used, and renamed ones still work."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import darseg
from conftest import REPOSITORY
from wording import says

USER_SCRIPT = """\
from pathlib import Path

import numpy as np
import torch

import darseg

recipe = darseg.load_recipe("photos.yaml", ["training.batch=8"])
reveal_type(recipe)
reveal_type(recipe.training.batch)
reveal_type(darseg.train(recipe, Path("run")))
reveal_type(darseg.evaluate("run"))
reveal_type(darseg.check(recipe).faults)
reveal_type(darseg.plan(recipe).rounds)
sample = darseg.manifest_of(recipe).unlabeled[0]
reveal_type(sample)
network = darseg.load_network(darseg.RunDirectory("run").network(0))
reveal_type(network)
image = darseg.read_image(sample.image)
reveal_type(image)
prediction = darseg.decide(torch.zeros(3, 4, 4), darseg.FINE)
reveal_type(prediction)
reveal_type(darseg.predict(network, image, darseg.Protocol((65, 65))))
reveal_type(darseg.predict_for_labeling(network, image, darseg.Protocol((65, 65))).confidence)
reveal_type(darseg.Labeling("global", threshold=0.9).method)
reveal_type(darseg.Labeling(ratio=0.5).settings())
run = darseg.RunDirectory("run")
reveal_type(run.recipe)
reveal_type(run.journal.read_text())
reveal_type(run.label_set(1).kept)
builder = darseg.HistogramBuilder(network.classes)
thresholds = darseg.choose_dars(builder.build(), darseg.ClassDistribution(np.full(3, 1 / 3)), 0.5)
reveal_type(thresholds)
reveal_type(darseg.assign(prediction, thresholds, darseg.image_generator(0, 1, sample.id)))
reveal_type(darseg.Scores)
reveal_type(darseg.draw_split(recipe, "lists", fraction="1/8"))
reveal_type(darseg.run_demo("demo"))
reveal_type(darseg.view_run("run"))
"""

ALLOWED = (
    "dict[str, Any]",  # the content of a JSON file, which has no closer type
    "Mapping[str, Any]",
    "ndarray[tuple[Any, ...], ",  # numpy's NDArray: the type of its numbers is known, its shape never is
    "_SupportsArray[dtype[Any]]",  # in numpy's ArrayLike
)
"""Parts of types in which `Any` is right."""


def test_type_checkers_and_python_find_the_same_names() -> None:
    tree = ast.parse(Path(darseg.__file__).read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {
        alias.asname: str(node.module).removeprefix("darseg.") for node in imports for alias in node.names
    }
    assert homes == darseg._HOMES
    assert all(alias.name == alias.asname for node in imports for alias in node.names)


@pytest.fixture(scope="module")
def ty() -> Path:
    path = Path(sys.executable).with_name("ty")
    if not path.exists():
        pytest.skip(f"no type checker here: {path} does not exist (pip install ty)")
    return path


def reported(ty: Path, script: Path) -> list[str]:
    """The lines that the type checker reports about a script, each "line:column: kind[rule] message"."""
    command = [ty, "check", "--python", sys.prefix, "--extra-search-path", REPOSITORY / "src"]
    result = subprocess.run(
        [*command, "--output-format", "concise", script], cwd=script.parent, capture_output=True, text=True
    )
    assert result.returncode in (0, 1), result.stderr
    lines = [line.removeprefix(f"{script.name}:") for line in result.stdout.splitlines()]
    return [line for line in lines if re.match(r"\d+:\d+: ", line) and "undefined-reveal" not in line]


def test_public_names_have_types(ty: Path, tmp_path: Path) -> None:
    assert not vague_types(ty, tmp_path / "user.py", USER_SCRIPT)


def test_attributes_of_public_names_have_types(ty: Path, tmp_path: Path) -> None:
    """Every public name, and every public attribute that a public class defines."""
    lines = ["import darseg"]
    for name in darseg.__all__:
        value = getattr(darseg, name)
        lines.append(f"reveal_type(darseg.{name})")
        if isinstance(value, type):
            attributes = {*vars(value).get("__annotations__", {}), *vars(value)}
            lines.append(f"def look(x: darseg.{name}) -> None:\n    pass")
            lines += [f"    reveal_type(x.{key})" for key in sorted(attributes) if not key.startswith("_")]
    assert len(lines) > 250
    assert not vague_types(ty, tmp_path / "user.py", "\n".join(lines))


def vague_types(ty: Path, script: Path, code: str) -> list[str]:
    """The lines of code whose revealed type says nothing, with that type. The code may have no faults."""
    script.write_text(code)
    lines = reported(ty, script)
    revealed = [line for line in lines if "revealed-type" in line]
    assert len(revealed) == code.count("reveal_type(")
    assert len(lines) == len(revealed), f"the script has faults: {set(lines) - set(revealed)}"
    vague = []
    for line in revealed:
        kind = line.partition("Revealed type: ")[2].strip("`")
        for part in ALLOWED:
            kind = kind.replace(part, "")
        if re.search(r"\bAny\b|Unknown|Todo", kind):
            vague.append(f"{code.splitlines()[int(line.split(':')[0]) - 1].strip()}: {kind}")
    return vague


@pytest.mark.parametrize("kind", ["Any", "dict", "list[Any]", "np.ndarray"])
def test_a_vague_type_is_noticed(ty: Path, tmp_path: Path, kind: str) -> None:
    code = (
        f"from typing import Any\nimport numpy as np\ndef f() -> {kind}: raise ValueError\nreveal_type(f())"
    )
    vague = vague_types(ty, tmp_path / "user.py", code)
    assert len(vague) == 1 and vague[0].startswith("reveal_type(f())")


def test_a_misspelled_public_name_is_a_fault(ty: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("import darseg\n\ndarseg.load_recipes\n")
    assert any(
        "load_recipes" in line and line.startswith("3:") for line in reported(ty, tmp_path / "user.py")
    )


CALL_OLD_NAME = """
import sys, warnings
import darseg
{imports}
home = sys.modules.get("darseg.{home}") or __import__("darseg.{home}", fromlist=["{new}"])
home.{new} = lambda *arguments, **options: print("called with", arguments, options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    darseg.{old}{arguments}
print(caught[0].category.__name__, caught[0].filename == "<string>", caught[0].message)
"""


@pytest.mark.parametrize(
    "imports", ["", "import darseg.demo.scenes, darseg.view.viewer"], ids=["fresh", "after"]
)
@pytest.mark.parametrize(
    ("home", "new", "arguments", "received"),
    [
        ("demo.demo", "run_demo", "('folder', 3, console=None)", "('folder', 3) {'console': None}"),
        (
            "view.viewer",
            "view_run",
            "('run', None, 0, False, str)",
            "('run', None, 0) {'open_browser': False, 'say': <class 'str'>}",
        ),
    ],
    ids=["demo", "view"],
)
def test_old_names_of_functions_warn_and_work(
    home: str, new: str, arguments: str, received: str, imports: str
) -> None:
    """With every way to pass arguments that version 0.2 allowed."""
    old = home.partition(".")[0]
    code = CALL_OLD_NAME.format(old=old, home=home, new=new, imports=imports, arguments=arguments)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    called, warned = result.stdout.splitlines()
    assert called == f"called with {received}"
    says(warned, "DeprecationWarning True", f"darseg.{old}", f"darseg.{new}")


@pytest.mark.parametrize("name", ["load_recipe", "Recipe"])
def test_the_recipes_old_module_still_has_its_names_and_warns(name: str) -> None:
    home = importlib.import_module("darseg.config")
    with pytest.warns(DeprecationWarning) as caught:
        value = getattr(home, name)
    assert value is getattr(darseg, name) and caught[0].filename == __file__
    says(str(caught[0].message), f"darseg.config.{name}", "0.4", f"darseg.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        home.nonsense  # noqa: B018
