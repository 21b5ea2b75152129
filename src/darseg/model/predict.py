"""Predictions of one image: by scales, windows and mirror.

`predict` averages probabilities (softmax per window), as evaluation does; `predict_for_labeling` averages logits, as
the release labels.
Shape letters: K classes, H, W pixels of the image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray

from darseg.data.prediction import FINE, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError, NumericsError
from darseg.model.decide import STRIP, decide_strips, overflow_message, relative_to_largest, scores_dtype
from darseg.model.network import Network
from darseg.model.windows import Average, Memory, Protocol, WindowSums, sum_windows


def predict(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol | None = None,
    *,
    name: str = "image",
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image, as `darseg predict` and `darseg evaluate` compute them.

    Probabilities are averaged in float32. A network is put into eval mode and afterwards back as it was, each module by
    itself; weights and BatchNorm's statistics do not change. Do not call this while another thread trains the network.

    Args:
        image: uint8 [H, W, 3], RGB, of any size.
        protocol: windows, mirror and scales; None: the whole image in one window, and its mirror.
        name: of the image, for error messages.
        memory: give the same for many images of one size, and each is faster.

    Returns:
        classes and confidences on the scale FINE, whose codes are off by at most 1.3e-4. The command line folds
        BatchNorm into convolutions first, so that its confidences differ in the last bits.

    Raises DataError for other arrays, SizeError for windows the network does not take, NumericsError if probabilities are
    not numbers (the network has diverged).
    """
    image = checked_image(image, name)
    with _eval_mode(network):
        sums = predict_scores(
            network, image, protocol or whole_image(network, image), average="probabilities", memory=memory
        )
        return decide_sums(sums, scale=FINE, probabilities=True, name=name)


def predict_for_labeling(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    name: str = "image",
    scale: ConfidenceScale = FLOAT16,
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image, for pseudo labels (DARS, section 3).

    Logits are averaged in float32; `decide` turns them into classes and confidences. The arguments are those of
    `predict`, except for `scale`, the scale of the confidences.

    Raises DataError for other arrays, SizeError for windows the network does not take, NumericsError if a confidence is
    not a number (logits above float16's 65,504, or a network that has diverged).
    """
    image = checked_image(image, name)
    with _eval_mode(network):
        sums = predict_scores(network, image, protocol, average="logits", memory=memory)
        return decide_sums(sums, scale=scale, probabilities=False, name=name)


def scores_for_labeling(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    scale: ConfidenceScale = FLOAT16,
    name: str = "image",
    memory: Memory | None = None,
) -> NDArray:
    """Averaged logits minus the largest of their pixel, float16 [K, H, W]; float32 for FINE.

    Raises the errors of `predict_for_labeling`; NumericsError if a largest logit is not finite.
    """
    image = checked_image(image, name)
    with _eval_mode(network), torch.inference_mode():
        sums = predict_scores(network, image, protocol, average="logits", memory=memory)
        (classes, height, width), device = sums.total_KHW.shape, sums.total_KHW.device
        scores_KHW = torch.empty((classes, height, width), dtype=scores_dtype(scale))
        rows = max(1, STRIP // (classes * width)) if device.type == "cpu" else height
        for top in range(0, height, rows):
            mean = sums.mean(top, min(top + rows, height))
            if not bool(mean.amax(dim=0).isfinite().all()):
                raise NumericsError(overflow_message(mean, name))
            scores_KHW[:, top : top + rows] = relative_to_largest(mean, scale)
        return scores_KHW.numpy()


@torch.inference_mode()
def predict_scores(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    average: Average,
    memory: Memory | None = None,
) -> WindowSums:
    """Sums of logits or probabilities over windows, mirror and scales, on the network's device.

    Args:
        network: in eval mode.
        image: uint8 [H, W, 3], RGB.
        memory: for the sums; the sums of the image before are overwritten.
    """
    return sum_windows(network, [torch.from_numpy(image)], protocol, average=average, memories=[memory])[0]


@torch.inference_mode()
def predict_probabilities(
    network: Network, image: NDArray[np.uint8], protocol: Protocol, *, memory: Memory | None = None
) -> NDArray[np.float32]:
    """The mean probabilities over windows, mirror and scales, float32 [K, H, W].

    The arguments are those of `predict_scores`.
    """
    sums = predict_scores(network, image, protocol, average="probabilities", memory=memory)
    return sums.mean(0, len(image)).cpu().numpy()


def whole_image(network: Network, image: NDArray[np.uint8]) -> Protocol:
    """The protocol of one window over the whole image [H, W, 3], padded to a legal size, and its mirror."""
    height, width = image.shape[:2]
    return Protocol((network.sides.up(height), network.sides.up(width)))


def checked_image(image: np.ndarray, name: str) -> np.ndarray:
    """The image in torch's memory layout. Raises DataError unless it is uint8 [H, W, 3] with pixels."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        kind = (
            f"{image.dtype} {list(image.shape)}"
            if isinstance(image, np.ndarray)
            else f"a {type(image).__name__}"
        )
        raise DataError(
            f"{name}: this is {kind}. Give a numpy array, uint8 [H, W, 3], RGB, as darseg.read_image returns it."
        )
    if image.size == 0:
        raise DataError(f"{name}: an image of shape {list(image.shape)} has no pixels.")
    # Copies only views such as image[..., ::-1], and arrays that cannot be written to.
    return np.require(image, requirements=["C", "W"])


@contextlib.contextmanager
def _eval_mode(network: Network) -> Generator[None, None, None]:
    """The network is in eval mode inside; each module that was in training mode is again, afterwards."""
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decide_sums(sums: WindowSums, *, scale: ConfidenceScale, probabilities: bool, name: str) -> Prediction:
    try:
        with torch.inference_mode():
            return decide_strips(
                sums.mean, sums.total_KHW, scale=scale, probabilities=probabilities, name=name
            )
    except DataError as error:
        raise NumericsError(str(error)) from None
