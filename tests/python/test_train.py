"""The trainer, run for a few steps on a tiny random pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import assert_values, tiny_tokenizer, trained_branch
from vmix import Adapter, init_adapter
from vmix.dataset import Example
from vmix.train.base import Base
from vmix.train.data import to_pixels, usable_images
from vmix.train.denoising import Denoising
from vmix.train.errors import TrainingError
from vmix.train.export import trained_adapter
from vmix.train.loop import main
from vmix.train.model import Denoiser, ValueBranch, add_lora
from vmix.train.objective import Chances
from vmix.train.options import check_args, parse_args
from vmix.train.order import Order, OwnBatches

LABELS = """
[[label]]
name = "vibrant color"
dimension = "color"
positive = "vibrant color"
negative = "zq"

[[label]]
name = "sharp focus"
dimension = "focus"
positive = "sharp focus"
negative = "xv"
default = 0.5
display_names = { zh = "清晰" }
"""
NAMES = ["vibrant color", "sharp focus"]
TOKENS, SIDE, COUNT = 16, 16, 6
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}


def _text(width: int, projection: bool = False) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer(TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_factor=10.0,  # by default all texts have nearly the same feature
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model, tokenizer


def _pipeline(folder: Path, prediction_type: str, xl: bool = False) -> Path:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, sample_size=SIDE,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=5.0,  # to latents with a deviation of about 1, as a trained one gives
    )  # fmt: skip
    encoder, tokenizer = _text(32)
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
    )
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    pipe: Any
    if xl:
        second, tokenizer_2 = _text(32, projection=True)
        unet = diffusers.UNet2DConditionModel(
            **UNET, **ATTENTION, cross_attention_dim=64, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        )  # fmt: skip
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts, unet=unet, text_encoder_2=second, tokenizer_2=tokenizer_2
        )
    else:
        unet = diffusers.UNet2DConditionModel(**UNET, **ATTENTION, cross_attention_dim=32)
        pipe = diffusers.StableDiffusionPipeline(
            **parts, unet=unet, safety_checker=None, feature_extractor=None, image_encoder=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pipeline(tmp_path_factory.mktemp("base"), "v_prediction")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "labels.toml").write_text(LABELS, encoding="utf-8")
    random = np.random.default_rng(0)
    lines = []
    for number in range(COUNT):
        name = f"{number}.png"
        pixels = random.integers(0, 256, (SIDE, SIDE + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        labels = {"vibrant color": number % 2}
        if number % 3 == 0:
            labels["sharp focus"] = 1
        lines.append({"file_name": name, "text": f"a dog {number % 4}", "aesthetics": labels})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(pipeline: Path, data: Path, out: Path, *more: str) -> Path:
    main(
        [
            f"--pretrained_model_name_or_path={pipeline}", f"--train_data_dir={data}",
            f"--labels={data / 'labels.toml'}", f"--output_dir={out}", "--train_batch_size=4",
            "--max_train_steps=4", "--learning_rate=1e-2", "--weights_dtype=f32", "--rank=0",
            "--report_to=none", *more,
        ]
    )  # fmt: skip
    return out


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


# --- what step 0 is, and what steps do -----------------------------------------------------------


@pytest.mark.parametrize("xl", [False, True])
def test_step_zero_is_the_base(tmp_path: Path, xl: bool) -> None:
    pipeline = _pipeline(tmp_path, "epsilon", xl)
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    context, pooled = base.text(["a dog", "a cat"])
    sample, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE]).expand(2, -1)
    conditions = base.conditions(pooled, sizes)
    plain = base.unet(sample, steps, context, added_cond_kwargs=conditions).sample

    branch = ValueBranch(init_adapter(pipeline, NAMES), base.unet)
    denoiser = Denoiser(base.unet, branch)
    weights = torch.ones(2, 2)
    mixed = torch.ones(2)
    assert torch.equal(denoiser(sample, steps, context, weights, mixed, conditions), plain)

    torch.nn.init.normal_(branch.zero.bias)
    steered = denoiser(sample, steps, context, weights, torch.tensor([1.0, 0.0]), conditions)
    assert not torch.allclose(steered[0], plain[0], atol=1e-4)
    assert torch.equal(steered[1], plain[1]), "an image without mixed values must not be touched"
    alone = denoiser(sample, steps, context, conditions=conditions)
    assert torch.equal(alone, plain), "without weights the U-Net is its own"


def test_mixing_is_the_two_branches_of_the_paper(pipeline: Path) -> None:
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    branch = ValueBranch(init_adapter(pipeline, NAMES), base.unet)
    name = branch.names[0]
    layer = base.unet.get_submodule(name)
    torch.nn.init.normal_(branch.zero.weight)
    denoiser = Denoiser(base.unet, branch)
    context, x = torch.randn(3, TOKENS, 32), torch.randn(3, 64, layer.to_q.in_features)
    values = branch(torch.randn(3, 2, 32))
    denoiser._values = values
    got = layer(x, context)

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    q, k = heads(layer.to_q(x)), heads(layer.to_k(context))
    weights = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1)
    content = heads(context @ layer.to_v.weight.T)
    both = weights @ content + weights @ heads(values[0])
    expected = layer.to_out[0](both.transpose(1, 2).flatten(2))
    # Sums of numbers of about 1 in another order; without the labels it is off by 0.1 and more.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_training_moves_the_loss_and_leaves_the_base(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    out = run(pipeline, data, tmp_path / "out", "--name=demo", "--rank=2", "--max_train_steps=3")
    adapter = Adapter.open(out / "demo.safetensors")
    assert [label.name for label in adapter.labels] == ["vibrant color", "sharp focus"]
    assert adapter.context_tokens == TOKENS
    on, off = (torch.from_dlpack(adapter.project(w)).clone() for w in ("all", "none"))
    assert not torch.allclose(on, off), "labels make no difference after training"
    assert {layer.name for layer in adapter.layers} == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    }
    lora = load_file(out / "demo-lora.safetensors")
    assert any("conv1" in name for name in lora)
    assert any("attn1_to_q" in name for name in lora)


def test_metadata(pipeline: Path, data: Path, tmp_path: Path) -> None:
    out = run(
        pipeline, data, tmp_path / "out", "--apply_to=contrast", "--license=MIT", "--title=Demo"
    )
    found = metadata(out / "vmix.safetensors")
    assert found["vmix.base"] == "other"
    assert found["vmix.apply_to"] == "contrast"
    assert found["modelspec.title"] == "Demo"
    assert found["modelspec.license"] == "MIT"
    assert "modelspec.author" not in found
    assert json.loads(found["vmix.labels"])[1] == {
        "name": "sharp focus",
        "dimension": "focus",
        "positive": ["sharp focus"],
        "negative": ["xv"],
        "default": 0.5,
        "neutral": None,
        "range": [0, 1],
        "step": 0.05,
        "display_names": {"zh": "清晰"},
    }
    names = json.loads(found["vmix.ldm_names"])
    assert (
        names["up_blocks.1.attentions.1.transformer_blocks.0.attn2"]
        == "output_blocks.3.1.transformer_blocks.0.attn2"
    )
    made = json.loads(found["vmix.made"])
    assert (made["method"], made["steps"], made["objective"]) == ("trained", 4, "denoising")
    assert str(tmp_path) not in json.dumps(found)


def test_lora_alone(pipeline: Path, data: Path, tmp_path: Path) -> None:
    import diffusers

    out = run(pipeline, data, tmp_path / "out", "--no_vmix", "--rank=2")
    assert not (out / "vmix.safetensors").exists()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    plain = pipe.unet.state_dict()["mid_block.attentions.0.proj_in.weight"].clone()
    pipe.load_lora_weights(out, weight_name="vmix-lora.safetensors")
    pipe.fuse_lora()
    module = pipe.unet.mid_block.attentions[0].proj_in
    assert not torch.equal(getattr(module, "base_layer", module).weight, plain)


@pytest.mark.parametrize("more", [["--cache_latents"], []])
def test_resume_is_bit_exact(pipeline: Path, data: Path, tmp_path: Path, more: list[str]) -> None:
    more = [*more, "--rank=2", "--gradient_accumulation_steps=2", "--lr_scheduler=cosine"]
    whole = run(pipeline, data, tmp_path / "whole", "--checkpointing_steps=3", *more)
    torch.rand(7)  # whatever else has happened in this process must not matter
    half = tmp_path / "half"
    (half / "checkpoint-3").parent.mkdir()
    (whole / "checkpoint-3").rename(half / "checkpoint-3")
    run(pipeline, data, half, "--resume_from_checkpoint=latest", *more)
    for file in ("vmix.safetensors", "vmix-lora.safetensors"):
        first, second = load_file(whole / file), load_file(half / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(pipeline, data, tmp_path / "other", "--seed=1", *more)
    seeded = load_file(other / "vmix.safetensors")
    assert any(
        not torch.equal(first, seeded[n])
        for n, first in load_file(half / "vmix.safetensors").items()
    )


@pytest.mark.parametrize("policy", ["cond", "both", "contrast"])
def test_what_a_dropped_caption_teaches(
    pipeline: Path, data: Path, tmp_path: Path, policy: str
) -> None:
    out = run(pipeline, data, tmp_path, "--text_dropout=0.9999", f"--apply_to={policy}")
    learned = load_file(out / "vmix.safetensors")["context.rows"].any()
    assert learned == (policy != "cond")


def test_cached_latents_change_nothing(pipeline: Path, data: Path, tmp_path: Path) -> None:
    first = load_file(run(pipeline, data, tmp_path / "a") / "vmix.safetensors")
    second = load_file(run(pipeline, data, tmp_path / "b", "--cache_latents") / "vmix.safetensors")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_it_learns_a_label(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """Black and white pictures under one caption: only the label can tell them apart.

    With v-prediction the target at the last timestep is the picture itself, negated."""
    for number in range(COUNT):
        Image.new("RGB", (SIDE, SIDE), ("black", "white")[number % 2]).save(data / f"{number}.png")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "text": "a dog"}) + "\n" for line in lines)
    (data / "metadata.jsonl").write_text(text)
    more = ["--max_train_steps=120", "--train_batch_size=8", "--cache_latents", "--text_dropout=0"]
    more += ["--learning_rate=3e-2"]
    run(pipeline, data, tmp_path / "out", *more)

    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    branch = trained_branch(pipeline, data, tmp_path / "out" / "checkpoint-120")
    denoiser = Denoiser(base.unet, branch)
    latents = torch.cat(
        [
            base.latents(base.moments(torch.full((1, 3, SIDE, SIDE), v)), torch.zeros(1))
            for v in (-1.0, 1.0)
        ]
    )
    context = base.text(["a dog"])[0].expand(2, -1, -1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(
        2, -1, -1, -1
    )
    t = torch.tensor([999, 999])
    noisy = base.scheduler.add_noise(latents, noise, t)
    target = -latents
    right = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    with torch.no_grad():
        losses = [
            float((denoiser(noisy, t, context, w, torch.ones(2)) - target).square().mean())
            for w in (right, right.flip(0))
        ]
    assert losses[0] < losses[1]


# --- what is written -----------------------------------------------------------------------------


def test_the_file_computes_what_the_branch_does(pipeline: Path) -> None:
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    branch = ValueBranch(init_adapter(pipeline, NAMES), base.unet)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.normal_(0, 0.5, generator=draw)
    weights = torch.cat(
        [torch.rand(5, 2, generator=draw), 6 * torch.rand(5, 2, generator=draw) - 3]
    )
    adapter = trained_adapter(branch, "float32", "cond", {"steps": 1}, {})
    assert adapter.made == {"method": "trained", "steps": 1}
    assert_values(adapter, branch, weights)
    halves = trained_adapter(branch, "bfloat16", "cond", {}, {})
    assert halves.dtype == "bfloat16"
    with pytest.raises(AssertionError):
        assert_values(halves, branch, weights)  # so that it could fail


def test_the_file_is_written_again_from_a_checkpoint(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    more = ["--use_ema", "--ema_decay=0.5"]
    run(pipeline, data, out, *more, "--checkpointing_steps=2")
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.8], [-1.5, 2.0]])
    last = Adapter.open(out / "vmix.safetensors")
    assert_values(last, trained_branch(pipeline, data, out / "checkpoint-4", "average"), weights)
    with pytest.raises(AssertionError):
        assert_values(last, trained_branch(pipeline, data, out / "checkpoint-4"), weights)

    # All steps are done: the same file, and one of another dtype.
    written = load_file(out / "vmix.safetensors")
    (out / "vmix.safetensors").unlink()
    run(pipeline, data, out, *more, "--resume_from_checkpoint=latest")
    same = load_file(out / "vmix.safetensors")
    assert same.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in same.items())
    run(pipeline, data, out, *more, "--resume_from_checkpoint=latest", "--dtype=f16")
    assert Adapter.open(out / "vmix.safetensors").dtype == "float16"

    # An earlier one, beside those that came after it.
    earlier = f"--resume_from_checkpoint={out / 'checkpoint-2'}"
    run(pipeline, data, again, *more, earlier, "--max_train_steps=2")
    found = Adapter.open(again / "vmix.safetensors")
    assert found.made["steps"] == 2
    assert_values(found, trained_branch(pipeline, data, out / "checkpoint-2", "average"), weights)
    assert (out / "checkpoint-4").is_dir()


def test_texts_and_method_are_in_the_card(pipeline: Path, data: Path, tmp_path: Path) -> None:
    several = LABELS.replace('positive = "sharp focus"', 'positive = ["in focus", "sharp"]')
    (data / "labels.toml").write_text(several, encoding="utf-8")
    card = (run(pipeline, data, tmp_path / "out") / "README.md").read_text("utf-8")
    assert "| sharp focus | focus | in focus / sharp | 0.5 |" in card
    assert "| method | trained |" in card


# --- what training starts from -------------------------------------------------------------------


def test_f_is_drawn_by_the_seed(pipeline: Path) -> None:
    """As nn.Linear draws it: uniform, up to 1/√N; whatever torch's own generator has drawn."""
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    untrained = init_adapter(pipeline, NAMES)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, other = (ValueBranch(untrained, base.unet, seed).linear.weight for seed in (3, 4))
    torch.set_rng_state(before)
    torch.rand(3)
    assert torch.equal(ValueBranch(untrained, base.unet, 3).linear.weight, first)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 2**-0.5
    assert first.abs().max() > 0.6  # of 32 numbers


