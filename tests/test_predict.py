"""Predicting images and videos: what is written belongs together, is named after its source, and loses nothing."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import write_png
from darseg.data import video
from darseg.data.images import read_image
from darseg.data.video import USUAL_RATE, VideoWriter, read_frames, video_facts, writable_rate
from darseg.demo.scenes import draw_scene
from darseg.errors import DataError, NumericsError, RunError, SizeError, StorageError
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import predict, predict_for_labeling, predict_scores, whole_image
from darseg.model.weights import load_network, save_network
from darseg.model.windows import Protocol
from darseg.run.evaluate import load_trained
from darseg.run.outputs import held_folder
from darseg.run.predict import KINDS, RECORD, predict_folder
from wording import refused, says

SPEC = NetworkSpec(backbone="resnet18_half", classes=4, output_stride=16, head_channels=8)
SIZE = (42, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has an opinion: logits far from each other, whatever the drawn weights."""
    torch.manual_seed(5)
    network = SPEC.build()
    for key, value in network.state_dict().items():
        if key.endswith("classifier.weight"):
            value.mul_(40)
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    save_network(network, path, SPEC)
    return path


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Network:
    """As `predict_folder` has it: in another memory layout last bits differ."""
    return load_trained(checkpoint).network


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    image = draw_scene(3, number, (max(65, size[0]), max(65, size[1])))[0]
    return np.ascontiguousarray(image[: size[0], : size[1]])


def film(
    path: Path, frames: int, rate: float = 12.5, code: str = "mp4v", size: tuple[int, int] = SIZE
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), rate, (size[1], size[0])
    )
    for number in range(frames):
        writer.write(picture(number, size)[:, :, ::-1])
    writer.release()
    return path


