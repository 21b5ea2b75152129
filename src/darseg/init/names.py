"""Files that name classes: text, CSV, JSON and YAML in the usual forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from darseg.data.files import parse_json, read_text
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.plain_yaml import parse_yaml

NAME_FILES = (
    *("classes", "class_names", "classnames", "labels", "label_names", "names", "categories", "class_dict", "obj"),
    *("label_colors", "label_colours", "labelmap", "label_map", "id2label", "palette", "colormap", "data", "dataset"),
    "_classes",
)  # fmt: skip
NAME_SUFFIXES = (".txt", ".names", ".csv", ".json", ".yaml", ".yml")
LARGEST_FILE, LONGEST_LINE = 1 << 20, 1000
"""Limits in bytes and characters; larger files hold something else."""

RGB = tuple[int, int, int]
Row = tuple[str, int | None, RGB | None]
"""Name, value, color."""


@dataclass(frozen=True)
class NameList:
    """Class names of a file, with their values and colors if it has them."""

    path: Path
    names: tuple[str, ...]
    values: tuple[int, ...] | None = None
    colors: tuple[RGB, ...] | None = None


def foreign_names(name_list: NameList, known: Collection[str]) -> list[str]:
    """The names of a file that a published set does not have, if they are most of them."""
    own = [name for name in name_list.names if name.casefold() not in known]
    return own if 2 * len(own) > len(name_list.names) else []


def find_names(folders: Iterable[Path], unread: list[str] | None = None) -> list[NameList]:
    """Every file in these folders that names classes, the most usual file names first.

    Args:
        unread: gets a line for each such file that is not UTF-8.
    """
    lists = []
    for folder in dict.fromkeys(folders):
        for stem in NAME_FILES:
            for suffix in NAME_SUFFIXES:
                path = folder / f"{stem}{suffix}"
                if not path.is_file() or path.stat().st_size > LARGEST_FILE:
                    continue
                try:
                    text = read_text(path, "utf-8-sig")
                    if suffix in (".txt", ".names", ".csv"):
                        rows = _rows_of_text(text)
                    else:
                        rows = _rows_of_data(parse_json(text) if suffix == ".json" else parse_yaml(text))
                except UnicodeDecodeError:
                    if unread is not None:
                        unread.append(
                            f"{path}: this file is not UTF-8, so its class names are not read. Save it as UTF-8"
                        )
                    continue
                except (OSError, ValueError, yaml.YAMLError, RecursionError):
                    continue
                names = _name_list(path, rows)
                if names:
                    lists.append(names)
    return lists


_LINES: tuple[tuple[str, Callable[[re.Match], Row]], ...] = (
    (r"([^:]+):(\d+),(\d+),(\d+):.*", lambda m: (m[1], None, (int(m[2]), int(m[3]), int(m[4])))),  # CVAT
    (
        r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\D.*)",
        lambda m: (m[4], None, (int(m[1]), int(m[2]), int(m[3]))),
    ),
    (
        r"(.*?\D)[\s,;:]+(\d+)[\s,]+(\d+)[\s,]+(\d+)",
        lambda m: (m[1], None, (int(m[2]), int(m[3]), int(m[4]))),
    ),
    (r"(\d+)[\s,:;]+(\D.*)", lambda m: (m[2], int(m[1]), None)),
)


def _rows_of_text(text: str) -> list[Row]:
    """Rows of lines in one of the usual forms; otherwise each line is a name."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if any(len(line) > LONGEST_LINE for line in lines):  # which could take hours to match
        return []
    for start in (0, 1):  # a table may have a header
        for pattern, row in _LINES:
            lines_matched = (re.fullmatch(pattern, line) for line in lines[start:])
            matches = [match for match in takewhile(bool, lines_matched) if match]
            if len(matches) == len(lines) - start > 1:
                return [row(match) for match in matches]
    return [(line, None, None) for line in lines]


def _rows_of_data(content: Any) -> list[Row]:
    """Rows of JSON or YAML; empty if it has none of the usual forms."""
    if isinstance(content, Mapping):
        for key in ("classes", "names", "labels", "categories", "class_names", "id2label"):
            if isinstance(content.get(key), (list, Mapping)):
                return _rows_of_data(content[key])
        rows: list[Row] = []
        for key, value in content.items():
            if str(key).isdigit() and isinstance(value, str):
                rows.append((value, int(key), None))
            elif isinstance(key, str) and type(value) is int:
                rows.append((key, value, None))
            elif isinstance(key, str) and _color(value):
                rows.append((key, None, _color(value)))
            else:
                return []
        return rows
    if not isinstance(content, list):
        return []
    rows = []
    for entry in content:
        if isinstance(entry, Mapping):
            number = entry.get("id")
            color = _color(entry.get("color"))
            name = entry.get(
                "name", ""
            )  # aliases of YAML may stand for a value that takes forever to write out
            name = str(name) if isinstance(name, (str, int, float)) else ""
            rows.append((name, number if type(number) is int else None, color))
        else:
            rows.append((entry if isinstance(entry, str) else "", None, None))
    return rows


def _color(value: Any) -> RGB | None:
    is_triple = isinstance(value, (list, tuple)) and len(value) == 3
    return (value[0], value[1], value[2]) if is_triple and all(type(part) is int for part in value) else None


def _name_list(path: Path, rows: Sequence[Row]) -> NameList | None:
    """Names of rows; None if the rows cannot be classes."""
    names = tuple(row[0].strip() for row in rows)
    are_paths = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names) or all(
        "/" in name for name in names
    )
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names) or "" in names or are_paths:
        return None
    values = tuple(row[1] for row in rows if row[1] is not None and 0 <= row[1] <= 65535)
    colors = tuple(row[2] for row in rows if row[2] is not None and max(row[2]) <= 255)
    return NameList(
        path,
        names,
        values=values if len(set(values)) == len(names) else None,
        colors=colors if len(set(colors)) == len(names) else None,
    )
