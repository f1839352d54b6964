"""Measure what the demo's adapter does, and write docs/demo: README.md, report.json and plots.

    make demo-report

Prompts and seeds are ones that nothing was tuned on. The pictures of real looks are drawn with
examples/demo/base, so three npm packages with emoji are downloaded once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cold_look
import numpy as np
import torch
import ways
from adapter import COUNT
from demo import (
    BATCH,
    DEMO,
    FIT_LABEL,
    FIT_WORDS,
    GUIDANCE,
    HERE,
    STEPS,
    Images,
    Pair,
    colour_of,
    every,
    fitted,
    generate,
    grid,
    only,
    open_pipeline,
    with_vmix,
)
from matplotlib.figure import Figure
from numpy.typing import NDArray
from objects import ObjectClassifier
from tqdm.auto import tqdm
from vmix import Adapter
from vmix.diffusers import load_vmix, set_vmix_scale, unload_vmix
from vmix.measures import HUE_BANDS, MEASURES, hue_matches, laplacian_variance

sys.path.insert(0, str(HERE / "base"))

# Not among the demo's prompts (which, with other seeds, hyper-parameters were chosen on).
PROMPTS = (
    *("a red strawberry", "a red balloon", "a red rocket", "a red crab", "a red book"),
    *("an orange fish", "an orange shirt", "an orange umbrella", "an orange fox"),
    *("a yellow moon", "a yellow drop", "a yellow boat", "a yellow duck", "a yellow bus"),
    *("a green cactus", "a green frog", "a green leaf", "a green hat", "a green turtle"),
    *("a blue butterfly", "a blue whale", "a blue gem", "a blue gift", "a blue cup"),
    *("purple grapes", "a purple octopus", "a purple crown", "a purple car"),
    *("a pink pig", "a pink rose", "a pink shoe", "a pink house"),
)
# Every pair has noise of its own: noise decides much of how the base's pictures look.
PAIRS: list[Pair] = [(prompt, 9001 + index) for index, prompt in enumerate(PROMPTS * 2)]
OUT = cold_look.OUT.parent
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
LAPLACIAN = "Laplacian variance"
COLOUR, OBJECT = FIDELITY = ("colour as prompted", "object as prompted")
COLUMNS = (*MEASURES, LAPLACIAN, *FIDELITY)

Values = Mapping[str, NDArray[np.float64]]


def concept_of(prompt: str) -> str:
    """What follows the colour."""
    return prompt.partition(f"{colour_of(prompt)} ")[2]


# --- statistics ----------------------------------------------------------------------------------


def measured(
    images: Images, colours: Sequence[str], concepts: Sequence[str], objects: ObjectClassifier
) -> Values:
    values = {name: measure(images) for name, measure in MEASURES.items()}
    values[LAPLACIAN] = laplacian_variance(images)
    found = [bool(hue_matches(i, colour)) for i, colour in zip(images, colours, strict=True)]
    values[COLOUR] = np.array(found, dtype=np.float64)
    values[OBJECT] = objects.matches(images, concepts).astype(np.float64)
    return values


def interval(values: NDArray[np.float64], draws: int = 4000) -> dict[str, float]:
    """Mean and 95 % bootstrap interval; pictures without a value (no object) are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def levels(values: Values) -> dict[str, dict[str, float]]:
    return {name: interval(values[name]) for name in COLUMNS}


def effects(after: Values, before: Values) -> dict[str, dict[str, float]]:
    """Differences within pairs of pictures: same prompt, same noise."""
    return {name: interval(after[name] - before[name]) for name in COLUMNS}


# --- real pictures -------------------------------------------------------------------------------