def written(folder: Path) -> set[str]:
    """The results in a folder; not the record of what made them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix() for path in files}


def averaged(network: Network, image: np.ndarray) -> torch.Tensor:
    """Probabilities of the whole image and of its mirror, written out: float64 [K, H, W]."""
    height, width = image.shape[:2]
    legal = [16 * max(1, -(-(side - 1) // 16)) + 1 for side in (height, width)]
    x = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] - network.mean[:, None, None]) / network.std[
        :, None, None
    ]
    top, left = (legal[0] - height) // 2, (legal[1] - width) // 2
    x = F.pad(x, (left, legal[1] - width - left, top, legal[0] - height - top))
    with torch.no_grad():
        plain, mirrored = network(x).main[0], network(x.flip(3)).main[0].flip(2)
    mean = (plain.double().softmax(0) + mirrored.double().softmax(0)) / 2
    return mean[:, top : top + height, left : left + width]


def test_a_prediction_is_of_the_averaged_probabilities(network: Network) -> None:
    for size in (SIZE, (33, 49), (1, 1), (70, 20)):
        image = picture(1, size)
        mean = averaged(network, image)
        prediction = predict(network, image)
        best, classes = (part.numpy() for part in mean.max(dim=0))
        # float32 rounds these probabilities by about 1e-6.
        clear = (mean.sort(dim=0).values.diff(dim=0)[-1] > 1e-4).numpy()
        assert (prediction.classes == classes)[clear].all() and clear.mean() > 0.9
        assert np.abs(prediction.confidence - best).max() < 2e-4  # of the scale: 1.3e-4
        assert (prediction.codes == predict(network, image, whole_image(network, image)).codes).all()


def test_a_protocol_may_be_given(network: Network) -> None:
    image = picture(2, (60, 90))
    how = Protocol((33, 33), mirror=False, scales=(0.5, 1.0))
    prediction = predict(network, image, how)
    mean = predict_scores(network, image, how, average="probabilities").mean(0, 60)
    assert (prediction.classes == mean.argmax(0).numpy()).all()
    assert (prediction.codes != predict(network, image).codes).any()
    with refused(SizeError, "32 x 32", "17 x 17", "33 x 33"):
        predict(network, image, Protocol((32, 32)))


def test_predicting_leaves_a_network_in_training_as_it_was(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    expected = predict(network, picture(1))
    network.train()
    network.backbone.eval()  # frozen, as some fine-tune it
    before = {name: (module.training) for name, module in network.named_modules()}
    state = {key: value.clone() for key, value in network.state_dict().items()}
    labeled, again = (
        predict_for_labeling(candidate, picture(1), Protocol((33, 33)))
        for candidate in (network, load_network(checkpoint))
    )
    assert (labeled.codes == again.codes).all() and (labeled.classes == again.classes).all()
    prediction = predict(network, picture(1))
    assert (prediction.codes == expected.codes).all() and (prediction.classes == expected.classes).all()
    with pytest.raises(SizeError):
        predict(network, picture(1), Protocol((32, 32)))
    assert {name: module.training for name, module in network.named_modules()} == before
    assert set(before.values()) == {True, False}
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_views_and_readonly_arrays_are_images_too(network: Network) -> None:
    image = picture(4)
    expected = predict(network, image).codes
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    assert (predict(network, bgr[:, :, ::-1]).codes == expected).all()
    image.setflags(write=False)
    assert (predict(network, image).codes == expected).all()


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (np.zeros((4, 4), np.uint8), "uint8 [4, 4]"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 [4, 4, 4]"),
        (np.zeros((4, 4, 3)), "float64 [4, 4, 3]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "a Tensor"),
        (np.zeros((0, 4, 3), np.uint8), "[0, 4, 3]"),
    ],
    ids=["gray", "four channels", "floats", "tensor", "empty"],
)
def test_arrays_that_are_not_images(network: Network, image, kind: str) -> None:
    with refused(DataError, "street 7", kind):
        predict(network, image, name="street 7")
    with pytest.raises(DataError):
        predict_for_labeling(network, image, Protocol((33, 33)))


def test_a_diverged_network_is_named(checkpoint: Path) -> None:
    network = load_network(checkpoint)
    with torch.no_grad():
        network.head.classifier.bias[0] = float("nan")
    with refused(NumericsError, "street 7", "training.learning_rate"):
        predict(network, picture(0), name="street 7")


def test_all_kinds_are_of_one_prediction(call, checkpoint: Path, network: Network, tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a" / "b.png", picture(7))
    code, out, err = call("predict", checkpoint, tmp_path / "in", tmp_path / "out")
    assert code == 0, err
    says(out.splitlines()[-1], f"1 image(s): {tmp_path / 'out' / 'index'}")
    assert written(tmp_path / "out") == {f"{kind}/a/b.png" for kind in KINDS}
    expected = predict(network, picture(7))
    index, confidence = (
        cv2.imread(str(tmp_path / "out" / kind / "a" / "b.png"), cv2.IMREAD_UNCHANGED)
        for kind in ("index", "confidence")
    )
    assert (index == expected.classes).all() and confidence.dtype == np.uint16
    assert np.abs(confidence / 65535 - expected.confidence).max() < 1e-5


def test_photographs_are_turned_upright(call, checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    mark = Image.Exif()
    mark[274] = 6  # a quarter turn
    Image.fromarray(picture(1)).save(tmp_path / "turned.jpg", exif=mark, quality=95)
    Image.fromarray(picture(1)).save(tmp_path / "plain.png")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"")
    status, printed, _ = call("predict", checkpoint, tmp_path, tmp_path / "out", "--kind", "index")
    assert status == 0
    assert read_image(tmp_path / "out" / "index" / "turned.png").shape[:2] == SIZE[::-1]
    assert read_image(tmp_path / "out" / "index" / "plain.png").shape[:2] == SIZE
    says(printed, "1 image(s) have an orientation mark", "upright", "1 .heic", vary=[r"predict: .* left"])


def test_patterns_keep_the_folders_below_their_fixed_part(
    call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/x/1.png", "in/x/y/2.PNG", "in/z/3.png", "in/top.png", "in/x/.hidden/4.png"):
        write_png(tmp_path / name, picture(1)) if name.endswith("png") else (
            write_png(tmp_path / "t.png", picture(1)),
            (tmp_path / "in/x/y").mkdir(parents=True, exist_ok=True),
            os.replace(tmp_path / "t.png", tmp_path / name),
        )
    (tmp_path / "in" / "x" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "in/**": {"x/1", "x/y/2", "z/3", "top"},
        "in/**/*.png": {"x/1", "z/3", "top"},
        "in/x/*": {"1", "y/2"},
        "in/[xz]/?.png": {"x/1", "z/3"},
        str(tmp_path / "in" / "*" / "1.png"): {"x/1"},
    }.items():
        code, _, err = call("predict", checkpoint, pattern, "out", "--kind", "index", "--existing", "replace")
        assert code == 0, err
        names_written = {
            name.removeprefix("index/").removesuffix(".png") for name in written(tmp_path / "out")
        }
        assert names_written == names, pattern
        for path in (tmp_path / "out").rglob("*.png"):
            path.unlink()
    code, _, err = call("predict", checkpoint, "in/*.jpg", "out")
    says(err, "in/*.jpg", ".png", ".mp4")
    assert code == 2


def test_a_name_with_brackets_is_a_name(call, checkpoint: Path, tmp_path: Path) -> None:
    name = "crack [1] 'a' <b>.png"
    write_png(tmp_path / name, picture(1))
    code, out, err = call(
        "predict", checkpoint, tmp_path / name, tmp_path / name, tmp_path / "out", "--kind", "index"
    )
    assert code == 0, err
    assert "1 image(s)" in out and written(tmp_path / "out") == {f"index/{name}"}


def test_images_that_differ_only_in_the_suffix(call, checkpoint: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a.png", picture(1))
    write_png(tmp_path / "in" / "a.jpg", picture(2))
    for sources in (
        [tmp_path / "in"],
        [tmp_path / "in" / "a.png", tmp_path / "in" / "a.jpg"],
        [tmp_path / "in" / "*"],
    ):
        code, _, err = call("predict", checkpoint, *sources, tmp_path / "out")
        says(err, "a.jpg and ", "a.png")
        assert code == 2
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(call, checkpoint: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_png(tmp_path / "in" / f"{number}.png", picture(number))
    old = tmp_path / "out" / "index" / "1.png"
    write_png(old, np.zeros((3, 3), np.uint8))
    before = old.read_bytes()
    arguments = ["predict", checkpoint, tmp_path / "in", tmp_path / "out", "--kind", "index"]
    code, _, err = call(*arguments)
    says(err, "1 file(s)", str(old), "--existing replace", "--existing keep")
    assert code == 2
    assert written(tmp_path / "out") == {"index/1.png"} and old.read_bytes() == before
    code, out, _ = call(*arguments, "--existing", "keep")
    says(out.splitlines()[-1], "1 image(s), 1 that")
    assert code == 0 and old.read_bytes() == before
    code, out, _ = call(*arguments, "--existing", "replace")
    assert code == 0 and "2 image(s): " in out and old.read_bytes() != before


def test_predictions_are_not_predicted(call, checkpoint: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(1))
    for _ in range(2):
        code, out, err = call(
            "predict", checkpoint, tmp_path, tmp_path / "out", "--kind", "color", "--existing", "replace"
        )
        assert code == 0 and "1 image(s)" in out, err
    assert written(tmp_path / "out") == {"color/a.png"}


@pytest.mark.parametrize(
    "arguments",
    [["in/a.png", "in/b.png"], ["in/nothing.png", "out"]],
    ids=["out is a file", "no such image"],
)
def test_bad_calls(call, checkpoint: Path, tmp_path: Path, monkeypatch, arguments: list[str]) -> None:
    for name in "ab":
        write_png(tmp_path / "in" / f"{name}.png", picture(1))
    monkeypatch.chdir(tmp_path)
    code, _, err = call("predict", checkpoint, *arguments)
    says(err, "in/b.png" if arguments[0] == "in/a.png" else "in/nothing.png")
    assert code == 2 and not (tmp_path / "out").exists()


def test_a_video_becomes_numbered_frames_and_a_video(
    call, checkpoint: Path, network: Network, tmp_path: Path
) -> None:
    film(tmp_path / "in" / "cam" / "walk.mp4", 7)
    write_png(tmp_path / "in" / "cam" / "walk.png", picture(0))  # phones write both under one name
    code, out, err = call("predict", checkpoint, tmp_path / "in", tmp_path / "out")
    assert code == 0, err
    assert "1 image(s), 7 frame(s) of 1 video(s)" in out
    frames = {
        f"{kind}/cam/walk/{n:06d}.png" for kind in ("index", "color", "confidence") for n in range(1, 8)
    }
    assert written(tmp_path / "out") == {
        *frames,
        "overlay/cam/walk.mp4",
        *(f"{kind}/cam/walk.png" for kind in KINDS),
    }
    overlay = tmp_path / "out" / "overlay" / "cam" / "walk.mp4"
    assert video_facts(overlay) == video_facts(tmp_path / "in" / "cam" / "walk.mp4")
    overlay_frames = list(read_frames(overlay))
    for number, frame in enumerate(read_frames(tmp_path / "in" / "cam" / "walk.mp4"), 1):
        index = cv2.imread(
            str(tmp_path / "out" / "index" / "cam" / "walk" / f"{number:06d}.png"), cv2.IMREAD_UNCHANGED
        )
        assert (index == predict(network, frame).classes).all()
        color = read_image(tmp_path / "out" / "color" / "cam" / "walk" / f"{number:06d}.png")
        blend = 0.55 * color.astype(float) + 0.45 * frame
        assert np.abs(overlay_frames[number - 1] - blend).mean() < 16  # the codec loses some


def test_a_video_cut_off_in_the_middle_is_reported_and_the_others_are_done(
    call, checkpoint: Path, tmp_path: Path
) -> None:
    whole = film(tmp_path / "whole.mkv", 30, size=(64, 96)).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "in" / "none.mp4").write_bytes(b"no video at all")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    film(tmp_path / "in" / "good.avi", 3, code="MJPG")
    write_png(tmp_path / "in" / "good2.png", picture(1))
    code, out, err = call("predict", checkpoint, tmp_path / "in", tmp_path / "out", "--kind", "overlay")
    says(err, "3 file(s)", "cut.mkv", "none.mp4: ", "bad.jpg: ", vary=[r"\d+(?= of its 30 frames)"])
    assert code == 2 and "Traceback" not in err
    (count,) = (int(number) for number in re.findall(r"(\d+) of its 30 frames", err))
    assert 0 < count < 30
    assert written(tmp_path / "out") == {"overlay/cut.mp4", "overlay/good.mp4", "overlay/good2.png"}
    assert len(list(read_frames(tmp_path / "out" / "overlay" / "cut.mp4"))) == count
    assert "1 image(s)" in out and f"{count + 3} frame(s) of 2 video(s)" in out


def test_frames_of_an_earlier_longer_video_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    for frames in (5, 3):
        film(tmp_path / "a.mp4", frames)
        predict_folder(checkpoint, tmp_path / "a.mp4", tmp_path / "out", ["index"], existing="replace")
    assert written(tmp_path / "out") == {f"index/a/{n:06d}.png" for n in (1, 2, 3)}
    predicted = predict_folder(checkpoint, tmp_path / "a.mp4", tmp_path / "out", ["index"], existing="keep")
    assert (predicted.kept, predicted.frames) == (1, 0)
    (tmp_path / "out" / "index" / "a" / "000003.png").unlink()  # as if it had been stopped
    predicted = predict_folder(checkpoint, tmp_path / "a.mp4", tmp_path / "out", ["index"], existing="keep")
    assert (predicted.kept, predicted.frames) == (0, 3)


def test_a_video_and_an_image_cannot_share_a_name(checkpoint: Path, tmp_path: Path) -> None:
    film(tmp_path / "in" / "a.mp4", 2)
    film(tmp_path / "in" / "b.mp4", 2)
    write_png(tmp_path / "in" / "a" / "000001.png", picture(0))
    with refused(DataError, "a.mp4", "000001.png"):
        predict_folder(checkpoint, tmp_path / "in", tmp_path / "out")
    film(tmp_path / "in" / "b.avi", 2, code="MJPG")
    with refused(DataError, "b.avi and ", "b.mp4"):
        predict_folder(checkpoint, tmp_path / "in", tmp_path / "out")


def test_an_interrupted_video_leaves_no_half_written_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "a.mp4", 6)
    calls = []

    def stop(network, image, *_, **__):
        calls.append(image)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return predict(network, image)

    monkeypatch.setattr("darseg.run.predict.predict", stop)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(checkpoint, tmp_path / "a.mp4", tmp_path / "out", ["overlay"])
    assert written(tmp_path / "out") == set()


def test_a_video_that_was_not_written_whole_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.add(picture(0, (41, 61)))
    assert video_facts(film(tmp_path / "rate.mkv", 2, rate=USUAL_RATE)).rate == pytest.approx(USUAL_RATE)
    monkeypatch.setattr(writer, "_frames", 2)  # as if one had been lost
    with refused(StorageError, "a.mp4"):
        writer.close()
    assert not (tmp_path / "a.mp4").exists() and not list(tmp_path.glob("*.part*"))


def test_unknown_kinds(checkpoint: Path, tmp_path: Path) -> None:
    with refused(RunError, "rainbow", "index, color, overlay, confidence"):
        predict_folder(checkpoint, tmp_path, tmp_path / "out", ["rainbow"])
    with refused(RunError, "existing", "'ask'", "fault, keep, replace"):
        predict_folder(checkpoint, tmp_path, tmp_path / "out", existing="ask")


def test_ctrl_c_ends_with_a_message(
    call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    write_png(tmp_path / "a.png", picture(0))
    monkeypatch.setattr("darseg.run.predict.predict", stop)
    code, _, err = call("predict", checkpoint, tmp_path / "a.png", tmp_path / "out")
    assert (code, err) == (130, "darseg: interrupted. Finished work is kept.\n")


def test_predictions_do_not_go_into_a_run_folder(checkpoint: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(0))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    with refused(RunError, str(tmp_path / "run")):
        predict_folder(checkpoint, tmp_path / "a.png", tmp_path / "run")


def write_video(path: Path, frames: list[np.ndarray], rate: float = 25, codec: str = "MJPG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    code = cv2.VideoWriter.fourcc(*codec)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, rate, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.parametrize(
    "rate, written",
    [
        (1 / 3, 0.333),
        (24000 / 1001, 23.976),
        (119.88, 119.88),
        (1000 / 3, 333.33),
        (999.99, 1000),
        (14985.1, 14985),
        (90000, 65535),
        (1e-9, 0.01),
    ],
)
def test_rates_are_written_as_the_nearest_that_a_file_can_state(
    tmp_path: Path, rate: float, written: float
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", rate)
    writer.add(np.zeros((*SIZE, 3), np.uint8))
    writer.close()
    assert writable_rate(rate) == written
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(written)


def test_videos_of_variable_rate_are_reported(tmp_path: Path) -> None:
    """The times of a Matroska file's frames are changed in place."""
    path = film(tmp_path / "steady.mkv", 12, rate=10, code="MJPG")
    data = bytearray(path.read_bytes())
    blocks = [found.start() for found in re.finditer(rb"\x81..\x80\xff\xd8", bytes(data), re.DOTALL)]
    assert len(blocks) == 12
    notes: list[str] = []
    assert len(list(read_frames(path, notes))) == 12 and not notes
    for block, time in zip(blocks, [0, 33, 66, 100, 133, 900, 933, 966, 1000, 1033, 1900, 1950], strict=True):
        data[block + 1 : block + 3] = time.to_bytes(2, "big")
    (tmp_path / "variable.mkv").write_bytes(data)
    assert len(list(read_frames(tmp_path / "variable.mkv", notes))) == 12
    says("\n".join(notes), "variable.mkv", "33 to ", "ms apart")


