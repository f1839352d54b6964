"""`vmix eval`, on the demo's model and on a tiny random one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import PRELOADED, tiny_pipeline, tiny_tokenizer
from torch import nn
from torch.distributed import TCPStore
from vmix import Adapter, measures
from vmix.aesthetic_predictor import AestheticPredictor
from vmix.clip_model import Clip, WeightsError
from vmix.diffusers import load_vmix, unload_vmix
from vmix.eval.metrics import ClipScore, Fid, colour_of
from vmix.eval.options import parse_args
from vmix.eval.pictures import origin_of
from vmix.eval.preference import tally
from vmix.eval.prompts import read_prompts, read_references
from vmix.eval.results import interval
from vmix.eval.rows import rows_of_flags, sweeps
from vmix.eval.run import main
from vmix.train.order import generator

ROOT = Path(__file__).resolve().parents[2]
DEMO, ADAPTER = (ROOT / "comfy_nodes" / "demo" / name for name in ("model", "adapter.safetensors"))
LORA = ROOT / "examples" / "demo" / "ablation" / "only-lora.safetensors"
NOWHERE = "/nowhere"  # as --weights: whatever this machine has, tests know of no weights
STEPS, GUIDANCE = 2, 3.0
_server = multiprocessing.get_context("forkserver")
# The one server of a test process also starts those that train.
_server.set_forkserver_preload([*PRELOADED, "vmix.eval.run", "diffusers", "transformers"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red strawberry\n\na house\na blue and pink fish\n  a green frog \na cup\n")
    return file


def arguments(base: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--base={base}", f"--prompts={prompts}", f"--out={out}", f"--steps={STEPS}",
        f"--guidance={GUIDANCE}", "--batch-size=2", f"--weights={NOWHERE}", *more,
    ]  # fmt: skip


def run(*args: Any) -> Path:
    main(arguments(*args))
    return Path(args[2])


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def files(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted((out / "images").rglob("*"))
        if file.is_file()
    }


# --- rows ----------------------------------------------------------------------------------------


def test_flags_give_the_papers_rows() -> None:
    flags = [f"--adapter={ADAPTER}", f"--lora={LORA}", "--scales=0,0.5,1,1.5", "--freeu"]
    args = parse_args(["--base=b", "--out=o", f"--prompts={__file__}", *flags])
    found = rows_of_flags(args)
    tables = {table.title: list(table.rows) for table in found.tables}
    assert tables == {
        "Methods": ["base", "FreeU", "LoRA only", "VMix, λ = 1", "VMix + LoRA"],
        "Strength λ": ["base", "VMix, λ = 0.5", "VMix, λ = 1", "VMix, λ = 1.5"],
    }
    assert sorted({name for names in tables.values() for name in names}) == sorted(
        row.name for row in found.rows
    )
    assert {row.selection for row in found.rows if row.adapter} == {"all"}
    assert [[row.scale for row in sweep] for sweep in sweeps(found.rows)] == [[0, 0.5, 1, 1.5]]


ROWS = f"""
base: {DEMO}
rows:
  - {{name: base}}
  - {{name: λ = 0, adapter: {ADAPTER}, scale: 0}}
  - {{name: "words", template: "a red {{prompt}}"}}
  - {{name: VMix, adapter: {ADAPTER}, selection: {{vibrant color: 1}}, scale: 1.5}}
  - {{name: preset, adapter: preset.safetensors, scale: 1.5}}
  - {{name: LoRA, lora: {LORA}, lora_scale: 0.5}}
  - {{name: FreeU, freeu: {{s1: 0.9, s2: 0.2, b1: 1.2, b2: 1.4}}}}
  - {{name: inversion, embedding: red.safetensors, token: <red>, template: "a <red> {{prompt}}"}}
  - {{name: two vectors, embedding: two.safetensors, token: <two>, template: "<two> {{prompt}}"}}
  - {{name: base again, freeu: false}}
