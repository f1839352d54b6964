"""Sets of images: what is read in every layout, what is said of what is wrong, and the order."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vmix.dataset import Dataset, DatasetError, Example, parse_label, read_dataset
from vmix.train.data import buckets, nearest_bucket, to_pixels, usable_images
from vmix.train.errors import TrainingError
from vmix.train.order import Order, OwnBatches, Place

# Machines are slow at times: how long an example takes says nothing.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIGHT, FOCUS = "natural lighting", "sharp focus"
NAMES = [LIGHT, FOCUS]
LABELS: list[dict[str, Any]] = [{LIGHT: 1}, {LIGHT: 0, FOCUS: 0.25}, {FOCUS: None}, {FOCUS: 1}]


def encoded(number: int, kind: str = "PNG", size: tuple[int, int] = (20, 12)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def lines(path: Path, *rows: Any) -> None:
    texts = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(text + b"\n" for text in texts))


def row(number: int) -> dict[str, Any]:
    return {"file_name": f"{number}.png", "text": f"dog {number}", "aesthetics": LABELS[number]}


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    folder = tmp_path / "listing"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(number))
    lines(folder / "metadata.jsonl", *map(row, range(4)))
    return folder


@pytest.fixture
def sidecars(tmp_path: Path) -> Path:
    folder = tmp_path / "side-cars"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        path = folder / ("more" if number == 3 else "") / str(number)
        path.with_suffix(".png").write_bytes(encoded(number))
        path.with_suffix(".txt").write_text(f"dog {number}\n")
        path.with_suffix(".aes.json").write_text(json.dumps(LABELS[number]))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """As webdataset writes them: captions in .txt or .json, labels in .json or .aes.json."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pattern = str(folder / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0, mtime=0) as writer:
        for number in range(4):
            sample: dict[str, Any] = {"__key__": f"a/{number}", "png": encoded(number)}
            if number % 2:
                sample["json"] = {"text": f"dog {number}", "aesthetics": LABELS[number]}
            else:
                sample |= {"txt": f"dog {number}", "aes.json": json.dumps(LABELS[number]).encode()}
            writer.write(sample)
    return folder


def problems(data: Dataset) -> str:
    return "\n".join(f"{place}: {what}" for place, what in data.problems)


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["listing", "sidecars", "shards"])
def test_layouts_say_the_same(layout: str, request: pytest.FixtureRequest) -> None:
    data = read_dataset(request.getfixturevalue(layout))
    assert not data.problems
    assert [example.caption for example in data.examples] == [f"dog {n}" for n in range(4)]
    assert [example.aesthetics for example in data.examples] == LABELS
    assert [example.read() for example in data.examples] == [encoded(n) for n in range(4)]
    for number, example in enumerate(data.examples):
        with example.open() as image:
            assert np.array_equal(image, Image.open(io.BytesIO(encoded(number))))


def test_keys(listing: Path, sidecars: Path, shards: Path) -> None:
    keys = [[example.key for example in read_dataset(p).examples] for p in (listing, sidecars)]
    assert keys == [[f"{n}.png" for n in range(4)], ["0.png", "1.png", "2.png", "more/3.png"]]
    expected = [f"train-{n // 3:03}.tar/a/{n}.png" for n in range(4)]
    for path in (shards, shards / "train-*.tar"):
        assert [example.key for example in read_dataset(path).examples] == expected
    assert len(read_dataset(shards / "train-001.tar").examples) == 1