@pytest.mark.parametrize(("degrees", "corner"), [(90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_videos_are_turned_upright(tmp_path: Path, degrees: int, corner: tuple[int, int]) -> None:
    """The matrix in the track's header is changed in place, as telephones write it."""
    frame = np.zeros((*SIZE, 3), np.uint8)
    frame[:20, :20] = 255
    with_mark = VideoWriter(tmp_path / "a.mp4", 10)
    for _ in range(3):
        with_mark.add(frame)
    with_mark.close()
    data, one = (tmp_path / "a.mp4").read_bytes(), 0x10000
    cos, sin = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    same, turned = (
        struct.pack(">9i", *matrix, 0, 0, 0x40000000)
        for matrix in ((one, 0, 0, 0, one, 0), (cos, sin, 0, -sin, cos, 0))
    )
    at = data.index(same, data.index(b"tkhd"))
    (tmp_path / "a.mp4").write_bytes(data[:at] + turned + data[at + len(same) :])
    first = next(read_frames(tmp_path / "a.mp4"))
    assert first.shape[:2] == (SIZE if degrees == 180 else SIZE[::-1])
    row, column = corner
    assert first[row * 10 :][:10, column * 10 :][:, :10].mean() > 150


def test_odd_videos_do_not_end_the_others(
    call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A colon in a name, a rate that no .mp4 states, damaged frames, too wide for an overlay, no frames at all."""
    monkeypatch.chdir(tmp_path)
    frames = [cv2.resize(np.roll(picture(1), i, 1), (160, 120)) for i in range(4)]
    write_video(tmp_path / "in" / "a:b.avi", frames)
    data = bytearray(write_video(tmp_path / "in" / "damaged.avi", frames).read_bytes())
    third = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)][2]
    data[third + 1000 : third + 1400] = bytes(400)
    (tmp_path / "in" / "damaged.avi").write_bytes(data)
    write_video(tmp_path / "in" / "wide.avi", [np.zeros((16, 8300, 3), np.uint8)])
    (tmp_path / "in" / "zero.mp4").write_bytes(b"")
    write_png(tmp_path / "in" / "good.png", picture(1))
    status, printed, errors = call("predict", checkpoint, "in", "out")
    assert status == 2
    out = tmp_path / "out"
    assert (out / "index" / "good.png").exists() and (out / "index" / "wide" / "000001.png").exists()
    assert (
        video_facts(out / "overlay" / "a:b.mp4").frames
        == video_facts(out / "overlay" / "damaged.mp4").frames
        == 4
    )
    assert not list(out.rglob("*.part*")) and not (out / "overlay" / "wide.mp4").exists()
    says(
        printed,
        "damaged.avi",
        " of 4 frames are damaged",
        vary=[r"predict: .* left", r"\d of 4", r"\(frame.*\)"],
    )
    says(errors, "2 file(s)", "wide.mp4", "8300x16", "zero.mp4")


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile private.avi\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nprivate.avi\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_no_videos(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is called .mp4 could name any file and address of this machine's network."""
    monkeypatch.delenv(video.OPTIONS, raising=False)
    write_video(tmp_path / "private.avi", [picture(1)] * 3)
    (tmp_path / "a.mp4").write_text(PLAYLISTS[kind])
    with refused(DataError, str(tmp_path / "a.mp4")):
        list(read_frames(tmp_path / "a.mp4"))
    assert video.OPTIONS not in os.environ
    monkeypatch.setenv(
        video.OPTIONS, "format_whitelist;concat,hls,sdp"
    )  # a user's options stay, and do not loosen this
    with pytest.raises(DataError):
        video_facts(tmp_path / "a.mp4")
    assert os.environ[video.OPTIONS] == "format_whitelist;concat,hls,sdp"
    monkeypatch.delenv(video.OPTIONS)
    assert len(list(read_frames(tmp_path / "private.avi"))) == 3


# --- earlier results


@pytest.mark.parametrize("kind", ["index", "overlay"])
def test_what_was_made_of_a_video_before_it_was_damaged_stays(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    video, out = film(tmp_path / "a.mkv", 30, size=(64, 96)), tmp_path / "out"
    predict_folder(checkpoint, video, out, [kind])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    done = predict_folder(checkpoint, video, out, [kind], existing="replace")
    says(done.failed[0], "a.mkv", "Kept from an earlier call", vary=[r"\d+(?= of its)", r"\d+(?= frame)"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    video.write_bytes(b"no video at all")
    assert predict_folder(checkpoint, video, out, [kind], existing="replace").failed
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", [0, 100, -1])
def test_files_that_were_cut_off_are_made_again_and_counted(
    left: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        write_png(images / f"{number}.png", picture(number))
    film(images / "v.mp4", 2)
    predict_folder(checkpoint, images, out)
    cut = [out / "index" / "1.png", out / "overlay" / "v.mp4"]
    before = [path.read_bytes() for path in cut]
    for path in cut:
        path.write_bytes(path.read_bytes()[:left])
    done = predict_folder(checkpoint, images, out, existing="keep")
    assert (done.images, done.videos, done.kept) == (1, 1, 2)
    assert [path.read_bytes() for path in cut] == before
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if str(cut[0]) in line)
    says(line, "2 file(s)")
    assert "moov" not in printed.err


def test_a_replacement_that_was_stopped_is_not_kept_as_of_one_network(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(6)
    other, images, out = tmp_path / "other.safetensors", tmp_path / "in", tmp_path / "out"
    save_network(SPEC.build(), other, SPEC)
    for number in range(2):
        write_png(images / f"{number}.png", picture(number))
    predict_folder(checkpoint, images, out, ["index"])

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("darseg.run.predict.predict", stop)
        predict_folder(other, images, out, ["index"], existing="replace")
    with refused(RunError, str(out), "network"):
        predict_folder(other, images, out, ["index"], existing="keep")
    (out / RECORD).write_text("{")
    with refused(RunError, RECORD, "--existing replace"):
        predict_folder(other, images, out, ["index"], existing="keep")
    assert predict_folder(other, images, out, ["index"], existing="replace").images == 2
    assert predict_folder(other, images, out, ["index"], existing="keep").kept == 2


def test_a_link_that_leads_nowhere_is_named_as_one(checkpoint: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "a.png", picture(0))
    (tmp_path / "in" / "b.png").symlink_to("gone.png")
    (tmp_path / "in" / "c.png").symlink_to("c.png")
    done = predict_folder(checkpoint, tmp_path / "in", tmp_path / "out", ["index"])
    assert done.images == 1
    says(done.failed[0], str(tmp_path / "in" / "b.png"), "gone.png")
    assert str(tmp_path / "in" / "c.png") in done.failed[1]


def test_what_is_done_is_looked_up_while_the_folder_is_held(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "in" / "a.png", picture(0))

    def looked_up(media, facts, outputs, *, existing: str):
        with refused(RunError, str(outputs.folder), "another process"), held_folder(outputs.folder):
            pass
        return media

    monkeypatch.setattr("darseg.run.predict.still_to_do", looked_up)
    assert predict_folder(checkpoint, tmp_path / "in", tmp_path / "out", ["index"]).images == 1