def real_pictures(adapter: Adapter, cache: Path, objects: ObjectClassifier) -> dict[str, Values]:
    """Emoji in a prompted colour under every look: all negative, single labels, all positive."""
    from colours import TARGET_HUES, colour_word, main_hue, rotate_hue
    from data import load_sources, one_thread
    from transforms import render

    looks: dict[str, dict[str, float]] = {"none": only(adapter, None), "all": every(adapter)}
    looks |= {label.name: only(adapter, label.name) for label in adapter.labels}
    images: dict[str, list[NDArray[np.float32]]] = {look: [] for look in looks}
    colours, concepts = [], []
    random = torch.Generator().manual_seed(4242)
    with one_thread():
        for source in tqdm(3 * load_sources(cache), desc="real pictures", leave=False):
            image = source.image
            hue, coloured = main_hue(image)
            if coloured > 0.3:
                target = int(torch.randint(len(TARGET_HUES), (), generator=random))
                image = rotate_hue(image, TARGET_HUES[target] - hue)
            colour = colour_word(image)
            if colour is None or colour not in HUE_BANDS:
                continue
            colours.append(colour)
            concepts.append(source.concept)
            seed = int(torch.randint(2**31, (), generator=random))
            for look, labels in looks.items():
                weights = {name: int(weight) for name, weight in labels.items()}
                drawn = render(image, weights, torch.Generator().manual_seed(seed))
                images[look].append(drawn.permute(1, 2, 0).numpy())
    return {
        look: measured(np.stack(drawings).astype(np.float64), colours, concepts, objects)
        for look, drawings in images.items()
    }


# --- attention maps ------------------------------------------------------------------------------


class Recorder:
    """An attention processor that does the plain computation and keeps the conditional maps."""

    def __init__(self, maps: list[torch.Tensor]) -> None:
        self.maps = maps

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any
    ) -> Any:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(tensor)
            for tensor in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        weights = attn.get_attention_scores(query, key)
        heads = weights.reshape(len(hidden_states), attn.heads, *weights.shape[1:]).mean(1)
        self.maps.append(heads.chunk(2)[1])  # [uncond; cond]
        out = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](out))


def attention_maps(pipe: Any, pairs: Sequence[Pair], make: Callable[[], Images]) -> Any:
    """The pictures and, of every layer and step, the map [pictures, queries, tokens] over heads."""
    before = pipe.unet.attn_processors
    maps: list[torch.Tensor] = []
    own = {n: Recorder(maps) if "attn2" in n else p for n, p in before.items()}
    pipe.unet.set_attn_processor(own)
    try:
        return make(), maps
    finally:
        pipe.unet.set_attn_processor(before)


