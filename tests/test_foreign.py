"""Run folders of somebody else: their links are not followed, and their records are checked when they are read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from conftest import recipe_dict
from darseg.cli import main
from darseg.cli.tables import print_table, say
from darseg.config.text import load_recipe
from darseg.data.manifest import Sample
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DarsegError, RunError, StorageError, printable
from darseg.model.aligned import AlignmentRecord, fold_alignment
from darseg.model.network import NetworkSpec
from darseg.model.weights import save_network
from darseg.report.facts import RunFacts, read_data, read_run, remarks
from darseg.report.overview import write_report
from darseg.report.share import shareable, without_places
from darseg.run.browse import open_round, read_facts
from darseg.run.data_digest import sources
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import describe_decisions, evaluate
from darseg.run.export import export_network
from darseg.run.journal import Journal
from darseg.run.records import StepRecord, read_scored
from darseg.run.rounds import train
from wording import refused, says

DEEP = "[" * 100_000

JUNK = [
    "",
    '{"a',
    "[]",
    "{}",
    "null",
    "7",
    '"text"',
    DEEP,
    '{"a": NaN}',
    "\ufeff{}",
    "\x00",
    '{"time": 1e999}',
]


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds."""
    folder = tmp_path_factory.mktemp("foreign")
    rounds = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.5}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data) | {"rounds": rounds}))
    train(load_recipe(folder / "tiny.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    signal.alarm(120)
    yield
    signal.alarm(0)


def go_on(run: Path) -> None:
    train(load_recipe(run / "recipe.yaml"), run, console=Console(quiet=True))


def look(run: Path) -> None:
    """What a report does before it draws."""
    facts = read_run(run)
    remarks(facts, read_data(facts))


# --- links


@pytest.mark.parametrize("name", ["round_1/labels", "round_1", "tensorboard", "round_1/predictions"])
def test_nothing_is_written_through_a_link_to_a_folder(run: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    if (run / name).exists():
        shutil.move(run / name, theirs)
    else:
        theirs.mkdir()
    (run / name).symlink_to(theirs)
    before = sorted(theirs.rglob("*"))
    with refused(StorageError, str(run / name), str(theirs), "link"):
        go_on(run)
    assert sorted(theirs.rglob("*")) == before


@pytest.mark.parametrize("name", ["environment.json", "recipe.yaml", "round_1/images.json", "round_1/labels"])
def test_nothing_is_read_through_a_link_out_of_the_run(run: Path, tmp_path: Path, name: str) -> None:
    """A report shows what it reads, and a page is given away."""
    theirs = tmp_path / "theirs"
    shutil.move(run / name, theirs)
    (run / name).symlink_to(theirs)
    for use in (read_run, open_round):
        with refused(StorageError, str(run / name), str(theirs), "link"):
            use(run)


def test_label_maps_are_not_read_through_links_out_of_the_run(run: Path, tmp_path: Path) -> None:
    (run / "round_1/images.json").unlink()  # the maps are counted then
    labels, theirs = run / "round_1/labels", tmp_path / "theirs"
    theirs.mkdir()
    path = next(labels.rglob("*.png"))
    shutil.move(path, theirs / "theirs.png")
    path.symlink_to(theirs / "theirs.png")
    round_ = open_round(run)
    sample = next(s for s in round_.samples if s.id == path.relative_to(labels).with_suffix("").as_posix())
    with refused(StorageError, str(path), str(theirs), "link"):
        round_.label_map(sample)
    assert [facts is None for _, facts in read_facts(round_)].count(True) == 1
    page = write_report(run).read_text()
    assert "is a link to" in page and "data:image/" not in page
    path.unlink()
    (labels / "loop").symlink_to("loop")
    with pytest.raises(DarsegError):
        round_.label_map(replace(sample, id="loop"))


def test_a_link_inside_the_run_is_followed(run: Path) -> None:
    (run / "round_1").rename(run / "elsewhere")
    (run / "round_1").symlink_to("elsewhere")
    go_on(run)


def test_a_run_folder_may_be_a_link_itself(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    go_on(tmp_path / "link")


@pytest.mark.parametrize("name", ["journal.jsonl", "report.html"])
def test_a_link_to_a_file_is_not_written_through(run: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    content = (
        (run / name).read_bytes() if (run / name).exists() else b'<meta name="generator" content="darseg 9">'
    )
    theirs.write_bytes(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(theirs)
    if name == "journal.jsonl":
        with refused(StorageError, str(run / name), str(theirs), "link"):
            go_on(run)
    else:
        write_report(run)
        assert not (run / name).is_symlink()
    assert theirs.read_bytes() == content


@pytest.mark.parametrize(
    "name",
    [
        *("recipe.yaml", "journal.jsonl", "data.json", "environment.json", "run.json", "bad_images.json"),
        "contents.json",
        *(
            "round_1/label.json",
            "round_1/thresholds.json",
            "round_1/labels/pipe.png",
            "round_0/network.safetensors",
        ),
    ],
)
def test_a_pipe_instead_of_a_file_is_never_waited_on(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for use in (go_on, look):
        try:
            use(run)
        except DarsegError as error:
            assert str(run) in str(error)
        else:
            assert use is look or name == "round_1/labels/pipe.png"


def test_reused_results_are_checked_before_they_are_copied(run: Path, tmp_path: Path) -> None:
    labels = run / "round_1" / "labels"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(b"secret")
    (labels / "more").symlink_to(secret)
    out = tmp_path / "out"
    with refused(StorageError, str(labels / "more"), str(secret), "link"):
        train(load_recipe(run / "recipe.yaml"), out, reuse=run)
    assert not list(out.rglob("key.png"))
    (labels / "more").unlink()
    (run / "round_0" / "network.safetensors").write_bytes(b"other")
    with refused(RunError, str(run / "round_0"), "network.safetensors", "--reuse"):
        train(load_recipe(run / "recipe.yaml"), tmp_path / "again", reuse=run)
    assert not list((tmp_path / "again").rglob("network.safetensors"))


def test_only_files_are_reused_and_without_their_modes(run: Path, tmp_path: Path) -> None:
    """A copied pipe would be waited on, a copied program that runs as its owner would run as the user."""
    labels, out = run / "round_1/labels", tmp_path / "out"
    os.mkfifo(labels / "pipe.png")
    (labels / "loop").symlink_to(labels)
    next(labels.rglob("*.png")).chmod(0o4755)
    train(load_recipe(run / "recipe.yaml"), out, reuse=run, console=Console(quiet=True))
    copied = out / "round_1/labels"
    for path in labels.rglob("*.png"):
        if path.name != "pipe.png":
            same = copied / path.relative_to(labels)
            assert same.read_bytes() == path.read_bytes() and not same.stat().st_mode & 0o4111
    assert not (copied / "pipe.png").exists() and not (copied / "loop").exists()
    for target in (Path("/dev/zero"), tmp_path / "run/recipe.yaml", tmp_path / "gone"):
        (labels / "link.png").symlink_to(target)
        with pytest.raises(StorageError, match=r"link\.png is a link to"):
            train(load_recipe(run / "recipe.yaml"), tmp_path / f"out_{target.name}", reuse=run)
        (labels / "link.png").unlink()


# --- records


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"../../../victim": "0" * 64}},
        {"outputs": {"/etc/passwd": "0" * 64}},
        {"outputs": {"network.safetensors": "0" * 64, "..": "0" * 64}},
        {"outputs": {"network.safetensors": "0" * 64, "labels": "0" * 64}},
        {"outputs": {}},
        {"outputs": {"network.safetensors": 7}},
        {"outputs": {"network.safetensors": "ABC"}},
        {"outputs": ["network.safetensors"]},
        {"inputs": {"settings": None}},
        {"inputs": "x"},
        {"seconds": "1"},
        {"seconds": -1},
        {"seconds": True},
        {"seconds": 10**400},
        {"facts": []},
        {"step": "label"},
        {"more": 1},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_record_that_is_none_is_refused(run: Path, change: dict[str, Any]) -> None:
    path = run / "round_0" / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(RunError, str(path), "damaged", "Delete"):
        RunDirectory(run).read_record(0, "train")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_stands_in_the_place_of_a_record_is_named(run: Path, kind: str) -> None:
    path = run / "round_0" / "train.json"
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with refused(RunError, str(path), kind, "not a file") as caught:
        RunDirectory(run).read_record(0, "train")
    assert "permissions" not in str(caught.value)


def test_the_records_of_a_run_are_read_as_they_were_written(run: Path) -> None:
    for index, step in ((0, "train"), (0, "evaluate"), (1, "label"), (1, "train"), (1, "evaluate")):
        record = RunDirectory(run).read_record(index, step)
        assert isinstance(record, StepRecord) and record.step == step
        assert json.loads((run / f"round_{index}" / f"{step}.json").read_text()) == vars(record)


ALIGNED = {"used": True, "why": "", "strength": 1.0, "bound": 2.0}


@pytest.mark.parametrize(
    "aligned", [7, [], {}, {"used": 1}, ALIGNED, {**ALIGNED, "used": False, "bound": "2"}]
)
def test_what_scores_say_of_aligned_decisions_is_checked(run: Path, aligned: Any) -> None:
    path = run / "round_1" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aligned": aligned}))
    shutil.copy(run / "round_1" / "network.safetensors", run / "round_1" / "result.safetensors")
    for use in (evaluate, lambda run: export_network(run, run.parent / "out.onnx")):
        with pytest.raises(RunError, match=r"scores\.json is damaged"):
            use(run)


@pytest.mark.parametrize(
    "change", [{"iou": {"sky": 0.5}}, {"iou": 7}, {"mean_iou": "1"}, {"pixel_accuracy": 1e999}]
)
def test_figures_that_are_none_are_refused(run: Path, change: dict[str, Any]) -> None:
    path = run / "round_1" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(RunError, str(path), "damaged", *change):
        read_scored(path, SCENE_CLASSES.names)


@pytest.mark.parametrize(
    "name", ["data.json", "contents.json", "environment.json", "run.json", "round_1/label.json"]
)
@pytest.mark.parametrize("content", ["", "[]", DEEP])
def test_a_run_does_not_go_on_with_damaged_files(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(RunError, match=name):
        go_on(run)


@pytest.mark.parametrize(
    "name",
    [
        *("data.json", "environment.json", "bad_images.json", "round_1/excluded.json", "round_1/label.json"),
        *(
            "round_1/thresholds.json",
            "round_1/pseudo_scores.json",
            "round_0/train.json",
            "round_0/scores.json",
        ),
    ],
)
def test_a_damaged_file_is_named_by_the_report_and_never_a_traceback(run: Path, name: str) -> None:
    path = run / name
    contents = [*JUNK, *(cut(path.read_bytes()) if path.exists() else ())]
    errors = 0
    for content in contents:
        path.write_text(content)
        try:
            read_run(run)
        except DarsegError as error:
            errors += 1
            assert path.name in str(error), content[:40]
    assert errors > 5 or name == "bad_images.json"  # which a report does not read


def cut(content: bytes) -> Iterator[str]:
    """The text with one of its values replaced by one of another type."""
    value = json.loads(content)
    for key in list(value)[:3]:
        for other in ([[["x"]]], {"a": {}}, 10**400, "text", None, -1.5):
            yield json.dumps(value | {key: other})


def test_damaged_facts_of_images_are_named(run: Path) -> None:
    path = run / "round_1" / "images.json"
    whole = json.loads(path.read_text())
    name, facts = next(iter(whole.items()))
    changes = [{"kept": [10**30, 0, 0]}, {"confidence": 10**400}, {"confidence": "x"}, {"predicted": None}]
    for content in (*JUNK, *(json.dumps(whole | {name: facts | change}) for change in changes)):
        path.write_text(content)
        try:
            RunDirectory(run).image_facts(1, len(facts["kept"]))
        except RunError as error:
            assert str(path) in str(error)
        else:
            assert content == "{}"


EVENTS = [
    {"event": "started", "time": "abc"},
    {"event": "started", "time": 1e300, "weights": ["x"]},
    {"event": "started", "time": -1e18},
    {"event": "step", "round": 0, "step": 3, "learning_rate": "abc"},
    {"event": "step", "round": 0, "step": 10**30, "learning_rate": 1},
    {"event": "step", "round": 0, "step": True},
    {"event": "step", "round": [0], "step": 2},
    {"event": "step"},
    {"event": "step", "round": 0, "step": 4, "loss_main": {"a": 1}},
    {"event": "warning", "text": {"a": 1}},
    {"event": ["step"], "round": 0},
    {"event": "checkpoint"},
]


def test_lines_of_a_journal_that_are_no_events_are_skipped(run: Path) -> None:
    with open(run / "journal.jsonl", "a") as file:
        for event in EVENTS:
            file.write(json.dumps(event) + "\n")
        file.write(f"{DEEP}\n{{\n\x00\n")
    write_report(run)
    go_on(run)
    (run / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    assert read_run(run).started is None
    write_report(run)


def test_folders_that_only_look_like_rounds_are_none(run: Path) -> None:
    for name in ("round_x", "round_", "round_01", "round_99999999999"):
        (run / name).mkdir()
        shutil.copy(run / "round_0" / "train.json", run / name)
    assert RunDirectory(run).rounds_with("train") == [0, 1]


# --- names


def test_control_characters_are_written_as_escapes() -> None:
    text = "a\x1b[31mred\x07 \u202egnp.exe \u2066x\x9b \ud800 tab\tline\n größe 猫"
    assert printable(text) == ("a\\x1b[31mred\\x07 \\u202egnp.exe \\u2066x\\x9b \\ud800 tab\tline\n größe 猫")


def test_console_and_journal_show_no_control_characters(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        journal = Journal(tmp_path / "journal.jsonl", None, Console(file=file, force_terminal=False))
        journal.say("\x1b]0;title\x07cat")
        journal.warn("\u202ecat\x1b[2K")
    assert (tmp_path / "out").read_text() == "\\x1b]0;title\\x07cat\nwarning: \\u202ecat\\x1b[2K\n"
    assert "\x1b" not in (tmp_path / "journal.jsonl").read_text()


def test_errors_on_the_console_hold_no_control_characters(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["darseg", "check", str(tmp_path / "a\x1b[2Jb.yaml")])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert "\x1b" not in error and "a\\x1b[2Jb.yaml" in error


def test_what_a_network_says_of_itself_does_not_control_the_terminal(tmp_path: Path, capsys) -> None:
    """Where its class weights come from, and the names of its classes, are texts of somebody else."""
    trap, share = "\x1b]0;taken\x07\x1b[2J", (0.5, 0.5)
    spec = NetworkSpec(classes=2, backbone="resnet18_half", class_names=(trap, "b"), head_channels=8)
    record = AlignmentRecord(
        (2.0, 0.5), (True, True), target=share, reached=share, strength=1.0, bound=5.0, source=trap
    )
    save_network(fold_alignment(spec.build(), record), tmp_path / "n.safetensors", spec)
    say(describe_decisions(tmp_path / "n.safetensors"))
    say(trap, error=True)
    print_table([[trap, "a\nb"]])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and out.count("\\x1b]0;taken\\x07") == 2 and out.count("\n") == 2


# --- reports of others' runs, and for others


def pictures_in(page: Path) -> int:
    return page.read_text().count("data:image/")


def test_a_report_shows_no_images_that_the_run_did_not_begin_with(
    run: Path, tmp_path: Path, tiny_data: Path
) -> None:
    """A run folder may name any folder of this machine as its data; it cannot know the sizes of the files there."""
    assert pictures_in(write_report(run)) > 0
    private = tmp_path / "private"
    shutil.copytree(tiny_data, private)
    image = next(path for path in sorted(private.rglob("*.png")) if "label" not in str(path))
    image.write_bytes(image.read_bytes() + b"one byte more")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_data), str(private)))
    page = write_report(run)
    assert pictures_in(page) == 0 and "--pictures" in page.read_text()
    assert pictures_in(write_report(run, pictures=True)) > 0
    (run / "data.json").unlink()
    assert pictures_in(write_report(run)) == 0


@pytest.mark.parametrize("role", ["labeled", "unlabeled"])
def test_a_report_quotes_no_file_that_the_recipe_names(run: Path, tmp_path: Path, role: str) -> None:
    (tmp_path / "key").write_text("-----BEGIN KEY-----\nhunter2\n")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"][role] = {"list": str(tmp_path / "key")}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    text = write_report(run).read_text()
    assert (
        "hunter2" not in text
        and "BEGIN" not in text
        and "2 line(s) of this list" in text
        and "darseg check" in text
    )


def test_the_report_says_where_its_pictures_come_from(run: Path, tiny_data: Path, call) -> None:
    code, out, _ = call("report", run, "--share")
    assert code == 0
    says(out, str(tiny_data), str(run / "report.html"))


def test_files_outside_the_data_root_are_counted_and_named(tmp_path: Path) -> None:
    """A recipe may name any folder, and a folder that comes with a run may hold links to any file."""
    for name in ("data/a.png", "data/b.png", "data_2/c.png", "private/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data/link.png").symlink_to(tmp_path / "private/d.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "private")
    (tmp_path / "data/same").symlink_to(tmp_path / "data")
    names = ("a.png", "same/b.png", "../data_2/c.png", "link.png", "more/d.png")
    samples = [Sample(name, tmp_path / "data" / name) for name in names]
    line = sources(tmp_path / "run", str(tmp_path / "data"), samples)
    says(line, str(tmp_path / "run"), "2 images", "3 elsewhere", str(tmp_path / "data_2/c.png"))


def test_a_page_to_be_shared_holds_no_places_and_names(run: Path, monkeypatch) -> None:
    user, host = "ada.lovelace", "analytical-engine"
    monkeypatch.setenv("LOGNAME", user)
    monkeypatch.setattr("socket.gethostname", lambda: f"{host}.example.org")
    places = [f"/home/{user}/my-photos/a.png", f"file:///srv/{host}/w.pth", f"~{user}/x", f"/mnt/{user}"]
    with open(run / "journal.jsonl", "a") as file:
        for number, place in enumerate([*places, f"by {user} on {host}"]):
            file.write(
                json.dumps({"time": 1.0, "event": "warning", "text": f"warned {number}: {place}"}) + "\n"
            )
    plain = write_report(run, run.parent / "plain.html").read_text()
    assert str(run) in plain and user in plain
    text = write_report(run, run.parent / "shared.html", share=True).read_text()
    assert not [name for name in (str(run.parent), user, host, "/home/", "/srv/") if name in text]
    assert "warned 0: …/a.png" in text and "warned 4: by … on …" in text and "root: …/" in text
    assert pictures_in(run.parent / "shared.html") > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/2 of a/b; see https://example.org/x/y", "1/2 of a/b; see https://example.org/x/y"),
        ("weights: /data/nets/resnet.pth, then", "weights: …/resnet.pth, then"),
        ("['/a/b, c/d.png', '/c/e']", "['…/e']"),
        ("//nas/share/x.png and 1/2", "…/2"),
        ("C:\\Users\\ada\\my x.png", "…/my x.png"),
        ("\\\\nas\\share\\x.png", "…/x.png"),
        ("smb://nas/a b/c.png", "…/c.png"),
        ("from https://ada:w?rd@example.org/x, too", "from https://… too"),
        ("from https://example.org/x?token=1, too", "from https://example.org/x… too"),
        ("a -> /x/y/z.png: gone", "a -> …/z.png: gone"),
    ],
)
def test_only_the_last_part_of_paths_is_left(text: str, expected: str) -> None:
    assert without_places(text) == expected


@pytest.mark.parametrize("text", ["a" * 200_000, "~/" * 50_000, "/a " * 50_000, "a:/" * 50_000])
def test_a_long_text_is_shared_within_seconds(text: str) -> None:
    signal.alarm(20)
    assert len(without_places(text)) <= len(text)


SENTENCES = (
    "{0}", "cannot read {0}: gone", "('{0}', '{1}')", "root={0}", "weights:{0}", "a/b {0}, then\n  - {1}", '"{0}" "{1}"',
)  # fmt: skip
SECRET = "zqj"  # in all that may not survive
around = st.text(" ,;:'\"()[]{}#&*!|>%@-_.ü猫\u202eaB7", max_size=5)


@st.composite
def places(draw: st.DrawFn) -> str:
    """An absolute path of some system, or an address with secrets."""
    parts = [f"{draw(around)}{SECRET}{draw(around)}" for _ in range(draw(st.integers(1, 4)))]
    last = draw(around)
    begin, between = draw(
        st.sampled_from(
            [("/", "/"), ("//", "/"), ("~/", "/"), ("file:///", "/"), ("C:\\", "\\"), ("d:/", "/")]
        )
    )
    if draw(st.integers(0, 3)) == 0:
        return (
            f"{draw(st.sampled_from(['https', 'HTTP', 's3']))}://{SECRET}:{SECRET}@host/x?a={SECRET}#{SECRET}"
        )
    if parts[0].startswith(("@", " ")) or begin == "//":
        parts[0] = SECRET + parts[0]
    return begin + between.join([*parts, last])


@pytest.fixture(scope="module")
def facts(finished: Path) -> RunFacts:
    return read_run(finished)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    places=st.lists(places(), min_size=1, max_size=3), sentence=st.sampled_from(SENTENCES), data=st.booleans()
)
def test_no_absolute_path_and_no_secret_of_an_address_is_shared(
    facts: RunFacts, places: list[str], sentence: str, data: bool
) -> None:
    text = sentence.format(*places, *places, *places)
    recipe = yaml.safe_dump({"a": places, places[0]: {"b": text}}, allow_unicode=data) + f"# {SECRET}\n"
    shared = shareable(
        replace(
            facts,
            recipe_text=recipe,
            weights=text,
            warnings=(text,),
            environment={"a": places[0], text: "b", "c": 1},
        )
    )
    shown = [shared.recipe_text, shared.weights, *shared.warnings, *map(str, shared.environment.items())]
    assert SECRET not in "\n".join(map(str, shown))
