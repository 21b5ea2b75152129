"""What a network says about one image: a class and a confidence for every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

FLOAT16_CODES = 15361
"""How many float16 values lie in [0, 1]: bit patterns 0 (0.0) to 15360 (1.0), ordered as their values are."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The most probable class of every pixel and its probability.

    classes: uint8 [H, W], class indices.
    codes: uint16 [H, W], bit patterns of the confidences as float16, 0..15360. Codes sort as confidences do.

    The arrays are not copied; they are read-only through this object.

    Raises DataError for wrong types or shapes, and for codes that are no confidence. A logit above 65504
    is infinite in float16 and makes the softmax NaN, which ends here; one below -65504 makes probability 0.
    """

    classes: NDArray[np.uint8]
    codes: NDArray[np.uint16]

    def __post_init__(self) -> None:
        for name, dtype in (("classes", np.uint8), ("codes", np.uint16)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 2:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
                raise DataError(f"Prediction.{name} is {found}: give a numpy array, {dtype.__name__} [H, W].")
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        if self.classes.shape != self.codes.shape:
            raise DataError(
                f"A prediction of {list(self.classes.shape)} classes and {list(self.codes.shape)} confidence "
                "codes: give both for the same pixels."
            )
        wrong = np.count_nonzero(self.codes >= FLOAT16_CODES)
        if wrong:
            raise DataError(
                f"{wrong} of {self.codes.size} confidence codes are above {FLOAT16_CODES - 1} (the largest "
                f"is {self.codes.max()}): not confidences in [0, 1]. Codes are float16 bit patterns; NaN "
                "comes from logits that are not finite in float16 – check whether training diverged."
            )

    @property
    def confidence(self) -> NDArray[np.float32]:
        """float32 [H, W], in [0, 1]."""
        return self.codes.view(np.float16).astype(np.float32)
