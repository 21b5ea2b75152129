"""Semi-supervised semantic segmentation by re-distributed pseudo labels (DARS).

The verbs of the command line – `train`, `evaluate`, `predict_folder`, `label_folder`, `redistribute_folder`,
`rasterize_folder`, `propose_recipe`, `export_network`, `check`, `plan`, `draw_split`, `view`, `mark_bad`,
`write_report`, `compare_runs`, `demo` – and the value types that flow between the rooms are importable from here.
Names are imported when first used, since torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Augmentation": "data.augment",
    "CAMVID": "data.classes",
    "CITYSCAPES": "data.classes",
    "VOC": "data.classes",
    "Batch": "data.batches",
    "ClassDistribution": "pseudo.distribution",
    "ClassSet": "data.classes",
    "ConfidenceHistogram": "pseudo.histogram",
    "DarsegError": "errors",
    "Example": "data.dataset",
    "FINE": "data.prediction",
    "FLOAT16": "data.prediction",
    "Findings": "data.manifest",
    "HistogramBuilder": "pseudo.histogram",
    "Manifest": "data.manifest",
    "Network": "model.network",
    "Output": "model.network",
    "Parity": "model.export",
    "Plan": "run.check",
    "Predicted": "run.predict",
    "Prediction": "data.prediction",
    "Protocol": "model.predict",
    "Proposal": "init.propose",
    "PseudoLabelSet": "pseudo.labelset",
    "Rasterized": "annotate.rasterize",
    "Recipe": "config.recipe",
    "Redistribution": "pseudo.redistribute",
    "Round": "run.build",
    "RunDirectory": "run.directory",
    "Sample": "data.manifest",
    "Scores": "training.scores",
    "Stage": "training.stage",
    "Thresholds": "pseudo.thresholds",
    "assign": "pseudo.assign",
    "build_network": "model.network",
    "check": "run.check",
    "class_set": "data.classes",
    "Comparison": "report.comparison",
    "compare_runs": "report.comparison",
    "LabelEncoding": "data.labels",
    "Labeling": "pseudo.labeling",
    "LoadReport": "model.weights",
    "convert": "model.weights",
    "choose_cbst": "pseudo.thresholds",
    "choose_dars": "pseudo.thresholds",
    "choose_global": "pseudo.thresholds",
    "decide": "model.decide",
    "demo": "demo.demo",
    "draw_split": "run.split",
    "evaluate": "run.evaluate",
    "export_network": "run.export",
    "image_generator": "pseudo.assign",
    "label_encoding": "data.labels",
    "label_folder": "run.label",
    "load_network": "model.weights",
    "load_recipe": "config.text",
    "load_weights": "model.weights",
    "manifest_of": "run.build",
    "mark_bad": "run.marks",
    "plan": "run.check",
    "predict": "model.predict",
    "predict_classes": "model.predict",
    "predict_folder": "run.predict",
    "propose_recipe": "init.propose",
    "rasterize_folder": "annotate.rasterize",
    "read_image": "data.images",
    "read_label": "data.labels",
    "redistribute": "pseudo.redistribute",
    "redistribute_folder": "run.label",
    "run_stage": "training.stage",
    "train": "run.rounds",
    "view": "view.viewer",
    "write_report": "report.overview",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'darseg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"darseg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
