"""Build the demo's base model from nothing: pictures, autoencoder, latents, base model, export.

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
from base import Base, load_average, pipeline, sheet, tokenize, train_base
from data import DEFAULT_CACHE, draw_many, fetch
from diffusers import AutoencoderKL
from text import train_tokenizer
from torch import Tensor
from transformers import CLIPTokenizer
from transforms import LABELS
from vae import centre, encode, psnr, train_vae

HERE = Path(__file__).resolve().parent


def drawings(work: Path, cache: Path, count: int, seed: int) -> tuple[Tensor, list[str]]:
    path = work / "drawings.pt"
    if not path.exists():
        samples = draw_many(cache, count, seed)
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


def latents_of(pixels: Tensor, work: Path, minutes: float, seed: int) -> Tensor:
    """Train the autoencoder, fix its scale, and encode every drawing once."""
    vae_folder, path = work / "vae", work / "latents.pt"
    if not path.exists():
        vae = train_vae(pixels, minutes, work / "vae.pt", seed=seed)
        latents = centre(vae, encode(vae, pixels))
        print(f"autoencoder: {psnr(vae, pixels[-64:]):.2f} dB on 64 held-out drawings")
        vae.save_pretrained(vae_folder)
        torch.save(latents, path)
    loaded: Tensor = torch.load(path, weights_only=True)
    return loaded


def export(base: Base, work: Path, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the pipeline as f16 safetensors under the ordinary file names."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    vae.register_to_config(_name_or_path="")  # otherwise the work folder's path is written
    pipe = pipeline(base, vae, tokenizer).to(dtype=torch.float16)
    pipe.save_pretrained(out)
    # Unasked, diffusers loads its own models in f32, and this one as its config says.
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    # The two files of CLIP's original tokenizer, for readers that do not know tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    shutil.copy(HERE / "CREDITS.md", out / "CREDITS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--work", type=Path, help="folder for intermediate results")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="downloads")
    parser.add_argument("--minutes", type=float, default=75, help="training of the base model")
    parser.add_argument("--vae-minutes", type=float, default=12)
    parser.add_argument("--count", type=int, default=36_000, help="drawings to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--export-only", action="store_true", help="write the model from the last checkpoint"
    )
    args = parser.parse_args()
    work: Path = args.work or args.cache / "base"
    work.mkdir(parents=True, exist_ok=True)

    pixels, texts = drawings(work, args.cache, args.count, args.seed)
    tokenizer = tokenizer_for(texts, work, args.cache)
    checkpoint = work / "base.pt"
    if args.export_only:
        export(load_average(checkpoint, tokenizer), work, tokenizer, args.out)
        return
    latents = latents_of(pixels, work, args.vae_minutes, args.seed)
    del pixels

    def preview(average: Base, step: int) -> None:
        vae = AutoencoderKL.from_pretrained(work / "vae")
        sheet(pipeline(average, vae, tokenizer), work / f"samples-{step:06d}.png")

    average = train_base(
        latents, tokenize(tokenizer, texts), tokenizer, args.minutes, checkpoint,
        seed=args.seed, preview=preview,
    )  # fmt: skip
    preview(average, 999_999)
    export(average, work, tokenizer, args.out)


if __name__ == "__main__":
    main()
