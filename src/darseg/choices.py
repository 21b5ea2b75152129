"""What a recipe, a command or an argument can choose from, where several rooms share the choice.

Each is a `Literal`, so the recipe, the command line and type checkers know the same values. The module imports nothing
of darseg and is open to every room, as `errors` is; `darseg --help` needs it before anything slow is loaded.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["validation", "test", "labeled", "unlabeled"]
"""What the images of a recipe are for."""
LabelFormat = Literal["auto", "index", "color"]
"""What the pixels of a label file hold."""
NamedValues = Literal["index", "one_based", "binary", "cityscapes_ids"]
"""The ways in which values of label files become classes that have a name."""
BuiltInClasses = Literal["cityscapes", "voc", "camvid"]
"""The class sets that darseg knows by name."""
AnnotationFormat = Literal["coco", "panoptic", "labelme", "cityscapes", "cvat"]
"""The annotation files that can be drawn as label maps."""
Trainer = Literal["yolo", "lightly-train", "mmseg"]
"""The other trainers for which data files are written next to label maps."""

Architecture = Literal["pspnet", "deeplabv2", "deeplabv3plus", "dpt", "linear"]
"""What follows the backbone of a network."""
ReleasedNetwork = Literal[
    "pspnet50",
    "deeplabv2_101",
    "deeplabv3plus_resnet50",
    "deeplabv3plus_resnet101",
    "dpt_dinov2_small",
    "dpt_dinov2_base",
    "dpt_dinov2_large",
]
"""The networks of released checkpoints: of DARS (the first two) and of UniMatch (versions 1 and 2)."""
LabelingPrior = Literal["labeled", "shrunk"]
"""The class shares that pseudo labels aim at: the labeled images', or those shrunk toward the network's estimate."""
ResultAlign = Literal["auto", "on", "off"]
"""Whether a run's result is its aligned network: as held-out images say, always, or never."""
ResultKeep = Literal["best", "last"]
"""Which round is a run's result, and what later rounds go on from: the best on the validation images, or the last."""
Precision = Literal["fp32", "bf16", "fp16"]
"""The number format of a training step."""
DynamicMethod = Literal["dst", "dmt"]
"""How pseudo labels are doubted while a network learns from them; see methods/dynamic.py."""
AdversarialMethod = Literal["advsemiseg", "s4gan"]
"""The methods with a discriminator."""
OnlineMethod = Literal[
    "fixmatch", "mean_teacher", "classmix", "unimatch", "unimatch_v2", "cps", AdversarialMethod
]
"""How unlabeled images are used while a network trains."""
OnlineAlign = Literal["none", "decisions", "probabilities"]
"""What gets the class shares of the labeled pixels before labels are accepted while training."""
Mixing = Literal["cutmix", "classmix", "none"]
"""What is pasted from one image of a pair into the other: a box, half of its classes, or nothing."""

PredictionKind = Literal["index", "color", "overlay", "confidence"]
"""What `predict` writes: class values, class colors, colors over the image, or probabilities."""
Existing = Literal["fault", "keep", "replace"]
"""What `predict` does with files that exist: refuse, keep those that are whole, or replace them."""
