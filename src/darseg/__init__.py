"""Semi-supervised semantic segmentation by re-distributed pseudo labels (DARS).

This package offers the functions behind the commands – `train`, `evaluate`, `predict_folder`, `align_network`,
`label_folder`, `redistribute_folder`, `rasterize_folder`, `propose_recipe`, `export_network`, `check`, `plan`,
`draw_split`, `suggest`, `view_run`, `mark_bad`, `write_report`, `compare_runs`, `run_demo` – and the values that they
take and return. A name is loaded when it is first used, because importing torch takes seconds.
"""

# `signal` itself takes milliseconds, in which Ctrl-C would print a traceback.
import _signal  # ty: ignore[import-not-found]
import os
import sys


def _leave(*_: object) -> None:
    """Answer Ctrl-C while modules are imported, and after the work: end without a traceback."""
    os._exit(130)  # 128 + SIGINT


_is_command = bool(sys.argv) and (sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "darseg")
_answers = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler  # Ctrl-C is not ignored
if _is_command and _answers:
    _signal.signal(_signal.SIGINT, _leave)

import importlib  # noqa: E402 (modules take time to import)
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:  # what `__getattr__` finds at run time
    from darseg.annotate.rasterize import Rasterized as Rasterized
    from darseg.annotate.rasterize import rasterize_folder as rasterize_folder
    from darseg.config.experiment import ExperimentFile as ExperimentFile
    from darseg.config.experiment import load_experiment as load_experiment
    from darseg.config.recipe import Recipe as Recipe
    from darseg.config.text import load_recipe as load_recipe
    from darseg.data.augment import Augmentation as Augmentation
    from darseg.data.batches import Batch as Batch
    from darseg.data.classes import CAMVID as CAMVID
    from darseg.data.classes import CITYSCAPES as CITYSCAPES
    from darseg.data.classes import VOC as VOC
    from darseg.data.classes import ClassSet as ClassSet
    from darseg.data.classes import class_set as class_set
    from darseg.data.dataset import Example as Example
    from darseg.data.encoding import LabelEncoding as LabelEncoding
    from darseg.data.encoding import label_encoding as label_encoding
    from darseg.data.examine import Findings as Findings
    from darseg.data.images import read_image as read_image
    from darseg.data.labels import read_label as read_label
    from darseg.data.manifest import Manifest as Manifest
    from darseg.data.manifest import Sample as Sample
    from darseg.data.prediction import FINE as FINE
    from darseg.data.prediction import FLOAT16 as FLOAT16
    from darseg.data.prediction import Prediction as Prediction
    from darseg.demo.demo import run_demo as run_demo
    from darseg.errors import DarsegError as DarsegError
    from darseg.experiment.compare import Compared as Compared
    from darseg.experiment.compare import compare as compare
    from darseg.experiment.plan import ExperimentPlan as ExperimentPlan
    from darseg.experiment.plan import plan_experiment as plan_experiment
    from darseg.init.propose import Proposal as Proposal
    from darseg.init.propose import propose_recipe as propose_recipe
    from darseg.model.convert import convert as convert
    from darseg.model.decide import decide as decide
    from darseg.model.former import predict_classes as predict_classes
    from darseg.model.network import Network as Network
    from darseg.model.network import Output as Output
    from darseg.model.network import build_network as build_network
    from darseg.model.parity import Parity as Parity
    from darseg.model.predict import predict as predict
    from darseg.model.predict import predict_for_labeling as predict_for_labeling
    from darseg.model.weights import LoadReport as LoadReport
    from darseg.model.weights import load_weights as load_weights
    from darseg.model.windows import Protocol as Protocol
    from darseg.pseudo.align import align as align
    from darseg.pseudo.alignment import Alignment as Alignment
    from darseg.pseudo.assign import assign as assign
    from darseg.pseudo.assign import image_generator as image_generator
    from darseg.pseudo.distribution import ClassDistribution as ClassDistribution
    from darseg.pseudo.histogram import ConfidenceHistogram as ConfidenceHistogram
    from darseg.pseudo.histogram import HistogramBuilder as HistogramBuilder
    from darseg.pseudo.labeling import AlignSettings as AlignSettings
    from darseg.pseudo.labeling import Labeling as Labeling
    from darseg.pseudo.labelset import PseudoLabelSet as PseudoLabelSet
    from darseg.pseudo.precision import ExpectedPrecision as ExpectedPrecision
    from darseg.pseudo.precision import HeldOutBuilder as HeldOutBuilder
    from darseg.pseudo.precision import HeldOutCounts as HeldOutCounts
    from darseg.pseudo.precision import choose_by_precision as choose_by_precision
    from darseg.pseudo.redistribute import Redistribution as Redistribution
    from darseg.pseudo.redistribute import redistribute as redistribute
    from darseg.pseudo.shift import Shift as Shift
    from darseg.pseudo.shift import estimate_shift as estimate_shift
    from darseg.pseudo.thresholds import Thresholds as Thresholds
    from darseg.pseudo.thresholds import choose_cbst as choose_cbst
    from darseg.pseudo.thresholds import choose_dars as choose_dars
    from darseg.pseudo.thresholds import choose_global as choose_global
    from darseg.report.comparison import Comparison as Comparison
    from darseg.report.comparison import compare_runs as compare_runs
    from darseg.report.overview import write_report as write_report
    from darseg.report.suggestions import suggest as suggest
    from darseg.report.variants import publish_comparison as publish_comparison
    from darseg.run.adapt import Adapted as Adapted
    from darseg.run.adapt import align_network as align_network
    from darseg.run.build import manifest_of as manifest_of
    from darseg.run.check import Plan as Plan
    from darseg.run.check import check as check
    from darseg.run.check import plan as plan
    from darseg.run.directory import RunDirectory as RunDirectory
    from darseg.run.evaluate import evaluate as evaluate
    from darseg.run.evaluate import load_network as load_network
    from darseg.run.export import export_network as export_network
    from darseg.run.label import label_folder as label_folder
    from darseg.run.marks import mark_bad as mark_bad
    from darseg.run.plan import Round as Round
    from darseg.run.predict import Predicted as Predicted
    from darseg.run.predict import predict_folder as predict_folder
    from darseg.run.redistribute import redistribute_folder as redistribute_folder
    from darseg.run.rounds import train as train
    from darseg.run.split import draw_split as draw_split
    from darseg.run.suggestions import Suggested as Suggested
    from darseg.run.suggestions import SuggestedImage as SuggestedImage
    from darseg.training.scores import Scores as Scores
    from darseg.training.stage import Stage as Stage
    from darseg.training.stage import run_stage as run_stage
    from darseg.view.viewer import view_run as view_run