def test_shards_are_what_webdataset_reads(shards: Path) -> None:
    names = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))
    ours = read_dataset(shards).examples
    assert [example.read() for example in ours] == [sample["png"] for sample in theirs]
    for example, sample in zip(ours, theirs, strict=True):
        assert example.key.endswith(f"{sample['__key__']}.png")
        text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["text"]
        assert example.caption == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@given(
    st.lists(
        st.text("a._/", min_size=1, max_size=8)
        .filter(lambda name: not name.endswith("/"))
        .map(lambda name: f"{name}.png"),
        max_size=6,
        unique=True,
    )
)
@settings(
    unhurried,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_names_in_shards_are_split_as_webdataset_splits_them(
    tmp_path: Path, names: list[str]
) -> None:
    path = tar(tmp_path / "x.tar", *((name, encoded(n)) for n, name in enumerate(names)))
    theirs: dict[str, bytes] = {}
    with path.open("rb") as file:
        files = [{**f, "__url__": ""} for f in webdataset.tariterators.tar_file_iterator(file)]
        for sample in webdataset.tariterators.group_by_keys(iter(files)):
            theirs |= {f"{sample['__key__']}.{k}": v for k, v in sample.items() if k == "png"}
    try:
        ours = read_dataset(path).examples
    except DatasetError:  # of a set without any image
        ours = []
    assert {e.key.removeprefix("x.tar/"): e.read() for e in ours} == theirs


def test_an_images_own_labels_win_over_those_beside_it(listing: Path, shards: Path) -> None:
    """`aesthetics.jsonl` speaks where the image's own are silent; `unknown` is not silence."""
    for folder, key in ((listing, "{}.png"), (shards, "train-000.tar/a/{}.png")):
        rows: list[Any] = [
            {"file_name": key.format(n), "aesthetics": {LIGHT: 0.5, FOCUS: "negative"}}
            for n in (0, 2)
        ]
        lines(folder / "aesthetics.jsonl", *rows)
        data = read_dataset(folder)
        assert not data.problems
        assert [example.aesthetics for example in data.examples] == [
            {LIGHT: 1, FOCUS: 0}, LABELS[1], {LIGHT: 0.5, FOCUS: None}, LABELS[3],
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        *((1, 1.0), (1.0, 1.0), (True, 1.0), ("positive", 1.0), (0, 0.0), (False, 0.0)),
        *(("negative", 0.0), (None, None), ("unknown", None), (0.3, 0.3), (5e-324, 5e-324)),
    ],
)
def test_spellings_of_labels(spelling: Any, meaning: float | None) -> None:
    assert parse_label("x", json.loads(json.dumps(spelling))) == meaning


@pytest.mark.parametrize("value", [2, -0.1, math.nan, math.inf, "Positive", "", "1", [], {}, 1e300])
def test_what_is_no_label(value: Any) -> None:
    with pytest.raises(ValueError, match=r"label 'x': expected 1 or positive.*found"):
        parse_label("x", value)


# --- what is wrong with a set --------------------------------------------------------------------


