"""Parts of a recipe that its sections share: numbers, paths, and weights to download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

Key = tuple[str | int, ...]  # ("rounds", 0, "steps")

Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


def _pair(value: Any) -> Any:
    return (value, value) if type(value) is int else value


Size = Annotated[tuple[Count, Count], BeforeValidator(_pair)]  # height and width; a single number means both


def or_word(word: str, message: str) -> WrapValidator:
    """Accept a word as well; another text has the fault `message`.

    A union would list the faults of each of its kinds.
    """

    def check(value: Any, usual: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str) and value != word:
            raise ValueError(message)
        return value if value == word else usual(value)

    return WrapValidator(check)


# A size, or "whole".
Window = Annotated[
    Size,
    or_word("whole", "should be height and width, as in [713, 713], or whole"),
    PlainSerializer(lambda value: value if value == "whole" else list(value)),
]


def falling(bounds: tuple[float, float] | None) -> str | None:
    """What is wrong with two bounds that are in the wrong order; otherwise None."""
    if bounds is None or bounds[0] <= bounds[1]:
        return None
    return f"found {list(bounds)}; the first number should be the smaller one"


def _path(value: str) -> str:
    if (longest := max(len(part.encode("utf-8", "surrogatepass")) for part in value.split("/"))) > 255:
        raise ValueError(f"has a name of {longest} bytes; file systems allow 255")
    if "\0" in value:
        raise ValueError("has the character NUL, which no path may have")
    return value


FilePath = Annotated[StrictStr, AfterValidator(_path)]


RoundNumber = Annotated[StrictInt, Field(ge=0)]

# A round, or "none".
Continued = Annotated[
    RoundNumber,
    or_word("none", "should be the number of an earlier round, or none"),
    PlainSerializer(lambda value: value),
]


def _round_or_path(value: Any) -> int | str:
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and value:
        return _path(value)
    raise ValueError("should be the number of an earlier round, or a path")


LabelsFrom = Annotated[int | str, PlainValidator(_round_or_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        """Keys, relative to this section, whose values do not work together, each with what to do about it."""
        yield from ()


SHORTEST_DIGEST = 16  # hex digits, unless over https: a file with 8 given digits can be made in minutes


class WeightsFile(Section):
    """Weights to download; the digest is checked before the file is read."""

    url: Annotated[StrictStr, Field(pattern=r"^(https?|file)://")]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-fA-F]{8,64}$")]  # all of it or its first digits

    @model_validator(mode="after")
    def _check(self) -> WeightsFile:
        urlsplit(self.url)  # raises ValueError
        if len(self.sha256) < SHORTEST_DIGEST and not self.url.startswith("https:"):
            raise ValueError("too few digits")
        return self


def check_label_parts(value: Any) -> Any:
    """A value of data.label_parts: class → pattern, and "other". Raises ValueError."""
    if not isinstance(value, Mapping) or not set(value) - {"other"}:
        raise ValueError('should be class: pattern, as in {cat: "{id}_mask_1", other: background}')
    for name, pattern in value.items():
        if not isinstance(name, str) or not isinstance(pattern, str):
            raise ValueError(f"{name}: {pattern!r} should be text")
        if name != "other" and pattern.count("{id}") != 1:
            raise ValueError(
                f"{name}: {pattern!r} should hold {{id}} once, as in {name}/{{id}} or {{id}}_{name}"
            )
    return dict(value)


def check_weights(value: Any) -> Any:
    """A value of network.weights: "none", a path, or a `WeightsFile`. Raises ValueError."""
    if isinstance(value, str) and value:
        return _path(value)
    if isinstance(value, WeightsFile):
        return value
    if isinstance(value, Mapping):
        try:
            return WeightsFile(**value)
        except (ValidationError, TypeError):
            raise ValueError(
                "should have exactly two keys: url (https://…) and sha256 (its first 8 to 64 hex digits; at least "
                f"{SHORTEST_DIGEST} unless the url is https://…)"
            ) from None
    raise ValueError('should be "none", the path of a weight file, or {url: …, sha256: …}')
