"""The command line of the trainer, and the YAML file that can stand for it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vmix.train.errors import TrainingError, complain
from vmix.train.single_file import is_of_hub

UNCONDITIONAL = ("cond", "both", "contrast")
OBJECTIVES = ("denoising", "text-pairs", "lora")
DTYPES = ("f32", "f16", "bf16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without a page of usage, which hides it."""
        self.exit(2, f"{self.prog}: {message}; --help lists all options\n")


class _Help(argparse.HelpFormatter):
    """With the defaults, where an option has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, True, argparse.SUPPRESS) or "unless given" in text:
            return text
        default = action.default
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} Default: {shown.replace('%', '%%')}.".strip()


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        "vmix.train",
        allow_abbrev=False,
        formatter_class=_Help,
        description="Train a VMix adapter. docs/training.md describes data and options.",
        epilog="Flags are named as in diffusers' training scripts. --config takes them from a "
        "YAML file, `learning_rate: 1e-4`; the command line wins.",
    )
    made.add_argument("--config", type=Path, help="YAML file with any of the options below.")
    _base(made.add_argument_group("base and files"))
    _data(made.add_argument_group("images"))
    _without_images(made.add_argument_group("objectives without images"))
    _trained(made.add_argument_group("what is trained"))
    _optimisation(made.add_argument_group("optimisation"))
    _running(made.add_argument_group("running"))
    return made


def _base(group: Any) -> None:
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="The frozen base, SD1.5 or SDXL: a .safetensors file as ComfyUI loads, a diffusers "
        "folder, or a repository of the hub.",
    )
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="What the base predicts, "
        "where neither its configuration nor the file says.")  # fmt: skip
    add("--labels", type=Path, help="TOML file with one [[label]] table per label, or what "
        "`vmix init` made of one for this base.")  # fmt: skip
    add("--output_dir", type=Path, required=True, help="Folder for all that is written.")
    add("--name", default="vmix", help="The adapter is written to <output_dir>/<name>.safetensors.")
    for key in ("title", "author", "license", "description"):
        add(f"--{key}", help=f"modelspec.{key} of the adapter.")
    add("--dtype", choices=DTYPES, default="f32", help="Of the adapter's rows.")
    add("--weights_dtype", choices=DTYPES, default="f16", help="Of the presets, of the LoRA and "
        "of the U-Net of --full_finetune.")  # fmt: skip
    add("--push_to_hub", action="store_true", help="Upload what was written, when done.")
    add("--hub_model_id", help="Repository to push to; the output folder's name unless given.")


def _data(group: Any) -> None:
    add, switch = group.add_argument, partial(group.add_argument, action="store_true")
    add("--train_data_dir", type=Path, help="Images with metadata.jsonl or side-cars, or .tar "
        "shards of webdataset (a folder, a file or a pattern).")  # fmt: skip
    add("--missing_labels", choices=("negative", "unknown"), default="negative",
        help="What a label is that an image does not speak of; the paper: negative.")  # fmt: skip
    switch("--skip_unusable", help="Train on the rest where images cannot be used.")
    switch("--verify_images", help="Decode every image before the first step, not only its header.")
    add("--resolution", type=int, help="The U-Net's own unless given.")
    switch("--aspect_ratio_buckets", help="Keep each image's shape, at the area of the resolution, "
           "instead of a square crop.")  # fmt: skip
    add("--bucket_step", type=int, default=64, help="Sides of buckets are multiples of this.")
    add("--shuffle_window", type=int, default=4096,
        help="Images of shards that are shuffled among each other.")  # fmt: skip
    switch("--cache_latents", help="Encode images and captions once, on disk; the autoencoder and "
           "the text encoders then stay off the device.")  # fmt: skip
    add("--cache_dir", type=Path, help="Where; <output_dir>/cache unless given.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read images.")


def _without_images(group: Any) -> None:
    add = group.add_argument
    add("--objective", choices=OBJECTIVES, default="denoising", help="denoising: from images, as "
        "the paper. text-pairs: the base with the labels' words in the prompt is the teacher. "
        "lora: the base with one LoRA per label is.")  # fmt: skip
    add("--prompts", type=Path, help="Text file with a prompt on each line. {words} in one "
        "is where text pairs' words go; the bare prompt is without it.")  # fmt: skip
    add("--samples_per_prompt", type=int, default=4, help="Pictures of its own for each prompt.")
    add("--sample_guidance", type=float, default=7.5, help="Guidance that they are made with.")
    add("--sample_steps", type=int, default=25, help="Steps that they are made in.")
    add("--teachers", type=Path, help="YAML file: for each label {positive, negative} words "
        "(text-pairs), or {file, positive, negative} with two scales (lora).")  # fmt: skip
    add("--teacher_strength", type=float, default=1.0,
        help="How far text pairs are pushed apart: η of Concept Sliders.")  # fmt: skip
    add("--teacher_template", default="{prompt}, {words}",
        help="How words join a prompt that does not say where.")  # fmt: skip


def _trained(group: Any) -> None:
    add, switch = group.add_argument, partial(group.add_argument, action="store_true")
    add("--rank", type=int, help="Of the LoRA beside the adapter, 0 for none; 64 with images, else "
        "0, unless given.")  # fmt: skip
    add("--no_vmix", dest="train_vmix", action="store_false", help="Train the LoRA only.")
    switch("--full_finetune", help="Train the U-Net itself and nothing else, to compare with; "
           "writes a diffusers folder.")  # fmt: skip
    add("--apply_to", choices=UNCONDITIONAL, help="What the unconditional pass of guidance will "
        "see; cond, and both for LoRAs, which act in both, unless given. With cond, a dropped "
        "caption drops the values; with both and contrast its image keeps its labels.")  # fmt: skip
    add("--text_dropout", type=float, default=0.1, help="Share of captions dropped for guidance.")
    add("--label_dropout", type=float, default=0.0, help="Share of labels made unknown.")
    switch("--use_ema", help="Write a running average of the weights.")
    add("--ema_decay", type=float, default=0.9999, help="Of the average, at most.")


def _optimisation(group: Any) -> None:
    add, switch = group.add_argument, partial(group.add_argument, action="store_true")
    add("--train_batch_size", type=int, default=256, help="Images per process and step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches in a step.")
    switch("--gradient_checkpointing", help="Less memory for about a third more time.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's unless given.")
    add("--max_train_steps", type=int, default=50_000, help="Steps in all.")
    add("--learning_rate", type=float, help="1e-4, for SDXL 1e-5, unless given.")
    add("--lora_learning_rate", type=float, help="The learning rate unless given.")
    add("--lr_scheduler", default="constant", help="constant, constant_with_warmup, linear, "
        "cosine, cosine_with_restarts, polynomial.")  # fmt: skip
    add("--lr_warmup_steps", type=int, default=0, help="Steps until the rate is whole.")
    switch("--use_8bit_adam", help="AdamW of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="0: gradients are not clipped.")
    add("--snr_gamma", type=float, help="Min-SNR weighting of the loss; 5 is usual.")
    add("--seed", type=int, default=0, help="Of everything that chance gives.")


def _running(group: Any) -> None:
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Older ones are deleted.")
    add("--resume_from_checkpoint", help='A checkpoint folder, or "latest".')
    add("--report_to", default="tensorboard", help="accelerate tracker: tensorboard, wandb, none.")
    add("--validation_prompt", action="append", help="May be repeated.")
    add("--validation_prompts", type=Path, help="Text file with a prompt on each line.")
    add("--validation_steps", type=int, default=500, help="Steps between pictures.")
    add("--validation_scales", type=_numbers, default=[1.0], help="λ of them, as 0.5,1,1.5.")
    add("--validation_guidance", type=float, default=7.5, help="Guidance of these pictures.")
    add("--validation_inference_steps", type=int, default=25, help="Steps that they take.")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    given = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config: Path | None = first.parse_known_args(given)[0].config
    made = parser()
    args = made.parse_args([*(_of_config(config, made, given) if config else ()), *given])
    if args.rank is None:
        args.rank = 64 if args.objective == "denoising" and not args.full_finetune else 0
    args.apply_to = args.apply_to or ("both" if args.objective == "lora" else "cond")
    if args.full_finetune:
        args.train_vmix = False
    args.cache_latents |= args.cache_dir is not None
    args.cache_dir = args.cache_dir or args.output_dir / "cache"
    return args


def _of_config(path: Path, made: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """A YAML file as arguments, without those that the command line gives too."""
    yaml_error, settings = read_yaml(path)
    if yaml_error or not isinstance(settings, dict):
        raise TrainingError(f"--config {path}: {yaml_error or 'expected `option: value` lines'}")
    actions = {
        option.removeprefix("--"): action
        for action in made._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--config", "--help")
    }
    flags = {argument.partition("=")[0] for argument in given}
    problems, arguments = [], []
    for key, value in settings.items():
        action = actions.get(str(key))
        if action is None:
            near = difflib.get_close_matches(str(key), actions, 1)
            problems.append(
                f"there is no option {key}" + (f"; did you mean {near[0]}?" if near else "")
            )
        elif isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
            if not isinstance(value, bool):
                problems.append(f"{key}: expected true or false, found {value!r}")
            elif value:
                arguments.append(f"--{key}")
        elif (texts := _texts(action, value)) is None:
            problems.append(f"{key}: expected {_expected(action)}, found {value!r}")
        elif f"--{key}" not in flags:
            arguments += [f"--{key}={text}" for text in texts]
    complain(f"--config {path}", problems)
    return arguments


def _texts(action: argparse.Action, value: Any) -> list[str] | None:
    """The option's arguments, None where it takes no such value."""
    if value is False and "no" in (action.choices or ()):
        value = "no"  # which YAML takes for false
    several = value if isinstance(value, list) else [value]
    if not several or any(isinstance(one, (bool, dict, list, type(None))) for one in several):
        return None
    texts = [str(one) for one in several]
    if not isinstance(action, argparse._AppendAction):
        texts = [",".join(texts)]
    try:
        for text in texts:
            made = action.type(text) if callable(action.type) else text
            if action.choices is not None and made not in action.choices:
                return None
    except ValueError:
        return None
    return texts