def said_by_python(function: Callable[[Any], object], value: object) -> str:
    """What Python itself says of the value: its words are not those of every version."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - whichever it is
        function(value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", said_by_python(json.loads, "{")),
        (b"[1]", "expected an object"),
        (b'"x"', "expected an object"),
        (b'{"text": "x"}', "no 'file_name'"),
        (b'{"file_name": "0.png"}', "no 'text'"),
        (b'{"file_name": 3, "text": "x"}', "file_name and text: expected strings"),
        (b'{"file_name": ["x"], "text": "x"}', "file_name and text: expected strings"),
        (b'{"file_name": "0.png", "text": null}', "file_name and text: expected strings"),
        (b'{"file_name": "0.png", "text": "x", "aesthetics": [1]}', "expected an object of labels"),
        (b'{"file_name": "0.png", "text": "x", "aesthetics": {"a": "yes"}}', "label 'a': expected"),
        (b'{"file_name": "0.png", "text": "\xff"}', "can't decode byte 0xff"),
        (b'{"file_name": "0.png", "text": "\\ud800"}', "surrogates not allowed"),
        (b'{"file_name": "%s.png", "text": "x"}' % (b"n" * 999), os.strerror(errno.ENAMETOOLONG)),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, said_by_python(json.loads, "9" * 10_000)),
    ],
)
def test_lines_of_another_shape(listing: Path, text: bytes, message: str) -> None:
    lines(listing / "metadata.jsonl", row(1), text, row(2))
    data = read_dataset(listing)
    assert [place for place, _ in data.problems] == ["metadata.jsonl, line 2"]
    assert message in data.problems[0][1]
    assert [example.key for example in data.examples] == ["1.png", "2.png"]


@pytest.mark.parametrize(
    "text", [b"{", b"[1]", b'{"file_name": "0.png"}', b'{"file_name": [], "aesthetics": {}}',
             b'{"file_name": "0.png", "aesthetics": null}', b"\xff"]
)  # fmt: skip
def test_lines_of_another_shape_beside_the_images(listing: Path, text: bytes) -> None:
    lines(listing / "aesthetics.jsonl", text)
    data = read_dataset(listing)
    assert [place for place, _ in data.problems] == ["aesthetics.jsonl, line 1"]
    assert len(data.examples) == 4


def test_an_image_that_is_listed_twice(listing: Path) -> None:
    lines(listing / "metadata.jsonl", row(0), row(1), row(0))
    data = read_dataset(listing)
    assert problems(data) == "metadata.jsonl, line 3: 0.png is listed twice"
    assert len(data.examples) == 2


def test_editors_and_systems_leave_their_marks(listing: Path, sidecars: Path) -> None:
    """Byte order marks, CRLF, and hidden files are no part of a set."""
    text = (listing / "metadata.jsonl").read_bytes()
    (listing / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    (sidecars / "0.txt").write_bytes(b"\xef\xbb\xbfdog 0\r\n")
    for hidden in ("._0.png", ".cache/0.png"):
        (sidecars / hidden).parent.mkdir(exist_ok=True)
        (sidecars / hidden).write_bytes(b"no image")
    for folder in (listing, sidecars):
        data = read_dataset(folder)
        assert not data.problems
        assert [example.caption for example in data.examples] == [f"dog {n}" for n in range(4)]


def test_side_cars_that_cannot_be_read(sidecars: Path) -> None:
    (sidecars / "0.txt").write_bytes(b"caf\xe9")
    (sidecars / "1.aes.json").write_text("[]")
    (sidecars / "2.png").unlink()
    (sidecars / "more" / "3.txt").unlink()
    data = read_dataset(sidecars)
    assert [example.key for example in data.examples] == ["more/3.png"]
    assert data.examples[0].caption is None
    for message in (
        "2.aes.json: no image beside it",
        "0.png: side-car: 'utf-8' codec can't decode byte 0xe9",
        "1.png: side-car: aesthetics: expected an object of labels",
    ):
        assert message in problems(data)


def test_names_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    """Absolute names and `..` are names; nothing but the shard is ever opened."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    names = [str(outside), "../outside.png", "/etc/../x.png", "a/../../b.png"]
    path = tar(tmp_path / "set" / "x.tar", *((name, encoded(n)) for n, name in enumerate(names)))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
        link.name, link.type = "hard.png", tarfile.LNKTYPE
        archive.addfile(link)
    data = read_dataset(path)
    # Names with dots before their ending are split at the first, as webdataset splits them.
    kept = [e for e in data.examples if "outside" in e.key or "x.png" in e.key or "b.png" in e.key]
    assert kept == list(data.examples)
    for example in data.examples:
        assert example.file == path
        assert example.read() in [encoded(n) for n in range(4)]


def test_a_shard_that_was_cut_off(shards: Path) -> None:
    """What is whole is used; what is not is named."""
    path = shards / "train-000.tar"
    with tarfile.open(path) as archive:
        last = next(m for m in archive.getmembers() if m.name == "a/2.png")
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    data = read_dataset(shards)
    assert "train-000.tar: cut off or damaged" in problems(data)
    assert [e.key[-5:] for e in data.examples] == ["0.png", "1.png", "3.png"]


def test_a_shard_that_is_damaged_in_the_middle(shards: Path) -> None:
    """tarfile takes a damaged header for the end of the archive."""
    path = shards / "train-000.tar"
    with tarfile.open(path) as archive:
        second = next(m for m in archive.getmembers() if m.name.startswith("a/1"))
    content = bytearray(path.read_bytes())
    content[second.offset : second.offset + 512] = b"\x55" * 512
    path.write_bytes(content)
    data = read_dataset(shards)
    assert problems(data) == f"train-000.tar: cut off or damaged at byte {second.offset}"
    assert [e.key[-5:] for e in data.examples] == ["0.png", "3.png"]


