"""`vmix label`: what it writes, what it leaves alone, and whether its measures see the looks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from scipy.stats import mannwhitneyu, spearmanr
from tiny_training import tiny_tokenizer
from vmix.dataset import read_dataset
from vmix.label import pixels, scoring, sheet
from vmix.label.command import main
from vmix.label.cut import alike, cuts, labelled
from vmix.label.learned import HEAD
from vmix.measures import sharpness

sys.path.append(str(Path(__file__).parents[2] / "examples" / "demo" / "base"))
COUNT = 10
LABELS = """
[[label]]
name = "natural lighting"
dimension = "lighting"

[[label]]
name = "sharp focus"
dimension = "focus"
"""
LIGHT, FOCUS = "natural lighting", "sharp focus"


def grey(number: int) -> Image.Image:
    """A checkered picture whose mean luma is (20 + 20·number) / 255."""
    board = (np.indices((16, 16)).sum(0) % 2)[..., None] * np.ones(3)
    return Image.fromarray((20 + 20 * number + 20 * (board - 0.5)).astype(np.uint8))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten pictures from dark to bright, in a random order of names."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "labels.toml").write_text(LABELS, encoding="utf-8")
    lines = []
    for number in range(COUNT):
        grey(number).save(folder / f"{name_of(number)}")
        lines.append({"file_name": name_of(number), "text": f"grey {number}"})
    lines.sort(key=lambda line: line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def name_of(number: int) -> str:
    return f"{(7 * number) % COUNT}.png"


class Said:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def row(self, label: str) -> list[str]:
        """Of the table, from the measure on."""
        line = next(line for line in self.out.splitlines() if line.startswith(f"  {label}  "))
        return line.removeprefix(f"  {label}").split()


@pytest.fixture
def vmix_label(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as done:
            main(["--workers=2", *map(str, arguments)])
        said = Said(int(done.value.code or 0), *capsys.readouterr())
        assert not set(said.out + said.err) & {"\x1b"}
        return said

    return run


@pytest.fixture
def refused(vmix_label: Callable[..., Said]) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        said = vmix_label(*arguments)
        assert (said.status, said.out) == (1, "")
        assert said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1
        return said.err

    return run


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The overlay, as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "aesthetics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line, parse_constant=refuse) for line in lines]
    return {entry["file_name"]: entry for entry in entries}


def save_another(image: Image.Image, path: Path) -> None:
    """In the place of one that may be as long, at a time that no clock is too coarse to tell."""
    image.save(path)
    os.utime(path, (2_000_000_000, 2_000_000_000))


def edit(folder: Path, **changes: Callable[[dict[str, Any]], object]) -> None:
    """Changes lines by the stem of their image's name."""
    entries = lines_of(folder)
    for stem, change in changes.items():
        change(entries[f"{stem.removeprefix('n')}.png"])
    text = "".join(json.dumps(entry) + "\n" for entry in entries.values())
    (folder / "aesthetics.jsonl").write_text(text, encoding="utf-8")


def lights(folder: Path) -> list[Any]:
    """Label of the pictures from dark to bright; "-" where there is none."""
    entries = lines_of(folder)
    return [entries[name_of(n)]["aesthetics"].get(LIGHT, "-") for n in range(COUNT)]