tables:
  one: [base, VMix, LoRA]
  two: [LoRA, FreeU]
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run over every kind of row."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "rows.yaml").write_text(ROWS, encoding="utf-8")
    (folder / "prompts.txt").write_text("strawberry\na green frog\na fish\n")
    vocabulary = json.loads((DEMO / "tokenizer" / "tokenizer.json").read_bytes())["model"]["vocab"]
    table = load_file(DEMO / "text_encoder" / "model.safetensors")
    words = next(v for name, v in table.items() if name.endswith("token_embedding.weight"))
    learned = {word: words[vocabulary[f"{word}</w>"]].clone() for word in ("a", "red")}
    Adapter.open(ADAPTER).values({"vibrant color": 1.0}).save(folder / "preset.safetensors")
    save_file({"<red>": learned["red"]}, folder / "red.safetensors")
    save_file({"emb_params": torch.stack(list(learned.values()))}, folder / "two.safetensors")
    main(
        [
            f"--rows={folder / 'rows.yaml'}", f"--prompts={folder / 'prompts.txt'}",
            f"--out={folder / 'out'}", f"--steps={STEPS}", f"--guidance={GUIDANCE}",
            "--batch-size=2", f"--weights={NOWHERE}", "--seed=5",
        ]
    )  # fmt: skip
    return folder / "out"


def drawn(out: Path, row: str) -> NDArray[np.uint8]:
    return np.stack([pixels(file) for file in sorted((out / "images" / row).glob("*.png"))])


def test_pictures_are_those_of_the_public_interface(compared: Path) -> None:
    """To the bit, against a pipeline used by hand, one per row; and rows leave nothing behind."""
    import diffusers

    texts = ["strawberry", "a green frog", "a fish"]

    def by_hand(pipe: Any) -> NDArray[np.uint8]:
        images = []
        for part in (range(0, 2), range(2, 3)):
            images += pipe(
                [texts[i] for i in part], generator=[generator(5, i) for i in part],
                num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            ).images  # fmt: skip
        return np.stack([np.asarray(image) for image in images])

    def fresh() -> Any:
        pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
        assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipe = fresh()
    base = by_hand(pipe)
    for row in ("base", "λ=0", "base-again"):
        np.testing.assert_array_equal(drawn(compared, row), base, err_msg=row)
    load_vmix(pipe, ADAPTER, {"vibrant color": 1}, 1.5)
    np.testing.assert_array_equal(drawn(compared, "VMix"), by_hand(pipe))
    np.testing.assert_array_equal(drawn(compared, "preset"), drawn(compared, "VMix"))
    unload_vmix(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    np.testing.assert_array_equal(drawn(compared, "FreeU"), by_hand(pipe))
    pipe = fresh()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # about layers that it leaves alone
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name, adapter_name="x")
    pipe.set_adapters("x", 0.5)
    np.testing.assert_array_equal(drawn(compared, "LoRA"), by_hand(pipe))
    others = [drawn(compared, row) for row in ("base", "VMix", "LoRA", "FreeU", "words")]
    assert len({other.tobytes() for other in others}) == len(others)


def test_an_embedding_that_is_a_words_own_is_that_word(compared: Path) -> None:
    words = drawn(compared, "words")
    np.testing.assert_array_equal(drawn(compared, "inversion"), words)
    np.testing.assert_array_equal(drawn(compared, "two-vectors"), words)


