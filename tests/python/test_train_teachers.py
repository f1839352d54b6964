"""Objectives without images, on a tiny random base: what teachers say, against diffusers' own
pipeline; caches of pictures; resumed runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_training as tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from vmix.train import teachers
from vmix.train.base import Base
from vmix.train.loop import Run, main
from vmix.train.options import parse_args
from vmix.train.teachers import Distillation

PROMPTS = ("a dog", "a {words} cat", "a cow")
PAIRS = {"vibrant color": "red", "sharp focus": {"positive": "sharp", "negative": "blurred"}}
SCALES = {"vibrant color": (1.5, 0.0), "sharp focus": (2.0, -1.0)}
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 5e-5}
"""Sums of f32 predictions of size 1, in another order: some 30 roundings of 6e-8, of several
predictions, and room for other processors. What teachers change is 0.01 and more."""
SAMPLED: dict[str, float] = {"rtol": 1e-4, "atol": 2e-4}
"""Samples from batches of another size: guidance 7.5 and the division by √ᾱ in the first step
magnify the rounding of a prediction some 200 times. Samples of other noise are 4 apart."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("base") / "base")


def make_lora(base: Path, path: Path, seed: int) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    torch.manual_seed(seed)
    unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    )
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    converted = convert_state_dict_to_kohya(state).items()
    save_file({k: v.contiguous() for k, v in converted}, path)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels, prompts, words and LoRAs."""
    made = tmp_path_factory.mktemp("teachers")
    (made / "labels.toml").write_text(tiny.LABELS)
    (made / "prompts.txt").write_text("\ufeff" + "\n".join(PROMPTS), encoding="utf-8")
    (made / "text-pairs.yaml").write_text(yaml.safe_dump(PAIRS))
    listing = {}
    for seed, (label, (positive, negative)) in enumerate(SCALES.items()):
        make_lora(base, made / f"{seed}.safetensors", seed)
        listing[label] = {
            "file": f"{seed}.safetensors", "positive": positive, "negative": negative,
        }  # fmt: skip
    (made / "lora.yaml").write_text(yaml.safe_dump(listing))
    return made


def arguments(base: Path, folder: Path, out: Path, objective: str, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={base}", f"--labels={folder / 'labels.toml'}",
        f"--output_dir={out}", f"--objective={objective}", f"--prompts={folder / 'prompts.txt'}",
        f"--teachers={folder / objective}.yaml", "--samples_per_prompt=2", "--sample_steps=2",
        "--learning_rate=1e-3", "--weights_dtype=f32", "--report_to=none", "--train_batch_size=4",
        "--max_train_steps=4", "--checkpointing_steps=2", *more,
    ]  # fmt: skip


def samples(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("cache/samples-*/*.safetensors"):
        found |= load_file(file)
    return found


def refused(*given: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(given)
    assert isinstance(error.value.code, str)
    assert error.value.code.startswith("vmix.train: ")
    return error.value.code


Predict = Callable[[int, str], torch.Tensor]


@pytest.mark.parametrize("objective", ["text-pairs", "lora"])
def test_what_teachers_say(base: Path, folder: Path, tmp_path: Path, objective: str) -> None:
    """The sum of what every label changes, from predictions of diffusers' own pipeline."""
    more = ("--teacher_strength=2",) if objective == "text-pairs" else ()
    run = Run(parse_args(arguments(base, folder, tmp_path / "out", objective, *more)))
    weights = torch.tensor([[0.0, 1 / 3], [1.0, 1 / 3], [0.0, 1.0], [0.4, 0.0]])
    if objective == "text-pairs":  # which rests at 1/2
        weights = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.0, 1.0], [0.4, 0.0]])
    else:  # one weight in a batch
        weights[3, 0] = 1.0
        weights[3, 1] = 1.0
    noisy, prompts = torch.randn(4, 4, 8, 8), [*PROMPTS, ""]
    timesteps = torch.tensor([1, 300, 700, 999])
    learner: Any = run.objective
    with torch.no_grad():
        found = learner._teach(run.model, noisy, timesteps, prompts, weights)

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(base)

    @torch.no_grad()
    def predict(row: int, text: str) -> torch.Tensor:
        context = pipe.encode_prompt(text, "cpu", 1, False)[0]
        return pipe.unet(noisy[row : row + 1], timesteps[row], context).sample[0]  # type: ignore[no-any-return]

    bare = ["a dog", "a cat", "a cow", ""]
    wanted = [predict(row, text) for row, text in enumerate(bare)]
    own = [prediction.clone() for prediction in wanted]
    if objective == "text-pairs":

        def told(row: int, words: str) -> str:
            return ("a dog, {}", "a {} cat", "a cow, {}", "{}")[row].format(words)

        for row, (first, second) in enumerate(weights.tolist()):
            wanted[row] += 2 * first * (predict(row, told(row, "red")) - own[row])
            sharp, blurred = (predict(row, told(row, word)) for word in ("sharp", "blurred"))
            wanted[row] += 2 * (2 * second - 1) * (sharp - blurred)
    else:
        for number, (positive, negative) in enumerate(SCALES.values()):
            pipe.load_lora_weights(folder / f"{number}.safetensors", adapter_name=str(number))
            for row, weight in enumerate(weights[:, number].tolist()):
                pipe.set_adapters([str(number)], [negative + weight * (positive - negative)])
                wanted[row] += predict(row, bare[row]) - own[row]
            pipe.unload_lora_weights()
    torch.testing.assert_close(found, torch.stack(wanted), **CLOSE)
    assert (found - torch.stack(own)).abs().amax((1, 2, 3))[1:].min() > 0.01, "it teaches something"


