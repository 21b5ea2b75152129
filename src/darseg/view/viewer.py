"""A local page to look through the unlabeled images of a run, and to mark bad ones.

The server listens at 127.0.0.1 alone and writes one file, the run's `bad_images.json`. Images are addressed by their
number among the run's own unlabeled images, so no request can name a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import io
import json
import math
import secrets
import signal
import socket
import threading
import unicodedata
import webbrowser
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import anyio
import cv2
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from darseg.data.classes import IGNORE
from darseg.data.images import read_image, shrink
from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.errors import DarsegError, RunError
from darseg.run.browse import LabeledRound, Repredictor, open_round, read_facts
from darseg.run.marks import change_marks, read_marks

ADDRESS, PORT = "127.0.0.1", 8765
PORTS_TRIED = 20  # from PORT on, where no port is asked for
LARGEST, THUMBNAIL = 1600, 160  # pixels of the long side of a picture
PAGE = 200  # most images in one answer
AT_ONCE = 4  # pictures drawn at the same time: decoding takes memory
LARGEST_POST = 10_000  # bytes

FILES = {
    "/": ("viewer.html", "text/html; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def view_run(
    run: Path | str,
    round_index: int | None = None,
    port: int | None = None,
    open_browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the page of a run at 127.0.0.1 until Ctrl-C.

    Args:
        round_index: whose pseudo labels; default: the last round that has some.
        port: 0 is any free one; default: 8765, or the next that is free.

    Raises RunError where there are no pseudo labels, or the port is taken.
    """
    one = open_round(run, round_index)
    server = server_of(one)
    with _ctrl_c(lambda: setattr(server, "should_exit", True)), listen(port) as sock:
        url = f"http://{ADDRESS}:{sock.getsockname()[1]}/"
        say(
            f"{len(one.samples)} unlabeled images, pseudo labels of round {one.index}: {url}  (Ctrl-C ends it)"
        )
        if open_browser:
            webbrowser.open(url)  # the socket listens already: the browser waits
        server.run([sock])


@contextlib.contextmanager
def _ctrl_c(end: Callable[[], object]) -> Generator[None, None, None]:
    """Ctrl-C calls `end`, also in the moments before uvicorn looks out for it. Only the main thread meets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: end())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def server_of(one: LabeledRound) -> uvicorn.Server:
    """The server of a round's page, to be run with a socket."""
    config = uvicorn.Config(
        viewer_app(one),
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def listen(port: int | None) -> socket.socket:
    """A socket that listens at 127.0.0.1. Raises RunError where no wanted port is free."""
    tried = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for number in tried:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ADDRESS, number))
            sock.listen(128)
        except OSError as error:
            sock.close()
            if port is not None:
                reason = error.strerror or error
                raise RunError(
                    f"Port {port} of {ADDRESS} cannot be used ({reason}). Choose another with --port; 0 is any."
                ) from error
            continue
        return sock
    raise RunError(
        f"Ports {tried[0]} to {tried[-1]} of {ADDRESS} are all taken. Choose one with --port, or --port 0."
    )