def content(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# --- what is written -----------------------------------------------------------------------------


def test_the_ends_are_labelled(data: Path, vmix_label: Callable[..., Said]) -> None:
    before = content(data)
    said = vmix_label(data, "-L", data / "labels.toml")
    assert (said.status, said.err) == (0, "")
    assert lights(data) == [0, 0, 0, None, None, None, None, 1, 1, 1]
    assert said.row(LIGHT)[:6] == ["brightness", "3", "4", "3", "0", "0"]
    entry = lines_of(data)[name_of(2)]
    assert entry["scores"]["brightness"] == pytest.approx(60 / 255, abs=1e-6)
    assert entry["auto"] == entry["aesthetics"]
    after = content(data)
    assert after.pop(str(data / "aesthetics.jsonl"))
    assert after == before, "nothing else in the set changes"
    assert "paper" in said.out


def test_training_reads_it_and_the_images_own_labels_win(
    data: Path, vmix_label: Callable[..., Said]
) -> None:
    listing = data / "metadata.jsonl"
    own = json.dumps({"file_name": name_of(0), "text": "mine", "aesthetics": {LIGHT: 1}})
    lines = [own, *(line for line in listing.read_text().splitlines() if name_of(0) not in line)]
    listing.write_text("\n".join(lines))
    vmix_label(data, "-L", data / "labels.toml")
    read = {example.key: example.aesthetics for example in read_dataset(data).examples}
    assert read[name_of(0)][LIGHT] == 1
    assert read[name_of(1)][LIGHT] == 0
    assert read[name_of(5)][LIGHT] is None
    assert not read_dataset(data).problems


@pytest.mark.parametrize("quantiles", ["0.5,0.5", "0,1", "0.2,0.9"])
def test_cuts_are_quantiles(data: Path, vmix_label: Callable[..., Said], quantiles: str) -> None:
    vmix_label(data, "-L", data / "labels.toml", f"--quantiles={quantiles}")
    low, high = map(float, quantiles.split(","))
    # Of ten different scores, at least these shares are at or beyond the cuts.
    wanted = {"0.5,0.5": (5, 5), "0,1": (1, 1), "0.2,0.9": (2, 1)}[quantiles]
    assert (lights(data).count(0), lights(data).count(1)) == wanted
    assert low <= high


def test_quantiles_of_one_label(data: Path, vmix_label: Callable[..., Said]) -> None:
    said = vmix_label(
        data, "-L", data / "labels.toml", f"--measure={FOCUS}=-brightness",
        "--quantiles=0.3,0.7", f"--quantiles={LIGHT}=0.1,0.5",
    )  # fmt: skip
    assert said.row(LIGHT)[1:4] == ["1", "4", "5"]
    assert said.row(FOCUS)[1:4] == ["3", "4", "3"]


def test_lower_is_better_with_a_minus(data: Path, vmix_label: Callable[..., Said]) -> None:
    said = vmix_label(data, "-L", data / "labels.toml", f"--measure={LIGHT}=-brightness")
    assert lights(data) == [1, 1, 1, None, None, None, None, 0, 0, 0]
    assert said.row(LIGHT)[0] == "-brightness"
    assert said.row(LIGHT)[6] == ">="


def test_equal_scores_have_equal_labels() -> None:
    def of(scores: Sequence[float], quantiles: tuple[float, float] = (0.3, 0.7)) -> list[Any]:
        array = np.array(scores, dtype=np.float64)
        return labelled(array, *cuts(array, quantiles))

    assert of([5.0] * 6) == [None] * 6
    assert of([0, 0, 0, 0, 0, 1, 2, 3, 4, 5]) == [0] * 5 + [None] * 2 + [1] * 3
    assert of([0] * 8 + [1, 2]) == [None] * 8 + [1, 1], "a score that is at both ends is at none"
    assert of([float("nan"), 1, 2]) == [None, 0, 1]
    assert of([float("nan")] * 2) == [None, None]
    assert of([3.0]) == [None]
    random = np.random.default_rng(0).integers(0, 4, 200).astype(float)
    for value in range(4):
        assert len(set(np.array(of(list(random)), dtype=object)[random == value])) == 1


def test_a_flat_picture_has_no_composition(data: Path, vmix_label: Callable[..., Said]) -> None:
    toml = '[[label]]\nname = "balance"\ndimension = "composition"\n'
    (data / "balance.toml").write_text(toml)
    for number in range(COUNT):
        picture = np.full((32, 32, 3), 240, np.uint8)
        if number:
            picture[8:16, 2 * number : 2 * number + 8] = 20
        Image.fromarray(picture).save(data / name_of(number))
    said = vmix_label(data, "-L", data / "balance.toml")
    entries = lines_of(data)
    assert entries[name_of(0)]["scores"]["off-centre"] is None
    assert entries[name_of(0)]["aesthetics"]["balance"] is None
    # The square's middle is at column 2n + 4 of 32, row 12 throughout: 3 and 9 are equally far.
    assert said.row("balance")[:6] == ["-off-centre", "4", "3", "3", "0", "1"]
    assert {n for n in range(1, 10) if entries[name_of(n)]["aesthetics"]["balance"] == 1} == {
        5,
        6,
        7,
    }


# --- what people did survives --------------------------------------------------------------------


def test_edits_survive(data: Path, vmix_label: Callable[..., Said]) -> None:
    run = ("-L", data / "labels.toml")
    vmix_label(data, *run)
    dark, middle, bright, other = (name_of(n)[:-4] for n in (0, 5, 9, 1))

    def drop(entry: dict[str, Any]) -> None:
        del entry["aesthetics"][LIGHT]

    edit(
        data,
        **{
            f"n{dark}": lambda e: e["aesthetics"].update({LIGHT: "positive"}),
            f"n{middle}": lambda e: e["aesthetics"].update({LIGHT: 0.6, "mine": 1}),
            f"n{bright}": drop,
            f"n{other}": lambda e: e.update(note="too dark?"),
        },
    )
    for quantiles in ("0.3,0.7", "0.5,0.5", "0.1,0.9", "0.3,0.7"):
        said = vmix_label(data, *run, f"--quantiles={quantiles}")
        found = lights(data)
        assert (found[0], found[5], found[9]) == ("positive", 0.6, "-")
        assert said.row(LIGHT)[4] == "3"
    entries = lines_of(data)
    assert entries[name_of(5)]["aesthetics"]["mine"] == 1
    assert entries[name_of(1)]["note"] == "too dark?"
    assert found[1:5] + found[6:9] == [0, 0, None, None, None, 1, 1]


def test_an_edit_that_agrees_for_a_while_survives(
    data: Path, vmix_label: Callable[..., Said]
) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    edit(data, **{f"n{name_of(5)[:-4]}": lambda e: e["aesthetics"].update({LIGHT: 1})})
    vmix_label(*run, "--quantiles=0.3,0.5")  # which labels it so as well
    vmix_label(*run)
    assert lights(data)[5] == 1


def test_handing_a_label_back(data: Path, vmix_label: Callable[..., Said]) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    stem = f"n{name_of(0)[:-4]}"
    edit(data, **{stem: lambda e: e["aesthetics"].update({LIGHT: 1})})
    vmix_label(*run)
    edit(data, **{stem: lambda e: e["aesthetics"].pop(LIGHT)})
    said = vmix_label(*run)
    assert lights(data)[0] == 0
    assert said.row(LIGHT)[4] == "0"


def test_edits_during_a_run_survive(
    data: Path, vmix_label: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    real = scoring.look

    def meanwhile(task: Any) -> Any:
        edit(data, **{f"n{name_of(0)[:-4]}": lambda e: e["aesthetics"].update({LIGHT: 1})})
        return real(task)

    monkeypatch.setattr(scoring, "look", meanwhile)
    vmix_label(*run, "--rescore", "--workers=1")
    assert lights(data)[0] == 1


def test_labels_that_left_the_list_go_unless_they_are_someones(
    data: Path, vmix_label: Callable[..., Said]
) -> None:
    vmix_label(data, "-L", data / "labels.toml")
    edit(data, **{f"n{name_of(0)[:-4]}": lambda e: e["aesthetics"].update({LIGHT: 1})})
    (data / "fewer.toml").write_text(LABELS[LABELS.rindex("[[label]]") :])
    said = vmix_label(data, "-L", data / "fewer.toml")
    assert lights(data) == [1] + ["-"] * 9
    assert f"'{LIGHT}' is not in the list: its automatic labels went from 9 images" in said.out


def test_a_line_that_cannot_be_read_is_not_lost(
    data: Path, vmix_label: Callable[..., Said], refused: Callable[..., str]
) -> None:
    overlay = data / "aesthetics.jsonl"
    for line, what in (
        ('{"file_name": "0.png", "aesthetics": {"a": 1}', "line 1: Expecting"),
        ('{"file_name": "0.png", "aesthetics": {"a": 2}}', "label 'a': expected 1 or positive"),
        ('{"file_name": "0.png", "aesthetics": {}, "scores": {"x": "y"}}', "scores: expected"),
        ('{"file_name": "0.png"}\n{"file_name": "0.png"}', "line 2: 0.png has a line already"),
        ("[]", "line 1: expected an object with a file_name"),
    ):
        overlay.write_text(line)
        assert what in refused(data, "-L", data / "labels.toml")
        assert overlay.read_text() == line


# --- scores are kept -----------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of images that are measured from here on."""
    seen: list[str] = []
    real = pixels.measured

    def measured(image: Any, keys: Sequence[str]) -> Any:
        seen.extend(keys)
        return real(image, keys)

    monkeypatch.setattr(pixels, "measured", measured)
    return seen


def test_another_cut_scores_nothing(
    data: Path, vmix_label: Callable[..., Said], looks: list[str]
) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    assert len(looks) == 2 * COUNT
    looks.clear()
    vmix_label(*run, "--quantiles=0.5,0.5")
    for number in range(COUNT):
        os.utime(data / name_of(number), (1, 1))  # as a copy has other times
    vmix_label(*run)
    assert looks == []
    vmix_label(*run, f"--measure={LIGHT}=coverage")
    assert looks == ["coverage"] * COUNT
    looks.clear()
    vmix_label(*run, "--resolution=64")
    assert looks == ["sharpness@64"] * COUNT
    looks.clear()
    vmix_label(*run, "--rescore")
    assert len(looks) == 2 * COUNT


def test_a_changed_image_is_scored_anew(data: Path, vmix_label: Callable[..., Said]) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    save_another(grey(11), data / name_of(0))
    said = vmix_label(*run)
    assert lights(data) == [1, 0, 0, 0, None, None, None, None, 1, 1]
    assert "(9 from before)" in said.out


def test_no_score_of_another_image_is_kept(
    data: Path, vmix_label: Callable[..., Said], looks: list[str]
) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run, "--resolution=64")
    vmix_label(*run)
    save_another(grey(11), data / name_of(0))
    vmix_label(*run)
    looks.clear()
    vmix_label(*run, "--resolution=64")
    assert looks == ["sharpness@64"]


def test_stopped_by_ctrl_c(
    data: Path, vmix_label: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = scoring.look, iter(range(COUNT))

    def look(task: Any) -> Any:
        if next(count) == 5:
            signal.raise_signal(signal.SIGINT)  # to the process, as a terminal does
        return real(task)

    monkeypatch.setattr(scoring, "look", look)
    run = (data, "-L", data / "labels.toml", "--workers=1")
    said = vmix_label(*run)
    assert (said.status, said.out) == (130, "")
    kept = lines_of(data)
    assert 1 <= len(kept) < COUNT
    assert all(entry["scores"] and not entry["aesthetics"] for entry in kept.values())
    monkeypatch.setattr(scoring, "look", real)
    assert f"({len(kept)} from before)" in vmix_label(*run).out
    assert lights(data) == [0, 0, 0, None, None, None, None, 1, 1, 1]


def test_saved_at_intervals(
    data: Path, vmix_label: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "INTERVAL", -1.0)  # of no time at all, too
    real, counts = scoring.look, []

    def look(task: Any) -> Any:
        counts.append(len(lines_of(data)) if (data / "aesthetics.jsonl").exists() else 0)
        return real(task)

    monkeypatch.setattr(scoring, "look", look)
    vmix_label(data, "-L", data / "labels.toml", "--workers=1")
    assert counts[0] == 0
    assert counts[-1] >= COUNT - 4  # a few are on their way


# --- layouts and trouble -------------------------------------------------------------------------


def test_side_cars(tmp_path: Path, vmix_label: Callable[..., Said]) -> None:
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for number in range(4):
        grey(2 * number).save(folder / "deep" / f"ü{number}.png")
        (folder / "deep" / f"ü{number}.txt").write_text("a caption")
    vmix_label(folder)
    vmix_label(folder)
    assert list(lines_of(folder)) == [f"deep/ü{n}.png" for n in range(4)], "no sheet is an image"
    assert {e.aesthetics[LIGHT] for e in read_dataset(folder).examples} == {0, 1, None}
    assert sorted(p.name for p in (tmp_path / "set-aesthetics").iterdir())[0] == "fine-texture.png"


def tar(path: Path, images: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_shards_in_parts(tmp_path: Path, vmix_label: Callable[..., Said], looks: list[str]) -> None:
    (tmp_path / "labels.toml").write_text(LABELS)
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard, numbers in (("a", range(6)), ("b", range(6, 10))):
        tar(shards / f"{shard}.tar", {f"{n}.png": png(grey(n)) for n in numbers})
    before = content(shards)
    run = ("-L", tmp_path / "labels.toml")
    vmix_label(shards / "a.tar", *run)
    vmix_label(shards / "b*.tar", *run)
    assert len(lines_of(shards)) == 10, "lines of other shards are kept"
    looks.clear()
    vmix_label(shards, *run)
    assert looks == []
    found = lines_of(shards)
    assert [found[f"{'ab'[n > 5]}.tar/{n}.png"]["aesthetics"][LIGHT] for n in range(10)] == [
        0, 0, 0, None, None, None, None, 1, 1, 1
    ]  # fmt: skip
    assert {k: v for k, v in content(shards).items() if k.endswith(".tar")} == before
    # Packed anew in another order, every image is the one it was, and is not measured again.
    another_order = [3, 1, 0, 5, 4, 2]
    tar(shards / "a.tar", {f"{n}.png": png(grey(n if n else 9)) for n in another_order})
    os.utime(shards / "a.tar", (2_000_000_000, 2_000_000_000))  # whatever the clock
    vmix_label(shards, *run)
    assert looks == ["brightness", "sharpness@512"], "but the one that changed is"


def test_broken_images_are_named_and_skipped(data: Path, vmix_label: Callable[..., Said]) -> None:
    (data / name_of(0)).write_bytes(b"no image")
    whole = (data / name_of(9)).read_bytes()
    (data / name_of(9)).write_bytes(whole[: len(whole) // 2])
    (data / name_of(5)).unlink()
    said = vmix_label(data, "-L", data / "labels.toml")
    assert said.status == 0
    assert "10 images, 7 with scores" in said.out
    assert f"skipped: {name_of(0)}: not an image" in said.out
    assert f"skipped: {name_of(9)}: not an image" in said.out
    assert f"skipped: {name_of(5)}: no such image" in said.out
    assert set(lines_of(data)) == {name_of(n) for n in (1, 2, 3, 4, 6, 7, 8)}


def test_nothing_but_broken_images(data: Path, vmix_label: Callable[..., Said]) -> None:
    for number in range(COUNT):
        (data / name_of(number)).write_bytes(b"no image")
    said = vmix_label(data, "-L", data / "labels.toml")
    assert said.status == 1
    assert "no image could be scored" in said.err
    assert said.out.count("skipped: ") == COUNT
    assert not (data / "aesthetics.jsonl").exists()


def test_an_image_that_broke_keeps_its_line(data: Path, vmix_label: Callable[..., Said]) -> None:
    run = (data, "-L", data / "labels.toml")
    vmix_label(*run)
    before = lines_of(data)[name_of(0)]
    (data / name_of(0)).write_bytes(b"no image")
    vmix_label(*run, "--quantiles=0.5,0.6")
    assert lines_of(data)[name_of(0)] == before


def test_odd_pictures_are_measured(data: Path, vmix_label: Callable[..., Said]) -> None:
    pictures = [
        Image.new("L", (1, 1)), Image.new("RGBA", (3, 2), (0, 0, 0, 0)), Image.new("1", (2, 9)),
        Image.new("P", (40, 1)), Image.new("LA", (5, 5)), Image.new("I;16", (8, 8)),
        Image.new("RGB", (1, 4000), "red"), Image.new("RGB", (4000, 1)),
    ]  # fmt: skip
    for number, picture in enumerate(pictures):
        picture.save(data / name_of(number))
    said = vmix_label(data, "-L", data / "labels.toml")
    assert "10 images, 10 with scores" in said.out
    assert lines_of(data)[name_of(1)]["scores"]["brightness"] == 1, "transparent is white"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--measure=sharp=brightness"], "--measure: there is no label 'sharp' among 'natural"),
        (["--measure=sharp focus=focus"], "expected one of colourfulness, brightness"),
        (["--measure=sharp focus=clip-iqa"], "--clip-iqa DIR with its weights is missing"),
        (["--measure=sharp focus=-laion"], "--laion DIR with its weights is missing"),
        (["--quantiles=dark=0.3,0.7"], "--quantiles: there is no label 'dark'"),
        (["--pair=dark=a|b"], "--pair: there is no label 'dark'"),
        (["--labels=nowhere.toml"], "nowhere.toml"),
        (["--clip-iqa=nowhere"], "nowhere/model.safetensors"),
        (["--laion=nowhere"], f"nowhere/{HEAD}.safetensors or nowhere/{HEAD}.pth"),
        (["--out=SET/metadata.jsonl"], "metadata.jsonl is not a folder"),
    ],
)
def test_user_errors(
    data: Path, refused: Callable[..., str], arguments: list[str], what: str
) -> None:
    given = [a.replace("SET", str(data)) for a in arguments]
    assert what in refused(data, "-L", data / "labels.toml", *given)
    assert not (data / "aesthetics.jsonl").exists()


def test_no_set(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "nothing is there" in refused(tmp_path / "nowhere")
    assert "neither a metadata.jsonl" in refused(tmp_path)


@pytest.mark.parametrize(
    "argument",
    ["--quantiles=0.7,0.3", "--quantiles=a", "--quantiles=0,2", "--measure=x", "--pair=x=a",
     "--resolution=0", "--workers=none", "--resco"],
)  # fmt: skip
def test_a_wrong_command_line(data: Path, vmix_label: Callable[..., Said], argument: str) -> None:
    said = vmix_label(data, argument)
    assert said.status == 2
    assert "usage: vmix label" in said.err


def test_as_a_command(data: Path, tmp_path: Path) -> None:
    """Without torch: pixel measures do not need it."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['vmix', 'label', *sys.argv[1:]]\n"
        "from vmix.__main__ import main; main()"
    )
    command = [sys.executable, "-c", script, str(data), "-L", str(data / "labels.toml")]
    # matplotlib, which brings the fonts, says on stderr where it cannot write at home.
    env = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert lights(data).count(1) == 3


# --- which measure -------------------------------------------------------------------------------


def test_default_labels(data: Path, vmix_label: Callable[..., Said]) -> None:
    said = vmix_label(data)
    measures = {
        "vibrant color": "colourfulness",
        "coherent color": "none",
        "natural lighting": "brightness",
        "proportional composition": "-off-centre",
        "sharp focus": "sharpness",
        "fine texture": "laplacian-variance",
        "expressive emotion": "none",
    }
    assert {label: said.row(label)[0] for label in measures} == measures
    assert "colourfulness serves another label already" in said.out
    assert "no measure for dimension 'emotion'" in said.out
    assert set(lines_of(data)["0.png"]["aesthetics"]) == {
        label for label, measure in measures.items() if measure != "none"
    }


def test_labels_that_order_alike_are_named(data: Path, vmix_label: Callable[..., Said]) -> None:
    said = vmix_label(data, "-L", data / "labels.toml", f"--measure={FOCUS}=-brightness")
    assert f"'{LIGHT}' and '{FOCUS}' order the images alike" in said.out
    random = np.random.default_rng(0)
    a = random.integers(0, 9, 50).astype(np.float64)
    b = a + random.normal(size=50)
    b[3] = np.nan
    [(_, _, r)] = alike([("a", a), ("b", b)], limit=0.5)
    assert r == pytest.approx(spearmanr(a, b, nan_policy="omit").statistic)


def test_sharpness_is_that_of_what_training_sees() -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    large = noise.resize((1024, 1024), Image.Resampling.BICUBIC)
    key = ["sharpness@256"]

    def of(image: Image.Image) -> float:
        return pixels.measured(image, key)["sharpness@256"]

    trained = of(large.resize((256, 256), Image.Resampling.LANCZOS))
    assert of(large) == pytest.approx(trained, rel=0.01), "resolution beyond does not count"
    thumbnail = of(large.resize((64, 64), Image.Resampling.LANCZOS))
    assert thumbnail < 0.3 * trained, "an enlarged thumbnail is soft"
    # Half of a wide picture is never seen; black beyond 2:1 changes nothing.
    wide = Image.new("RGB", (3072, 1024))
    for left in (0, 1024, 2048):
        wide.paste(large, (left, 0))
    beyond = wide.copy()
    beyond.paste("black", (0, 0, 500, 1024))
    assert of(beyond) == of(wide)


def test_enlarged_pictures_are_as_soft_as_they_look() -> None:
    """Rounded to 1/255, a soft picture would consist of little steps: three times the sharpness."""

    def blob(side: int) -> Any:
        x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side * 4 - 2] * 2)
        return np.exp(-32 * (x**2 + y**2))[..., None] * np.ones(3)

    small = Image.fromarray((255 * blob(64)).round().astype(np.uint8))
    found = pixels.measured(small, ["sharpness@512"])["sharpness@512"]
    # What is left is the rounding of the small picture itself.
    assert found == pytest.approx(sharpness(blob(512)), rel=0.2)


def test_jpegs_are_decoded_smaller_but_look_the_same() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.resize((2400, 1800), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
    small, whole = pixels.opened(file.getvalue(), 256), Image.open(file)
    assert small.size == (1200, 900) < whole.size
    keys = ["colourfulness", "brightness", "sharpness@256", "off-centre"]
    found, wanted = (pixels.measured(image, keys) for image in (small, whole))
    for key in keys:  # which of the pixels are averaged first is all that differs
        assert found[key] == pytest.approx(wanted[key], rel=0.02, abs=1e-3), key


def test_measures_see_the_looks_that_the_demo_draws(
    tmp_path: Path, vmix_label: Callable[..., Said]
) -> None:
    from transforms import LABELS as LOOKS
    from transforms import render

    generator = torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)
    folder = tmp_path / "set"
    folder.mkdir()
    truth: dict[str, dict[str, int]] = {}
    for number in range(60):
        rgba = torch.zeros(4, 64, 64)
        rgba[:3] = torch.from_numpy(random.random((3, 1, 1)))
        for _ in range(3):
            x, y = random.integers(8, 40, 2)
            rgba[:3, y : y + 12, x : x + 12] = torch.from_numpy(random.random((3, 1, 1)))
        rgba[3, 4:60, 4:60] = 1
        labels = dict(zip(LOOKS, map(int, random.integers(0, 2, 4)), strict=True))
        drawn = (render(rgba, labels, generator) * 255).round().to(torch.uint8)
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        truth[f"{number}.png"] = labels
    toml = Path(__file__).parents[2] / "examples" / "demo" / "labels.toml"
    vmix_label(folder, "-L", toml, "--resolution=128")
    entries = lines_of(folder)
    # Colours are drawn at random, pale ones among them; the other looks are unmistakable.
    least = {"colourfulness": 0.9, "brightness": 0.99, "sharpness@128": 0.99, "off-centre": 0.99}
    for (key, auc), label in zip(least.items(), LOOKS, strict=True):
        sides: tuple[list[float], list[float]] = ([], [])
        for name, labels in truth.items():
            sides[labels[label]].append(entries[name]["scores"][key])
        worse, better = sides[::-1] if key == "off-centre" else sides
        found = mannwhitneyu(better, worse).statistic / (len(worse) * len(better))
        assert found >= auc, key


# --- learned measures ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with the width of ViT-L/14's embeddings, and a head for them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tokenizer = tiny_tokenizer()
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_factor": 5.0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **tower, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=768,
        )
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    torch.save(head_weights(), folder / f"{HEAD}.pth")
    return folder


def head_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for place, out, into in (
        (0, 1024, 768), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)
    ):  # fmt: skip
        state[f"layers.{place}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"layers.{place}.bias"] = torch.randn(out, generator=generator)
    return state


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        tile = Image.fromarray(pixels).resize((40, 32), Image.Resampling.NEAREST)
        tile.save(folder / f"{number}.png")
    return folder


def test_clip_iqa_is_torchmetrics(
    clip: Path, colours: Path, vmix_label: Callable[..., Said], looks: list[str]
) -> None:
    from torchmetrics.multimodal import CLIPImageQualityAssessment
    from transformers import CLIPModel, CLIPProcessor

    said = vmix_label(
        colours, f"--clip-iqa={clip}", "--measure=sharp focus=clip-iqa",
        "--pair=natural lighting=a bright day|night",
    )  # fmt: skip
    assert said.status == 0
    assert said.row("coherent color")[0] == said.row("expressive emotion")[0] == "clip-iqa"
    pairs = {
        "natural lighting": ("a bright day", "night"),
        "sharp focus": ("sharp focus", "blurry, out of focus"),
        "expressive emotion": ("expressive emotion", "blank, expressionless"),
    }
    model: Any = CLIPModel.from_pretrained(clip)
    for name in ("get_text_features", "get_image_features"):
        # torchmetrics 1.9 expects tensors, as transformers 4 gave.
        setattr(model, name, partial(_pooled, getattr(model, name)))
    load: Any = lambda: (model, CLIPProcessor.from_pretrained(clip))  # noqa: E731
    metric = CLIPImageQualityAssessment(load, prompts=tuple(pairs.values()))
    pictures = [np.asarray(Image.open(colours / f"{n}.png").convert("RGB")) for n in range(6)]
    wanted: Any = metric(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float())
    entries = lines_of(colours)
    for index, (positive, negative) in enumerate(pairs.values()):
        key = f"clip-iqa tiny: {positive} | {negative}"
        found = [entries[f"{n}.png"]["scores"][key] for n in range(6)]
        # Scaled by the same code; sums in another order, times 100, are what is left.
        np.testing.assert_allclose(found, wanted[f"user_defined_{index}"], atol=1e-4)
        assert np.ptp(found) > 1e-2, "the pictures do not differ"
    looks.clear()
    again = vmix_label(
        colours, f"--clip-iqa={clip}", "--measure=sharp focus=clip-iqa",
        "--pair=natural lighting=a bright day|night", "--quantiles=0.5,0.5",
    )  # fmt: skip
    assert "from before" not in again.out
    assert looks == []


def _pooled(method: Callable[..., Any], *args: Any, **more: Any) -> Any:
    found = method(*args, **more)
    return getattr(found, "pooler_output", found)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_laion(
    clip: Path, colours: Path, vmix_label: Callable[..., Said], tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor, CLIPModel

    folder = tmp_path / "laion"
    shutil.copytree(clip, folder)
    state = head_weights()
    if kind == "safetensors":
        (folder / f"{HEAD}.pth").unlink()
        save_file(state, folder / f"{HEAD}.safetensors")
    (colours / "labels.toml").write_text('[[label]]\nname = "fine"\ndimension = "aesthetics"\n')
    said = vmix_label(colours, "-L", colours / "labels.toml", f"--laion={folder}")
    assert said.row("fine")[:4] == ["laion", "2", "2", "2"]

    model: Any = CLIPModel.from_pretrained(clip)
    pictures = [Image.open(colours / f"{n}.png").convert("RGB") for n in range(6)]
    inputs = AutoImageProcessor.from_pretrained(clip)(images=pictures, return_tensors="pt")
    with torch.no_grad():
        x = _pooled(model.get_image_features, **inputs)
        x = x / x.norm(dim=1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    found = [lines_of(colours)[f"{n}.png"]["scores"]["laion"] for n in range(6)]
    np.testing.assert_allclose(found, x.flatten(), rtol=1e-4, atol=1e-5)


def test_a_head_that_is_more_than_tensors_is_refused(
    clip: Path, colours: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = tmp_path / "laion"
    shutil.copytree(clip, folder)
    (folder / f"{HEAD}.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    assert HEAD in refused(colours, f"--laion={folder}")
    assert not (tmp_path / "pwned").exists()


def test_weights_say_where_they_belong(
    clip: Path, colours: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(clip, folder)
    (folder / f"{HEAD}.pth").unlink()
    said = refused(colours, f"--laion={folder}")
    assert f"{folder / HEAD}.pth" in said
    assert "improved-aesthetic-predictor" in said
    assert "config.json" not in said
    (folder / "model.safetensors").unlink()
    assert str(folder / "model.safetensors") in refused(colours, f"--clip-iqa={folder}")


# --- contact sheets ------------------------------------------------------------------------------


def test_sheets(data: Path, vmix_label: Callable[..., Said], tmp_path: Path) -> None:
    said = vmix_label(data, "-L", data / "labels.toml", f"--out={tmp_path / 'sheets'}")
    for name in ("natural-lighting", "sharp-focus"):
        file = tmp_path / "sheets" / f"{name}.png"
        assert str(file) in said.out
        with Image.open(file) as image:
            assert image.format == "PNG"
            image.load()
    # The pictures are there from dark to bright, framed by what they are labelled.
    with Image.open(tmp_path / "sheets" / "natural-lighting.png") as image:
        side, top = sheet.CELL, 64 + 24
        for number in range(COUNT):
            left = sheet.EDGE + number * (side + sheet.GAP)
            inside = np.asarray(image.crop((left + 8, top + 8, left + side - 8, top + side - 8)))
            assert inside.mean() == pytest.approx(20 + 20 * number, abs=2)
            frame = image.getpixel((left - 1, top + 20))
            value = (0, 0, 0, None, None, None, None, 1, 1, 1)[number]
            assert frame == ImageColor.getrgb(sheet.COLOURS[value])


def test_rows_of_a_sheet() -> None:
    random = np.random.default_rng(0)
    scores = random.permutation(200).astype(float)
    pictures = [sheet.Picture(f"{n}", score, None, False) for n, score in enumerate(scores)]
    pictures.append(sheet.Picture("no score", float("nan"), None, False))
    for sign, low, high in ((1, 59.7, 139.3), (-1, 139.3, 59.7)):
        rows = sheet.sections(pictures, low, high, sign)
        found = [[p.score for p in row] for _, row in rows]
        assert found[0] == ([*range(12)] if sign > 0 else [*range(199, 187, -1)])
        assert found[3] == ([*range(188, 200)] if sign > 0 else [*range(11, -1, -1)])
        assert set(found[1]) == set(range(54, 66) if sign > 0 else range(134, 146))
        assert set(found[2]) == set(range(134, 146) if sign > 0 else range(54, 66))
    for count in (0, 1, 12, 13, 30, 48, 49):
        rows = sheet.sections(pictures[:count], 50, 150, 1)
        names = [p.name for _, row in rows for p in row]
        assert len(names) == len(set(names)) == min(count, 48)


def test_a_sheet_replaces_a_sheet_only(
    data: Path, vmix_label: Callable[..., Said], refused: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "pictures"
    out.mkdir()
    grey(3).save(out / "sharp-focus.png")
    before = content(out)
    run = (data, "-L", data / "labels.toml", f"--out={out}")
    assert "sharp-focus.png is not a contact sheet" in refused(*run)
    assert content(out) == before
    (out / "sharp-focus.png").unlink()
    for _ in range(2):
        assert vmix_label(*run).status == 0


def test_sheets_do_not_become_images_of_the_set(colours: Path, refused: Callable[..., str]) -> None:
    assert "is in the set" in refused(colours, f"--out={colours / 'sheets'}")


def test_names_of_sheets() -> None:
    names = sheet.file_names(["a/b", "a b", "../x", "清晰", "?", "A/B"])
    assert list(names.values()) == [
        "a-b.png", "a-b-2.png", "x.png", "清晰.png", "label.png", "A-B-3.png"
    ]  # fmt: skip