def _expected(action: argparse.Action) -> str:
    if action.choices is not None:
        return " or ".join(map(str, action.choices))
    kinds: dict[Any, str] = {int: "a whole number", float: "a number", _numbers: "numbers"}
    return kinds.get(action.type, "a text")


def read_yaml(path: Path) -> tuple[str, Any]:
    """What is wrong with the file, else "", and what it holds."""
    import yaml

    try:
        return "", yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        return f"line {line}: {error.problem}", None
    except OSError as error:
        return error.strerror or str(error), None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        return " ".join(str(error).split()), None


def read_lines(path: Path, option: str) -> list[str]:
    """Lines of a text file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{option} {path}: {error}") from error
    if not any(lines):
        raise TrainingError(f"{option} {path} has no lines")
    return [line for line in lines if line]


def check_args(args: argparse.Namespace) -> None:
    problems = []
    if not args.train_vmix and not args.rank and not args.full_finetune:
        problems.append("--no_vmix needs --rank: there would be nothing to train")
    if args.full_finetune and args.rank:
        problems.append("--full_finetune trains no LoRA beside it: leave --rank out")
    if args.train_vmix and args.labels is None:
        problems.append("--labels is missing")
    if args.objective == "denoising":
        if args.train_data_dir is None:
            problems.append("--train_data_dir is missing (or another --objective)")
        for key in ("prompts", "teachers"):
            if getattr(args, key) is not None:
                problems.append(f"--{key} is for --objective text-pairs and lora")
    else:
        if args.train_data_dir is not None:
            problems.append(f"--objective {args.objective} needs no --train_data_dir")
        if args.prompts is None:
            problems.append(f"--objective {args.objective} needs --prompts")
        if args.objective == "lora" and args.teachers is None:
            problems.append("--objective lora needs --teachers")
        if not args.train_vmix:
            problems.append(f"--objective {args.objective} trains the adapter")
        if args.apply_to == "contrast":
            problems.append(f"--objective {args.objective} trains for cond or both")
        if args.label_dropout:
            problems.append("--label_dropout is for images")
        if "{words}" not in args.teacher_template or "{prompt}" not in args.teacher_template:
            problems.append("--teacher_template needs {prompt} and {words}")
    for key in ("text_dropout", "label_dropout"):
        if not 0 <= getattr(args, key) < 1:
            problems.append(f"--{key} {getattr(args, key)} is not a share below 1")
    for key in (
        *("train_batch_size", "gradient_accumulation_steps", "max_train_steps"),
        *("checkpointing_steps", "bucket_step", "shuffle_window", "validation_steps"),
        *("samples_per_prompt", "sample_steps", "validation_inference_steps"),
    ):
        if getattr(args, key) < 1:
            problems.append(f"--{key} {getattr(args, key)} is not positive")
    for key in (
        *("resolution", "checkpoints_total_limit", "snr_gamma"),
        *("learning_rate", "lora_learning_rate"),
    ):
        if getattr(args, key) is not None and getattr(args, key) <= 0:
            problems.append(f"--{key} {getattr(args, key)} is not positive")
    for key in ("rank", "seed", "lr_warmup_steps", "dataloader_num_workers", "max_grad_norm"):
        if getattr(args, key) < 0:
            problems.append(f"--{key} {getattr(args, key)} is negative")
    if Path(args.name).name != args.name:
        problems.append(f"--name {args.name} is not a file's name; --output_dir is for folders")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.append(f"--output_dir {args.output_dir} is not a folder")
    complain("arguments", problems)


def check_paths(args: argparse.Namespace) -> None:
    """Before anything that takes its time."""
    problems = []
    base, resumed = args.pretrained_model_name_or_path, args.resume_from_checkpoint
    if not is_of_hub(base) and not Path(base).exists():
        problems.append(f"--pretrained_model_name_or_path {base}: no such file or folder")
    if resumed and resumed != "latest" and not Path(resumed).is_dir():
        problems.append(f"--resume_from_checkpoint {resumed}: no checkpoint is there")
    complain("paths", problems)


def settings(args: argparse.Namespace) -> Mapping[str, Any]:
    """Everything that decides what the steps are, for checkpoints to be compared by."""
    kept = (
        *("objective", "train_vmix", "rank", "full_finetune", "apply_to", "text_dropout"),
        *("label_dropout", "missing_labels", "resolution", "aspect_ratio_buckets", "bucket_step"),
        *(
            "shuffle_window",
            "train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "seed",
        ),
        *("lora_learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "snr_gamma"),
        *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
        *("use_ema", "ema_decay", "use_8bit_adam", "teacher_strength", "teacher_template"),
        *("prediction_type", "samples_per_prompt", "sample_guidance", "sample_steps"),
    )
    return {key: getattr(args, key) for key in kept}