class Guard:
    """Refuses requests that come by another name or from another page; says in every answer what a browser may do.

    A page elsewhere could let its own name lead to 127.0.0.1 (DNS rebinding): then the browser sends that name as Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {name for name, _ in message["headers"]}
                extra = HEADERS | ({} if b"cache-control" in named else {"cache-control": "no-store"})
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in extra.items()),
                ]
            await send(message)

        refused = self._refused(scope) if scope["type"] == "http" else None
        app = self.app if refused is None else PlainTextResponse(refused, 403)
        await app(scope, receive, send_with_headers)

    @staticmethod
    def _refused(scope: Scope) -> str | None:
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        name, _, port = hosts[0].partition(":") if len(hosts) == 1 else ("", "", "")
        if name not in (ADDRESS, "localhost") or not (port.isdecimal() or not port):
            return f"Only http://{ADDRESS} and http://localhost lead here."
        origins = [value for name, value in headers if name == b"origin"]
        if scope["method"] not in ("GET", "HEAD") and origins != [f"http://{hosts[0]}"]:
            return "Only this server's own page can change something here."
        return None


@dataclass(frozen=True)
class Filter:
    """Which images are listed, in which order; shares and coverage in percent, confidence from 0 to 1.

    Attributes:
        of: whose share of `class_index` is meant: "label" or "prediction".
        sort: "list" (as the run lists them), "id", "coverage", "confidence" or "share".
    """

    class_index: int | None = None
    share: float = 0.0
    of: str = "label"
    coverage: tuple[float, float] = (0.0, 100.0)
    confidence: tuple[float, float] = (0.0, 1.0)
    marked: bool = False
    text: str = ""
    sort: str = "list"
    down: bool = False

    @classmethod
    def of_query(cls, query: Mapping[str, str], classes: int) -> Filter:
        """From a query string. Raises ValueError."""
        given: dict[str, Any] = {}
        if query.get("class"):
            given["class_index"] = int(query["class"])
            if not 0 <= given["class_index"] < classes:
                raise ValueError(f"class {query['class']}: there are {classes}")
        if query.get("share"):
            given["share"] = _number(query["share"])
        for name, largest in (("coverage", 100.0), ("confidence", 1.0)):
            low, high = query.get(f"{name}_from"), query.get(f"{name}_to")
            given[name] = (_number(low) if low else 0.0, _number(high) if high else largest)
        for name, allowed in (
            ("of", ("label", "prediction")),
            ("sort", ("list", "id", "coverage", "confidence", "share")),
        ):
            if query.get(name):
                if query[name] not in allowed:
                    raise ValueError(f"{name} is one of {', '.join(allowed)}")
                given[name] = query[name]
        given["marked"], given["down"] = query.get("marked") == "1", query.get("down") == "1"
        given["text"] = query.get("text", "")
        return cls(**given)


class Table:
    """Facts and marks of all images, as columns; facts come in while others are read already."""

    def __init__(self, one: LabeledRound) -> None:
        count, classes = len(one.samples), len(one.classes)
        self.round = one
        self.ids = [sample.id for sample in one.samples]
        self.folded = [_folded(name) for name in self.ids]
        self.position = {name: at for at, name in enumerate(self.ids)}
        self.by_id = np.argsort(np.argsort(np.array(self.ids, object)))
        self.left_out = np.array([name in one.excluded for name in self.ids])
        self.pixels = np.zeros(count, np.int64)
        self.kept = np.zeros((count, classes), np.int64)
        self.predicted = np.full((count, classes), -1, np.int64)  # -1: not known
        self.confidence = np.full(count, np.nan)
        self.read = self.left_out.copy()  # whether a row's facts are as good as they will be
        self.unreadable = np.zeros(count, bool)
        self._lock = threading.Lock()

    def fill(self, stop: threading.Event) -> None:
        """Read the facts of all images, until asked to stop."""
        for at, facts in read_facts(self.round):
            if stop.is_set():
                return
            with self._lock:
                if facts is None:
                    self.unreadable[at] = True
                else:
                    self.pixels[at], self.kept[at] = facts.pixels, facts.kept
                    if facts.predicted is not None:
                        self.predicted[at] = facts.predicted
                    if facts.confidence is not None:
                        self.confidence[at] = facts.confidence
                self.read[at] = True

    def coverage(self) -> np.ndarray:
        """Percent of each image's pixels that are labeled; NaN where not known."""
        known = self.pixels > 0
        return np.where(known, 100 * self.kept.sum(1) / np.maximum(1, self.pixels), np.nan)

    def share(self, class_index: int, of: str) -> np.ndarray:
        """Percent of each image's pixels that are of a class; NaN where not known."""
        counts = (self.kept if of == "label" else self.predicted)[:, class_index]
        return np.where((self.pixels > 0) & (counts >= 0), 100 * counts / np.maximum(1, self.pixels), np.nan)

    def select(self, wanted: Filter, marks: Mapping[str, float]) -> np.ndarray:
        """Positions of the images that pass a filter, in its order. What is not known of an image passes no bound."""
        with self._lock:
            passes = np.ones(len(self.ids), bool)
            coverage = self.coverage()
            for values, (low, high), (lowest, highest) in (
                (coverage, wanted.coverage, (0, 100)),
                (self.confidence, wanted.confidence, (0, 1)),
            ):
                if low > lowest or high < highest:
                    passes &= (values >= low) & (values <= high)
            share = None
            if wanted.class_index is not None:
                share = self.share(wanted.class_index, wanted.of)
                passes &= (share > 0) & (share >= wanted.share)
            if wanted.marked:
                passes &= np.array([name in marks for name in self.ids])
            if wanted.text:
                sought = _folded(wanted.text)
                passes &= np.array([sought in name for name in self.folded])
            keys = {"id": self.by_id, "coverage": coverage, "confidence": self.confidence, "share": share}
            found = np.flatnonzero(passes)
            key = keys.get(wanted.sort)
        if key is None:
            return found[::-1] if wanted.down else found
        values = key[found].astype(float)
        values = np.where(
            np.isnan(values), np.inf, -values if wanted.down else values
        )  # what is not known comes last
        return found[np.argsort(values, kind="stable")]

    def row(self, at: int, marks: Mapping[str, float], shown: Filter) -> dict[str, Any]:
        """An image as the list shows it."""
        class_index = shown.class_index
        return {
            "index": at,
            "id": self.ids[at],
            "coverage": _plain(self.coverage_of(at)),
            "confidence": _plain(self.confidence[at]),
            "share": None if class_index is None else _plain(self.share(class_index, shown.of)[at]),
            "bad": self.ids[at] in marks,
            "left_out": bool(self.left_out[at]),
            "unreadable": bool(self.unreadable[at]),
        }

    def coverage_of(self, at: int) -> float:
        pixels = int(self.pixels[at])
        return 100 * int(self.kept[at].sum()) / pixels if pixels else math.nan


