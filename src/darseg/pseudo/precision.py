"""How much of each class keeps a target precision, from predictions of held-out labeled images.

Letters: K classes, M held-out images, t a confidence code, a_i(t) the labeled pixels of image i that are predicted as a
class with a code of at least t, w_i(t) those of them that are wrong. Sums over images of a, w, a², aw and w² are
integers: exact, whatever the order of the images, and added up over processes.
"""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE
from darseg.data.prediction import FLOAT16, SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError, RecipeError
from darseg.pseudo.distribution import ClassDistribution, check_class_count
from darseg.pseudo.histogram import ConfidenceHistogram, check_predicted_classes
from darseg.pseudo.labeling import check_target_precision
from darseg.pseudo.thresholds import Thresholds, choose_dars

DEVIATIONS = 1.645
"""Standard errors between the precision measured and its lower bound: a normal error is below it 95 times in 100."""

LEAST_EFFECTIVE = 10.0
"""Effective images below which a class's own bound is not used: if all is right, 9 of them show 0.9 at most."""

LEAST_HELD_OUT = 10
"""Held-out images below which no precision can be measured."""

LARGEST = 1 << 30
"""Bytes of sums in a file: 255 classes on the fine scale need two thirds of it."""

SUMS = ("accepted", "wrong", "accepted²", "accepted · wrong", "wrong²")

Basis = Literal["class", "all classes", "none"]
"""What a threshold rests on: the class's own held-out pixels, those of all classes, or nothing reached the target."""


