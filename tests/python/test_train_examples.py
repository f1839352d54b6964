"""examples/train: every file is read by what it is for, and the runs without images are run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny_training import launched, tiny_pipeline, together
from vmix import Adapter, read_label_list
from vmix.train.options import check_args, parse_args, read_lines, read_yaml
from vmix.train.single_file import CONFIGS

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "train"
ACCELERATE = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
TRAINING = {"sd15", "sdxl", "text_pairs", "lora"}


def test_all_configurations_are_tested() -> None:
    others = {"pairs", "teachers"}
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == TRAINING | others | ACCELERATE.keys()


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_configuration(name: str) -> None:
    """Unknown keys are errors of its own."""
    config: Any = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type == DistributedType[ACCELERATE[name]]
    assert config.mixed_precision == "bf16"
    env = launched(EXAMPLES / f"{name}.yaml")
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "deepspeed_zero2":
        assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    if name == "fsdp":
        assert env["FSDP_VERSION"] == "2"
        assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_fsdp_shares_out_nearly_all_of_the_unet_by_block(base: str) -> None:
    names = launched(EXAMPLES / "fsdp.yaml")["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(CONFIGS / base / "unet")
        )
    blocks = [module for module in unet.modules() if type(module).__name__ in names]
    assert {type(module).__name__ for module in blocks} == set(names)
    shared = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    assert shared > 0.9 * sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize(("name", "rate"), [("sd15", 1e-4), ("sdxl", 1e-5)])
def test_the_recipe_is_the_papers(name: str, rate: float) -> None:
    args = parse_args(["--config", str(EXAMPLES / f"{name}.yaml")])
    check_args(args)
    assert args.train_batch_size * args.gradient_accumulation_steps == 256
    assert (args.max_train_steps, args.learning_rate) == (50_000, rate)
    assert (args.rank, args.text_dropout, args.lr_scheduler) == (64, 0.1, "constant")
    assert (args.mixed_precision, args.gradient_checkpointing, args.apply_to) == (
        "bf16",
        True,
        "cond",
    )
    assert len(read_label_list(EXAMPLES / args.labels)) == 4


@pytest.mark.parametrize("name", ["text_pairs", "lora"])
def test_without_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the files are, with a tiny base and LoRAs in place of the published ones."""
    folder = shutil.copytree(EXAMPLES, tmp_path / "train")
    pipeline = tiny_pipeline(tmp_path / "base")
    monkeypatch.chdir(folder)
    args = parse_args(["--config", f"{name}.yaml"])
    check_args(args)
    labels = {label.name for label in read_label_list(args.labels)}
    problem, teachers = read_yaml(args.teachers)
    assert not problem
    assert teachers.keys() == labels
    assert len(read_lines(args.prompts, "--prompts")) > 10
    for entry in teachers.values() if name == "lora" else ():
        rank, layer = 2, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
        down, up = torch.randn(rank, 64), torch.randn(64, rank)
        save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, entry["file"])
    argv = [
        f"--config={name}.yaml", f"--pretrained_model_name_or_path={pipeline}",
        "--mixed_precision=no", "--train_batch_size=2", "--max_train_steps=1", "--sample_steps=1",
        "--samples_per_prompt=1", "--validation_inference_steps=1", "--report_to=none",
    ]  # fmt: skip
    (ended,) = together(tmp_path / "said", argv, 1)
    assert ended.status == 0, ended.err
    assert {
        label.name for label in Adapter.open(args.output_dir / "vmix.safetensors").labels
    } == labels
