"""What the site's build (mkdocs.yml) does in addition: links out of docs/, and the list of public names.

- A page may link to a file of the repository, such as `[recipe](../recipes/camvid_1of8.yaml)`. The link works on the
  code host, and in the site, which gets a copy of that file.
- `<!-- names of ROOM -->` becomes an entry for every public name of that room.
- Lines `field: what it is` of a docstring become a list.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import darseg

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")
NAMES = re.compile(r"^<!-- names of (\w+) -->$", re.MULTILINE)

FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


def on_files(files: Files, config: Any) -> Files:
    """Copy the files outside docs/ that pages link to."""
    for page in list(files.documentation_pages()):
        for target in OUTSIDE.findall(Path(page.abs_src_path).read_text()):
            if target.endswith(".md") or not (REPOSITORY / target).is_file():
                raise PluginError(
                    f"{page.src_uri} links to ../{target}. Expected a file that exists, and not a page (.md)."
                )
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, content=(REPOSITORY / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links to the copied files and an entry for each public name."""
    rooms = set(NAMES.findall(markdown))
    missing = {home.split(".")[0] for home in darseg._HOMES.values()} - rooms
    if rooms and missing:
        raise PluginError(
            f"{page.file.src_uri} has no <!-- names of ROOM --> for {', '.join(sorted(missing))}. Add one for each room."
        )
    markdown = NAMES.sub(lambda match: entries(match[1]), markdown)
    return OUTSIDE.sub(r"](\1)", markdown)


def entries(room: str) -> str:
    """Directives for mkdocstrings for the public names of a room: functions first, then types and constants."""
    names = [name for name, home in darseg._HOMES.items() if home.split(".")[0] == room]
    lines = []
    for name in sorted(names, key=lambda name: (not name.islower(), name)):
        lines += [
            f"::: darseg.{darseg._HOMES[name]}.{name}",
            f"    options: {{heading: darseg.{name}, toc_label: {name}}}",
            "",
        ]
    return "\n".join(lines)


class Fields(griffe.Extension):
    """Makes lists of the fields of a value type: docstrings have them as plain lines, which Markdown would join."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The text with paragraphs of `field: …` lines as lists; deeper lines continue their field."""
    paragraphs = text.split("\n\n")
    for index, paragraph in enumerate(paragraphs):
        lines = paragraph.split("\n")
        if FIELD.match(lines[0]) and all(FIELD.match(line) or line.startswith("    ") for line in lines):
            paragraphs[index] = "\n".join(
                FIELD.sub(r"- **\1**: ", line, count=1) if FIELD.match(line) else line for line in lines
            )
    return "\n\n".join(paragraphs)