@dataclass(frozen=True, eq=False)
class HeldOutCounts:
    """How precise the predictions of held-out images are, by class and lowest accepted confidence.

    Attributes:
        sums: int64 [5, K + 1, codes]: sums over the images of a, w, a², aw and w², of the K classes and of all classes
            together; copied and read-only.
        images: int64 [K + 1], images with a_i(0) > 0.
        held_out: number of images, M.
        squares: sum of the squares of their labeled pixels.

    Raises DataError for other arrays, and if sums of squares may not fit into 64 bits.
    """

    sums: NDArray[np.int64]
    images: NDArray[np.int64]
    held_out: int
    squares: int
    scale: ConfidenceScale = FLOAT16

    def __post_init__(self) -> None:
        sums, images = np.array(self.sums), np.array(self.images)
        expected = (len(SUMS), len(images), self.scale.codes)
        if sums.dtype != np.int64 or images.dtype != np.int64 or sums.shape != expected:
            raise DataError(
                f"Counts of held-out images are {sums.dtype} {list(sums.shape)} for {len(images)} rows; expected int64 "
                f"{list(expected)}."
            )
        check_class_count(len(images) - 1)
        if self.squares >= 1 << 63:
            raise DataError(
                f"The {self.held_out} held-out images have too many pixels to measure their precision exactly. Hold "
                "fewer or smaller images out, or give rounds a number as their labeling_ratio."
            )
        for name, array in (("sums", sums), ("images", images)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return len(self.images) - 1

    @property
    def precision(self) -> NDArray[np.float64]:
        """float64 [K + 1, codes]: share of right pixels among the accepted ones; NaN if there are none."""
        accepted, wrong = self.sums[:2]
        return np.where(accepted > 0, (accepted - wrong) / np.maximum(accepted, 1), np.nan)

    @property
    def effective(self) -> NDArray[np.float64]:
        """float64 [K + 1]: effective images of all pixels predicted as a class, (Σ a)² / Σ a²; 0 without any.

        It is the number of images if all have equally many such pixels, and less if few have most of them.
        """
        accepted, squares = self.sums[0, :, 0].astype(np.float64), self.sums[2, :, 0]
        return accepted**2 / np.maximum(squares, 1)

    def lower_bound(self) -> NDArray[np.float64]:
        """float64 [K + 1, codes]: what the precision is at least, as far as these images show; 0 without any.

        The smaller of two numbers: the precision if one more image, of effective size, were all wrong; and the precision
        minus `DEVIATIONS` standard errors between images, of a ratio of two sums.
        """
        accepted, wrong, squares, products, wrong_squares = self.sums.astype(np.float64)
        accepted = np.maximum(accepted, 1)
        share_wrong = wrong / accepted
        effective = accepted**2 / np.maximum(squares, 1)
        one_more = (1 - share_wrong) * effective / (effective + 1)
        spread = wrong_squares - 2 * share_wrong * products + share_wrong**2 * squares
        correction = self.held_out / max(1, self.held_out - 1)
        error = np.sqrt(np.maximum(spread, 0) * correction) / accepted
        bound = np.minimum(one_more, 1 - share_wrong - DEVIATIONS * error)
        return np.where(self.sums[0] > 0, np.maximum(bound, 0), 0)

    def pack(self) -> NDArray[np.int64]:
        """All counts as one array, int64 [N], that adds up over parts of the images; see `unpack`."""
        rest = [self.held_out, self.squares >> 31, self.squares & ((1 << 31) - 1)]
        return np.concatenate([self.sums.ravel(), self.images, np.array(rest, np.int64)])

    @classmethod
    def unpack(cls, packed: NDArray[np.int64], scale: ConfidenceScale = FLOAT16) -> HeldOutCounts:
        """The counts of an array that `pack` made, or of the sum of such arrays. Raises DataError for others."""
        rows = (len(packed) - 3) // (len(SUMS) * scale.codes + 1)
        if rows * (len(SUMS) * scale.codes + 1) != len(packed) - 3:
            raise DataError(
                f"{len(packed)} numbers are not counts of held-out images on the scale {scale.name}."
            )
        cells = len(SUMS) * rows * scale.codes
        held_out, high, low = map(int, packed[-3:])
        return cls(
            packed[:cells].reshape(len(SUMS), rows, scale.codes),
            packed[cells:-3],
            held_out,
            squares=(high << 31) + low,
            scale=scale,
        )

    def __add__(self, other: HeldOutCounts) -> HeldOutCounts:
        if self.sums.shape != other.sums.shape:
            raise DataError(
                f"Counts of held-out images of {self.classes} and {other.classes} classes, on the scales "
                f"{self.scale.name} and {other.scale.name}, cannot be added. Count both with the same classes and scale."
            )
        return HeldOutCounts.unpack(self.pack() + other.pack(), self.scale)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldOutCounts) and np.array_equal(self.pack(), other.pack())

    def to_bytes(self) -> bytes:
        """A compressed npz; equal counts give equal bytes."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{f"{self.scale.name}_held_out": self.pack()})  # ty: ignore[invalid-argument-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> HeldOutCounts:
        """The counts that `to_bytes` wrote. Raises DataError for other bytes. Never unpickles."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as members:
                if (size := sum(member.file_size for member in members.infolist())) > LARGEST:
                    raise ValueError(f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                name = archive.files[0]
                packed, scale = archive[name], SCALES[name.removesuffix("_held_out")]
            if packed.dtype != np.int64 or packed.ndim != 1 or packed.min(initial=0) < 0:
                raise ValueError("expected whole numbers in one row, none negative")
            return cls.unpack(packed, scale)
        except (
            Exception
        ) as error:  # zip, zlib and numpy raise a dozen kinds for damaged bytes; all mean the same
            raise DataError(
                f"These {len(data)} bytes are not counts of held-out images ({type(error).__name__}: {error}). Count "
                "them again."
            ) from error


class HeldOutBuilder:
    """Counts predictions of held-out images one after the other.

    It takes 40 bytes · (K + 1) · codes of the scale. Several threads may use it at once.
    """

    def __init__(self, classes: int, scale: ConfidenceScale = FLOAT16) -> None:
        check_class_count(classes)
        self.scale, self._held_out, self._squares = scale, 0, 0
        self._sums = np.zeros((len(SUMS), classes + 1, scale.codes), np.int64)
        self._images = np.zeros(classes + 1, np.int64)
        self._lock = threading.Lock()

    def add(self, prediction: Prediction, truth: NDArray[np.uint8]) -> None:
        """Count one image; pixels whose truth is 255 do not count.

        Raises DataError if the shapes or scales differ, or for classes that there are not.
        """
        classes = len(self._images) - 1
        check_predicted_classes(prediction, classes)
        if prediction.classes.shape != truth.shape or prediction.scale is not self.scale:
            raise DataError(
                f"A prediction of {list(prediction.classes.shape)} pixels on the confidence scale "
                f"{prediction.scale.name} cannot be compared with {list(truth.shape)} labels on {self.scale.name}. Give "
                "both for the same pixels and scale."
            )
        labeled = truth != IGNORE
        predicted, codes = prediction.classes[labeled], prediction.codes[labeled]
        is_wrong = predicted != truth[labeled]
        present = np.unique(predicted)
        rows = np.append(present, classes)
        accepted, wrong = (
            self._at_least(np.searchsorted(present, predicted[chosen]), codes[chosen], len(present))
            for chosen in (slice(None), is_wrong)
        )
        products = (accepted, wrong, accepted * accepted, accepted * wrong, wrong * wrong)
        with self._lock:
            for total, product in zip(self._sums, products, strict=True):
                total[rows] += product
            self._images[rows] += accepted[:, 0] > 0
            self._held_out += 1
            self._squares += int(labeled.sum()) ** 2

    def _at_least(
        self, rows: NDArray[np.integer], codes: NDArray[np.uint16], count: int
    ) -> NDArray[np.int64]:
        """int64 [count + 1, codes]: pixels of each row with at least that code; the last row is their sum."""
        cells = rows.astype(np.int64) * self.scale.codes + codes
        counts = np.bincount(cells, minlength=count * self.scale.codes).reshape(count, self.scale.codes)
        at_least = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        return np.concatenate([at_least, at_least.sum(axis=0, keepdims=True)]).astype(np.int64)

    def build(self) -> HeldOutCounts:
        """The counts of everything added so far."""
        return HeldOutCounts(
            self._sums, self._images, self._held_out, squares=self._squares, scale=self.scale
        )


@dataclass(frozen=True)
class ExpectedPrecision:
    """What thresholds that follow a target precision rest on; lists of K.

    Attributes:
        target: what the precision of each class should be at least.
        held_out: number of held-out images.
        basis: what each threshold rests on.
        expected: precision of the held-out pixels that the threshold accepts; None if it accepts none of them.
        bound: lower bound of the precision of `basis` where its target is reached first; None if nothing is accepted.
        images: held-out images with pixels predicted as the class.
        effective: how many images of equal size say as much.
        pixels: held-out pixels that the threshold accepts.
        ratio: accepted pixels as a share of what the class has among the unlabeled pixels if they have the labeled ones'
            class shares; None for a class without labeled pixels.
        folds: how many folds of the labeled images were held out, each from a network of its own; 0: other images were
            held out from the network that labels.
    """

    target: float
    held_out: int
    basis: tuple[Basis, ...]
    expected: tuple[float | None, ...]
    bound: tuple[float | None, ...]
    images: tuple[int, ...]
    effective: tuple[float, ...]
    pixels: tuple[int, ...]
    ratio: tuple[float | None, ...]
    folds: int = 0

    def of_all(self, kept: Sequence[int] | NDArray[np.int64]) -> float | None:
        """Expected precision of all labels together; None if no class that has labels has an expectation.

        Args:
            kept: labels of each class.
        """
        known = [
            (float(count), share)
            for count, share in zip(kept, self.expected, strict=True)
            if share is not None
        ]
        total = sum(count for count, _ in known)
        return sum(count * share for count, share in known) / total if total else None

    def named(self, basis: Basis, names: Sequence[str]) -> list[str]:
        """The classes whose threshold rests on `basis`."""
        return [name for name, own in zip(names, self.basis, strict=True) if own == basis]

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object; without folds if there are none, as before there were any."""
        fields = vars(self) if self.folds else {key: vars(self)[key] for key in vars(self) if key != "folds"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], classes: int) -> ExpectedPrecision:
        """What `to_json` made. Raises ValueError, KeyError or TypeError for anything else."""
        numbers = ("target", "held_out", "folds")
        lists = {key: tuple(content[key]) for key in cls.__annotations__ if key not in numbers}
        if not all(len(values) == classes for values in lists.values()):
            raise ValueError(f"the expected precision is not that of {classes} classes")
        if not set(lists["basis"]) <= set(get_args(Basis)):
            raise ValueError(f"'basis' must be {', '.join(get_args(Basis))}")
        shares = [
            value for key in ("expected", "bound", "ratio") for value in lists[key] if value is not None
        ]
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in [*shares, content["target"]]):
            raise ValueError("shares must be from 0 to 1")
        counts = [*lists["images"], *lists["effective"], *lists["pixels"], content["held_out"]]
        if not all(type(value) in (int, float) and 0 <= value < 1 << 53 for value in counts):
            raise ValueError("counts must not be negative")
        folds = content.get("folds", 0)
        if type(folds) is not int or not 0 <= folds <= content["held_out"]:
            raise ValueError("'folds' must be a number of folds")
        return cls(target=content["target"], held_out=content["held_out"], folds=folds, **lists)


def choose_by_precision(
    histogram: ConfidenceHistogram,
    distribution: ClassDistribution,
    held_out: HeldOutCounts,
    *,
    target_precision: float,
) -> tuple[Thresholds, ExpectedPrecision]:
    """As much of each class as DARS accepts at ratio 1, if the held-out images show the target precision.

    A class may use the codes from the lowest one on whose lower bound reaches the target, without those at which the
    held-out pixels it accepts are less precise than the target. If all of its pixels are those of fewer than
    `LEAST_EFFECTIVE` effective images, the lower bound is that of all classes together. Of these codes it takes the
    largest that is not above DARS's threshold, and drops what is above its share at random; otherwise the smallest
    above it. If there is none, nothing is accepted.

    Args:
        histogram: of the unlabeled images.
        held_out: of images that the network was not trained on, predicted in the same way.
        target_precision: at least 0, below 1. At 0 the thresholds are those of `choose_dars` with ratio 1.

    Raises:
        RecipeError: the target is out of bounds.
        DataError: the histogram is empty, or number of classes or scale differ; fewer than `LEAST_HELD_OUT` images.
    """
    try:
        check_target_precision(target_precision)
    except ValueError as error:
        raise RecipeError(f"The target precision is {target_precision}; it {error}.") from None
    dars = choose_dars(histogram, distribution, 1.0)
    if held_out.classes != len(distribution) or held_out.scale is not histogram.scale:
        raise DataError(
            f"The held-out images were counted with {held_out.classes} classes on the scale {held_out.scale.name}, the "
            f"unlabeled ones with {len(distribution)} on {histogram.scale.name}. Count both alike."
        )
    if held_out.held_out < LEAST_HELD_OUT:
        raise DataError(
            f"{held_out.held_out} held-out image(s) cannot show how precise predictions are; at least {LEAST_HELD_OUT} "
            "are needed."
        )
    bounds, precision, effective = held_out.lower_bound(), held_out.precision, held_out.effective
    accept, basis, bound = np.array(dars.accept), list[Basis](), list[float | None]()
    for k in range(len(distribution)):
        own = effective[k] >= LEAST_EFFECTIVE
        reached = bounds[k if own else -1] >= target_precision
        first = int(reached.argmax()) if reached.any() else len(reached)
        # Comparisons with NaN, where no held-out pixel is so confident, are false.
        usable = np.flatnonzero(~(precision[k, first:] < target_precision)) + first
        accept[k] = _nearest(usable, int(dars.accept[k]), nothing=histogram.scale.codes)
        nothing = not len(usable)
        basis.append("none" if nothing else "class" if own else "all classes")
        bound.append(None if nothing else float(bounds[k if own else -1, first]))
    thresholds = _accepting(histogram, dars, accept)
    return thresholds, _expected(
        thresholds, distribution, held_out, basis=basis, bound=bound, target=target_precision
    )


def _nearest(usable: NDArray[np.integer], wanted: int, nothing: int) -> int:
    """The largest usable code not above the wanted one, otherwise the smallest; else `nothing`."""
    if wanted == nothing or not len(usable):
        return nothing
    below = int(np.searchsorted(usable, wanted, side="right"))
    return int(usable[below - 1] if below else usable[0])


def _accepting(histogram: ConfidenceHistogram, dars: Thresholds, accept: NDArray[np.int32]) -> Thresholds:
    """DARS's thresholds with other codes."""
    accepted = np.array(
        [counts[code:].sum() for counts, code in zip(histogram.counts, accept, strict=True)], np.int64
    )
    accept = np.where(accepted > 0, accept, histogram.scale.codes).astype(np.int32)
    keep = np.minimum(1, dars.wanted / np.maximum(accepted, 1)) * ((accepted > 0) & (dars.wanted > 0))
    return Thresholds(
        accept=accept,
        keep=keep,
        wanted=dars.wanted,
        predicted=dars.predicted,
        accepted=accepted,
        scale=dars.scale,
    )


def _expected(
    thresholds: Thresholds,
    distribution: ClassDistribution,
    held_out: HeldOutCounts,
    *,
    basis: Sequence[Basis],
    bound: Sequence[float | None],
    target: float,
) -> ExpectedPrecision:
    codes, rows = thresholds.scale.codes, range(len(thresholds.accept))
    counted = [held_out.sums[:2, k, min(int(thresholds.accept[k]), codes - 1)] for k in rows]
    none = thresholds.accept == codes
    pixels = [0 if none[k] else int(counted[k][0]) for k in rows]
    share = distribution.share * int(thresholds.predicted.sum())
    taken = np.minimum(thresholds.wanted, thresholds.accepted)
    return ExpectedPrecision(
        target=float(target),
        held_out=held_out.held_out,
        basis=tuple(basis),
        expected=tuple(float(1 - counted[k][1] / pixels[k]) if pixels[k] else None for k in rows),
        bound=tuple(bound),
        images=tuple(held_out.images[:-1].tolist()),
        effective=tuple(round(value, 2) for value in held_out.effective[:-1].tolist()),
        pixels=tuple(pixels),
        ratio=tuple(float(min(1, taken[k] / share[k])) if share[k] > 0 else None for k in rows),
    )
