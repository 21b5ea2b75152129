"""The viewer's page and what it asks for: routes over one value, `Viewer`, that holds the state.

Images are addressed by their number among the run's unlabeled images, so no request can name a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from darseg.data.classes import IGNORE
from darseg.data.dataset import read_truth
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.errors import DarsegError, printable
from darseg.run.browse import LabeledRound, RememberedPredictions, Repredictor, ResultPredictor
from darseg.run.evaluate import describe_decisions
from darseg.run.marks import change_marks, read_marks
from darseg.view.guard import Guard, in_one_line
from darseg.view.pictures import colormap, hex_color, indexed_png, jpeg, pixel_at
from darseg.view.table import Filter, Table, number

LARGEST, THUMBNAIL = 1600, 160  # pixels of the long side of a picture
QUALITY = {LARGEST: 90, THUMBNAIL: 75}  # of JPEGs
PAGE = 200  # most images in one answer
AT_ONCE = 4  # pictures drawn at the same time: decoding needs memory
LARGEST_POST = 10_000  # bytes
DIGITS = 12  # of an image's number
RECENT = 8  # maps kept in memory for the pixel under the pointer

FILES = {
    "/": ("viewer.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
TOKEN = "{{token}}"  # in the page's addresses of its style and script
KINDS = ("photo", "label", "prediction", "confidence", "result", "truth")  # of pictures


@dataclass(frozen=True, eq=False)
class Viewer:
    """What the routes share.

    Attributes:
        label_at: position of an image → its label map, None if the round left it out; the last few stay in memory.
        truth_at: position of an image → its truth.
        token: in all addresses; a browser caches pictures, but not for the next run at the same port.
        drawing: limits how many pictures are drawn at the same time.
        predicting: held during a prediction.
        marking: held while marks change.
    """

    round: LabeledRound
    table: Table
    repredictor: Repredictor
    result: ResultPredictor
    label_at: Callable[[int], NDArray[np.uint8] | None]
    truth_at: Callable[[int], NDArray[np.uint8]]
    token: str
    drawing: anyio.CapacityLimiter
    predicting: asyncio.Lock
    marking: threading.Lock

    @classmethod
    def of_round(cls, round_: LabeledRound, token: str, plain: bool = False) -> Viewer:
        """The state of a viewer that has just started."""
        return cls(
            round=round_,
            table=Table(round_),
            repredictor=Repredictor(round_),
            result=ResultPredictor(round_.run, plain),
            label_at=lru_cache(RECENT)(lambda at: round_.label_map(round_.samples[at])),
            truth_at=lru_cache(RECENT)(lambda at: read_truth(round_.samples[at])),
            token=token,
            drawing=anyio.CapacityLimiter(AT_ONCE),
            predicting=asyncio.Lock(),
            marking=threading.Lock(),
        )

    def predictions(self, kind: str) -> RememberedPredictions:
        """Where the predictions of a kind of picture come from."""
        return self.result if kind == "result" else self.repredictor

    def marks(self) -> dict[str, float]:
        """Id of an image that is marked as bad → when it was."""
        return read_marks(self.round.run, self.table.position)


def viewer_app(round_: LabeledRound, token: str, plain: bool = False) -> ASGIApp:
    """The page of a round and all it asks for, as an ASGI application.

    Args:
        token: what requests must hold.
        plain: show the result as it was trained, also if its decisions are aligned.
    """
    viewer, stop = Viewer.of_round(round_, token, plain), threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        thread = threading.Thread(target=viewer.table.fill, args=(stop,), name="facts", daemon=True)
        thread.start()
        yield
        stop.set()

    routes = [
        *(Route(path, partial(send_file, viewer)) for path in FILES),
        Route("/api/run", partial(send_run, viewer)),
        Route("/api/images", partial(send_images, viewer)),
        Route("/api/images/{index}", partial(send_image, viewer)),
        Route("/api/images/{index}/pixel", partial(send_pixel, viewer)),
        Route("/api/marks", partial(mark, viewer), methods=["POST"]),
        Route("/images/{index}/{kind}", partial(send_picture, viewer)),
    ]
    handlers: Any = {
        DarsegError: send_error,
        HTTPException: send_refusal,
        Exception: send_fault,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), token)


async def send_file(viewer: Viewer, request: Request) -> Response:
    """The page, its style, or its script."""
    name, media_type = FILES[request.url.path]
    content = importlib.resources.files("darseg.view").joinpath(name).read_text(encoding="utf-8")
    content = content.replace(TOKEN, viewer.token)
    return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})


async def send_run(viewer: Viewer, request: Request) -> Response:
    """What the page needs to know of the run."""
    round_, table = viewer.round, viewer.table
    return JSONResponse(
        {
            "name": printable(round_.run.root.resolve().name),
            "round": round_.index,
            "classes": [
                {"name": printable(name), "color": hex_color(color)}
                for name, color in zip(round_.classes.names, round_.classes.colors, strict=True)
            ],
            "images": len(round_.samples),
            "left_out": int(table.left_out.sum()),
            "read": int(table.read.sum()),
            "marked": len(viewer.marks()),
            "truth": any(sample.label for sample in round_.samples),
            "predicted": bool((table.predicted >= 0).any()),
            "confidence": bool(np.isfinite(table.confidence).any()),
            "result": describe_decisions(round_.run.root, plain=viewer.result.plain),
            "token": viewer.token,
            "colormap": [hex_color(color) for color in colormap()[:: 255 // 15]],
        }
    )


async def send_images(viewer: Viewer, request: Request) -> Response:
    """Part of the list of images that pass a filter, and the place of one of them in that list."""
    query, table = request.query_params, viewer.table
    try:
        wanted = Filter.of_query(query, len(viewer.round.classes))
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", PAGE))
    except ValueError as error:
        raise HTTPException(400, f"This filter cannot be used: {error}.") from None
    if offset < 0 or not 0 <= limit <= PAGE:
        raise HTTPException(
            400, f"offset {offset}, limit {limit}: offset must be at least 0, limit 0 to {PAGE}."
        )
    marks = viewer.marks()
    positions = await anyio.to_thread.run_sync(table.select, wanted, marks)
    place = np.flatnonzero(positions == table.position.get(query.get("find", ""), -1))
    return JSONResponse(
        {
            "total": len(positions),
            "read": int(table.read.sum()),
            "offset": offset,
            "place": int(place[0]) if place.size else None,
            "images": [table.row(int(at), marks, wanted) for at in positions[offset : offset + limit]],
        }
    )


async def send_image(viewer: Viewer, request: Request) -> Response:
    """All that is known of an image."""
    at, sample = _image_of(viewer, request)
    table = viewer.table
    return JSONResponse(
        table.row(at, viewer.marks(), Filter())
        | {
            "kept": table.percentages(table.kept, at),
            "predicted": table.percentages(table.predicted, at),
            "truth": sample.label is not None,
        }
    )


async def send_pixel(viewer: Viewer, request: Request) -> Response:
    """What is known of the pixel at fractions x, y of width and height."""
    at, _ = _image_of(viewer, request)
    try:
        x, y = (number(request.query_params.get(name, "")) for name in ("x", "y"))
    except ValueError as error:
        raise HTTPException(400, f"x and y must be fractions of width and height: {error}.") from None
    look = partial(_look, viewer, at, x=x, y=y)
    return JSONResponse(await anyio.to_thread.run_sync(look, limiter=viewer.drawing))


def _look(viewer: Viewer, at: int, *, x: float, y: float) -> dict[str, Any]:
    sample = viewer.round.samples[at]
    prediction, result = viewer.repredictor.known(sample), viewer.result.known(sample)
    maps = {
        "label": viewer.label_at(at),
        "truth": viewer.truth_at(at) if sample.label and not viewer.round.stranger else None,
        "prediction": None if prediction is None else prediction.classes,
        "result": None if result is None else result.classes,
    }
    facts: dict[str, Any] = {}
    for name, values in maps.items():
        if values is not None:
            row, column = pixel_at(values, x, y)
            value = int(values[row, column])
            facts |= {"x": column, "y": row, name: None if value == IGNORE else value}
    if prediction is not None:
        code = prediction.codes[pixel_at(prediction.codes, x, y)]
        facts["confidence"] = round(float(prediction.scale.confidence(code)), 5)
    return facts


async def send_picture(viewer: Viewer, request: Request) -> Response:
    """A picture of one of KINDS."""
    _, sample = _image_of(viewer, request)
    kind, prediction = request.path_params["kind"], None
    if kind not in KINDS:
        raise HTTPException(404, f"There is no picture of this kind. There are {', '.join(KINDS)}.")
    if viewer.round.stranger and kind != "label":  # label maps are part of the run folder
        raise HTTPException(403, viewer.round.stranger)
    size = THUMBNAIL if request.query_params.get("small") == "1" else LARGEST
    if kind in ("prediction", "confidence", "result"):
        source = viewer.predictions(kind)
        prediction = source.known(sample)
        if prediction is None:
            async with viewer.predicting:
                if await request.is_disconnected():  # the reader has moved on to another image
                    return Response(status_code=204)
                prediction = await anyio.to_thread.run_sync(source.prediction, sample)
    draw = partial(_draw, viewer.round, sample, kind=kind, size=size, prediction=prediction)
    content = await anyio.to_thread.run_sync(draw, limiter=viewer.drawing)
    media_type = "image/jpeg" if kind == "photo" else "image/png"
    return Response(content, media_type=media_type, headers={"cache-control": "private, max-age=86400"})


def _draw(
    round_: LabeledRound, sample: Sample, *, kind: str, size: int, prediction: Prediction | None
) -> bytes:
    if kind == "photo":
        return jpeg(read_image(sample.image, sample.reading), size, QUALITY[size])
    if kind == "confidence":
        assert prediction is not None
        values = np.rint(prediction.confidence * 255).astype(np.uint8)
        return indexed_png(values, size, palette=colormap())
    values = _map_of(round_, sample, kind=kind, prediction=prediction)
    return indexed_png(values, size, palette=round_.classes.palette(), transparent=IGNORE)


def _map_of(
    round_: LabeledRound, sample: Sample, *, kind: str, prediction: Prediction | None
) -> NDArray[np.uint8]:
    """uint8 [H, W] of classes and 255: a prediction, truth, or pseudo label of an image."""
    if kind in ("prediction", "result"):
        assert prediction is not None
        return prediction.classes
    if kind == "truth":
        if sample.label is None:
            raise HTTPException(404, "The truth of this image is not known.")
        return read_truth(sample)
    label = round_.label_map(sample)
    if label is None:
        raise HTTPException(404, f"Round {round_.index} left this image out because it was marked as bad.")
    return label


async def mark(viewer: Viewer, request: Request) -> Response:
    """Mark an image as bad, or remove its mark."""
    index, bad = _wanted_mark(await _body(request), len(viewer.round.samples))
    name = viewer.table.ids[index]

    def change() -> dict[str, float]:
        with viewer.marking:
            return change_marks(viewer.round.run, viewer.table.position, ids=[name], bad=bad)

    marks = await anyio.to_thread.run_sync(change)
    return JSONResponse({"index": index, "bad": name in marks, "marked": len(marks)})


async def _body(request: Request) -> bytes:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_POST:
            raise HTTPException(413, f"This request is larger than {LARGEST_POST} bytes.")
    return content


def _wanted_mark(content: bytes, images: int) -> tuple[int, bool]:
    """The index of the image, and whether it is bad."""
    try:
        wanted = json.loads(content)
        index, bad = wanted["index"], wanted["bad"]
        if type(index) is not int or type(bad) is not bool or not 0 <= index < images:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f'This is not a mark. Send {{"index": 0 to {images - 1}, "bad": true or false}}.'
        raise HTTPException(400, message) from None
    return index, bad


def _image_of(viewer: Viewer, request: Request) -> tuple[int, Sample]:
    text, samples = request.path_params["index"], viewer.round.samples
    index = int(text) if text.isascii() and text.isdecimal() and len(text) <= DIGITS else len(samples)
    if index >= len(samples):
        shown = f"{text[:DIGITS]}…" if len(text) > DIGITS else text
        raise HTTPException(404, f"There is no image {shown}. Images are numbered 0 to {len(samples) - 1}.")
    return index, samples[index]


async def send_error(request: Request, error: Exception) -> Response:
    """The message of an error in the run folder or the data."""
    return PlainTextResponse(printable(str(error)), 500)


async def send_refusal(request: Request, error: Exception) -> Response:
    """Why a request cannot be answered."""
    assert isinstance(error, HTTPException)
    return PlainTextResponse(str(error.detail), error.status_code, headers=error.headers)


async def send_fault(request: Request, error: Exception) -> Response:
    """What to do about a fault of the viewer itself."""
    reason = f"The viewer failed to answer ({in_one_line(error)})."
    return PlainTextResponse(f"{reason} Reload the page, or start darseg view again.", 500)