def compare_maps(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per picture: mean over layers and steps of correlation and of total variation."""
    correlations, variations = [], []
    for a, b in zip(first, second, strict=True):
        variations.append(0.5 * (a - b).abs().sum(-1).mean(-1))
        x, y = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (a, b))
        correlations.append((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)))
    pair = (torch.stack(part).double().mean(0).numpy() for part in (correlations, variations))
    return next(pair), next(pair)


def word_maps(pipe: Any, pairs: Sequence[Pair], maps: Sequence[torch.Tensor]) -> Any:
    """The map of each prompt's last word, mean over steps and the layers of highest resolution."""
    queries = max(m.shape[1] for m in maps)
    mean = torch.stack([m for m in maps if m.shape[1] == queries]).mean(0)
    side = round(queries**0.5)
    ids = pipe.tokenizer([prompt for prompt, _ in pairs]).input_ids
    last = [len(row) - 2 for row in ids]  # the end of text comes after it
    return mean[torch.arange(len(pairs)), :, last].reshape(-1, side, side).numpy()


def attention(
    pipe: Any, adapter: Adapter, pairs: Sequence[Pair], bar: Any
) -> tuple[dict[str, Any], list[tuple[str, Any, Any]]]:
    """How far attention maps move, what to compare that with, and pictures beside their maps."""
    text = [prompt for prompt, _ in pairs]
    context = pipe.encode_prompt(text, "cpu", 1, False)[0]
    empty = pipe.encode_prompt([""] * len(text), "cpu", 1, False)[0]
    f_a = torch.utils.dlpack.from_dlpack(adapter.project(every(adapter))).to(context)

    def plain(seed: int = 0) -> Images:
        return generate(pipe, [(p, s + seed) for p, s in pairs], bar)

    def added() -> Images:
        random = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
        embeds = {"prompt_embeds": context + f_a, "negative_prompt_embeds": empty}
        bar.update(len(pairs))
        return np.asarray(pipe(generator=random, **embeds, **options).images)

    makers: dict[str, Callable[[], Images]] = {
        "VMix, λ = 1": lambda: with_vmix(pipe, adapter, pairs, every(adapter), 1.0, bar),
        "VMix, λ = 2": lambda: with_vmix(pipe, adapter, pairs, every(adapter), 2.0, bar),
        "f_a added to the text instead": added,
        "another seed": lambda: plain(100),
    }
    images, maps = attention_maps(pipe, pairs, plain)
    rows, shown = {}, [("base model", images, word_maps(pipe, pairs, maps))]
    for name, make in makers.items():
        other, others = attention_maps(pipe, pairs, make)
        correlation, variation = compare_maps(maps, others)
        rows[name] = {
            "correlation": interval(correlation),
            "total variation": interval(variation),
            "pixel change": interval(np.abs(other - images).mean((1, 2, 3))),
        }
        if len(shown) < 2:
            shown.append((name, other, word_maps(pipe, pairs, others)))
    return rows, shown


# --- the measurements ----------------------------------------------------------------------------


def measure(args: argparse.Namespace, pipe: Any, adapter: Adapter) -> tuple[dict[str, Any], Any]:
    """Everything the report says, and what the attention plot shows."""
    pairs = PAIRS[: args.pairs]
    names = [label.name for label in adapter.labels]
    default, maps = adapter.apply_to, pairs[:BATCH]
    objects = ObjectClassifier.fit(args.cache)
    real = real_pictures(adapter, args.cache, objects)

    def judged(images: Images) -> Values:  # of all pairs or of the first ones
        colours, concepts = (
            [part(prompt) for prompt, _ in pairs[: len(images)]] for part in (colour_of, concept_of)
        )
        return measured(images, colours, concepts, objects)

    some = pairs[: len(PROMPTS)]  # that the ways are tried on
    sources = {
        ways.PAIRS: Adapter.open(args.ablation / "pairs.safetensors"),
        ways.TRAINED: adapter,
    }
    total = (len(SCALES) + 3 * (len(names) + 2) - 2 + 3) * len(pairs) + 5 * len(maps)
    with tqdm(total=total + ways.count(some), desc="pictures", unit="") as bar:

        def made(
            selection: Any, scale: float = 1.0, source: Adapter = adapter, **more: Any
        ) -> Values:
            return judged(with_vmix(pipe, source, pairs, selection, scale, bar, **more))

        # λ, and the check that λ = 0 and removal are the base model, bit for bit.
        bare = generate(pipe, pairs, bar)
        base = judged(bare)
        batch = pairs[:BATCH]  # the same batch: another size rounds otherwise
        load_vmix(pipe, adapter, every(adapter), 1.0)
        set_vmix_scale(pipe, 0.0)
        zero = generate(pipe, batch)
        unload_vmix(pipe)
        identical = [bool((bare[: len(batch)] == i).all()) for i in (zero, generate(pipe, batch))]
        strength = {0.0: base}
        strength |= {scale: made(every(adapter), scale) for scale in SCALES if scale}

        # Labels one by one, and the policies for the unconditional pass, each as trained.
        policies: dict[str, dict[str, Values]] = {}
        for policy in ("cond", "both", "contrast"):
            source = adapter
            if (policy == "cond") != (default == "cond"):
                source = Adapter.open(
                    args.ablation / f"{'cond' if policy == 'cond' else 'both'}.safetensors"
                )
            looks = {name: only(adapter, name) for name in names}
            looks |= {"none": only(adapter, None), "all": every(adapter)}
            policies[policy] = {}
            for look, selection in looks.items():
                if policy == default and look == "all":
                    values = strength[1.0]
                elif policy == "contrast" and look == "none":
                    values = policies["both"]["none"]  # the same thing twice
                else:
                    values = made(selection, source=source, apply_to=policy)
                policies[policy][look] = values
        single = policies[default]

        # The paper's table 3: the adapter trained beside a LoRA, that LoRA, and a LoRA alone.
        joint = Adapter.open(args.ablation / "joint.safetensors")
        ablation = {"base model": base, "VMix (LoRA dropped)": made(every(joint), source=joint)}
        pipe.load_lora_weights(
            args.ablation, weight_name="joint-lora.safetensors", adapter_name="a"
        )
        ablation["VMix and its LoRA"] = made(every(joint), source=joint)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(args.ablation, weight_name="only-lora.safetensors", adapter_name="b")
        ablation["LoRA only"] = judged(generate(pipe, pairs, bar))
        pipe.unload_lora_weights()
        ablation["the demo's adapter (trained without LoRA)"] = strength[1.0]
        maps_moved, shown = attention(pipe, adapter, maps, bar)
        own = dict(zip(names, MEASURES, strict=True))
        tried = ways.measure(pipe, sources, some, judged, own, FIDELITY, interval, bar)

    def distance(values: Values) -> float:
        """From real all-positive pictures: root mean square over measures, in their SDs."""
        gaps = [
            (np.nanmean(values[m]) - np.nanmean(real["all"][m])) / np.nanstd(real["all"][m])
            for m in MEASURES
        ]
        return float(np.sqrt(np.mean(np.square(gaps))))

    result = {
        "settings": {
            "prompts": list(PROMPTS), "seeds": [seed for _, seed in pairs], "pairs": len(pairs),
            "concepts": objects.concepts,
            "steps": STEPS, "guidance": GUIDANCE, "apply_to": default,
            "trained": adapter.made,
        },
        "real": {
            "pictures": len(real["all"][COLOUR]),
            "all negative": levels(real["none"]), "all positive": levels(real["all"]),
            "labels": {name: effects(real[name], real["none"]) for name in names},
            "colour ceiling": float(np.mean([real[look][COLOUR].mean() for look in real])),
            "object ceiling": objects.ceiling(args.cache),
        },
        "labels": {name: effects(single[name], single["none"]) for name in names},
        "levels": {"base": levels(base), "none": levels(single["none"])},
        "strength": {f"{scale:g}": levels(values) for scale, values in strength.items()},
        "strength effect": {f"{s:g}": effects(values, base) for s, values in strength.items()},
        "identical": {"scale 0": identical[0], "after unloading": identical[1]},
        "attention": maps_moved,
        "unconditional": {
            policy: {
                "labels": {n: effects(looks[n], looks["none"]) for n in names},
                "range": effects(looks["all"], looks["none"]),
                "all": levels(looks["all"]), "none": levels(looks["none"]),
                "distance all": distance(looks["all"]),
                "no object, none": float(np.isnan(looks["none"]["off-centre"]).mean()),
            }
            for policy, looks in policies.items()
        },
        "ablation": {
            row: {"levels": levels(values), "distance": distance(values)}
            for row, values in ablation.items()
        },
        "ways": tried,
    }  # fmt: skip
    return result, shown


# --- writing -------------------------------------------------------------------------------------

BLUE, GREY, BAND = "#0969da", "#8c959f", "#b6d4fe"


def figure(columns: int, width: float, height: float, share: bool = False) -> tuple[Figure, Any]:
    canvas = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = canvas.subplots(1, columns, sharey=share)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eaeef2")
        axis.set_axisbelow(True)
    return canvas, axes


def plot_labels(result: Mapping[str, Any], path: Path) -> None:
    names = list(result["labels"])
    canvas, axes = figure(len(MEASURES), 12, 2.9, share=True)
    for axis, name in zip(axes, MEASURES, strict=True):
        for row, label in enumerate(names):
            real, own = result["real"]["labels"][label][name], result["labels"][label][name]
            first = row == 0
            axis.plot(
                real["mean"], row - 0.14, "D", color=GREY, mfc="white",
                label="drawn look" if first else None,
            )  # fmt: skip
            axis.plot([own["low"], own["high"]], [row + 0.14] * 2, color=BLUE, lw=2)
            axis.plot(own["mean"], row + 0.14, "o", color=BLUE, label="VMix" if first else None)
        axis.axvline(0, color=GREY, lw=0.8)
        axis.set_title(name, fontsize=11)
    axes[0].set_yticks(range(len(names)), [f"+ {name}" for name in names])
    axes[0].invert_yaxis()
    canvas.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    canvas.savefig(path)


def plot_strength(result: Mapping[str, Any], path: Path) -> None:
    scales = [float(scale) for scale in result["strength"]]
    canvas, axes = figure(len(COLUMNS), 17, 2.9)
    for axis, name in zip(axes, COLUMNS, strict=True):
        rows = [levels[name] for levels in result["strength"].values()]
        axis.fill_between(
            scales, [r["low"] for r in rows], [r["high"] for r in rows], color=BAND, lw=0
        )
        axis.plot(scales, [r["mean"] for r in rows], "o-", color=BLUE, ms=4)
        real = result["real"]["all positive"][name]["mean"]
        axis.axhline(real, color=GREY, ls="--", lw=1)
        axis.set_title(name, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("λ")
        axis.set_xticks([0, 0.5, 1, 1.5, 2])
    for axis in axes[-len(FIDELITY) :]:
        axis.set_ylim(0, 1.02)
    canvas.savefig(path)


def plot_attention(pairs: Sequence[Pair], shown: Any, path: Path, count: int = 6) -> None:
    canvas = Figure(figsize=(1.6 * count, 6.8), layout="constrained", dpi=110)
    axes = canvas.subplots(4, count)
    for column in range(count):
        top = max(float(maps[column].max()) for _, _, maps in shown)
        for row, (name, images, maps) in enumerate(shown):
            axes[2 * row, column].imshow(images[column])
            axes[2 * row + 1, column].imshow(maps[column], vmin=0, vmax=top, cmap="magma")
            axes[2 * row, 0].set_ylabel(name)
            axes[2 * row + 1, 0].set_ylabel("attention map")
        axes[0, column].set_title(
            pairs[column][0].removeprefix("a ").removeprefix("an "), fontsize=10
        )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    canvas.savefig(path)


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.0f}"


def cell(value: Mapping[str, float]) -> str:
    mean, low, high = (number(value[key], "+") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


SIGNS = ("positive", "negative")

# What the numbers of the committed report.json say; to be read again when they change.
NOTES = {
    "model": """\
A `StableDiffusionPipeline` in miniature, 11 MB in f16: an autoencoder (64×64 px to 8×8×16
latents, 0.9 M parameters), CLIP's tokenizer and text encoder with 1,457 tokens (0.4 M), and a
U-Net with cross-attention at two resolutions (4.3 M, v-prediction).

**Trained on** 66 things as three vendors draw them: Twemoji (CC BY 4.0), Noto Emoji
(Apache 2.0) and Fluent Emoji 3D (MIT), [credits](../../comfy_nodes/demo/model/CREDITS.md). Of
these 198 originals come 48,000 drawings in other hues, places and looks. Hues are turned to
seven colours; brown, black, gray and white are those that originals have. Each of the four
looks is the positive one in seven drawings of ten; a quarter of the captions name some of the
looks (`a red apple, blurry`), the others say nothing, like most of a web corpus. No photograph
was used, and no weights of another model.

**For** 71 minutes the autoencoder and 200 minutes text encoder and U-Net, on two CPU cores,
from random initialisation: the U-Net's last 125 on these drawings, before that on others
without looks in captions, and the autoencoder's on more positive ones
([how](../../examples/demo/base/README.md)). The autoencoder gives new drawings back at 30.1 dB
if they are sharp, large and bright, and at 33.5 in the mean over looks: colour, edges and small
parts are kept.

**It can draw** one of the 66 things in one of the colours, and looks that are named, except
that *sharp* and *blurry* do next to nothing. **It cannot draw** two things, a scene, people,
writing, a number of things, or any word that no caption had. A colour that contradicts all
drawings of a thing may be met in a part of it only (a yellow penguin) or not at all (a yellow
hat), and a thing may come out as one that is like it (a pineapple as a strawberry, a bus as a
truck). Wheels, eyes and thin parts are approximate; edges are softer than those of drawings.""",
    "cold look": """\
16 of 24, both right, was the floor that this model had to reach. The viewers are
vision-language models, each asked in other words and without a list of things to choose from.
Answers are counted by a rule that was written before: a thing may go by the other names that
cold_look.py lists, among which *teacup* is not. All three missed the hat's colour, the
pineapple, which came out as a strawberry, and the bus, which has become a truck.""",
    "labels": """\
All four labels do what they say. Color, lighting and composition come to nine tenths of the
drawn look or more, **sharp focus** to a fifth, and no further beside positive labels
(+0.106, next section): the model's pictures are softer than drawings whatever the labels are.
Labels are not independent of each other: each makes the object easier to recognise, composition
most, since all-negative pictures are so far gone, and lighting costs 0.055 of sharpness.""",
    "ways": """\
- **Colour** follows all three ways, text pairs furthest.
- **Light** follows all three ways.
- **Focus** follows the adapter trained on pictures alone: +0.11 at λ = 1, +0.17 at 2. The words
  do next to nothing in the prompt itself, and text pairs of them do no more (-0.009 to +0.003):
  some captions with looks have not taught this base what *sharp* means, and labelled pictures
  have.
- **Composition** follows all three ways at λ = 1; beyond, text pairs lose half of it and more.
- At guidance 7.5 light moves a little less, by words and by the trained label, and the trained
  label for composition needs a λ over 1. The prompt suffers more: its colour from λ = 1.5 on,
  with text pairs from 1, and with text pairs at 2 three objects in ten are lost.

Fidelity is the mean over positive and negative sides of all labels, and small objects in a
corner are hard to recognise: the words themselves cost 0.03 and 0.055. The dotted line, as in the
table above, is the drawn look while the other looks are negative. Colour has more to act on where
they are positive, as here: for the trained label +0.274 against +0.066.""",
    "strength": """\
Many of the base's pictures are all-positive by themselves, and some are dark or dull. All labels
together bring these to the others: at λ = 0.5 colour and light are where they stay, light short of
drawn pictures, and position was there before. Sharpness gains a tenth of what is missing. Colour is
as prompted in two pictures of 64 less at λ = 1 and in three at 2, the object in one; all these
intervals reach zero.""",
    "attention": """\
At λ = 1 the maps correlate at 0.91 with the base's, more than those of another seed (0.83); they
are not equal because later layers and steps see what earlier ones have changed. Pictures are
changed in light and colour (rocket, crab) while the layout stays. The same f_a added to the text's
features, which the paper rejects, changes pictures about as much and takes the maps apart
(0.49).""",
    "unconditional": """\
The default is `cond`: lighting and composition follow it most. `both` moves every label less,
sharpness to a third, and keeps colour and object best. `contrast` moves colour twice as far as the
drawings do, takes all-positive pictures away from drawn ones (1.16 against 0.73) and loses three
objects of 64. Of all-negative pictures, a quarter keep the object with `cond` and a third with the
others.""",
    "ablation": """\
Every adapter brings the base nearer to drawn all-positive pictures; what still separates them is
mostly sharpness. The LoRA alone, not being told labels, learns the mixture and moves away. The
adapter of the joint training does without its LoRA what it does with it. These distances have no
intervals: small differences mean little.""",
}


def cold() -> str:
    """What viewers made of the sheet that cold_look.py draws."""
    key = json.loads((cold_look.OUT / "key.json").read_text(encoding="utf-8"))["prompts"]
    looks = json.loads((cold_look.OUT / "looks.json").read_text(encoding="utf-8"))
    counts = [cold_look.count(look["answers"], key) for look in looks]
    lines = [
        [f"{index}: {look['viewer']}", *(f"{count[part]} of {len(key)}" for part in count)]
        for index, (look, count) in enumerate(zip(looks, counts, strict=True), 1)
    ]
    asked = [
        [f"{number}", prompt, *(look["answers"].get(f"{number}", "—") for look in looks)]
        for number, prompt in enumerate(key, 1)
    ]
    header = ["", "prompt", *(f"viewer {index + 1}" for index in range(len(looks)))]
    return f"""{rows(["viewer", *counts[0]], lines)}

<details><summary>All prompts and answers</summary>

{rows(header, asked)}

</details>"""


def by_way(result: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """A table for each guidance: every way and λ, each label's effect, the prompt's fidelity."""
    tables = []
    for guidance, part in result.items():
        lines = [
            [way, "" if way == ways.PROMPT else scale, *(cell(row[n]) for n in (*own, *FIDELITY))]
            for way, by_scale in part["ways"].items()
            for scale, row in by_scale.items()
        ]
        found = ", ".join(f"{n} {part['base'][n]['mean']:.3f}" for n in FIDELITY)
        header = ["", "λ", *(f"{n} ({m})" for n, m in own.items()), *FIDELITY]
        tables.append(f"Guidance {guidance}; the base itself: {found}.\n\n{rows(header, lines)}")
    return "\n\n".join(tables)


def verdict(own: Mapping[str, float], real: Mapping[str, float]) -> str:
    share = own["mean"] / real["mean"]
    if own["low"] <= 0 <= own["high"]:
        return "not shown"
    return f"{share:.0%}" if share > 0 else f"{share:.0%}, the wrong way"


def text(r: Mapping[str, Any]) -> str:
    """docs/demo/README.md from the numbers, and from what viewers answered."""
    settings, real, labels = r["settings"], r["real"], r["labels"]
    objects = real["object ceiling"]
    own = dict(zip(labels, MEASURES, strict=True))  # the measure that is about the label

    def column(values: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [number(values[name]["mean"]) for name in COLUMNS]

    label_rows = [
        [name, m, cell(labels[name][m]), cell(real["labels"][name][m]),
         verdict(labels[name][m], real["labels"][name][m])]
        for name, m in own.items()
    ]  # fmt: skip

    def both(name: str, measure: str) -> str:
        drawn = real["labels"][name][measure]["mean"]
        return f"{cell(labels[name][measure])} ({number(drawn, '+')})"

    side_rows = [[name, *(both(name, measure) for measure in COLUMNS)] for name in labels]
    strength_rows = [[scale, *column(values)] for scale, values in r["strength"].items()]
    fidelity_rows = [
        [scale, *(cell(values[m]) for m in FIDELITY)]
        for scale, values in r["strength effect"].items()
    ]
    strength_rows.append(["drawn, all positive", *column(real["all positive"])])
    attention_rows = [
        [name, *(f"{value['mean']:.3f}" for value in row.values())]
        for name, row in r["attention"].items()
    ]
    policy_fidelity = [f"{word}, all {look}" for word in ("colour", "object") for look in SIGNS]
    policy_rows = [
        [
            policy + (" (default)" if policy == settings["apply_to"] else ""),
            *(f"{row['labels'][name][m]['mean']:+.3f}" for name, m in own.items()),
            *(f"{row[look][m]['mean']:.3f}" for m in FIDELITY for look in ("all", "none")),
            f"{row['distance all']:.2f}",
        ]
        for policy, row in r["unconditional"].items()
    ]
    ablation_rows = [
        [name, *column(row["levels"]), f"{row['distance']:.2f}"]
        for name, row in r["ablation"].items()
    ]
    ablation_rows.append(["drawn, all positive", *column(real["all positive"]), "0"])
    zero = "yes" if all(r["identical"].values()) else f"NO: {r['identical']}"
    return f"""# The demo: a small model, and what the adapter does to it

Written by `make demo-report` from [report.json](report.json): {settings["pairs"]} pairs of prompt
and seed that nothing was tuned on, no seed twice, {settings["steps"]} DDIM steps, guidance
{settings["guidance"]:g}, strength 1 unless said otherwise. Square brackets are 95 % bootstrap
intervals over pairs. The model is very small (64 px, 5.5 M parameters) and its labels are four
drawn looks, so this shows that the method and this implementation work, not how a real photograph
would improve. More pages:
[labels fitted from words](fitted/README.md);
[other methods, and another base](comparison/README.md);
[adapters from words and from LoRAs](objectives/README.md).

![Eight prompts without VMix, all labels positive, one of them negative, all negative](grid.png)

## The model

{NOTES["model"]}

## A cold look

24 prompts, drawn by a seed from all things and hues and pictured without being chosen
([cold_look.py](../../examples/demo/cold_look.py)). Viewers saw this sheet and nothing else:

![24 numbered pictures](cold-look/sheet.png)

{cold()}

{NOTES["cold look"]}

## Measures

Measures ([vmix.measures](../../python/vmix/measures.py)): colourfulness after Hasler and Süsstrunk;
brightness, the mean luma; sharpness, the deviation of the Laplacian over that of luma; off-centre,
the distance of the object from the centre in half-sizes. Laplacian variance (luma in 0..255) is the
usual measure of focus, which follows exposure and contrast as well.

Text fidelity is the share of pictures whose main hue is the prompt's colour (*{COLOUR}*),
and of those in which a small classifier, blind to colour, size and place, sees the prompt's object
among {len(settings["concepts"])} (*{OBJECT}*). On drawn pictures, which are right by
construction, the first finds {real["colour ceiling"]:.3f} and the second
{objects["all looks"]:.3f} (the same drawings as it was fitted to, in other hues, looks and places):
what to compare the pictures below with.

## Labels one by one

One label positive and the others negative, against all negative. "Drawn look" is the same
difference between emoji drawn with and without the look that the label was trained on.

{rows(["label", "its measure", "VMix", "drawn look", "share"], label_rows)}

![Effect of every label on every measure](labels.png)

All measures, VMix and in brackets the drawn look:

{rows(["label", *COLUMNS], side_rows)}

{NOTES["labels"]}

## Three ways to a label

One label positive against negative, same prompt and noise, {len(r["settings"]["prompts"])} prompts.
Words in the prompt: `a red book, vivid` against `a red book, dull`
([words.yaml](../../examples/demo/words.yaml)). Text pairs: `vmix train --objective text-pairs`, the
base with these words as its teacher. Trained: the demo's adapter, from {COUNT:,} pictures with
labels. Positive is w = 1 and negative w = 0. Other labels are where they change nothing; those of
the trained adapter, which has no such place, are positive. The last columns are the prompt's
fidelity, mean of both sides, against the base with the same noise and guidance.

{by_way(r["ways"], own)}

![Effect on each label's own measure against λ, by way and guidance](ways.png)

{NOTES["ways"]}

## Strength

All labels positive. λ = 0 and an unloaded adapter give the base's pictures bit for bit: {zero}.

{rows(["λ", *COLUMNS], strength_rows)}

![Measures against strength; the dashed line is drawn all-positive pictures](strength.png)

The prompt is met at each λ, against the base with the same noise:

{rows(["λ", *FIDELITY], fidelity_rows)}

{NOTES["strength"]}

## Attention maps

The paper's figure 10: both branches share one map, so that aesthetics leave the layout alone.
Against the base's maps for the same prompt and noise; mean over layers, steps and pictures.

{rows(["", "correlation", "total variation", "pixel change"], attention_rows)}

![Pictures and the attention map of the object's word](attention.png)

{NOTES["attention"]}

## The unconditional pass

What guidance's unconditional pass is given is not in the paper. `cond`: nothing. `both`: the same
labels. `contrast`: all labels negative. `cond` is the demo's adapter; the others share one whose
labels were in both passes in training (see [training](../training.md#the-unconditional-pass)). The
first columns are each label's effect on its own measure, then text fidelity, and how far
all-positive pictures are from drawn ones (root mean square over the four measures, in standard
deviations).

{rows(["", *own, *policy_fidelity, "distance"], policy_rows)}

{NOTES["unconditional"]}

## With and without LoRA

The paper's table 3 in miniature, all labels positive. The LoRA alone is trained on the same
pictures and is not told their labels; in half of them, each look is the negative one.

{rows(["", *COLUMNS, "distance"], ablation_rows)}

{NOTES["ablation"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--adapter", type=Path, default=DEMO / "adapter.safetensors")
    parser.add_argument("--ablation", type=Path, default=HERE / "ablation")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "vmix-demo")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pairs", type=int, help="Fewer prompt-seed pairs, for a quick look.")
    parser.add_argument("--text-only", action="store_true", help="Rewrite README from report.json.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "report.json"
    if not args.text_only:
        pipe, adapter = open_pipeline(args.model), Adapter.open(args.adapter)
        words = fitted(pipe, {FIT_LABEL: FIT_WORDS})
        grid(pipe, adapter, 0, words=words).save(args.out / "grid.png")  # as `make demo` makes it
        result, shown = measure(args, pipe, adapter)
        data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        pairs = PAIRS[:BATCH]
        plot_attention(pairs, shown, args.out / "attention.png", min(6, len(shown[0][1])))
    result = json.loads(data.read_text(encoding="utf-8"))
    plot_labels(result, args.out / "labels.png")
    plot_strength(result, args.out / "strength.png")
    labels = zip(result["labels"], MEASURES, strict=True)
    drawn = {name: result["real"]["labels"][name][measure]["mean"] for name, measure in labels}
    ways.plot(result["ways"], drawn, args.out / "ways.png")
    (args.out / "README.md").write_text(text(result), encoding="utf-8")


if __name__ == "__main__":
    main()