def test_a_lora_at_its_rest_is_not_asked(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its scale there is not 0 to the last bit, as at {2, -1}."""
    run = Run(parse_args(arguments(base, folder, tmp_path / "out", "lora")))
    learner: Any = run.objective
    monkeypatch.setattr(learner, "_taught", None)
    with torch.no_grad():
        learner._teach(
            run.model, torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), ["", ""],
            learner.rest.expand(2, -1),
        )  # fmt: skip


@pytest.mark.parametrize("objective", ["text-pairs", "lora"])
def test_resume_is_bit_exact(base: Path, folder: Path, tmp_path: Path, objective: str) -> None:
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    main(arguments(base, folder, whole, objective))
    main(arguments(base, folder, halted, objective, "--max_train_steps=2"))
    main(arguments(base, folder, halted, objective, "--resume_from_checkpoint=latest"))
    first, second = (load_file(out / "vmix.safetensors") for out in (whole, halted))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["context.rows"].any(), "it has learned something"
    card = (whole / "README.md").read_text("utf-8")
    assert "| base | base |" in card
    assert "| apply_to | " in card
    if objective == "text-pairs":
        assert "| pairs | vibrant color: red, none; sharp focus: sharp, blurred |" in card


# --- the pictures --------------------------------------------------------------------------------


def test_more_pictures_join_those_that_are_there(base: Path, folder: Path, tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    once = ("--train_batch_size=3", "--max_train_steps=1")
    main(arguments(base, folder, few, "text-pairs", *once))
    before = samples(few)
    assert len(before) == 2 * len(PROMPTS)
    again = ("--samples_per_prompt=7", *once)
    main(arguments(base, folder, many, "text-pairs", *again))
    shutil.copytree(few / "cache", tmp_path / "grown" / "cache")
    main(arguments(base, folder, tmp_path / "grown", "text-pairs", *again))
    grown, whole = samples(tmp_path / "grown"), samples(many)
    assert grown.keys() == whole.keys()
    assert len(whole) == 7 * len(PROMPTS)
    assert all(torch.equal(grown[key], before[key]) for key in before)
    for key, picture in whole.items():
        torch.testing.assert_close(grown[key], picture, **SAMPLED)


def test_what_the_base_predicts_makes_other_pictures(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number, kind in enumerate(("epsilon", "v_prediction"), 1):
        once = (f"--prediction_type={kind}", "--max_train_steps=1")
        main(arguments(base, folder, out, "text-pairs", *once))
        shutil.rmtree(out / "checkpoint-1")
        assert len(list(out.glob("cache/samples-*"))) == number


@pytest.mark.parametrize("objective", ["text-pairs", "lora"])
def test_pictures_of_a_resumed_run_are_the_bases(
    base: Path, folder: Path, tmp_path: Path, objective: str
) -> None:
    """Not those of the LoRA that it has trained."""
    out, given = tmp_path / "out", ("--rank=2", "--lora_learning_rate=0.5")
    main(arguments(base, folder, out, objective, *given, "--max_train_steps=1"))
    before = samples(out)
    shutil.rmtree(out / "cache")
    given = (*given, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    main(arguments(base, folder, out, objective, *given))
    after = samples(out)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], picture) for key, picture in before.items())


def test_pictures_are_shared_out_whatever_is_there(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes the second looks when the first has drawn."""
    run = Run(parse_args(arguments(base, folder, tmp_path / "out", "text-pairs")))
    shutil.rmtree(tmp_path / "out" / "cache")
    drawn: list[int] = []

    def draw(self: Distillation, numbers: list[int]) -> torch.Tensor:
        drawn.extend(numbers)
        return torch.zeros(len(numbers), 4, 8, 8)

    monkeypatch.setattr(Distillation, "_draw", draw)
    monkeypatch.setattr(Base, "place_encoders", lambda *_: None)
    for rank in (0, 1):
        learner: Any = run.objective
        learner.prepare(run.bar, rank, 2, lambda: None)
    assert sorted(drawn) == list(range(2 * len(PROMPTS)))


# --- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_sentences(base: Path, folder: Path, tmp_path: Path) -> None:
    def said(objective: str, *more: str) -> str:
        return refused(*arguments(base, folder, tmp_path / "out", objective, *more))

    assert "--label_dropout is for images" in said("text-pairs", "--label_dropout=0.1")
    odd = tmp_path / "odd.yaml"
    odd.write_text("vibrant color: [red, blue]")
    found = "expected words as positive and negative, found ['red', 'blue']"
    assert found in said("text-pairs", f"--teachers={odd}")
    odd.write_text("vibrant color: {file: absent.safetensors}")
    assert "no .safetensors file" in said("lora", f"--teachers={odd}")
    assert teachers.told("a dog", "red", "{words} {prompt} {x}") == "red a dog {x}"
