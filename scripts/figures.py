"""The pictures of docs/how_it_works.md and docs/tutorial.md, from the runs that these pages describe.

    darseg demo                                                        # writes demo/
    .venv/bin/python scripts/figures.py demo/seed_0/dars               # figures of how it works
    darseg align demo/seed_0/control demo/data/images --out aligned.safetensors
    .venv/bin/python scripts/figures.py demo/seed_0/control --aligned aligned.safetensors # what alignment changes
    .venv/bin/python scripts/figures.py runs/photos --tutorial predictions    # of the tutorial, run in its folder

Charts are SVGs with their own background, light or dark as the reader's system prefers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

import darseg
from darseg.data.files import write_whole
from darseg.data.maps import label_path
from darseg.demo.demo import sheet
from darseg.model.weights import load_network
from darseg.run.build import evaluation_protocol, labeling_protocol
from darseg.run.evaluate import load_trained
from darseg.training.schedule import Schedule

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 760  # of charts, in the units of their text
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1b2a2f }
.title { font-weight: 600; font-size: 15px } .small { font-size: 12px; fill: #51646b } .end { text-anchor: end }
.mid { text-anchor: middle }
.back { fill: #ffffff } .line { stroke: #b9c6ca; fill: none } .strong { stroke: #51646b; fill: none }
.a { fill: #c2571a } .b { fill: #00796b } .c { fill: #cfd8dc } .as { stroke: #c2571a; fill: none; stroke-width: 2 }
.aim { stroke: #1b2a2f; stroke-width: 3 }
.bs { stroke: #00796b; fill: none; stroke-width: 2 } .box { fill: #e7f1ef; stroke: #00796b }
@media (prefers-color-scheme: dark) {
text { fill: #e3ecee } .small { fill: #9fb3ba } .back { fill: #1b2226 }
.line { stroke: #45555c } .strong { stroke: #9fb3ba }
.a { fill: #f0935a } .b { fill: #4db6a6 } .c { fill: #4a5a61 } .as { stroke: #f0935a } .bs { stroke: #4db6a6 }
.box { fill: #223633; stroke: #4db6a6 } .aim { stroke: #ffffff } }
</style>"""