def test_results_are_the_measures_of_the_pictures(compared: Path) -> None:
    result = json.loads((compared / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row["values"] for row in result["rows"]}
    for name, folder in (("base", "base"), ("FreeU", "FreeU"), ("LoRA", "LoRA")):
        images = drawn(compared, folder) / 255.0
        for measure, function in measures.MEASURES.items():
            expected = float(np.nanmean(function(images)))
            # the same sums over one picture at a time and over three
            assert rows[name][measure]["mean"] == pytest.approx(expected, rel=1e-9)
        match = float(measures.hue_matches(images[1], "green"))
        assert rows[name]["hue match"] == {"mean": match, "low": match, "high": match, "n": 1}
    assert rows["base"] == rows["λ = 0"]
    first, second = result["tables"]
    assert (first["title"], first["rows"]) == ("one", ["base", "VMix", "LoRA"])
    gaps = measures.brightness(drawn(compared, "VMix") / 255.0)
    gaps -= measures.brightness(drawn(compared, "base") / 255.0)
    found = first["differences"]["VMix"]["brightness"]
    # Of values of order one, again: sums in another order differ in their last bits.
    assert found["mean"] == pytest.approx(gaps.mean(), abs=1e-12)
    assert gaps.min() - 1e-12 <= found["low"] <= found["high"] <= gaps.max() + 1e-12
    assert set(second["differences"]) == {"FreeU"}
    text = (compared / "results.md").read_text(encoding="utf-8")
    mean = rows["VMix"]["colourfulness"]["mean"]
    assert f"| VMix | {mean:.3f} |" in text
    assert "FID" not in text.split("## one")[1], "a metric without weights has no column"
    for name in ("pt_inception-2015-12-05-6726825d.pth", "clip-vit-large-patch14", "linearMSE"):
        assert name in text, "it says which files to put where"
    assert (compared / "grid.png").stat().st_size > 1000


def said_by_yaml(text: str) -> str:
    """What is wrong with the text in yaml's own words, the first of them."""
    with pytest.raises(yaml.YAMLError) as error:
        yaml.safe_load(text)
    return re.escape(str(error.value).splitlines()[0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: x, adaptor: y}", "row 'x': there is no 'adaptor'; known are name, base, adapter"),
        ("{name: x, scale: much}", "row 'x': scale: expected a number, found 'much'"),
        ("{name: x, adapter: gone.safetensors}", "row 'x': no such file: .*gone.safetensors"),
        ("{name: x, lora: rows.yaml}", "rows.yaml is not a .safetensors file"),
        ("{name: Base}", "'base' and 'Base' would share a folder"),
        ("{name: x, freeu: {s1: 1}}", "freeu: expected numbers for s1, s2, b1 and b2"),
        ("{name: x, template: plain}", "the template 'plain' lacks {prompt}"),
        ("{name: x, embedding: e.safetensors}", "an embedding needs the token"),
        ("{scale: 1}", "row 2: it has no name"),
        ("[", f"rows.yaml: .*{said_by_yaml('[')}"),
    ],
)
def test_rows_are_checked(tmp_path: Path, prompts: Path, entry: str, message: str) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text(f"base: b\nrows:\n  - name: base\n  - {entry}\n", encoding="utf-8")
    save_file({"e": torch.zeros(4)}, tmp_path / "e.safetensors")
    with pytest.raises(SystemExit, match=rf"^vmix eval: .*{message}"):
        main([f"--rows={rows}", f"--prompts={prompts}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_to_the_base_ends_before_any_picture(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(3, 5)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no header at all")
    (tmp_path / "rows.yaml").write_text(
        "rows:\n- name: base\n- {name: x, embedding: other.safetensors, token: <x>, "
        "template: '{prompt} <x>'}\n"
    )
    out = tmp_path / "out"
    for more, message in (
        ([f"--adapter={ADAPTER}"], "row 'VMix': .*adapter.safetensors: this adapter is for other"),
        ([f"--adapter={tmp_path / 'broken.safetensors'}"], "row 'VMix': .*broken.safetensors"),
        ([f"--lora={LORA}"], "row 'LoRA only': .*only-lora.safetensors: "),
        ([f"--lora={tmp_path / 'broken.safetensors'}"], "row 'LoRA only': .*broken.safetensors"),
        ([f"--lora={tmp_path / 'other.safetensors'}"], "row 'LoRA only': .*other.safetensors: "),
        ([f"--rows={tmp_path / 'rows.yaml'}"], "expected an embedding of width 32"),
        ([f"--base={tmp_path / 'gone'}"], "the base .*gone: no such file or folder"),
        ([f"--base={tmp_path}"], "the base "),
        (["--metrics=pixels,fid"], "FID needs Inception's weights: put pt_inception"),
        (["--metrics=clip"], "the CLIP score needs CLIP: put the folder clip-vit-large-patch14"),
        (["--metrics=aes"], "the Aes score needs .*sac\\+logos\\+ava1-l14-linearMSE.pth"),
        (["--clip=gone"], "--clip gone: no such file"),
        ([f"--clip={tmp_path}"], "is not a folder of CLIP"),
        (["--samples=0"], "--samples 0 is not positive"),
    ):
        with pytest.raises(SystemExit, match=f"^vmix eval: .*{message}") as error:
            run(tiny, prompts, out, *more)
        assert "\n" not in str(error.value), "one sentence"
        assert not list(out.rglob("*.png"))


# --- prompts -------------------------------------------------------------------------------------


def test_mjhq_folders(tmp_path: Path) -> None:
    """Laid out as playgroundai/MJHQ-30K: meta_data.json, and a zip of <category>/<id>.jpg."""
    entries = {
        **{f"a{i}": {"category": "animals", "prompt": f"animal {i}"} for i in range(3)},
        **{f"f{i}": {"category": "food", "prompt": f"food {i}"} for i in range(2)},
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    found = read_prompts(tmp_path)
    assert found.prompts == ["animal 0", "food 0", "animal 1", "food 1", "animal 2"]
    assert not found.references
    for name, entry in entries.items():
        file = tmp_path / "mjhq30k_imgs" / entry["category"] / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(file)
    for path in (tmp_path, tmp_path / "meta_data.json"):
        references = read_prompts(path).references
        assert [e.file.stem for e in references] == ["a0", "f0", "a1", "f1", "a2"]
        assert all(e.open().size == (4, 4) for e in references)
    assert len(read_references(tmp_path)) == 5
    (tmp_path / "mjhq30k_imgs" / "food" / "f1.jpg").unlink()
    with pytest.raises(
        Exception, match=r"images of meta_data.json that are not there: food/f1.jpg"
    ):
        read_prompts(tmp_path)


def test_sets_of_images_as_prompts(tmp_path: Path) -> None:
    for name in ("x", "y"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    found = read_prompts(tmp_path)
    assert found.prompts == ["a x", "a y"]
    assert [e.key for e in found.references] == ["x.png", "y.png"]
    (tmp_path / "y.txt").unlink()
    with pytest.raises(Exception, match=r"images without a caption.*y\.png"):
        read_prompts(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (
        ("empty.txt", "expected a prompt on each line"),
        ("gone", "no such file"),
    ):
        with pytest.raises(Exception, match=message):
            read_prompts(tmp_path / name)


def test_a_prompt_has_a_colour_if_it_names_one() -> None:
    for prompt, colour in (
        ("a Red, shiny apple", "red"), ("blue-green", None), ("a red and red cup", "red"),
        ("a reddish cup", None), ("a house", None),
    ):  # fmt: skip
        assert colour_of(prompt) == colour


# --- making each picture once --------------------------------------------------------------------


def test_pictures_are_kept_and_batches_made_whole(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    out = run(tiny, prompts, tmp_path / "out", "--freeu")
    whole = files(out)
    assert sorted(whole)[:2] == ["images/FreeU/000000.png", "images/FreeU/000001.png"]
    assert len(whole) == 10
    for name in whole:
        os.utime(out / name, (1, 1))  # so that a picture's time tells whether it is made again
    (out / "images/base/000002.png").unlink()
    broken = out / "images/FreeU/000001.png"
    broken.write_bytes(broken.read_bytes()[:40])  # as after a power failure
    run(tiny, prompts, out, "--freeu")
    assert files(out) == whole
    again = {name for name in whole if (out / name).stat().st_mtime != 1}
    assert again == {
        *("images/base/000002.png", "images/base/000003.png"),
        *("images/FreeU/000000.png", "images/FreeU/000001.png"),
    }


def test_noise_depends_on_seed_and_index_alone(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    """Batches of another size round otherwise; another prompt is another picture, same noise."""
    out = run(tiny, prompts, tmp_path / "a")
    other = run(tiny, prompts, tmp_path / "b", "--batch-size=5")
    seeded = run(tiny, prompts, tmp_path / "c", "--seed=1")
    first, second, third = (drawn(o, "base").astype(int) for o in (out, other, seeded))
    assert np.abs(first - second).max() <= 1  # of 255
    assert np.abs(first - third).max() > 30
    assert len({image.tobytes() for image in first}) == 5


def test_other_settings_are_refused_or_remade(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = run(tiny, prompts, tmp_path / "out", "--freeu")
    before = files(out)
    for more, message in (
        (["--guidance=4"], "guidance 3.0 before, now 4.0"),
        (["--seed=1"], "seed 0 before, now 1"),
        ([f"--base={DEMO}"], "another base"),
        (["--samples=2"], "another prompt"),
    ):
        with pytest.raises(SystemExit, match=rf"--remake.*row 'base': {message}") as error:
            run(tiny, prompts, out, *more)
        assert "another --out" in str(error.value)
        assert files(out) == before
    run(tiny, prompts, out, "--seed=1", "--remake")
    after = files(out)
    for name in before:
        assert (after[name] == before[name]) == ("FreeU" in name), "a row that was not asked for"
    Image.new("RGB", (16, 16)).save(out / "images/base/000000.png")
    with pytest.raises(SystemExit, match="pictures that this command did not make"):
        run(tiny, prompts, out, "--seed=1")


def test_more_prompts_later_are_the_same_as_at_once(
    tiny: Path, prompts: Path, tmp_path: Path
) -> None:
    """The last batch, which was smaller, is made again; a shorter run makes its own again."""
    grown = run(tiny, prompts, tmp_path / "grown", "--limit=3")
    assert len(files(grown)) == 3
    three = files(grown)
    run(tiny, prompts, grown)
    assert files(grown) == files(run(tiny, prompts, tmp_path / "whole"))
    run(tiny, prompts, grown, "--limit=3")
    assert {name: files(grown)[name] for name in three} == three


def _evaluate(
    argv: Sequence[str], variables: Mapping[str, str], threads: int, last: int | None = None
) -> None:
    """In a process of its own; with `last`, as far as the next picture is about to get its name.

    Writes the names of its pictures to $NAMES."""
    os.environ.update(variables)
    torch.set_num_threads(threads)
    names, real = list[str](), os.replace

    def replace(source: Path, target: Path) -> None:
        if "images" in target.parts:
            if len(names) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            names.append("/".join(target.parts[-2:]))
        real(source, target)

    os.replace = replace  # type: ignore[assignment]
    main(argv)
    if "NAMES" in variables:
        Path(variables["NAMES"]).write_text(json.dumps(names))


def _started(argv: Sequence[str], last: int | None = None, **variables: Any) -> Any:
    threads = torch.get_num_threads()  # as here, where the same bits are to come out
    env = {k: str(v) for k, v in {"OMP_NUM_THREADS": threads, **variables}.items()}
    process = _server.Process(target=_evaluate, args=(argv, env, threads, last))
    process.start()
    return process


def test_a_killed_run_goes_on_to_the_same_bits(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    options = (tiny, prompts, tmp_path / "killed", "--freeu")
    process = _started(arguments(*options), last=3)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    found = [path.rpartition("/")[2] for path in files(tmp_path / "killed")]
    assert found == ["000000.png", "000001.png", "000002.png", "000003.png.part"]
    run(*options)
    whole = run(tiny, prompts, tmp_path / "whole", "--freeu")
    assert files(tmp_path / "killed") == files(whole)


def test_ctrl_c(tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "000002.png":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit) as ended:
        run(tiny, prompts, tmp_path / "out")
    assert ended.value.code == 130
    assert len(files(tmp_path / "out")) == 3


@pytest.mark.full
def test_processes_share_the_work(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    argv = arguments(tiny, prompts, tmp_path / "two", "--freeu")
    # They meet here, as torchrun has them do: a port that is free now may be taken when they look.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": store.host,
        "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": 0, "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }  # fmt: skip
    shares = [tmp_path / "0", tmp_path / "1"]
    both = [
        _started(argv, RANK=rank, LOCAL_RANK=rank, NAMES=share, **world)
        for rank, share in enumerate(shares)
    ]
    for process in both:
        process.join(600)
        assert process.exitcode == 0
    first, second = (set(json.loads(share.read_text())) for share in shares)
    assert first & second == set()
    assert {len(first), len(second)} == {6, 4}, "of three batches in two rows, two and one"
    assert files(tmp_path / "two") == files(run(tiny, prompts, tmp_path / "one", "--freeu"))
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("one", "two")]
    assert results[0] == results[1]


def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(
    tiny: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real error of the system: files may grow to 100 bytes only.

    Output is captured in memory, where it may grow."""
    out = tmp_path / "out"
    run(tiny, prompts, out, "--limit=2")
    made = files(out)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        why = os.strerror(errno.EFBIG)
        with pytest.raises(SystemExit, match=rf"000002.png could not be written: .*{why}"):
            run(tiny, prompts, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files(out) == made, "neither less nor half a file"
    run(tiny, prompts, out)
    assert len(files(out)) == 5


def test_measures_are_taken_once(
    tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tiny, prompts, tmp_path / "out", "--limit=2")
    os.utime(out / "images/base/000001.png", (1, 1))  # which no picture that is made again has
    first = (out / "results.json").read_bytes()
    calls = list[int]()
    real = measures.MEASURES["brightness"]
    counted = {**measures.MEASURES, "brightness": lambda i: calls.append(1) or real(i)}
    monkeypatch.setattr(measures, "MEASURES", counted)
    for count in (2, 0):  # of a picture of another time all are measured, and once
        calls.clear()
        run(tiny, prompts, out, "--limit=2")
        assert len(calls) == count
        assert (out / "results.json").read_bytes() == first
    (out / "images/base/000001.png").unlink()
    run(tiny, prompts, out, "--limit=2")
    assert len(calls) == 2
    assert (out / "results.json").read_bytes() == first


def test_bootstrap_interval() -> None:
    """Of many normal numbers it is the classical one, mean ± 1.96 deviations of the mean."""
    values = np.random.default_rng(3).normal(5, 2, 900)
    found = interval(np.append(values, np.nan))
    half = 1.96 * values.std() / 30
    assert found["n"] == 900
    assert found["mean"] == pytest.approx(values.mean())
    # 4000 draws: the 2.5 % quantile is known to about 4 % of the half-width
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval(np.array([np.nan]))["mean"] is None


# --- learned metrics, with random weights --------------------------------------------------------

SIDE, CONTEXT = 32, 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP in transformers' layout, with ViT-L/14's width of features."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_tokenizer(CONTEXT)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "initializer_factor": 10.0}  # fmt: skip
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**part, **text},
        vision_config={**part, "image_size": SIDE, "patch_size": 8},
        projection_dim=768,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor: Any = CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
    processor.save_pretrained(folder)
    return folder


def noise(folder: Path, count: int, side: int, seed: int = 0) -> list[Path]:
    """Coarse colours, so that pictures differ in what a network sees of them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BILINEAR).save(path)
    return paths


def ignore(_: int) -> None:
    pass


def test_clip_score_is_that_of_torchmetrics(clip: Path, tmp_path: Path) -> None:
    """Whose own way with transformers 5 and with long prompts is worked around here."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(clip)
    processor: Any = CLIPProcessor.from_pretrained(clip)

    class Old:
        """What transformers returned before version 5, which torchmetrics expects."""

        config = model.config

        def to(self, _: Any) -> Old:
            return self

        def get_image_features(self, *args: Any) -> Any:
            features = model.get_image_features(*args)
            return getattr(features, "pooler_output", features)

        def get_text_features(self, *args: Any) -> Any:
            features = model.get_text_features(*args)
            return getattr(features, "pooler_output", features)

    paths = noise(tmp_path, 3, 40)
    texts = ["a dog", "x", "b c d"]
    found = ClipScore(Clip(clip)).measure(paths, texts, ignore)["CLIP score"]
    for path, text, score in zip(paths, texts, found, strict=True):
        image = torch.from_numpy(pixels(path).copy()).permute(2, 0, 1)
        with torch.no_grad():
            expected: Any = clip_score(image, text, lambda: (Old(), processor))  # type: ignore[arg-type]
        # float32 in batches of other shapes; torchmetrics cuts negative scores off at 0
        assert max(score, 0) == pytest.approx(float(expected), abs=1e-3)
    assert np.ptp(found) > 0.1


def test_long_prompts_keep_their_end_of_text(clip: Path) -> None:
    """CLIP reads a text's feature there: without it, every long text would have the same."""
    model = Clip(clip)
    long = "a b c d e f g h i j k l m n o p q r s t"
    features = model.texts([long, f"{long} u v", f"x{long}"])
    torch.testing.assert_close(features[0], features[1])  # what is cut makes no difference
    assert (features[0] - features[2]).norm() > 0.01


def test_clip_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    part = {"width": 64, "layers": 2}
    config = {
        "embed_dim": 48,
        "vision_cfg": {**part, "image_size": SIDE, "patch_size": 8, "head_width": 32},
        "text_cfg": {**part, "context_length": 77, "vocab_size": 49408, "heads": 4},
    }
    folder = tmp_path / "clip"
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**config)  # type: ignore[arg-type]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    found = Clip(folder)
    assert found.width == 48
    paths = noise(tmp_path / "images", 2, 40)
    images = [Image.open(path).convert("RGB") for path in paths]
    prepare: Any = open_clip.image_transform(SIDE, is_train=False)
    tokens: Any = open_clip.get_tokenizer("ViT-B-32")(["a dog", "a long text"])
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(torch.stack([prepare(i) for i in images]), normalize=True)
        torch.testing.assert_close(found.images(images), expected)
        expected = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(found.texts(["a dog", "a long text"]), expected)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"expected open_clip_model.safetensors"):
        Clip(folder)  # open_clip would go on with random weights


def published() -> nn.Module:
    """The predictor as its authors publish it (MLP of improved-aesthetic-predictor)."""
    torch.manual_seed(1)
    module = nn.Module()
    module.layers = nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    return module.eval()


def test_aesthetic_predictor(clip: Path, tmp_path: Path) -> None:
    module: Any = published()
    torch.save(module.state_dict(), tmp_path / "predictor.pth")
    save_file(module.state_dict(), tmp_path / "predictor.safetensors")
    paths = noise(tmp_path / "images", 3, 40)
    images = [Image.open(path) for path in paths]
    with torch.no_grad():
        expected = module.layers(Clip(clip).images(images)).flatten().tolist()
    for name in ("predictor.pth", "predictor.safetensors"):
        found = AestheticPredictor(clip, tmp_path / name).score(images)
        # scores of order 0.1 in float32, whose sums may come in another order
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert AestheticPredictor(clip, tmp_path / "predictor.pth").score([]) == []

    wrong = module.state_dict() | {"layers.2.weight": torch.zeros(128, 1000)}
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(
        WeightsError, match=r"layers.2.weight of shape \[128, 1024\], found \[128, 1000"
    ):
        AestheticPredictor(clip, tmp_path / "wrong.pth")


class Harm:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_pickles_are_not_run(clip: Path, tmp_path: Path) -> None:
    """torch-fidelity and predictors come as .pth, whose tensors are read and nothing else."""
    harm, mark = tmp_path / "weights.pth", tmp_path / "harmed"
    with harm.open("wb") as file:
        pickle.dump({"layers.0.weight": Harm(mark)}, file)
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        AestheticPredictor(clip, harm)
    with pytest.raises(WeightsError, match=r"weights\.pth does not hold Inception's weights"):
        Fid(harm, [], torch.device("cpu"))
    torch.save({"layers.0.weight": torch.zeros(1)}, harm)
    with pytest.raises(WeightsError, match=r"weights\.pth does not hold Inception's weights"):
        Fid(harm, [], torch.device("cpu"))
    assert not mark.exists()


def test_learned_metrics_have_columns(
    tiny: Path, prompts: Path, clip: Path, tmp_path: Path
) -> None:
    """Found where the sentences say that they are looked for."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "clip-vit-large-patch14").symlink_to(clip)
    module = published()
    torch.save(module.state_dict(), tmp_path / "weights" / "sac+logos+ava1-l14-linearMSE.pth")
    out = run(tiny, prompts, tmp_path / "out", "--freeu", f"--weights={tmp_path / 'weights'}")
    result = json.loads((out / "results.json").read_text(encoding="utf-8"))
    row = result["rows"][1]
    assert list(row["values"])[:3] == ["CLIP score", "Aes score", "colourfulness"]
    images = [Image.open(path) for path in sorted((out / "images/FreeU").glob("*.png"))]
    weights = tmp_path / "weights" / "sac+logos+ava1-l14-linearMSE.pth"
    expected = np.mean(AestheticPredictor(clip, weights).score(images))
    assert row["values"]["Aes score"]["mean"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert "CLIP score ↑ | Aes score ↑" in (out / "results.md").read_text(encoding="utf-8")
    assert [note[:22] for note in result["notes"]] == ["Left out: FID needs In"]


def inception(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's own class with random weights, its features spread like trained ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return network


@pytest.mark.full
def test_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂), the last from the centred features alone:
    the sum of the singular values of X₁X₂ᵀ, over n − 1. Pictures of 299 pixels are not resized."""
    network = inception(tmp_path / "inception.pth", monkeypatch)
    paths = noise(tmp_path / "made", 6, 299, 1)
    noise(tmp_path / "real", 5, 299, 2)
    references = read_references(tmp_path / "real")
    metric = Fid(tmp_path / "inception.pth", references, torch.device("cpu"))
    found = metric.measure(paths, [""] * 6, ignore)["FID"]

    def features(files: Sequence[Path]) -> Any:
        batch = torch.stack([torch.from_numpy(pixels(p).copy()).permute(2, 0, 1) for p in files])
        return network(batch)[0].double()

    first, second = (features(files) for files in (paths, [e.file for e in references]))
    means = [part.mean(0) for part in (first, second)]
    centred = [
        (part - mean) / (len(part) - 1) ** 0.5
        for part, mean in zip((first, second), means, strict=True)
    ]
    expected = (means[0] - means[1]).square().sum()
    expected += sum(part.square().sum() for part in centred)
    expected -= 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    assert expected > 0.1
    # torchmetrics takes roots of the eigenvalues of a 2,048-square product of rank 4
    assert found == pytest.approx([float(expected)], rel=1e-2)


# --- preferences ---------------------------------------------------------------------------------


def test_choices_of_several_people_are_summed(tmp_path: Path) -> None:
    exports = []
    for number, choices in enumerate((["A"] * 30 + ["tie"] * 2, ["A"] * 10 + ["B"] * 10)):
        exports.append(tmp_path / f"{number}.json")
        content = {"format": "vmix.preference", "page": "p", "rows": ["A", "B"]}
        made = [{"index": i, "choice": choice} for i, choice in enumerate(choices)]
        exports[-1].write_text(json.dumps({**content, "choices": made}))
    text = tally(exports)
    # scipy.stats.binomtest(40, 50).proportion_ci(method="wilson"): 0.6696, 0.8876
    assert "| A | 40 | 80% [67%, 89%] |" in text
    assert "| B | 10 | 20% [11%, 33%] |" in text
    assert "| no difference | 2 |" in text
    exports[1].write_text(exports[1].read_text().replace('"p"', '"q"'))
    with pytest.raises(Exception, match=r"1\.json is of another page"):
        tally(exports)
    exports[1].write_text("{}")
    with pytest.raises(Exception, match=r"1\.json is no export of a preference page"):
        tally(exports)


def test_the_page_compares_like_with_like(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = run(tiny, prompts, tmp_path / "out", "--freeu", "--limit=2")
    main([f"--out={out}", "--preference", "base", "FreeU"])
    page = (out / "preference.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert "another-seed" not in page
    origin = origin_of(out / "images/base/000000.png")
    assert origin is not None
    assert "guidance" in origin
    assert "guidance" not in page, "who chooses must not know"
    for rows, message in (
        (["base", "gone"], "has no pictures of 'gone'; it has FreeU, base"),
        (["base", "base"], "expected two rows, found 'base' twice"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([f"--out={out}", "--preference", *rows])
    run(tiny, prompts, out, "--seed=1", "--limit=2", "--remake")
    with pytest.raises(SystemExit, match=r"000000.png: the rows differ in seed"):
        main([f"--out={out}", "--preference", "base", "FreeU"])
