"""A tiny random pipeline, images for it, and processes that train on them.

Processes are forked from a server that has imported the trainer, so that each costs its steps only.
They are on the CPU and speak gloo.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import multiprocessing.forkserver
import os
import string
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore

CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
"""For processes; accelerate would take a GPU where there is one."""
os.environ["ACCELERATE_USE_CPU"] = "true"  # here too: it keeps what a process first asked for
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
TOKENS, SIDE = 77, 16
LABELS = """
[[label]]
name = "vibrant color"
positive = "vibrant color"
negative = "zq"

[[label]]
name = "sharp focus"
positive = "sharp focus"
negative = "xv"
"""
PRELOADED = [
    "vmix.train.loop", "vmix.train.teachers", "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.training_utils", "torch.distributed.fsdp", "torch.distributed.tensor",
]  # fmt: skip
_server: Any = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def tiny_tokenizer(length: int = TOKENS) -> Any:
    """CLIP's, of single letters; from files, which every version of transformers takes."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> Path:
    multiprocessing.forkserver.ensure_running()  # which imports meanwhile
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=32,
        initializer_factor=10.0,  # by default all texts have nearly the same feature
        bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, sample_size=SIDE,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            scaling_factor=5.0,  # to latents with a deviation of about 1, as a trained one gives
        ),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4, cross_attention_dim=32,
        ),
        scheduler=diffusers.DDIMScheduler(
            prediction_type=prediction_type, steps_offset=1, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def tiny_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    (folder / "labels.toml").write_text(LABELS, encoding="utf-8")
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        labels = {"vibrant color": number % 2, "sharp focus": int(number % 3 == 0)}
        line = {"file_name": f"{number}.jpg", "text": f"a dog {number % 4}", "aesthetics": labels}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def arguments(pipeline: Path, data: Path, out: Path, *more: str) -> list[str]:
    images = [] if any("--objective" in flag for flag in more) else [f"--train_data_dir={data}"]
    return [
        f"--pretrained_model_name_or_path={pipeline}", *images,
        f"--labels={data / 'labels.toml'}", f"--output_dir={out}", "--max_train_steps=4",
        "--learning_rate=1e-3", "--weights_dtype=f32", "--rank=2", "--report_to=none", *more,
    ]  # fmt: skip


def trained_branch(pipeline: Path, data: Path, checkpoint: Path, file: str = "trained") -> Any:
    """The value branch with what a checkpoint holds, and the labels of the data."""
    import diffusers
    from vmix import init_adapter
    from vmix.train.model import ValueBranch

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    branch = ValueBranch(init_adapter(pipeline, data / "labels.toml"), unet)
    state = load_file(checkpoint / f"{file}.safetensors").items()
    own = {
        name.removeprefix("branch."): tensor for name, tensor in state if name.startswith("branch.")
    }
    assert own.keys() == dict(branch.named_parameters()).keys()
    branch.load_state_dict(own, strict=False)  # AesEmb is no parameter
    return branch


def assert_values(adapter: Any, branch: Any, weights: torch.Tensor) -> None:
    """V_a of the file are those of the branch in f64, at every row of weights [B, N].

    Rows, coefficients and sums of the file are f32: some ten roundings of 6e-8 of the largest
    value, and twice that where features cancel each other.
    """
    from vmix.train.model import label_features

    exact = copy.deepcopy(branch).double()
    with torch.no_grad():
        expected = exact(label_features(exact.aes_emb, weights.double()))
    names = [label.name for label in adapter.labels]
    assert len(adapter.layers) == len(branch.names) == len(expected)
    for number, row in enumerate(weights.tolist()):
        found = adapter.values(dict(zip(names, row, strict=True)))
        for name, values in zip(branch.names, expected, strict=True):
            largest = float(values[number].abs().max())
            assert largest > 1e-3, "nothing to compare"
            torch.testing.assert_close(
                torch.from_dlpack(found[name]).double(), values[number], rtol=0, atol=2e-6 * largest
            )


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, and what it said."""

    status: int
    out: str
    err: str


def together(
    folder: Path,
    argv: list[str],
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    before: Callable[[int], object] | None = None,
    timeout: float = 600,
) -> list[Ended]:
    """Run `vmix.train` in processes that know of each other; one that hangs is an error.

    `before(rank)` is called in each of them first; what they say is kept in the folder.
    """
    # They meet here, as torchrun has them do: a port that is free now may be taken when they look.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    for rank in range(processes):
        variables: dict[str, Any] = dict(CPU)
        if processes > 1:
            variables |= {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": store.host, "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0,
                "GLOO_SOCKET_IFNAME": LOOPBACK,
            }  # fmt: skip
        given = {**{key: str(value) for key, value in variables.items()}, **(env or {})}
        process = _server.Process(target=_train, args=(argv, given, folder / str(rank), before))
        process.start()
        running.append(process)
    until = time.monotonic() + timeout
    try:
        for process in running:
            process.join(max(0, until - time.monotonic()))
        hung = [rank for rank, process in enumerate(running) if process.exitcode is None]
        said = [(folder / f"{rank}.err").read_text("utf-8") for rank in range(processes)]
        assert not hung, f"processes {hung} hang after {timeout} s: {said}"
    finally:
        for process in running:
            process.kill()
    return [
        Ended(
            process.exitcode, *((folder / f"{rank}.{s}").read_text("utf-8") for s in ("out", "err"))
        )
        for rank, process in enumerate(running)
    ]


def _train(
    argv: list[str], env: Mapping[str, str], said: Path, before: Callable[[int], object] | None
) -> None:
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(said.with_suffix(f".{stream}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
    os.environ.update(env)
    torch.set_num_threads(1)
    from vmix.train.loop import main

    if before is not None:
        before(int(env.get("RANK", 0)))
    main(argv)


def launched(config: Path, *more: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` sets, here for `as_on_gpus`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    given = ["--config_file", str(config), *more, "-m", "vmix.train"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = prepare_deepspeed_cmd_env(args)[1]
    else:
        env = prepare_multi_gpu_env(args)
    kept = {k: v for k, v in env.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    return {**kept, "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}


def as_on_gpus(_rank: int) -> None:
    """accelerate knows FSDP and DeepSpeed on GPUs only: it takes the CPUs for such."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