def svg(height: float, alt: str, parts: Sequence[str]) -> str:
    """A whole picture; `alt` describes it for readers who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(alt)}">\n{STYLE}\n'
        f'<rect class="back" width="{WIDTH}" height="{height:g}" rx="8"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def line(x: float, y: float, to_x: float, to_y: float, kind: str = "line", more: str = "") -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" {more}/>'


def rect(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {more}/>'


def pipeline() -> str:
    """One round as boxes and arrows."""
    wide = 170
    boxes = [
        (15, 40, "labeled images", "few"),
        (15, 180, "unlabeled images", "many"),
        (202, 40, "train", "half a batch of each"),
        (202, 180, "predict", "class and confidence"),
        (389, 180, "count", "by class and confidence"),
        (576, 180, "choose and assign", "threshold, keep share"),
        (576, 40, "pseudo labels", "255 where not labeled"),
    ]
    parts = [
        '<defs><marker id="m" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="b" d="M0 0L8 4L0 8z"/></marker></defs>',
        text(15, 25, "One round after the first", "title"),
    ]
    for x, y, name, about in boxes:
        parts += [rect(x, y, wide, 62, "box", 'rx="6"'), text(x + wide / 2, y + 27, name, "mid")]
        parts.append(text(x + wide / 2, y + 46, about, "mid small"))
    arrow = 'marker-end="url(#m)"'
    for start, end in (
        ((185, 71), (200, 71)),
        ((185, 211), (200, 211)),
        ((287, 102), (287, 178)),
        ((372, 211), (387, 211)),
        ((559, 211), (574, 211)),
        ((700, 180), (700, 104)),
        ((576, 71), (374, 71)),
    ):
        parts.append(line(*start, *end, "bs", arrow))
    parts.append(f'<path class="bs" d="M100 102V140H640V178" stroke-dasharray="4 4" {arrow}/>')
    parts.append(text(460, 132, "class shares, measured", "small mid"))
    parts += [
        text(295, 164, "the network of the last step", "small"),
        text(475, 62, "the next round's", "small mid"),
    ]
    return svg(262, "Train, predict, count, choose and assign, train again", parts)


def shares(run: darseg.RunDirectory, index: int, names: Sequence[str]) -> str:
    """Shares of each class in predictions, labeled images and pseudo labels, each divided by its share in the truth."""
    labels = run.label_set(index)
    aim = labels.thresholds.wanted / labels.thresholds.wanted.sum()  # the labeled images' shares
    truth = np.array(json.loads((run.round(index) / "pseudo_scores.json").read_text())["truth"])
    true, raw, kept = (counts / counts.sum() for counts in (truth, labels.histogram.predicted, labels.kept))
    left, right, top, step = 200, 700, 88, 27
    low, high = -2.0, 2.0  # of log2 of the ratio

    def at(ratio: float) -> float:
        return left + (min(max(math.log2(ratio), low), high) - low) / (high - low) * (right - left)

    bottom = top + step * (len(names) - 1) + 16
    parts = [text(20, 28, f"Share of each class ÷ its share in the truth, round {index}", "title")]
    parts += ['<circle class="a" cx="26" cy="47" r="6"/>', text(38, 52, "raw predictions")]
    parts += [rect(160, 41, 12, 12, "b"), text(178, 52, "pseudo labels")]
    parts += [line(290, 40, 290, 55, "aim"), text(298, 52, "labeled images: what alignment aims at")]
    for ratio, word in ((0.25, "¼"), (0.5, "½"), (1, "as in the truth"), (2, "twice"), (4, "4 times")):
        kind = "strong" if ratio == 1 else "line"
        parts += [
            line(at(ratio), top - 12, at(ratio), bottom, kind),
            text(at(ratio), bottom + 18, word, "mid small"),
        ]
    for k, name in enumerate(names):
        y = top + step * k
        parts += [text(130, y + 4, name, "end"), text(190, y + 4, f"{true[k]:.2%}", "end small")]
        if raw[k] == 0:
            parts.append(text(left + 8, y + 4, "never predicted: nothing to align, labeled nowhere", "small"))
            continue
        parts.append(line(at(aim[k] / true[k]), y - 11, at(aim[k] / true[k]), y + 11, "aim"))
        parts.append(line(at(raw[k] / true[k]), y, at(kept[k] / true[k]), y, "strong"))
        parts.append(f'<circle class="a" cx="{at(raw[k] / true[k]):.1f}" cy="{y}" r="6"/>')
        parts.append(rect(at(kept[k] / true[k]) - 6, y - 6, 12, 12, "b"))
    return svg(bottom + 32, "Class shares of raw predictions and pseudo labels against the truth", parts)


def threshold(run: darseg.RunDirectory, index: int, k: int, name: str) -> str:
    """Confidences of the pixels predicted as class k with the threshold, and the codes around it."""
    labels = run.label_set(index)
    chosen = labels.thresholds
    counts, accept = labels.histogram.counts[k], int(chosen.accept[k])
    confidence = darseg.FLOAT16.confidence(np.arange(darseg.FLOAT16.codes))
    parts = [text(20, 28, f"Pixels predicted as “{name}” by confidence, round {index}", "title")]

    # Left: all confidences, in 50 bins.
    left, right, top, bottom = 30.0, 400.0, 70.0, 240.0
    bins = np.linspace(0, 1, 51)
    place = np.minimum(np.digitize(confidence, bins) - 1, 49)
    above = np.arange(len(counts)) >= accept
    rejected = np.bincount(place, counts * ~above, 50)
    accepted = np.bincount(place, counts * above, 50)
    tallest = (rejected + accepted).max()
    wide = (right - left) / 50
    for n in range(50):
        x = left + n * wide
        low = (bottom - top) * rejected[n] / tallest
        high = (bottom - top) * accepted[n] / tallest
        parts.append(rect(x + 0.5, bottom - low, wide - 1, low, "c"))
        parts.append(rect(x + 0.5, bottom - low - high, wide - 1, high, "b"))
    t = left + float(chosen.threshold[k]) * (right - left)
    parts += [line(left, bottom, right, bottom, "strong"), line(t, top - 6, t, bottom + 6, "as")]
    parts.append(text(t - 6, top + 4, f"threshold t = {chosen.threshold[k]:.4f}", "end"))
    parts.append(
        text(t - 6, top + 21, f"accepted {chosen.accepted[k]:,} of {chosen.predicted[k]:,}", "end small")
    )
    parts += [text(left, bottom + 20, "0", "small"), text(right, bottom + 20, "1", "small end")]
    parts.append(text((left + right) / 2, bottom + 20, "confidence", "small mid"))

    # Right: each code around the threshold, where pixels are tied.
    left, right = 440.0, 740.0
    first, last = accept - 4, min(accept + 4, len(counts) - 1)
    tallest = counts[first : last + 1].max()
    wide = (right - left) / (last - first + 1)
    for n, code in enumerate(range(first, last + 1)):
        x, tall = left + n * wide, (bottom - top - 30) * counts[code] / tallest
        parts.append(rect(x + 2, bottom - tall, wide - 4, tall, "b" if code >= accept else "c"))
        if code % 2 == accept % 2:
            parts.append(text(x + wide / 2, bottom + 20, f"{confidence[code]:.4f}"[1:], "small mid"))
    parts += [line(left, bottom, right, bottom, "strong")]
    x = left + (accept - first) * wide
    parts.append(line(x, top + 24, x, bottom + 6, "as"))
    parts.append(text(left, top - 12, "The float16 values around t"))
    surplus = chosen.accepted[k] - chosen.wanted[k]
    for n, words in enumerate(
        (
            f"{chosen.wanted[k]:,} are wanted. {counts[accept]:,} pixels are tied at t,",
            f"so {surplus:,} too many are accepted. A share of {chosen.keep[k]:.4f}",
            "of the accepted pixels, drawn at random, is kept.",
        )
    ):
        parts.append(text(left, bottom + 42 + 17 * n, words, "small"))
    return svg(bottom + 90, f"Histogram of confidences of {name} with the threshold", parts)


def schedule() -> str:
    """The learning rate of three equal rounds on the poly curve."""
    left, right, top, bottom = 60.0, 730.0, 60.0, 220.0
    parts = [
        text(
            20,
            28,
            "Learning rate of three equal rounds",
            "title",
        )
    ]
    steps, spans = 100, [(0.0, 1.0), (0.5, 1.0), (2 / 3, 1.0)]
    wide = (right - left) / len(spans)
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        parts += [line(left, y, right, y), text(left - 8, y + 4, f"{share:g}", "end small")]
    for index, span in enumerate(spans):
        rates = [Schedule(span=span).rate(step, steps, 1.0) for step in range(steps + 1)]
        points = [
            f"{left + (index + step / steps) * wide:.1f} {bottom - rate * (bottom - top):.1f}"
            for step, rate in enumerate(rates)
        ]
        parts.append(f'<path class="bs" d="M{"L".join(points)}"/>')
        x = left + index * wide
        parts += [line(x, top - 8, x, bottom, "strong"), text(x + 8, bottom + 20, f"round {index}")]
        parts.append(text(x + 8, bottom + 38, f"span {span[0]:.3g} – 1, from {rates[0]:.3f} to 0", "small"))
    parts.append(
        text(
            left,
            bottom + 62,
            "share of the base rate: (1 − fraction of the curve)^0.9",
            "small",
        )
    )
    return svg(bottom + 76, "Learning rate over three rounds", parts)


def steps_picture(run: darseg.RunDirectory, index: int, rows: int) -> np.ndarray:
    """What labeling does to single images: image, prediction, confidence, pseudo label, truth (BGR)."""
    recipe = darseg.load_recipe(run.recipe)
    manifest, network = darseg.manifest_of(recipe), load_trained(run.root, index - 1).network
    palette, protocol = manifest.classes.palette(), labeling_protocol(recipe)
    table = []
    for sample in manifest.unlabeled[8 : 8 + rows]:
        image = darseg.read_image(sample.image)
        prediction = darseg.predict_for_labeling(network, image, protocol)
        gray = np.rint(prediction.confidence * 255).astype(np.uint8)
        label = darseg.read_label(label_path(run.labels(index), sample.id))
        columns = [palette[prediction.classes], np.repeat(gray[..., None], 3, axis=2), palette[label]]
        truth = [palette[darseg.read_label(sample.label, sample.encoding)]] if sample.label else []
        table.append([image, *columns, *truth])
    titles = ["image", "prediction", "confidence", f"pseudo label, round {index}", "truth (never used)"]
    legend = list(zip(manifest.classes.names, manifest.classes.colors, strict=True))
    return sheet(table, titles[: len(table[0])], legend)


def aligned_picture(run: darseg.RunDirectory, aligned: Path, rows: int) -> np.ndarray:
    """The validation scenes that gain most right pixels by alignment: image, truth, plain, aligned (BGR)."""
    recipe = darseg.load_recipe(run.recipe)
    manifest, protocol = darseg.manifest_of(recipe), evaluation_protocol(recipe)
    palette = manifest.classes.palette()
    networks = [load_network(run.last_network(), plain=True), load_network(aligned)]
    gains = []
    for sample in manifest.validation:
        image = darseg.read_image(sample.image)
        truth = darseg.read_label(sample.label, sample.encoding)
        plain, moved = (darseg.predict(network, image, protocol).classes for network in networks)
        pictures = [image, palette[truth], palette[plain], palette[moved]]
        gains.append((int((moved == truth).sum()) - int((plain == truth).sum()), pictures))
    table = [pictures for _, pictures in sorted(gains, key=lambda entry: -entry[0])[:rows]]
    titles = ["image", "truth", "plain: the largest p", "aligned: the largest p w"]
    return sheet(table, titles, list(zip(manifest.classes.names, manifest.classes.colors, strict=True)))


def write_picture(path: Path, picture: np.ndarray) -> None:
    """A JPEG: photographs as PNG are several times larger."""
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    write_whole(path, data.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="A finished run folder.")
    parser.add_argument(
        "--tutorial", type=Path, help="Draw the tutorial's pictures; the folder that `darseg predict` wrote."
    )
    parser.add_argument("--aligned", type=Path, help="Draw what this aligned network of the run changes.")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    run = darseg.RunDirectory(arguments.run)
    names = darseg.manifest_of(darseg.load_recipe(run.recipe)).classes.names
    if arguments.tutorial:
        write_picture(arguments.out / "tutorial_photos.jpg", photos_picture(run))
        write_picture(arguments.out / "tutorial_labels.jpg", steps_picture(run, 2, 3))
        write_picture(arguments.out / "tutorial_overlay.jpg", overlay_picture(arguments.tutorial / "overlay"))
        return
    if arguments.aligned:
        write_picture(arguments.out / "aligned.jpg", aligned_picture(run, arguments.aligned, 3))
        return
    charts = {
        "pipeline": pipeline(),
        "shares": shares(run, 1, names),
        "threshold": threshold(run, 1, names.index("building"), "building"),
        "schedule": schedule(),
    }
    for name, chart in charts.items():
        write_whole(arguments.out / f"{name}.svg", chart)
    write_picture(arguments.out / "steps.jpg", steps_picture(run, 1, 3))


def photos_picture(run: darseg.RunDirectory) -> np.ndarray:
    """Labeled photographs with their label maps, and others without (BGR)."""
    manifest = darseg.manifest_of(darseg.load_recipe(run.recipe))
    palette = manifest.classes.palette()
    labeled = [
        [darseg.read_image(s.image), palette[darseg.read_label(s.label, s.encoding)]]
        for s in manifest.labeled[:2]
    ]
    unlabeled = [[darseg.read_image(s.image) for s in manifest.unlabeled[n : n + 3]] for n in (0, 3)]
    table = [pair + images for pair, images in zip(labeled, unlabeled, strict=True)]
    titles = (
        "labeled: photograph",
        "its label map",
        "without a label",
        "without a label",
        "without a label",
    )
    return sheet(table, titles, list(zip(manifest.classes.names, manifest.classes.colors, strict=True)))


def overlay_picture(folder: Path) -> np.ndarray:
    """The first overlays of unlabeled photographs that `darseg predict` wrote (BGR)."""
    names = [f"street_{index:03d}" for index in (1, 2, 3, 4, 6)]
    return sheet([[darseg.read_image(folder / f"{name}.png") for name in names]], names, [])


if __name__ == "__main__":
    main()
