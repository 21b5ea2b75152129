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
builder = darseg.HistogramBuilder(network.classes)
thresholds = darseg.choose_dars(builder.build(), darseg.ClassDistribution(np.full(3, 1 / 3)), 0.5)
reveal_type(thresholds)
reveal_type(darseg.assign(prediction, thresholds, darseg.image_generator(0, 1, sample.id)))
reveal_type(darseg.Scores)
reveal_type(darseg.draw_split(recipe, "lists", fraction="1/8"))
reveal_type(darseg.run_demo("demo"))
reveal_type(darseg.view_run("run"))
"""


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
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    lines = reported(ty, tmp_path / "user.py")
    revealed = [line.partition("Revealed type: ")[2].strip("`") for line in lines if "revealed-type" in line]
    assert len(revealed) == USER_SCRIPT.count("\nreveal_type(")
    assert len(lines) == len(revealed), f"the script has faults: {lines}"
    vague = [kind for kind in revealed if kind == "Any" or re.search("Unknown|Todo", kind)]
    assert not vague, f"types that say nothing: {vague}"


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
