"""Backbones that timm builds: dilated networks, and networks of four scales."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from darseg.errors import RecipeError, faults
from darseg.model.backbone import RESNETS, RGB, Features
from darseg.model.convolutions import exchange_convolutions
from darseg.model.sides import Sides

TIMM = "timm/"
"""Prefix of backbones that timm builds, as in `timm/tf_efficientnet_lite0`."""

SCALES = (4, 8, 16, 32)
"""Strides of the four feature maps of a network that is not dilated."""


class TimmBackbone(nn.Module):
    """A dilated network of timm, without its classifier; `Features` are its last four feature maps.

    Mean and standard deviation are those of timm's configuration of the network.
    Raises RecipeError if timm cannot be imported, does not know `name`, or cannot build it with this output stride.
    """

    def __init__(self, name: str, output_stride: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.stride = output_stride
        self.sides = Sides(output_stride)
        timm = import_timm(name)
        how: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            self.body = create_body(name, features_only=True, output_stride=output_stride, **how)
        except RecipeError:
            raise
        except Exception as error:  # timm refuses with assertions, TypeError, NotImplementedError, …
            raise _refused(name, output_stride, f"{type(error).__name__}: {error}") from error
        reductions = self.body.feature_info.reduction()
        if len(reductions) < len(Features._fields) or reductions[-1] != output_stride:
            raise _refused(name, output_stride, f"its feature maps have strides {reductions}")
        self.channels = last_four(self.body.feature_info.channels())
        self.mean = in_255(self.body.pretrained_cfg["mean"])
        self.std = in_255(self.body.pretrained_cfg["std"])
        exchange_convolutions(self.body, timm)

    def forward(self, images: Tensor) -> Features:
        return Features(*self.body(images)[-4:])


class TimmScales(nn.Module):
    """A network of timm that is not dilated: its four feature maps have strides 4, 8, 16 and 32.

    Such are ConvNeXt, Swin and PVTv2, and CNNs as ImageNet knows them. Mean and standard deviation are those of timm's
    configuration. Raises RecipeError if timm cannot be imported, does not know `name`, or cannot build it for images of
    any size.
    """

    stride = SCALES[-1]
    sides = Sides(SCALES[-1], offset=0)

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.name = name
        how: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        with torch.device("meta"):
            # Networks of windows, such as Swin, take images of other sizes only if they are told to.
            any_size = how | {"strict_img_size": False}
            if not _why_not(name, any_size):
                how = any_size
            elif reason := _why_not(name, how):
                raise RecipeError(
                    faults(
                        f"{name} cannot be built for images of any size, with feature maps at strides 4, 8, 16 and 32",
                        [reason],
                    )
                    + "\nChoose another backbone, such as timm/convnext_tiny, timm/swin_tiny_patch4_window7_224, "
                    "timm/pvt_v2_b1 or timm/resnet50."
                )
        self.body = create_body(name, features_only=True, **how)
        self.channels = last_four(self.body.feature_info.channels())
        self.mean = in_255(self.body.pretrained_cfg["mean"])
        self.std = in_255(self.body.pretrained_cfg["std"])

    def forward(self, images: Tensor) -> Features:
        maps = self.body(images)[-4:]
        if self.channels[-1] != maps[-1].shape[1]:  # Swin and its kind: channels last
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return Features(*maps)


def last_four(channels: Any) -> tuple[int, int, int, int]:
    """The last four of some numbers of channels."""
    first, second, third, fourth = channels[-4:]
    return first, second, third, fourth


def _why_not(name: str, how: dict[str, Any]) -> str:
    """Why a network does not have four scales for images of any size; empty if it has.

    Call on the meta device.
    """
    try:
        body = create_body(name, features_only=True, **how)
        if (strides := tuple(body.feature_info.reduction()[-4:])) != SCALES:
            return f"its last feature maps have strides {list(strides)}"
        body.eval()(torch.zeros(1, 3, 96, 160))
    except RecipeError:
        raise
    except Exception as error:  # timm's networks refuse with assertions, TypeError, RuntimeError, …
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return ""


def import_timm(wanted_by: str) -> ModuleType:
    """The module timm. Raises RecipeError, which says how to install it, if it cannot be imported."""
    try:
        with warnings.catch_warnings():
            # torchvision's image extension, which nothing here uses, is missing with CPU builds of torch.
            warnings.filterwarnings("ignore", "Failed to load image Python extension")
            return importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision built for another torch fails with a RuntimeError or OSError, not an ImportError.
        raise RecipeError(
            f"The backbone {wanted_by} needs timm, which cannot be imported here ({type(error).__name__}: {error}). "
            'Install it with: pip install "darseg[timm]". If it is installed already, its torchvision does not fit this '
            f"torch: reinstall the two together. Backbones without timm are {', '.join(RESNETS)}."
        ) from error


def create_body(name: str, **how: Any) -> Any:
    """The network `name` ("timm/…") of timm, randomly initialized.

    Raises RecipeError if timm has no such network, or whatever timm raises if it cannot build it like this.
    """
    timm = import_timm(name)
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('.')[0]}*")[:5]
        raise RecipeError(
            f"timm {timm.__version__} has no network {model!r}. "
            + (f"Similar names are {', '.join(near)}. " if near else "")
            + "See timm.list_models() for all names."
        )
    return timm.create_model(model, pretrained=False, **how)


def all_keys(name: str) -> frozenset[str]:
    """Keys of the state dict of the whole network of timm, the classifier included."""
    with torch.device("meta"):  # names only: no memory, no random numbers drawn
        return frozenset(create_body(name).state_dict())


def _refused(name: str, output_stride: int, reason: str) -> RecipeError:
    other_stride = 16 if output_stride == 8 else 8
    return RecipeError(
        f"{name} cannot be built with output stride {output_stride} ({reason}). Try output stride {other_stride}, or a "
        "network that timm can dilate, such as timm/resnet50, timm/mobilenetv3_large_100 or timm/tf_efficientnet_lite0."
    )


def in_255(parts: tuple[float, ...]) -> RGB:
    """A color of timm (0..1) as RGB in 0..255."""
    red, green, blue = (255 * float(part) for part in parts)
    return red, green, blue