def test_value_matrices_start_as_the_base_below_a_lora(pipeline: Path) -> None:
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    plain = base.unet.get_submodule(f"{name}.to_v").weight.clone()
    add_lora(base.unet, 2)
    branch = ValueBranch(init_adapter(pipeline, NAMES), base.unet)
    assert torch.equal(branch.to_v_aes[branch.names.index(name)].weight, plain)


def test_an_init_file_is_the_list_that_it_was_made_of(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    start = tmp_path / "init.safetensors"
    init_adapter(pipeline, data / "labels.toml").save(start)
    first = load_file(run(pipeline, data, tmp_path / "a") / "vmix.safetensors")
    out = run(pipeline, data, tmp_path / "b", f"--labels={start}")
    second = load_file(out / "vmix.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    with pytest.raises(SystemExit, match="expected an init file, found an adapter"):
        run(pipeline, data, tmp_path / "c", f"--labels={out / 'vmix.safetensors'}")
    xl = _pipeline(tmp_path / "xl", "epsilon", xl=True)
    with pytest.raises(SystemExit, match="another base: expected 16 tokens of width 64, 4 layers"):
        run(xl, data, tmp_path / "c", f"--labels={start}")


# --- names and data ------------------------------------------------------------------------------


def test_what_training_starts_from(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """AesEmb is the pipeline's own context at the first end of text; W_Va starts as its W_V."""
    out = run(pipeline, data, tmp_path, "--learning_rate=1e-9", "--adam_weight_decay=0")
    tensors = load_file(out / "vmix.safetensors")
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    for row, text in (
        (tensors["aes_emb"][0, 0], "vibrant color"),
        (tensors["aes_emb"][1, 1], "xv"),
    ):
        ids = base.pipe.tokenizer(text, padding="max_length", max_length=TOKENS).input_ids
        end = ids.index(base.pipe.tokenizer.eos_token_id)
        assert ids.count(ids[end]) > 1 or end == TOKENS - 1
        # Another order of sums in float32, over two blocks, on numbers of about 1; those of another
        # text are 1 apart.
        torch.testing.assert_close(row, base.text([text])[0][0, end], rtol=1e-5, atol=5e-5)
    trained = trained_branch(pipeline, data, out / "checkpoint-4")
    assert len(trained.names) == 4
    for name, to_v in zip(trained.names, trained.to_v_aes, strict=True):
        own = base.unet.get_submodule(f"{name}.to_v").weight
        torch.testing.assert_close(to_v.weight, own, rtol=0, atol=1e-8)  # four steps of 1e-9


def test_missing_labels_are_negative(data: Path) -> None:
    weights = [image.weights for image in usable_images(data, NAMES)]
    assert weights == [(0, 1), (1, 0), (0, 0), (1, 1), (0, 0), (1, 0)]
    weights = [image.weights for image in usable_images(data, NAMES, missing="unknown")]
    assert weights == [(0, 1), (1, 0.5), (0, 0.5), (1, 1), (0, 0.5), (1, 0.5)]


def test_everything_wrong_is_listed(data: Path) -> None:
    rows = [
        {"file_name": "0.png", "text": "x", "aesthetics": {"vivid": 1}},
        {"file_name": "gone.png", "text": "x", "aesthetics": {"vibrant color": 1}},
        {"file_name": "1.png", "text": "x"},
        {"file_name": "2.png", "aesthetics": {}},
        {"file_name": "3.png", "text": "x", "aesthetics": {"sharp focus": 2}},
        {"file_name": "labels.toml", "text": "x", "aesthetics": {"vibrant color": 1}},
    ]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with pytest.raises(TrainingError) as error:
        usable_images(data, NAMES)
    for part in (
        "0.png: unknown label 'vivid'",
        "gone.png: no such image",
        "1.png: no aesthetics",
        "metadata.jsonl, line 4: no 'text'",
        "metadata.jsonl, line 5: label 'sharp focus': expected 1 or positive",
        "labels.toml: not an image",
        "metadata.jsonl, line 7: Expecting property name",
        "no usable image",
    ):
        assert part in str(error.value)


def test_what_a_whole_set_lacks_is_one_sentence(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.aes.json").write_text('{"sharp focus": 1}')
    said: list[str] = []
    with pytest.raises(TrainingError) as error:
        usable_images(tmp_path, NAMES, say=said.append)
    expected = "5 images: no caption; expected a .txt beside each, or metadata.jsonl with `text`"
    assert str(error.value).splitlines()[1].strip() == expected
    assert said == [f"{tmp_path}: 5 images, 0 usable"], "nothing is said twice"
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("a dog")
        (tmp_path / f"{number}.aes.json").unlink()
    with pytest.raises(TrainingError, match="5 images: no aesthetics; `vmix label` proposes some"):
        usable_images(tmp_path, NAMES, say=said.append)


def test_a_label_that_is_the_same_everywhere(data: Path) -> None:
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["aesthetics"] = {"vibrant color": line["aesthetics"]["vibrant color"]}
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for skip in (False, True):
        with pytest.raises(TrainingError, match="'sharp focus' is the same in every image"):
            usable_images(data, NAMES, skip=skip)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "sharp focus"', 'name = "all"', "`all`, which is reserved"),
        ("default", "defualt", "unknown field `defualt`"),
        ("default = 0.5", 'default = "0.5"', "line 13"),
        (
            "default = 0.5",
            "default = 1e300",
            "label `sharp focus` with default inf",
        ),
    ],
)
def test_labels_are_checked_before_anything_is_loaded(
    data: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    (data / "labels.toml").write_text(LABELS.replace(old, new), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"(?s)labels.toml: .*{message}"):
        run(tmp_path / "no base", data, tmp_path / "out")


def test_labels_with_equal_texts_are_warned_of(pipeline: Path, data: Path, tmp_path: Path) -> None:
    (data / "labels.toml").write_text(LABELS.replace('"xv"', '"zq"'), encoding="utf-8")
    with pytest.warns(UserWarning, match="`sharp focus`: its negative `zq` is that of `vibrant co"):
        run(pipeline, data, tmp_path, "--max_train_steps=1")


def test_checkpoints_are_checked(pipeline: Path, data: Path, tmp_path: Path) -> None:
    out = run(pipeline, data, tmp_path / "out", "--rank=2", "--checkpointing_steps=2")
    (out / "checkpoint-3.part").mkdir()  # as an interruption leaves it
    run(pipeline, data, out, "--rank=2", "--resume_from_checkpoint=latest")
    for more, message in (
        (["--rank=4", "--resume_from_checkpoint=latest"], "made with other settings"),
        (["--rank=2", f"--resume_from_checkpoint={tmp_path}"], "checkpoint-<step>"),
        (["--checkpointing_steps=0"], "--checkpointing_steps 0 is not positive"),
        (["--rank=-1"], "--rank -1 is negative"),
        (["--resolution=0"], "--resolution 0 is not positive"),
        (["--name=a/b"], "--name a/b is not a file's name"),
        ([f"--output_dir={data / '0.png'}"], "is not a folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(pipeline, data, out, *more)


def test_a_base_whose_config_asks_for_half_precision(data: Path, tmp_path: Path) -> None:
    pipeline = _pipeline(tmp_path / "base", "epsilon")
    config = pipeline / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    assert (run(pipeline, data, tmp_path / "out") / "vmix.safetensors").exists()


def test_timesteps_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the last 1/count of the range may round up to its end."""
    almost_one = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda count, **_: almost_one.expand(count))
    assert Chances.of(range(8), 0, (4, 8, 8), 2, 8, 999).timesteps.max() == 999


def test_what_chance_gives_depends_on_the_number_alone() -> None:
    whole = Chances.of(range(10, 16), 0, (4, 8, 8), 2, 6, 999)
    part = Chances.of([15, 12], 0, (4, 8, 8), 2, 6, 999)
    for name in ("drop", "label_drop", "timesteps", "latent_noise", "noise"):
        assert torch.equal(getattr(whole, name)[[5, 2]], getattr(part, name)), name
    # one timestep from each sixth of the range
    assert sorted((whole.timesteps * 6 // 1000).tolist()) == list(range(6))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_who_knows_the_picture_has_no_loss(tmp_path: Path, data: Path, prediction: str) -> None:
    """The target, from the picture and what the model is shown, by the definitions of ε and v."""
    base = Base(str(_pipeline(tmp_path, prediction)), torch.device("cpu"), torch.float32)
    args = parse_args(
        [
            "--pretrained_model_name_or_path=x", "--output_dir=y", "--train_batch_size=6",
            "--text_dropout=0",
        ]
    )  # fmt: skip
    objective = Denoising(base, usable_images(data, NAMES), args, 1)
    mean = torch.randn(6, 4, 8, 8)
    picture = mean * base.pipe.vae.config.scaling_factor

    def model(noisy: torch.Tensor, timesteps: torch.Tensor, *_: Any) -> torch.Tensor:
        signal = base.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        noise = (noisy - signal.sqrt() * picture) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * picture
        return noise if prediction == "epsilon" else velocity

    batch = {
        "number": range(6),
        "index": list(range(6)),
        "moments": torch.cat([mean, torch.full_like(mean, -60)], dim=1),
        "context": torch.zeros(6, TOKENS, 32),
        "pooled": torch.zeros(6, 0),
        "sizes": torch.zeros(6, 6),
    }
    loss = objective.loss(cast(Any, model), batch)
    assert loss < 1e-6  # rounding, which low noise amplifies, and a picture's least deviation


def test_arguments_are_checked(pipeline: Path, data: Path, tmp_path: Path) -> None:
    args = ["--pretrained_model_name_or_path=x", f"--train_data_dir={data}", "--output_dir=y"]
    with pytest.raises(TrainingError, match="nothing to train"):
        check_args(parse_args([*args, "--no_vmix", "--rank=0"]))
    with pytest.raises(SystemExit, match="--labels is missing"):
        main(args)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    args += [f"--labels={data / 'labels.toml'}", f"--pretrained_model_name_or_path={tmp_path}"]
    with pytest.raises(SystemExit, match="expected StableDiffusionPipeline"):
        main(args)
    defaults = parse_args(args)
    assert (defaults.train_batch_size, defaults.max_train_steps) == (256, 50_000)
    assert defaults.rank == 64


def test_batches_see_every_image_once_an_epoch_and_resume_anywhere() -> None:
    def take(count: int, batch: int, start: int = 0, rank: int = 0, world: int = 1) -> list[Any]:
        batches = iter(OwnBatches(Order([0] * 6, batch, 0), start, rank, world))
        return [next(batches) for _ in range(count)]

    stream = [i for batch in take(6, 4) for _, i in batch]
    for start in range(0, 24, 6):
        assert sorted(stream[start : start + 6]) == list(range(6))
    assert stream[:6] != stream[6:12], "epochs are shuffled anew"
    assert take(4, 4, 2) == take(6, 4)[2:]
    first, second = take(3, 4, 0, 0, 2), take(3, 4, 0, 1, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == take(3, 4)
    assert [p for b in take(6, 2) for p in b] == [p for b in take(3, 4) for p in b], "accumulation"


def test_pixels_are_what_a_viewer_shows(tmp_path: Path) -> None:
    turned = Image.new("RGB", (SIDE, SIDE), "white")
    turned.paste("black", (0, 0, SIDE, SIDE // 2))  # the upper half, stored on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    pixels, clear = (
        to_pixels(Example(name, "x", {}, tmp_path / name), (SIDE, SIDE))[0]
        for name in ("turned.png", "clear.png")
    )
    assert (pixels[:, :, SIDE // 2 :] == -1).all()  # EXIF 6: a quarter turn to the right
    assert (pixels[:, :, : SIDE // 2] == 1).all()
    assert (clear == 1).all(), "transparent is white"


def test_grey_in_sixteen_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).round().reshape(SIDE, SIDE)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "floats.tiff")
    pixels = to_pixels(Example("grey.png", "x", {}, tmp_path / "grey.png"), (SIDE, SIDE))[0]
    # Half of a step of 1/255, in -1..1.
    expected = torch.from_numpy(ramp / 65535 * 2 - 1).float().expand(3, -1, -1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.001 / 255)
    for name in ("grey.png", "floats.tiff"):
        (tmp_path / name).with_suffix(".txt").write_text("x")
    with pytest.raises(TrainingError, match=r"floats.tiff: pixels are floating-point numbers"):
        usable_images(tmp_path, [], say=lambda _: None)


def test_sizes_are_read_without_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lines = []
    for name in ("turned.png", "turned.jpg", "turned.tiff"):
        Image.new("RGB", (SIDE, 2 * SIDE)).save(tmp_path / name, exif=exif)
        lines.append(json.dumps({"file_name": name, "text": "x"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("turned.png", "turned.jpg"):  # pixels that cannot be read
        data = (tmp_path / name).read_bytes()
        start = data.index(b"IDAT" if name.endswith("png") else b"\xff\xda") + 4
        (tmp_path / name).write_bytes(data[:start] + b"\xff" * len(data[start:]))
    sizes = [image.size for image in usable_images(tmp_path, [], say=lambda _: None)]
    assert sizes == [(SIDE, 2 * SIDE)] * 3, "as viewers show them"


def test_captions_may_hold_any_character(data: Path) -> None:
    line = json.dumps(
        {"file_name": "6.png", "text": "one\u2028two", "aesthetics": {}}, ensure_ascii=False
    )
    Image.new("RGB", (SIDE, SIDE)).save(data / "6.png")
    with (data / "metadata.jsonl").open("a", encoding="utf-8") as listing:
        listing.write(line.replace("{}", '{"sharp focus": 1}') + "\n")
        listing.write(line.replace('"one\u2028two"', "null").replace("{}", '{"sharp focus": 1}'))
    with pytest.raises(TrainingError) as error:
        usable_images(data, NAMES)
    assert str(error.value).split(":\n")[1].splitlines()[0].strip() == (
        f"metadata.jsonl, line {COUNT + 2}: file_name and text: expected strings"
    )


def test_pixels_are_cropped_at_the_centre(data: Path) -> None:
    image = usable_images(data, NAMES)[3]
    pixels, sizes = to_pixels(image.example, (SIDE, SIDE))
    with Image.open(image.example.file) as file:
        expected = np.asarray(file)[:, 2:-2].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert sizes.tolist() == [SIDE, SIDE + 4, 0, 2, SIDE, SIDE]
