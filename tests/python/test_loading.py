"""Weights that a model's files lack are an error; and the versions that pyproject.toml allows."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tomllib
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_training import arguments, tiny_images, tiny_pipeline
from torch import Tensor
from vmix.clip_model import Clip
from vmix.eval.errors import EvalError
from vmix.eval.pipelines import Pipelines, applied
from vmix.eval.rows import Row
from vmix.eval.run import main as evaluate
from vmix.loading import WeightsError, check_lora, load_model
from vmix.train.errors import TrainingError
from vmix.train.loop import main as train
from vmix.train.single_file import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "comfy_nodes" / "demo" / "model"
sys.path[:0] = [str(ROOT / "examples" / "demo"), str(ROOT / "examples" / "demo" / "base")]
FIVE = int(transformers.__version__.partition(".")[0]) >= 5
START = "text_model."

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


def change(folder: Path, changed: Callable[[State], State]) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file(changed(load_file(file)), file, {"format": "pt"})


def renamed(state: State) -> State:
    """Names that no version of transformers knows."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def without(part: str) -> Callable[[State], State]:
    def changed(state: State) -> State:
        kept = {name: tensor for name, tensor in state.items() if part not in name}
        assert len(kept) < len(state)
        return kept

    return changed


# --- the demo's text encoder ---------------------------------------------------------------------


def demo_encoder(folder: Path) -> Any:
    loaded: Any = transformers.CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]
    return loaded[0].float()


def test_the_demos_text_encoder_has_names_that_old_and_new_transformers_read() -> None:
    file = DEMO / "text_encoder" / "model.safetensors"
    state = load_file(file)
    assert len(state) == 36
    assert all(name.startswith(START) for name in state)
    model = demo_encoder(file.parent)
    loaded = {name.removeprefix(START): t for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        assert torch.equal(loaded[name.removeprefix(START)], tensor.float()), name


def test_the_demos_text_encoder_computes_the_same_with_every_version() -> None:
    """The numbers are those of transformers 5.23. Another order of the same sums gives differences
    of some 1e-6 in numbers of about 1."""
    tokens = torch.tensor([[1455, 320, 525, 710, *[1456] * 28]])  # a red apple
    with torch.no_grad():
        found = demo_encoder(DEMO / "text_encoder")(tokens).last_hidden_state[0]
    expected = torch.tensor([0.106816, 0.795515, -0.896628, -0.069518])
    torch.testing.assert_close(found[3, :4], expected, atol=1e-4, rtol=0)


def test_names_without_the_models_own_are_read_or_refused(tmp_path: Path) -> None:
    """transformers 5 writes them; transformers 4 would go on with random numbers."""
    folder = Path(shutil.copytree(DEMO / "text_encoder", tmp_path / "text_encoder"))
    change(folder, lambda state: {n.removeprefix(START): t for n, t in state.items()})
    if FIVE:
        expected = demo_encoder(DEMO / "text_encoder").state_dict()
        found = load_model(transformers.CLIPTextModel, folder).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        return
    with pytest.raises(WeightsError) as refused:
        load_model(transformers.CLIPTextModel, folder)
    said = str(refused.value)
    assert "36 of the 36 weights of CLIPTextModel are missing: text_model.embeddings.pos" in said
    assert "36 in the file are unknown: embeddings.position_embedding.weight" in said


def test_readmes_snippet_loads_every_weight() -> None:
    """It is diffusers' own loading, which only logs what it misses."""
    first, second = (
        diffusers.StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
        for _ in range(2)
    )
    for part in ("text_encoder", "unet", "vae"):
        state = getattr(first, part).state_dict()
        for name, tensor in getattr(second, part).state_dict().items():
            assert torch.equal(state[name], tensor), f"{part}.{name}"


def test_the_script_that_writes_the_demo_writes_those_names(tmp_path: Path) -> None:
    build: Any = import_module("build")
    file = tmp_path / "model.safetensors"
    tensor = torch.ones(2, dtype=torch.float16)
    for names in (("final_layer_norm.bias", "a"), ("text_model.final_layer_norm.bias", "a")):
        save_file({name: tensor.clone() for name in names}, file)
        build.name_as_before(file)
        assert sorted(load_file(file)) == ["text_model.a", "text_model.final_layer_norm.bias"]


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changed", "expected"),
    [
        (
            "text_encoder", renamed,
            r"text_encoder: 36 of the 36 weights of CLIPTextModel are missing: "
            r"\S*embeddings.position_embedding.weight, \S+, \S+, \.\.\.; "
            r"36 in the file are unknown: model\.\S+, "
            r".*another version of transformers \(\S+ is installed\)",
        ),
        (
            "text_encoder", without("final_layer_norm.bias"),
            r"1 of the 36 weights of CLIPTextModel are missing: \S*final_layer_norm.bias$",
        ),
        (
            "unet", without("conv_out.bias"),
            r"unet: 1 of the \d+ weights of UNet2DConditionModel are missing: conv_out.bias$",
        ),
        ("vae", without(".conv1."), r"vae: \d+ of the \d+ weights of AutoencoderKL are missing: "),
    ],
)  # fmt: skip
def test_missing_weights_of_a_pipeline_are_named(
    copied: Path, part: str, changed: Callable[[State], State], expected: str
) -> None:
    change(copied / part, changed)
    with pytest.raises(TrainingError, match=expected) as refused:
        load_pipeline(str(copied))
    assert str(refused.value).startswith(f"{copied / part}: ")
    assert "\n" not in str(refused.value)


