"""The documentation: its code runs, its recipes load, its commands parse, the site is whole and loads nothing foreign.

A block that cannot run here has a comment before it, `<!-- not run: REASON -->`; Python is then only compiled.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import yaml

import darseg
from conftest import REPOSITORY, recipe_dict
from darseg.cli import app
from darseg.errors import RecipeError
from wording import refused

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMENT = re.compile(r"<!--(?! not run: ).*?-->", re.DOTALL)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n\s*)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
INLINE = re.compile(r"`darseg ([a-z][^`]*)`")
CONSOLE = ("", "bash", "sh", "console")
MINIMAL = {
    "data": {"root": "photos", "classes": ["road", "sky"]},
    "network": {"weights": "none"},
    "rounds": [{"steps": 1}, {"steps": 1, "labeling_ratio": 0.5}, {"steps": 1, "labeling_ratio": 0.5}],
}
"""The recipe that fragments of recipes, and changes on the command line, are applied to."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its first line of text in the page.
        why: the reason why it is not run; None: it is run.
    """

    page: Path
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """All fenced blocks of a page, except what is commented out."""
    text = COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    blocks = []
    for match in FENCE.finditer(text):
        first_line = text.count("\n", 0, match.start("text")) + 1
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        blocks.append(
            Block(
                page=page,
                line=first_line,
                language=match["language"],
                text="\n".join(lines) + "\n",
                why=match["why"],
            )
        )
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text())]


def commands_in(text: str) -> Iterator[list[str]]:
    """The arguments of `darseg`, or of torchrun's `-m darseg`, on each line of a console."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ").strip()
        if not line.startswith(("darseg ", "torchrun ")):
            continue
        tokens = shlex.split(line, comments=True)
        end = next((n for n, token in enumerate(tokens) if token in ("&&", "|", ";", ">", "&")), len(tokens))
        if "darseg" in tokens[:end]:
            yield tokens[tokens.index("darseg") + 1 : end]


def command_fault(arguments: list[str], folder: Path) -> str | None:
    """The fault that the command line would report for these arguments, without running them; None: none."""
    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("darseg", list(arguments))
        name, command, rest = group.resolve_command(
            context, [*getattr(context, "_protected_args", ()), *context.args]
        )
        parameters = command.make_context(name, rest, parent=context).params
    except typer.Exit:  # --help, --version
        return None
    except Exception as error:  # click's, or typer's copy of it
        if not hasattr(error, "format_message"):
            raise
        return error.format_message()
    return recipe_fault(MINIMAL, folder, parameters.get("overrides") or [])


def recipe_fault(recipe: dict, folder: Path, overrides: list[str]) -> str | None:
    """The fault of a recipe with changes; None: it loads."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    try:
        darseg.load_recipe(folder / "recipe.yaml", overrides)
    except RecipeError as error:
        return str(error)
    return None


def merged(base: dict, change: dict) -> dict:
    """`base` with the keys of `change`, section by section."""
    result = copy.deepcopy(base)
    for key, value in change.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def run_python(blocks: list[Block]) -> None:
    """Run the blocks of a page one after the other; each knows the names of those before."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines in front, so that a failure shows the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        if block.why is None:
            exec(code, names)


def with_python() -> list[Any]:
    pages = [page for page in PAGES if any(b.page == page and b.language == "python" for b in BLOCKS)]
    return [pytest.param(page, id=page.stem) for page in pages]