def test_members_that_are_no_sample(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar", ("README", b"x"), ("._0.png", b"x"), ("__meta__/y.png", b"x"),
        ("0.png", encoded(0)), ("0.txt", b"dog"), ("1.txt", b"a caption alone"),
        ("2.png", encoded(2)), ("2.txt", b"\xff"), ("3.png", encoded(3)), ("3.json", b"[]"),
        ("4.png", encoded(0)), ("4.json", b'{"text": 3}'), ("5.png", encoded(1)),
        ("5.png", encoded(2)),
    )  # fmt: skip
    data = read_dataset(path)
    assert [example.key for example in data.examples] == ["x.tar/0.png", "x.tar/5.png"]
    assert [place for place, _ in data.problems] == [
        "x.tar/5.png", "x.tar/1", "x.tar/2", "x.tar/3", "x.tar/4",
    ]  # fmt: skip
    for message in (
        "5.png: is in it twice", "1: no image among txt", "2: 'utf-8' codec", "expected an object",
        "expected a string as text",
    ):  # fmt: skip
        assert message in problems(data)


def test_a_member_that_pretends_to_be_huge(tmp_path: Path) -> None:
    member = tarfile.TarInfo("0.txt")
    member.size = 2**40
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf() + bytes(512))
    assert "x.tar/0.txt: cut off" in problems(read_dataset(path))


def test_any_damage_to_a_shard_is_survived(shards: Path, tmp_path: Path) -> None:
    """Random bytes in headers and texts: problems or other labels, never another error; what is
    read lies in the file."""
    whole = (shards / "train-000.tar").read_bytes()
    path, draw = tmp_path / "x.tar", random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            place = draw.randrange(len(content)) // 512 * 512 + draw.randrange(512)
            content[place] = draw.choice((0, 255, 0x30, 0x37, draw.randrange(256)))
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            data = read_dataset(path)
        except DatasetError:
            continue
        for example in data.examples:
            assert example.size is not None
            assert len(example.read()) == example.size