def test_shapes_of_another_model_are_named(copied: Path) -> None:
    def shorter(state: State) -> State:
        end = "final_layer_norm.bias"
        return {name: t[:-1].clone() if name.endswith(end) else t for name, t in state.items()}

    change(copied / "text_encoder", shorter)
    expected = r"final_layer_norm.bias: expected \[32\], found (\[31\]|another)$"
    with pytest.raises(TrainingError, match=expected):
        load_pipeline(str(copied))


def test_more_than_a_model_has_is_no_mistake(copied: Path) -> None:
    """Older models have their positions' numbers in the file."""
    more = {f"{START}embeddings.position_ids": torch.arange(77)[None]}
    change(copied / "text_encoder", lambda state: state | more)
    load_pipeline(str(copied))


def test_commands_refuse_a_base_with_missing_weights(copied: Path, tmp_path: Path) -> None:
    change(copied / "text_encoder", renamed)
    images, out = tiny_images(tmp_path / "images", 2), tmp_path / "out"
    where = re.escape(str(copied / "text_encoder"))
    with pytest.raises(SystemExit, match=rf"^vmix\.train: {where}: 36 of the 36 weights"):
        train(arguments(copied, images, out))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n")
    with pytest.raises(SystemExit, match=rf"^vmix eval: the base .*{where}: 36 of the 36 weights"):
        evaluate([f"--base={copied}", f"--prompts={prompts}", f"--out={out}", "--weights=/nowhere"])
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_the_demo_refuses_a_model_with_missing_weights(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copied / "text_encoder", renamed)
    demo: Any = import_module("demo")
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--model={copied}"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2
    assert "36 of the 36 weights of CLIPTextModel are missing" in capsys.readouterr().err
    base: Any = import_module("base")
    with pytest.raises(WeightsError, match="36 of the 36 weights of CLIPTextModel are missing"):
        base.Base.open(copied)


def test_a_clip_with_missing_weights_is_refused(tmp_path: Path) -> None:
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 1}
    config: Any = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 10}, projection_dim=8,
        vision_config={**part, "image_size": 4, "patch_size": 2},
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    change(tmp_path, without("visual_projection"))
    expected = (
        rf"{tmp_path.name}: 1 of .* weights of CLIPModel are missing: visual_projection.weight"
    )
    with pytest.raises(WeightsError, match=expected):
        Clip(tmp_path)


# --- LoRAs ---------------------------------------------------------------------------------------


def lora(file: Path, *layers: str) -> Path:
    made = {}
    for layer in layers:
        made[f"{layer}.lora_A.weight"] = torch.ones(2, 32 if "text" in layer else 64)
        made[f"{layer}.lora_B.weight"] = torch.ones(32 if "text" in layer else 64, 2)
    save_file(made, file)
    return file


def test_layers_of_a_lora_that_find_no_place_are_an_error(tiny: Path, tmp_path: Path) -> None:
    pipe = Pipelines(torch.device("cpu"), torch.float32).of(str(tiny))
    here = next(
        f"unet.{name}"
        for name, module in pipe.unet.named_modules()
        if name.endswith("attn1.to_q") and module.weight.shape == (64, 64)
    )
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    whole = lora(tmp_path / "whole.safetensors", here, text)
    with applied(pipe, Row("x", base=str(tiny), lora=whole)):
        pass
    nowhere = here.replace("transformer_blocks.0", "transformer_blocks.7")
    other = lora(tmp_path / "other.safetensors", here, text, nowhere)
    expected = r"other\.safetensors: 2 of the LoRA's 3 layers are in this base"
    with (
        pytest.raises(EvalError, match=expected),
        applied(pipe, Row("x", base=str(tiny), lora=other)),
    ):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_A.default.weight",
        "lora_unet_a_to_q.lora_down.weight", "unet.a.processor.to_q_lora.down.weight",
        "unet.a.to_q.lora.down.weight", "text_encoder.a.q_proj.lora_linear_layer.down.weight",
    ],
)  # fmt: skip
def test_layers_of_a_lora_are_counted_in_every_kind_of_file(name: str) -> None:
    module = torch.nn.Module()
    up = re.sub("(lora_)A|down", lambda found: f"{found[1] or ''}{'B' if found[1] else 'up'}", name)
    with pytest.raises(WeightsError, match=r"^0 of the LoRA's 1 layers"):
        check_lora([name, up, name.rpartition(".")[0] + ".alpha"], "x", module)
    check_lora([up], "x", module)


# --- versions ------------------------------------------------------------------------------------


def requirements() -> dict[str, str]:
    """Every requirement of the extras that has a lower bound, as `name` → version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    found = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def numbers(text: str) -> list[int]:
    parts = [int(part) for part in text.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    lines = (ROOT / "tests" / "oldest.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    oldest = {name: numbers(pin) for name, pin in pins}
    assert oldest == {name: numbers(bound) for name, bound in requirements().items()}


def test_the_versions_here_are_allowed() -> None:
    for name, bound in requirements().items():
        if name != "maturin":
            found = numbers(re.sub(r"[^\d.].*", "", version(name)))
            assert found >= numbers(bound), f"{name} {version(name)}"