def viewer_app(one: LabeledRound) -> ASGIApp:
    """The page and what it asks for, as an ASGI application."""
    run, table, repredictor = one.run, Table(one), Repredictor(one)
    files = importlib.resources.files("darseg.view")
    token = secrets.token_hex(
        8
    )  # in addresses of pictures: a browser keeps them, but not for the next run at this port
    drawing, predicting = anyio.CapacityLimiter(AT_ONCE), asyncio.Lock()
    marking = threading.Lock()
    stop = threading.Event()

    def marks() -> dict[str, float]:
        return read_marks(run, table.position)

    async def file(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return Response(
            files.joinpath(name).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"}
        )

    async def about(request: Request) -> Response:
        return JSONResponse(
            {
                "name": run.root.resolve().name,
                "round": one.index,
                "classes": [
                    {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
                    for name, color in zip(one.classes.names, one.classes.colors, strict=True)
                ],
                "images": len(one.samples),
                "left_out": int(table.left_out.sum()),
                "read": int(table.read.sum()),
                "marked": len(marks()),
                "truth": any(sample.label for sample in one.samples),
                "predicted": bool((table.predicted >= 0).any()),
                "confidence": bool(np.isfinite(table.confidence).any()),
                "token": token,
                "colormap": ["#{:02x}{:02x}{:02x}".format(*color) for color in _colormap()[:: 255 // 15]],
            }
        )

    async def images(request: Request) -> Response:
        query = request.query_params
        try:
            wanted = Filter.of_query(query, len(one.classes))
            offset, limit = int(query.get("offset", 0)), int(query.get("limit", PAGE))
        except ValueError as error:
            raise HTTPException(400, f"This filter cannot be used: {error}") from None
        if offset < 0 or not 0 <= limit <= PAGE:
            raise HTTPException(400, f"offset is at least 0, limit from 0 to {PAGE}.")
        now = marks()
        found = await anyio.to_thread.run_sync(table.select, wanted, now)
        at = table.position.get(query.get("find", ""), -1)
        place = np.flatnonzero(found == at)
        return JSONResponse(
            {
                "total": len(found),
                "read": int(table.read.sum()),
                "offset": offset,
                "place": int(place[0]) if place.size else None,
                "images": [table.row(int(one), now, wanted) for one in found[offset : offset + limit]],
            }
        )

    def sample_of(request: Request) -> tuple[int, Sample]:
        at = request.path_params["index"]
        if at >= len(one.samples):
            raise HTTPException(404, f"There are {len(one.samples)} images, the first is 0.")
        return at, one.samples[at]

    async def image(request: Request) -> Response:
        at, sample = sample_of(request)
        pixels = max(1, int(table.pixels[at]))
        known = bool(table.predicted[at, 0] >= 0)
        return JSONResponse(
            table.row(at, marks(), Filter())
            | {
                "kept": [round(100 * int(n) / pixels, 3) for n in table.kept[at]]
                if table.pixels[at]
                else None,
                "predicted": [round(100 * int(n) / pixels, 3) for n in table.predicted[at]]
                if known
                else None,
                "truth": sample.label is not None,
            }
        )

    def draw(kind: str, sample: Sample, size: int, prediction: Prediction | None) -> tuple[bytes, str]:
        if kind == "photo":
            return _photo(read_image(sample.image), size, 75 if size == THUMBNAIL else 90), "image/jpeg"
        if kind == "confidence":
            assert prediction is not None
            return _indexed(
                np.rint(prediction.confidence * 255).astype(np.uint8), _colormap(), None, size
            ), "image/png"
        if kind == "prediction":
            assert prediction is not None
            values = prediction.classes
        elif kind == "truth":
            if sample.label is None:
                raise HTTPException(404, "The truth of this image is not known.")
            values = truth_map(sample)
        else:
            found = one.label_map(sample)
            if found is None:
                raise HTTPException(404, f"Round {one.index} left this image out: it was marked as bad.")
            values = found
        return _indexed(values, one.classes.palette(), IGNORE, size), "image/png"

    @lru_cache(maxsize=8)
    def label_at(at: int) -> np.ndarray | None:
        return one.label_map(one.samples[at])

    @lru_cache(maxsize=8)
    def truth_at(at: int) -> np.ndarray:
        return truth_map(one.samples[at])

    async def picture(request: Request) -> Response:
        _, sample = sample_of(request)
        kind, prediction = request.path_params["kind"], None
        if kind not in ("photo", "label", "prediction", "confidence", "truth"):
            raise HTTPException(404, "No such picture.")
        size = THUMBNAIL if request.query_params.get("small") == "1" else LARGEST
        if kind in ("prediction", "confidence"):
            prediction = repredictor.known(sample)
            if prediction is None:
                async with predicting:
                    if await request.is_disconnected():  # stepped on meanwhile
                        return Response(status_code=204)
                    prediction = await anyio.to_thread.run_sync(repredictor.prediction, sample)
        made = partial(draw, kind, sample, size, prediction)
        content, media_type = await anyio.to_thread.run_sync(made, limiter=drawing)
        return Response(content, media_type=media_type, headers={"cache-control": "private, max-age=86400"})

    async def pixel(request: Request) -> Response:
        """What is known of the pixel at fractions x, y of width and height."""
        at, sample = sample_of(request)
        try:
            x, y = (_number(request.query_params.get(name, "")) for name in ("x", "y"))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

        def look() -> dict[str, Any]:
            maps = {"label": label_at(at), "truth": truth_at(at) if sample.label else None}
            prediction = repredictor.known(sample)
            if prediction is not None:
                maps["prediction"] = prediction.classes
            there = {name: values for name, values in maps.items() if values is not None}
            said: dict[str, Any] = {}
            for name, values in there.items():
                row, column = _pixel(values, x, y)
                value = int(values[row, column])
                said |= {"x": column, "y": row, name: None if value == IGNORE else value}
            if prediction is not None:
                row, column = _pixel(prediction.codes, x, y)
                code = prediction.codes[row, column]
                said["confidence"] = round(float(prediction.scale.confidence(code)), 5)
            return said

        return JSONResponse(await anyio.to_thread.run_sync(look, limiter=drawing))

    async def mark(request: Request) -> Response:
        text = b""
        async for part in request.stream():
            text += part
            if len(text) > LARGEST_POST:
                raise HTTPException(413, "Too long.")
        try:
            asked = json.loads(text)
            at, bad = asked["index"], asked["bad"]
            if type(at) is not int or type(bad) is not bool or not 0 <= at < len(one.samples):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise HTTPException(
                400, 'Wanted is {"index": number of an image, "bad": true or false}.'
            ) from None

        def change() -> dict[str, float]:
            with marking:
                return change_marks(run, table.position, [table.ids[at]], bad)

        now = await anyio.to_thread.run_sync(change)
        return JSONResponse({"index": at, "bad": table.ids[at] in now, "marked": len(now)})

    def truth_map(sample: Sample) -> np.ndarray:
        assert sample.label is not None
        return read_label(sample.label, sample.encoding)

    async def told(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 500)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse(str(error.detail), error.status_code, headers=error.headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        thread = threading.Thread(target=table.fill, args=(stop,), name="facts", daemon=True)
        thread.start()
        yield
        stop.set()

    routes = [
        *(Route(path, file) for path in FILES),
        Route("/api/run", about),
        Route("/api/images", images),
        Route("/api/images/{index:int}", image),
        Route("/api/images/{index:int}/pixel", pixel),
        Route("/api/marks", mark, methods=["POST"]),
        Route("/images/{index:int}/{kind}", picture),
    ]
    handlers: Any = {DarsegError: told, HTTPException: refused}
    return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan))


def _folded(text: str) -> str:
    """For finding: letters of either case, however their accents are written (macOS takes names apart)."""
    return unicodedata.normalize("NFC", text.casefold())


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _pixel(values: np.ndarray, x: float, y: float) -> tuple[int, int]:
    height, width = values.shape
    return min(height - 1, max(0, int(y * height))), min(width - 1, max(0, int(x * width)))


def _photo(image: np.ndarray, size: int, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(shrink(image, size, cv2.INTER_AREA)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _indexed(values: np.ndarray, palette: np.ndarray, transparent: int | None, size: int) -> bytes:
    """An indexed PNG; pixels of the value `transparent` are see-through."""
    image = Image.fromarray(np.ascontiguousarray(shrink(values, size, cv2.INTER_NEAREST)), "P")
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    clear = {} if transparent is None else {"transparency": transparent}
    image.save(file, "PNG", compress_level=3, **clear)
    return file.getvalue()


@lru_cache(maxsize=1)
def _colormap() -> np.ndarray:
    """uint8 [256, 3], RGB: viridis, even to the eye from dark to light."""
    steps = np.arange(256, dtype=np.uint8)[None]
    return cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)[0, :, ::-1].copy()