def test_what_is_no_set(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "nothing is there"),
        (tmp_path / "x-*.tar", "nothing is there"),
        (tmp_path, "has neither a metadata.jsonl, nor images, nor .tar shards"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_dataset(path)
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert "x.tar: not a readable tar file" in problems(read_dataset(tmp_path))


# --- the report before the first step ------------------------------------------------------------


@pytest.fixture
def broken(listing: Path) -> Path:
    """One image of each kind of trouble, and three good ones."""
    data = bytearray(encoded(9, "JPEG", (64, 64)))
    (listing / "cut.jpg").write_bytes(data[: len(data) // 2])
    (listing / "none.png").write_bytes(b"GIF89a")
    labels = {LIGHT: 1, FOCUS: 1}
    lines(
        listing / "metadata.jsonl", row(0), row(1), row(3),
        {"file_name": "gone.png", "text": "x", "aesthetics": labels},
        {"file_name": "none.png", "text": "x", "aesthetics": labels},
        {"file_name": "2.png", "text": "x", "aesthetics": {"shrap focus": 1}},
        {"file_name": "cut.jpg", "text": "x"},
        b"{",
    )  # fmt: skip
    return listing


def test_all_that_is_wrong_is_said_before_the_first_step(broken: Path) -> None:
    said: list[str] = []
    with pytest.raises(TrainingError) as error:
        usable_images(broken, NAMES, say=said.append)
    for message in (
        f"gone.png: no such image: {broken / 'gone.png'}",
        "none.png: not an image",
        "2.png: unknown label 'shrap focus'",
        "cut.jpg: no aesthetics",
        f"metadata.jsonl, line 8: {said_by_python(json.loads, '{')}",
        "--skip_unusable",
    ):
        assert message in str(error.value)
    assert f"{broken}: 7 images, 3 usable" in said[0]
    table = [line.split() for line in said[0].splitlines() if line.strip().startswith(NAMES[0][:7])]
    assert table == [["natural", "lighting", "1", "2", "0", "0"]]
    assert ["sharp", "focus", "1", "1", "1", "0"] in [line.split() for line in said[0].splitlines()]


def test_the_rest_can_be_trained_on(broken: Path) -> None:
    said: list[str] = []
    images = usable_images(broken, NAMES, skip=True, say=said.append)
    assert [image.example.key for image in images] == ["0.png", "1.png", "3.png"]
    assert [image.weights for image in images] == [(1, 0), (0, 0.25), (0, 1)]
    assert "not used: gone.png" in said[0]
    unknown = usable_images(broken, NAMES, skip=True, missing="unknown", say=said.append)
    assert [image.weights for image in unknown] == [(1, 0.5), (0, 0.25), (0.5, 1)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("sharded", [False, True])
def test_pixels_that_are_cut_off_are_found_by_verifying(
    tmp_path: Path, kind: str, sharded: bool
) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow is built without {kind}")
    folder = tmp_path / "set"
    folder.mkdir()
    whole = encoded(0, kind, (64, 48))
    end = kind.lower()
    samples = [("0", whole), ("1", whole[: len(whole) * 2 // 3]), ("2", whole)]
    texts = [json.dumps({LIGHT: n % 2}).encode() for n in range(3)]
    files = [
        item
        for (key, image), text in zip(samples, texts, strict=True)
        for item in ((f"{key}.{end}", image), (f"{key}.txt", b"x"), (f"{key}.aes.json", text))
    ]
    if sharded:
        tar(folder / "x.tar", *files)
    else:
        for name, content in files:
            (folder / name).write_bytes(content)
    with pytest.raises(TrainingError, match=rf"1\.{end}: not an image"):
        usable_images(folder, [LIGHT], verify=True, say=lambda _: None)
    images = usable_images(folder, [], skip=True, verify=True, say=lambda _: None)
    assert [image.size for image in images] == [(48, 64)] * 2


def test_a_label_that_teaches_nothing(listing: Path) -> None:
    lines(listing / "metadata.jsonl", *({**row(n), "aesthetics": {LIGHT: n}} for n in (0, 1)))
    for skip in (False, True):
        with pytest.raises(TrainingError, match="label 'sharp focus' is the same in every image"):
            usable_images(listing, NAMES, skip=skip, say=lambda _: None)


# --- shapes and pixels ---------------------------------------------------------------------------


@given(st.integers(1, 24), st.integers(1, 8))
@unhurried
def test_buckets_have_the_area_of_the_resolution(steps: int, step: int) -> None:
    side = steps * step
    shapes = buckets(side, step)
    assert (side, side) in shapes
    for height, width in shapes:
        assert height % step == width % step == 0
        assert max(height / width, width / height) <= 2
        assert height * width <= side * side
        assert max((height + step) * width, height * (width + step)) > side * side, "too small"
        assert (width, height) in shapes


@given(st.integers(1, 4000), st.integers(1, 4000))
@unhurried
def test_the_nearest_shape_loses_least(height: int, width: int) -> None:
    shapes = buckets(512, 64)
    chosen = nearest_bucket((height, width), shapes)

    def kept(shape: tuple[int, int]) -> float:  # share of the image that is left of its crop
        scale = max(shape[0] / height, shape[1] / width)
        return shape[0] * shape[1] / (scale * scale * height * width)

    assert kept(chosen) == pytest.approx(max(map(kept, shapes)))


@pytest.mark.parametrize(("height", "width"), [(90, 200), (240, 100), (150, 150), (30, 17)])
def test_pixels_lie_where_geometry_puts_them(tmp_path: Path, height: int, width: int) -> None:
    """A ramp to the right in red and downwards in green, scaled to cover and cropped at the centre:
    every pixel tells where it comes from. Within two of 255 levels: rounding, twice."""
    across, down = (np.linspace(20, 235, size) for size in (width, height))
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = across.round(), down.round()[:, None]
    Image.fromarray(ramp).save(tmp_path / "x.png")
    shape = nearest_bucket((height, width), buckets(96, 16))
    pixels, sizes = to_pixels(Example("x", "x", {}, tmp_path / "x.png"), shape)
    assert pixels.shape == (3, *shape)

    scale = max(shape[0] / height, shape[1] / width)
    large = [round(height * scale), round(width * scale)]
    top, left = (large[0] - shape[0]) // 2, (large[1] - shape[1]) // 2
    for channel, ramp1, offset, count, axis in (
        (0, across, left, large[1], 1), (1, down, top, large[0], 0),
    ):  # fmt: skip
        places = (np.arange(shape[axis]) + offset + 0.5) * len(ramp1) / count - 0.5
        expected = np.interp(places, np.arange(len(ramp1)), ramp1)
        got = (pixels[channel].numpy() + 1) * 127.5
        line = got[shape[0] // 2] if axis else got[:, shape[1] // 2]
        inner = slice(4, -4)  # the filter has less to go by at an edge
        assert np.abs(line - expected)[inner].max() <= 2
    # As StableDiffusionXLPipeline._get_add_time_ids joins original size, crop and target size.
    original, crop = (height, width), (top, left)
    assert sizes.tolist() == list(original + crop + shape)


# --- the order -----------------------------------------------------------------------------------


def take(order: Order, count: int, first: int = 0) -> list[list[Place]]:
    return list(islice(order.from_batch(first), count))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 2**31),
    st.integers(0, 40), st.booleans(), st.integers(1, 9),
)  # fmt: skip
@settings(unhurried, max_examples=150)
def test_order(
    names: list[int], batch: int, seed: int, first: int, sharded: bool, window: int
) -> None:
    """No batch mixes shapes, every epoch of a bucket has each of its images once, and the stream
    can be entered anywhere."""
    shards = [i // 4 for i in range(len(names))] if sharded else None
    stream = take(Order(names, batch, seed, shards, window), 60)
    assert [n for places in stream for n, _ in places] == list(range(60 * batch))
    of_bucket: dict[int, list[int]] = {name: [] for name in names}
    for places in stream:
        (name,) = {names[index] for _, index in places}
        of_bucket[name] += [index for _, index in places]
    for name, seen in of_bucket.items():
        members = [index for index, other in enumerate(names) if other == name]
        for start in range(0, len(seen) - len(members) + 1, len(members)):
            assert sorted(seen[start : start + len(members)]) == members
    again = Order(names, batch, seed, shards, window)
    assert take(again, 60 - first, first) == stream[first:]
    assert take(again, 5) == stream[:5], "what was taken before must not matter"


def test_processes_share_a_batch_out() -> None:
    order = Order([0, 0, 0, 1, 1], 6, 0)
    whole = take(order, 20, 3)
    parts = [list(islice(OwnBatches(order, 3, rank, 3), 20)) for rank in range(3)]
    assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == whole


def test_buckets_are_seen_as_often_as_they_have_images() -> None:
    names = [0] * 70 + [1] * 25 + [2] * 5
    counts = Counter(names[places[0][1]] for places in take(Order(names, 2, 0), 4000))
    for name, share in ((0, 0.7), (1, 0.25), (2, 0.05)):
        deviation = math.sqrt(4000 * share * (1 - share))
        assert abs(counts[name] - 4000 * share) < 4 * deviation


def test_shards_are_read_nearly_from_front_to_back() -> None:
    """Within a window, images are mixed; a shard is done when the window has passed over it."""
    count, size, window = 40, 50, 120
    shards = [i // size for i in range(count * size)]
    order = Order([0] * len(shards), 10, 0, shards, window)
    epochs = [
        [index for places in take(order, 200, start) for _, index in places] for start in (0, 200)
    ]
    assert epochs[0] != epochs[1]
    for seen in epochs:
        assert sorted(seen) == list(range(count * size))
        places: dict[int, list[int]] = {}
        for place, index in enumerate(seen):
            places.setdefault(shards[index], []).append(place)
        for shard, own in places.items():
            assert max(own) - min(own) < size + 2 * window, shard
        for start in range(0, len(seen), window):
            # 120 images of shards of 50: three or four, where an even shuffle has nearly all 40
            assert len({shards[i] for i in seen[start : start + window]}) <= window // size + 2
        firsts = sorted(places, key=lambda shard: min(places[shard]))
        assert firsts != sorted(firsts), "shards come in an order of their own"
        inside = [i for i in seen if shards[i] == firsts[0]]
        assert inside != sorted(inside), "and so do images within a window"
    whole: Sequence[int] = torch.randperm(len(shards)).tolist()
    assert len({shards[i] for i in whole[:window]}) > 30  # what the bound above keeps out