@pytest.mark.parametrize("page", with_python())
def test_python_runs(
    page: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The folder holds only `tiny.yaml`, a recipe of short rounds on tiny drawn scenes."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data), sort_keys=False))
    monkeypatch.chdir(tmp_path)
    run_python([block for block in BLOCKS if block.page == page and block.language == "python"])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml" and b.why is None], ids=str)
def test_recipes_load(block: Block, tmp_path: Path) -> None:
    recipe = yaml.safe_load(block.text)
    if "variants" in recipe:
        (tmp_path / recipe["recipe"]).write_text(yaml.safe_dump(MINIMAL))
        (tmp_path / "experiment.yaml").write_text(block.text)
        assert darseg.load_experiment(tmp_path / "experiment.yaml").recipes
    elif not {"data", "network", "rounds"} <= set(recipe):
        assert recipe_fault(merged(MINIMAL, recipe), tmp_path, []) is None
    else:
        (tmp_path / "whole.yaml").write_text(block.text)
        darseg.load_recipe(tmp_path / "whole.yaml")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_commands_exist(page: Path, tmp_path: Path) -> None:
    """Every command in a block parses; in running text the command and its options exist."""
    faults = []
    for block in (block for block in BLOCKS if block.page == page and block.language in CONSOLE):
        for arguments in commands_in(block.text):
            fault = command_fault(arguments, tmp_path)
            if fault:
                faults.append(f"{block}: darseg {shlex.join(arguments)}: {fault}")
    faults += inline_faults(COMMENT.sub("", page.read_text()))
    assert not faults, "\n".join(faults)


def inline_faults(text: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    text = FENCE.sub("", text)
    faults = []
    for match in INLINE.finditer(text):
        name, *rest = match[1].split()
        if name not in group.commands:
            faults.append(f"`darseg {match[1]}`: no such command")
            continue
        parameters = group.commands[name].params
        known = {"--help"}.union(*([*option.opts, *option.secondary_opts] for option in parameters))
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
        faults += [f"`darseg {match[1]}`: no option {word}" for word in unknown]
    return faults


def test_commands_and_options_that_do_not_exist_are_noticed(tmp_path: Path) -> None:
    """The tests above can fail: they report what does not exist, and nothing else."""
    text = "\n".join(
        [
            "```",
            "$ darseg train photos.yaml --epochs 3   # no such option",
            "darseg fly photos",
            "darseg predict runs/photos",
            "darseg label RUN images labels --method best",
            "darseg train photos.yaml training.bach=4",
            "darseg plan photos.yaml rounds.9.steps=4",
            "Written to runs/photos",
            "```",
            "1. ```bash",
            "   torchrun --nproc-per-node 4 -m darseg train photos.yaml --out a \\",
            "     training.batch=4 'rounds=[{steps: 4}]' && darseg nonsense",
            "   darseg --version",
            "   ```",
            "<!-- TODO",
            "```",
            "darseg nowhere",
            "```",
            "-->",
        ]
    ).replace("1. ```bash", "   ```bash")
    first, second = blocks_of(Path("page.md"), text)
    assert (first.line, second.line) == (2, 11)
    faults = [command_fault(arguments, tmp_path) for arguments in commands_in(first.text)]
    facts = ["--epochs", "fly", "images", "best", "training.batch", "rounds.9"]
    assert len(faults) == len(facts)
    for fault, word in zip(faults, facts, strict=True):
        assert fault is not None and word.lower() in fault.lower()
    assert [command_fault(arguments, tmp_path) for arguments in commands_in(second.text)] == [None, None]
    assert inline_faults("`darseg plan --processes N`, `darseg check`, `darseg redistribute …`") == []
    assert len(inline_faults("`darseg plan --gpus N` and `darseg fly`")) == 2


def test_a_broken_example_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    good = "```python\nvalue = 3\n```\n\n```python\nassert value == 3\n```\n"
    run_python(blocks_of(page, good))
    with pytest.raises(AssertionError):
        run_python(blocks_of(page, good.replace("== 3", "== 4")))
    slow = "<!-- not run: takes a GPU -->\n```python\nraise ValueError\n```\n"
    assert [block.why for block in blocks_of(page, slow)] == ["takes a GPU"]
    run_python(blocks_of(page, slow))
    with pytest.raises(SyntaxError):
        run_python(blocks_of(page, slow.replace("ValueError", "ValueError(")))
    assert recipe_fault(merged(MINIMAL, {"training": {"crop": [65, 81]}}), tmp_path, []) is None
    assert "crops" in str(recipe_fault(merged(MINIMAL, {"training": {"crops": 65}}), tmp_path, []))


def test_ready_recipes_are_all_listed() -> None:
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert [p.name for p in (REPOSITORY / "recipes").iterdir() if f"(../recipes/{p.name})" not in text] == []


def test_the_readme_links_to_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", (REPOSITORY / "README.md").read_text())
    local = [target for target in targets if "://" not in target]
    assert local and [target for target in local if not (REPOSITORY / target).exists()] == []


def test_pictures_are_small() -> None:
    large = {p.name: p.stat().st_size for p in (REPOSITORY / "docs" / "images").iterdir()}
    assert {name: size for name, size in large.items() if size > 300_000} == {}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; a link or name that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason='the site needs pip install ".[docs]"')
    out = tmp_path_factory.mktemp("docs") / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out


class _Loads(HTMLParser):
    """Addresses that a page loads by itself: scripts, styles, fonts, pictures, frames; not links."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = {"src", "srcset", "data", "poster"} | ({"href"} if tag == "link" else set())
        self.addresses += [value or "" for name, value in attrs if name in loading]


def loaded_by(html: str) -> list[str]:
    parser = _Loads()
    parser.feed(html)
    return parser.addresses


def elsewhere(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(\w+:)?//", address.strip())]


def test_no_page_of_the_site_loads_anything_from_elsewhere(site: Path) -> None:
    assert elsewhere(loaded_by('<script src="https://unpkg.com/x"></script><a href="https://ok.org">')) != []
    assert elsewhere(loaded_by('<link href="//fonts.org/a.css"><img src="images/a.png">')) == [
        "//fonts.org/a.css"
    ]
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    foreign = {page.name: elsewhere(loaded_by(page.read_text())) for page in pages}
    assert {name: addresses for name, addresses in foreign.items() if addresses} == {}
    for style in site.rglob("*.css"):
        assert elsewhere(re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", style.read_text())) == [], style


def test_every_public_name_has_its_entry(site: Path) -> None:
    entries = set(re.findall(r'id="(darseg\.[\w.]+)"', (site / "reference.html").read_text()))
    assert [name for name, home in darseg._HOMES.items() if f"darseg.{home}.{name}" not in entries] == []


def test_files_of_the_repository_that_pages_link_to_are_in_the_site(site: Path) -> None:
    name = "recipes/camvid_1of8.yaml"
    assert f'href="{name}"' in (site / "results.html").read_text()
    assert (site / name).read_bytes() == (REPOSITORY / name).read_bytes()


def test_the_site_works_from_disk(site: Path, visit: Callable) -> None:
    """In a browser: no errors, nothing loaded from other machines, pictures are shown, the search works."""
    for name in ("tutorial.html", "how_it_works.html"):
        seen = visit((site / name).as_uri(), color_scheme="dark")
        widths = seen.page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert widths and all(widths), (name, widths)
        assert seen.errors == [] and seen.leaving_the_machine() == []
    seen.page.click("input.md-search__input")
    seen.page.keyboard.type("choose_dars")
    seen.page.wait_for_selector(".md-search-result__link")
    assert "choose_dars" in seen.page.inner_text(".md-search-result__list")
    assert seen.errors == [] and seen.leaving_the_machine() == []


def test_the_hook_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scripts/docs_hook.py: fields become lists; links to missing files and missing rooms are faults."""
    pytest.importorskip("mkdocs", reason='the site needs pip install ".[docs]"')
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    from mkdocs.exceptions import PluginError

    import docs_hook  # ty: ignore[unresolved-import]

    text = "A thing.\n\nsize: pixels,\n    both sides.\nname: its name.\n\nRaises: nothing.\nMore of it."
    assert docs_hook.listed(text) == (
        "A thing.\n\n- **size**: pixels,\n    both sides.\n- **name**: its name.\n\nRaises: nothing.\nMore of it."
    )
    page = SimpleNamespace(abs_src_path=str(tmp_path / "a.md"), src_uri="a.md")
    files: Any = SimpleNamespace(documentation_pages=lambda: [page])
    (tmp_path / "a.md").write_text("see [x](../recipes/nothing.yaml)")
    with refused(PluginError, "a.md", "../recipes/nothing.yaml"):
        docs_hook.on_files(files, None)
    with refused(PluginError, "a.md", "<!-- names of ROOM -->", "pseudo"):
        docs_hook.on_page_markdown("<!-- names of run -->", SimpleNamespace(file=page), None, files)


def test_make_docs_is_what_is_tested() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    result = subprocess.run(
        ["make", "-n", "-o", "setup", "docs"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "mkdocs build --strict" in result.stdout, result.stderr
