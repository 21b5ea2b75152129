"""Change an image's colors at random and blur it: what makes a strong view of a weak one.

The sequence is that of FixMatch and UniMatch for segmentation: color jitter, grayscale, Gaussian blur. Each operation
works on 8-bit colors and rounds, as Pillow's does, so colors saturate between the operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from darseg.errors import RecipeError

LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue are (ITU-R BT.601), as OpenCV and Pillow convert colors to gray."""


@dataclass(frozen=True)
class Colors:
    """How colors are drawn at random; the defaults are those of UniMatch.

    Attributes:
        jitter: strengths of brightness, contrast, saturation and hue. A strength s stands for a factor drawn uniformly
            from [1 - s, 1 + s], never below 0; for hue, for a turn by a share of the color circle in [-s, s]. The four
            follow each other in random order.
        jitter_share: share of the images whose colors are jittered.
        gray_share: share of the images that become gray.
        blur: smallest and largest standard deviation of a Gaussian blur, in pixels; it is drawn uniformly.
        blur_share: share of the images that are blurred.
    """

    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.25)
    jitter_share: float = 0.8
    gray_share: float = 0.2
    blur: tuple[float, float] = (0.1, 2.0)
    blur_share: float = 0.5

    def __post_init__(self) -> None:
        brightness, contrast, saturation, hue = self.jitter
        if not all(0 <= strength < math.inf for strength in (brightness, contrast, saturation)):
            raise RecipeError(
                f"The color jitter {list(self.jitter)} is not valid. Give strengths of 0 or more."
            )
        if not 0 <= hue <= 0.5:
            raise RecipeError(
                f"The hue jitter {hue} is not valid. Give a share of the color circle from 0 to 0.5."
            )
        if not 0 < self.blur[0] <= self.blur[1] < math.inf:
            raise RecipeError(
                f"The blur {list(self.blur)} is not valid. Give the smallest and the largest standard deviation in "
                "pixels, both above 0."
            )
        for name in ("jitter_share", "gray_share", "blur_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise RecipeError(f"{name} {share} is not valid. Give a share of the images from 0 to 1.")


UNCHANGED = Colors(jitter_share=0.0, gray_share=0.0, blur_share=0.0)
"""Colors as they are."""


def recolor(image: np.ndarray, how: Colors, *, generator: np.random.Generator) -> np.ndarray:
    """An image with other colors.

    Args:
        image: uint8 [H, W, 3], RGB; stays as it is.
        generator: all randomness; every call takes the same number of draws.

    Returns uint8 [H, W, 3].
    """
    jitters, grays, blurs = generator.random(3) < (how.jitter_share, how.gray_share, how.blur_share)
    draws, order = generator.random(4), generator.permutation(4)
    deviation = how.blur[0] + generator.random() * (how.blur[1] - how.blur[0])
    changed = image
    if jitters:
        for operation in order:
            # From -1 to 1, times the strength.
            changed = _jitter(
                changed, int(operation), amount=(2 * draws[operation] - 1) * how.jitter[operation]
            )
    if grays:
        changed = np.repeat(cv2.cvtColor(changed, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    if blurs:
        changed = cv2.GaussianBlur(changed, (0, 0), deviation)
    return changed.copy() if changed is image else changed


def _jitter(image: np.ndarray, operation: int, *, amount: float) -> np.ndarray:
    """Brightness (0), contrast (1), saturation (2) times 1 + amount, or the hue (3) turned by it."""
    if amount == 0:
        return image
    factor = max(0.0, 1 + amount)
    match operation:
        case 0:
            return cv2.LUT(image, _table(np.arange(256) * factor))
        case 1:
            # Toward the mean gray of the image, as Pillow rounds it.
            middle = int(np.dot(cv2.mean(image)[:3], LUMA) + 0.5)
            return cv2.LUT(image, _table(middle + (np.arange(256) - middle) * factor))
        case 2:
            gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            return cv2.addWeighted(image, factor, gray, 1 - factor, 0)
        case _:
            turned = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue from 0 to 255
            turned[..., 0] += np.uint8(round(amount * 256) % 256)  # wraps around the circle
            return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)


def _table(values: np.ndarray) -> np.ndarray:
    """The 256 values of a color, rounded and kept within 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
