"""Build the demo's base model: pictures, autoencoder, latents, base model, export.

From nothing, or with `--start` from the weights of an earlier model.

    python examples/demo/base/build.py --out comfy_nodes/demo/model

Every stage leaves its result in the work folder and is skipped when it is there, and the two
trainings continue from their last checkpoint, so the command can be repeated after a break.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from base import Base, pipeline, sheet, tokenize, train_base
from data import DEFAULT_CACHE, draw_many, fetch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from text import train_tokenizer
from torch import Tensor
from training import averaged
from transformers import CLIPTokenizer
from transforms import LABELS
from vae import centre, encode, new_vae, train_vae
from vmix.loading import load_model

HERE = Path(__file__).resolve().parent
POSITIVE = 0.7  # share of the drawings with the positive look, for each label
SAID = 0.25  # share of the captions with words about the look
VAE_POSITIVE = 0.9  # sharp, large and bright pictures are the hardest to keep


def drawings(
    work: Path, cache: Path, name: str, count: int, seed: int, positive: float, said: float
) -> tuple[Tensor, list[str]]:
    path = work / f"{name}.pt"
    if not path.exists():
        samples = draw_many(cache, count, seed, positive, said)
        pixels = torch.stack([sample.image for sample in samples])
        torch.save({"pixels": pixels, "texts": [sample.text for sample in samples]}, path)
    state = torch.load(path, weights_only=True)
    return state["pixels"], state["texts"]


def tokenizer_for(texts: list[str], work: Path, cache: Path) -> CLIPTokenizer:
    """Learned from the captions, and from all emoji names so that other words stay short."""
    folder = work / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    listing = fetch(cache)[0].parents[2] / "emoji.json"
    names = [str(entry["name"]).lower() for entry in json.loads(listing.read_text("utf-8"))]
    tokenizer = train_tokenizer([*texts, *names, *LABELS])
    tokenizer.save_pretrained(folder)
    return tokenizer


def autoencoder(start: Path | None, work: Path, cache: Path, steps: int, seed: int) -> None:
    """Train it and leave it in the work folder, its latents not yet scaled."""
    if (work / "vae").exists():
        return
    vae = new_vae()
    if start is not None:
        vae = load_model(AutoencoderKL, start / "vae")
        vae.register_to_config(scaling_factor=1.0)
    pixels, _ = drawings(work, cache, "vae-drawings", 16_000, seed + 2, VAE_POSITIVE, 0.0)
    vae = train_vae(vae, pixels, steps, work / "vae.pt", seed=seed)
    vae.save_pretrained(work / "vae")


def latents_of(pixels: Tensor, work: Path) -> Tensor:
    """Every drawing encoded once; fixes the autoencoder's scale."""
    path = work / "latents.pt"
    if not path.exists():
        vae = load_model(AutoencoderKL, work / "vae")
        latents = centre(vae, encode(vae, pixels))
        vae.save_pretrained(work / "vae")
        torch.save(latents, path)
    loaded: Tensor = torch.load(path, weights_only=True)
    return loaded


def name_as_before(text_encoder: Path) -> None:
    """Names as transformers 4 writes them, which transformers 5 reads too, but not the reverse."""
    start = "text_model."
    tensors = load_file(text_encoder)
    named = {f"{start}{name.removeprefix(start)}": tensor for name, tensor in tensors.items()}
    save_file(named, text_encoder, {"format": "pt"})


def export(base: Base, work: Path, tokenizer: CLIPTokenizer, out: Path, start: Path | None) -> None:
    """Write the pipeline as f16 safetensors under the ordinary file names."""
    vae = load_model(AutoencoderKL, work / "vae")
    for model in (vae, base.unet):
        model.register_to_config(_name_or_path="")  # otherwise the folder's path is written
    pipe = pipeline(base, vae, tokenizer).to(dtype=torch.float16)
    pipe.save_pretrained(out)
    # Unasked, diffusers loads its own models in f32, and this one as its config says.
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('dtype": "float16"', 'dtype": "float32"'))
    name_as_before(out / "text_encoder" / "model.safetensors")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    # The two files of CLIP's original tokenizer, for readers that do not know tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    if start is not None:  # reading and writing it again adds settings
        shutil.copytree(start / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    shutil.copy(HERE / "CREDITS.md", out / "CREDITS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--work", type=Path, help="folder for intermediate results")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="downloads")
    parser.add_argument("--start", type=Path, help="model folder whose weights to go on from")
    parser.add_argument("--steps", type=int, default=9_600, help="of 64, for the base model")
    parser.add_argument("--vae-steps", type=int, default=2_600, help="of 16")
    parser.add_argument("--count", type=int, default=48_000, help="drawings to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--export-only", action="store_true", help="write the model from the last checkpoint"
    )
    args = parser.parse_args()
    work: Path = args.work or args.cache / "base"
    work.mkdir(parents=True, exist_ok=True)

    pixels, texts = drawings(work, args.cache, "drawings", args.count, args.seed, POSITIVE, SAID)
    if args.start is None:
        tokenizer = tokenizer_for(texts, work, args.cache)
        base = Base.new(tokenizer)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer")
        base = Base.open(args.start)
    checkpoint = work / "base.pt"
    if args.export_only:
        export(averaged(base, checkpoint), work, tokenizer, args.out, args.start)
        return
    autoencoder(args.start, work, args.cache, args.vae_steps, args.seed)
    latents = latents_of(pixels, work)
    del pixels

    def show(average: Base, step: int) -> None:
        if step % 1000 == 0:
            vae = load_model(AutoencoderKL, work / "vae")
            sheet(pipeline(average, vae, tokenizer), work / f"samples-{step:06d}.png")

    average = train_base(
        base, latents, tokenize(tokenizer, texts), tokenizer, args.steps, checkpoint,
        seed=args.seed, show=show,
    )  # fmt: skip
    export(average, work, tokenizer, args.out, args.start)


if __name__ == "__main__":
    main()
