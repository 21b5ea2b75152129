"""Data files with which other trainers read label maps that darseg wrote; 255 is not learned from.

The formats are those that the trainers document: Ultralytics' semantic segmentation (YOLO26; a data file with
`masks_dir`), LightlyTrain's `train_semantic_segmentation` (`data`), and MMSegmentation 1.x (`BaseSegDataset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from darseg.choices import Trainer
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.files import read_file, write_whole
from darseg.data.manifest import Sample
from darseg.errors import RunError

FILES: dict[Trainer, str] = {"yolo": "yolo.yaml", "lightly-train": "lightly_train.yaml", "mmseg": "mmseg.py"}
"""Trainer → its data file, in the folder of the label maps."""

IMAGES = "images"
"""The folder whose name Ultralytics replaces with that of the masks."""

CROP = 512  # pixels; the side of a crop in most of MMSegmentation's own configurations


def check_trainer(trainer: Trainer | None, images: Path, out: Path) -> None:
    """Raise RunError if a trainer would not find the label maps in `out` of the images in a folder."""
    if trainer is None:
        return
    if images.is_file():
        raise RunError(
            f"{images} is one image, and --for {trainer} writes a data file for a folder of images. Give the folder."
        )
    if trainer == "yolo":
        _yolo_places(images, out)


def write_for(
    trainer: Trainer, images: Path, out: Path, *, samples: Sequence[Sample], classes: ClassSet
) -> Path:
    """Write the data file of a trainer next to the label maps in `out`, and return its path.

    Args:
        samples: the labeled images; their ids are their paths below `images` without suffix.

    Raises RunError as `check_trainer` and for a file that is there with other content, StorageError if it cannot be
    written.
    """
    path = out / FILES[trainer]
    match trainer:
        case "yolo":
            text = _yolo(images, out, classes)
        case "lightly-train":
            text = _lightly_train(images, out, classes)
        case "mmseg":
            text = _mmseg(images, out, samples=samples, classes=classes)
    if path.is_file() and read_file(path) != text.encode():
        raise RunError(
            f"{path} is there and differs from what would be written, perhaps because you added to it, so it is kept. "
            "The label maps are done. To have it written again, rename it and run the same command again."
        )
    write_whole(path, text)
    return path


def _yolo_places(images: Path, out: Path) -> tuple[Path, str, str]:
    """The root of a data set, the images' folder below it, and the name that replaces IMAGES in it."""
    parts, maps = images.absolute().parts, out.absolute().parts
    if parts.count(IMAGES) != 1:
        raise RunError(
            f"{images}: YOLO finds the mask of an image by replacing the folder {IMAGES} in its path, so that path must "
            f"have exactly one folder of this name. Move the images, as to photos/{IMAGES}."
        )
    place = parts.index(IMAGES)
    wanted = Path(*parts[:place], "masks", *parts[place + 1 :])
    if len(maps) != len(parts) or maps[:place] != parts[:place] or maps[place + 1 :] != parts[place + 1 :]:
        raise RunError(
            f"{out}: YOLO finds the mask of an image by replacing the folder {IMAGES} in its path. Give {wanted} as the "
            "folder of the label maps, or another name instead of masks."
        )
    return Path(*parts[:place]), "/".join(parts[place:]), maps[place]


def _yolo(images: Path, out: Path, classes: ClassSet) -> str:
    root, train, masks = _yolo_places(images, out)
    values = {"path": str(root), "train": train, "masks_dir": masks, "names": dict(enumerate(classes.names))}
    head = (
        "# Ultralytics, semantic segmentation. Masks hold the class ids below; 255 is ignored.\n"
        "# Add a key val: images with true masks, below path, in a folder images with a folder of masks next to it.\n"
    )
    return head + _as_yaml(values)


def _lightly_train(images: Path, out: Path, classes: ClassSet) -> str:
    names = dict(enumerate(classes.names))
    values = {
        "train": {"images": str(images.absolute()), "masks": str(out.absolute())},
        "classes": names | {IGNORE: _unused_name(classes.names)},
        "ignore_classes": [IGNORE],
    }
    head = (
        "# LightlyTrain: data = yaml.safe_load(open(THIS_FILE)); data['val'] = {'images': …, 'masks': …};\n"
        "# lightly_train.train_semantic_segmentation(data=data, …). All values of masks must be listed, 255 too.\n"
    )
    return head + _as_yaml(values)


def _mmseg(images: Path, out: Path, *, samples: Sequence[Sample], classes: ClassSet) -> str:
    """A configuration. A data set of MMSegmentation has one suffix of images, so each suffix is one."""
    ids: dict[str, list[str]] = {}
    for sample in samples:
        ids.setdefault(sample.image.suffix, []).append(sample.id)
    datasets = []
    for number, (suffix, names) in enumerate(ids.items(), 1):
        listed = out / f"mmseg_{number}.txt"
        write_whole(listed, "".join(f"{name}\n" for name in names))
        datasets.append(
            "dict(\n"
            "    type='BaseSegDataset',\n"
            f"    ann_file={str(listed.absolute())!r},\n"
            f"    data_prefix=dict(img_path={str(images.absolute())!r}, seg_map_path={str(out.absolute())!r}),\n"
            f"    img_suffix={suffix!r},\n"
            "    seg_map_suffix='.png',\n"
            f"    ignore_index={IGNORE},\n"
            "    reduce_zero_label=False,\n"
            "    metainfo=metainfo,\n"
            "    pipeline=train_pipeline)"
        )
    one_kind = len(datasets) == 1
    joined = datasets[0] if one_kind else f"dict(type='ConcatDataset', datasets=[{', '.join(datasets)}])"
    return (
        "# MMSegmentation 1.x: name this file in _base_. Classes are 0, 1, …; 255 is ignored.\n"
        "# Add val_dataloader and val_evaluator for images with true label maps, and choose your own pipeline.\n"
        f"metainfo = dict(\n    classes={tuple(classes.names)!r},\n"
        f"    palette={[list(map(int, color)) for color in classes.colors]!r})\n"
        "train_pipeline = [\n"
        "    dict(type='LoadImageFromFile'),\n"
        "    dict(type='LoadAnnotations'),\n"
        f"    dict(type='RandomCrop', crop_size=({CROP}, {CROP})),\n"
        "    dict(type='RandomFlip', prob=0.5),\n"
        "    dict(type='PackSegInputs'),\n"
        "]\n"
        f"train_dataset = {joined}\n"
        "train_dataloader = dict(dataset=train_dataset)\n"
    )


def _unused_name(names: Sequence[str]) -> str:
    """A name for pixels without a label that no class has."""
    name = "unlabeled"
    while name in names:
        name += "_"
    return name


def _as_yaml(values: dict) -> str:
    """YAML in ASCII: nothing in a name can be read as something else."""
    return yaml.safe_dump(values, sort_keys=False, width=10_000)