__version__ = "0.3.0"

_HOMES = {
    "Adapted": "run.adapt",
    "align": "pseudo.align",
    "align_network": "run.adapt",
    "Alignment": "pseudo.alignment",
    "AlignSettings": "pseudo.labeling",
    "assign": "pseudo.assign",
    "Augmentation": "data.augment",
    "Batch": "data.batches",
    "build_network": "model.network",
    "CAMVID": "data.classes",
    "check": "run.check",
    "choose_by_precision": "pseudo.precision",
    "choose_cbst": "pseudo.thresholds",
    "choose_dars": "pseudo.thresholds",
    "choose_global": "pseudo.thresholds",
    "CITYSCAPES": "data.classes",
    "class_set": "data.classes",
    "ClassDistribution": "pseudo.distribution",
    "ClassSet": "data.classes",
    "compare": "experiment.compare",
    "compare_runs": "report.comparison",
    "Compared": "experiment.compare",
    "Comparison": "report.comparison",
    "ConfidenceHistogram": "pseudo.histogram",
    "convert": "model.convert",
    "DarsegError": "errors",
    "decide": "model.decide",
    "draw_split": "run.split",
    "estimate_shift": "pseudo.shift",
    "evaluate": "run.evaluate",
    "Example": "data.dataset",
    "ExpectedPrecision": "pseudo.precision",
    "ExperimentFile": "config.experiment",
    "ExperimentPlan": "experiment.plan",
    "export_network": "run.export",
    "Findings": "data.examine",
    "FINE": "data.prediction",
    "FLOAT16": "data.prediction",
    "HeldOutBuilder": "pseudo.precision",
    "HeldOutCounts": "pseudo.precision",
    "HistogramBuilder": "pseudo.histogram",
    "image_generator": "pseudo.assign",
    "label_encoding": "data.encoding",
    "label_folder": "run.label",
    "LabelEncoding": "data.encoding",
    "Labeling": "pseudo.labeling",
    "load_experiment": "config.experiment",
    "load_network": "run.evaluate",
    "load_recipe": "config.text",
    "load_weights": "model.weights",
    "LoadReport": "model.weights",
    "Manifest": "data.manifest",
    "manifest_of": "run.build",
    "mark_bad": "run.marks",
    "Network": "model.network",
    "Output": "model.network",
    "Parity": "model.parity",
    "Plan": "run.check",
    "plan": "run.check",
    "plan_experiment": "experiment.plan",
    "predict": "model.predict",
    "predict_classes": "model.former",
    "predict_folder": "run.predict",
    "predict_for_labeling": "model.predict",
    "Predicted": "run.predict",
    "Prediction": "data.prediction",
    "Proposal": "init.propose",
    "propose_recipe": "init.propose",
    "Protocol": "model.windows",
    "PseudoLabelSet": "pseudo.labelset",
    "publish_comparison": "report.variants",
    "rasterize_folder": "annotate.rasterize",
    "Rasterized": "annotate.rasterize",
    "read_image": "data.images",
    "read_label": "data.labels",
    "Recipe": "config.recipe",
    "redistribute": "pseudo.redistribute",
    "redistribute_folder": "run.redistribute",
    "Redistribution": "pseudo.redistribute",
    "Round": "run.plan",
    "run_demo": "demo.demo",
    "run_stage": "training.stage",
    "RunDirectory": "run.directory",
    "Sample": "data.manifest",
    "Scores": "training.scores",
    "Shift": "pseudo.shift",
    "Stage": "training.stage",
    "suggest": "report.suggestions",
    "Suggested": "run.suggestions",
    "SuggestedImage": "run.suggestions",
    "Thresholds": "pseudo.thresholds",
    "train": "run.rounds",
    "view_run": "view.viewer",
    "VOC": "data.classes",
    "write_report": "report.overview",
}

__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # type checkers know the names above, and report all others

    def __getattr__(name: str) -> Any:
        if name in ("demo", "view"):  # rooms; called, they are the old names of `run_demo` and `view_run`
            return importlib.import_module(f"darseg.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'darseg' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"darseg.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
