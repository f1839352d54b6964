"""Measure adapters made without training; writes plots and report.json of docs/training-free.

    python examples/demo/training_free.py

Labels are colour words, because what they do to a picture can be counted: the share of the
object's coloured pixels that have the asked hue, against how like the unsteered picture the result
still is. The same word written in the prompt, other ways of making the adapter, and values that
differ from token to token are compared with it where they leave the picture as much alike. The
tables of the README are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import (
    DEMO,
    GUIDANCE,
    HERE,
    STEPS,
    Images,
    Pair,
    article,
    draw_grid,
    generate,
    open_pipeline,
)
from matplotlib.figure import Figure
from numpy.typing import NDArray
from report import rows
from tqdm.auto import tqdm
from vmix import Adapter, init_adapter
from vmix.diffusers import ApplyTo, Scale, load_vmix, set_vmix_scale, unload_vmix
from vmix.measures import HUE_BANDS, foreground, hue_and_chroma, hue_matches, luma

GAIN = 0.25  # that init_adapter gives every label
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
RARE = "[V]"  # what labels are told from under trained adapters; here the empty text by default
# Objects that come in every colour; as prompts they name none.
OBJECTS = (
    *("ball", "boat", "book", "bus", "butterfly", "car", "crown", "cup"),
    *("fish", "gem", "gift", "hat", "heart", "house", "shirt", "shoe"),
)
SEED = 7000  # and the following, one for every object
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
RARE_SCALES = (0.5, 1.0, 2.0)
# Variants, at strengths that leave the picture about as much alike as those between λ = 1 and 3.
FEW = COLOURS[::2]  # that they are measured on
BY_TOKEN = {
    "from the end of text on": 2.0,
    "end of text only": 60.0,
    "words only": 12.0,
    "difference of contexts": 5.0,
}
POLICIES: dict[ApplyTo, float] = {"both": 2.2, "contrast": 1.5}
FINE, FINE_LAYERS = 2.4, "fine layers only"  # on all colours, and in the grid
SHARE, FOUND, LIKE = MEASURED = ("share of the hue", "pictures of the hue", "like unsteered")
COLOURED, TOLERANCE, FEWEST = 0.15, 10.0, 20  # chroma, degrees, pixels

GRID = (
    *(("red", "car"), ("yellow", "butterfly"), ("green", "hat"), ("blue", "house")),
    *(("purple", "fish"), ("pink", "gift"), ("green", "heart"), ("blue", "cup")),
)
GRID_SCALES = (1.0, 2.0, 3.0, 4.0)

Values = Mapping[str, NDArray[np.float64]]
Spread = dict[str, float]


# --- measures ------------------------------------------------------------------------------------


def hue_share(images: Images, word: str) -> NDArray[np.float64]:
    """Share of the object's coloured pixels whose hue the word stands for; 0 where few have any."""
    hue, chroma = hue_and_chroma(images)
    coloured = (foreground(images) > 0.5) & (chroma > COLOURED)
    start, end = HUE_BANDS[word]
    asked = (hue - start + TOLERANCE) % 360 <= (end - start) % 360 + 2 * TOLERANCE
    total, own = (part.sum((1, 2)) for part in (coloured, coloured & asked))
    return np.where(total < FEWEST, 0.0, own / np.maximum(total, 1))


def likeness(images: Images, others: Images) -> NDArray[np.float64]:
    """Correlation of luma, pair by pair."""
    x, y = (luma(part).reshape(len(part), -1) for part in (images, others))
    x, y = (part - part.mean(1, keepdims=True) for part in (x, y))
    norm = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.asarray((x * y).sum(1) / np.maximum(norm, 1e-9))


def measured(images: Mapping[str, Images], bare: Images) -> dict[str, Values]:
    """Every measure of the pictures of every word."""
    return {
        word: {
            SHARE: hue_share(part, word),
            FOUND: hue_matches(part, word).astype(np.float64),
            LIKE: likeness(part, bare),
        }
        for word, part in images.items()
    }


def over(values: Mapping[str, Values], name: str, words: Iterable[str]) -> NDArray[np.float64]:
    """Of every object, the mean over words."""
    return np.asarray(np.mean([values[word][name] for word in words], axis=0))


def interval(
    rows: Sequence[NDArray[np.float64]],
    statistic: Callable[[NDArray[np.float64]], float] = lambda means: means[0],
) -> Spread:
    """A statistic of the rows' means over objects, and its 95 % bootstrap interval over objects."""
    values, count = np.stack(rows), len(OBJECTS)
    picks = np.random.default_rng(0).integers(count, size=(4000, count))
    low, high = np.quantile([statistic(m) for m in values[:, picks].mean(-1).T], [0.025, 0.975])
    return {"mean": float(statistic(values.mean(1))), "low": float(low), "high": float(high)}


def summary(values: Mapping[str, Values]) -> dict[str, Any]:
    words = {
        word: {name: float(part[name].mean()) for name in MEASURED}
        for word, part in values.items()
    }  # fmt: skip
    return {**{name: interval([over(values, name, values)]) for name in MEASURED}, "words": words}


def against(values: Mapping[str, Values], curve: Sequence[Mapping[str, Values]]) -> Spread:
    """Share of the hue less that of the curve, of the same words, where it is as much alike."""

    def difference(means: NDArray[np.float64]) -> float:
        (like, *likes), (share, *shares) = means.reshape(2, -1)
        x, y = np.array(sorted(zip(likes, shares, strict=True))).T
        return float(share - np.interp(like, x, y))

    levels = (values, *curve)
    return interval(
        [over(part, name, values) for name in (LIKE, SHARE) for part in levels], difference
    )


# --- pictures ------------------------------------------------------------------------------------

Words = dict[str, Images]  # the pictures of every colour word


def steered(
    pipe: Any, source: Adapter, words: Iterable[str], pairs: Sequence[Pair],
    scales: Mapping[str, Scale], bar: Any, apply_to: ApplyTo | None = None,
) -> dict[str, Words]:  # fmt: skip
    made: dict[str, Words] = {name: {} for name in scales}
    for word in words:
        load_vmix(pipe, source, {word: 1.0}, apply_to=apply_to)
        try:
            for name, scale in scales.items():
                set_vmix_scale(pipe, scale)
                made[name][word] = generate(pipe, pairs, bar)
        finally:
            unload_vmix(pipe)
    return made


@contextmanager
def added(pipe: Any, delta: torch.Tensor) -> Iterator[None]:
    """W_V·delta [prompts, tokens, d] on the values of the conditional pass."""
    both = torch.cat([torch.zeros_like(delta), delta])
    hooks = [
        module.to_v.register_forward_pre_hook(lambda _, given: (given[0] + both,))
        for name, module in pipe.unet.named_modules()
        if name.endswith(".attn2")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def by_token(pipe: Any, source: Adapter, pairs: Sequence[Pair], bar: Any) -> dict[str, Words]:
    """What adapters have no form for: f_a at some tokens only, or another one at every token."""
    tokenizer = pipe.tokenizer
    ids = tokenizer([p for p, _ in pairs], padding="max_length", return_tensors="pt").input_ids
    position, end = torch.arange(ids.shape[1]), (ids == tokenizer.eos_token_id).int().argmax(1)
    end = end[:, None]
    masks = (position >= end, position == end, (position > 0) & (position < end))
    made: dict[str, Words] = {name: {} for name in BY_TOKEN}
    for word in FEW:
        f_a = torch.utils.dlpack.from_dlpack(source.project({word: 1.0}))
        positive, empty = pipe.encode_prompt([word, ""], "cpu", 1, False)[0]
        deltas = [f_a * mask[..., None] for mask in masks]
        deltas.append(GAIN * (positive - empty).expand(len(pairs), -1, -1))
        for (name, scale), delta in zip(BY_TOKEN.items(), deltas, strict=True):
            with added(pipe, scale * delta):
                made[name][word] = generate(pipe, pairs, bar)
    return made


def named(pipe: Any, pairs: Sequence[Pair], objects: Sequence[str], bar: Any) -> Words:
    """What the adapter is compared with: the same noise, and the word in the prompt."""
    seeds = [seed for _, seed in pairs]
    return {
        word: generate(
            pipe,
            [(article(f"{word} {o}"), s) for o, s in zip(objects, seeds, strict=True)],
            bar,
        )
        for word in COLOURS
    }


def draw(bare: Images, made: Mapping[str, Words], fine: Words, prompted: Words) -> Any:
    def column(words: Words) -> Images:
        return np.stack([words[word][OBJECTS.index(name)] for word, name in GRID])

    columns = [("unsteered", "λ = 0", column(dict.fromkeys(COLOURS, bare)))]
    columns += [(f"λ = {s:g}", "training-free", column(made[f"{s:g}"])) for s in GRID_SCALES]
    columns += [(f"λ = {FINE:g}", FINE_LAYERS, column(fine))]
    columns += [("word in prompt", "no adapter", column(prompted))]
    groups = [("base", 1), ("adapter", len(GRID_SCALES)), ("fine", 1), ("prompt", 1)]
    return draw_grid(columns, [f"{name}, {word}" for word, name in GRID], groups)


# --- the plot ------------------------------------------------------------------------------------

INK = "#1f2328"
INKS = {
    "red": "#d1242f", "yellow": "#bf8700", "green": "#1a7f37",
    "blue": "#0969da", "purple": "#8250df", "pink": "#e275ad",
}  # fmt: skip


def means(levels: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    points = [(level[LIKE]["mean"], level[SHARE]["mean"]) for level in levels]
    return [x for x, _ in points], [y for _, y in points]


def cross(axis: Any, level: Mapping[str, Any], colour: str) -> None:
    """95 % intervals over objects."""
    a, b = level[LIKE], level[SHARE]
    axis.plot([a["low"], a["high"]], [b["mean"]] * 2, color=colour, lw=1, alpha=0.5)
    axis.plot([a["mean"]] * 2, [b["low"], b["high"]], color=colour, lw=1, alpha=0.5)


def plot(result: Mapping[str, Any], path: Path) -> None:
    canvas = Figure(figsize=(11, 4.6), layout="constrained", dpi=110)
    left, right = canvas.subplots(1, 2, sharey=True, sharex=True)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eaeef2")
        axis.set_axisbelow(True)
        axis.set_xlabel(f"{LIKE} (correlation of luma), falling to the right")
    left.set_ylabel("share of coloured pixels in the asked hue")
    start = result["unsteered"]
    lines = (
        ("strength", "#0969da", "training-free adapter, by λ", -6),
        ("strength, rare identifier", "#8c959f", "told from a rare identifier instead", 6),
    )
    for key, colour, label, aside in lines:
        curve = {"0": start, **result[key]}
        left.plot(*means(curve.values()), "o-", color=colour, ms=5, label=label)
        for scale, level in curve.items():
            cross(left, level, colour)
            if scale != "0":
                place = (level[LIKE]["mean"], level[SHARE]["mean"])
                left.annotate(
                    scale, place, (aside, -aside), textcoords="offset points", color=colour,
                    fontsize=9, ha="left" if aside > 0 else "right",
                    va="top" if aside > 0 else "bottom",
                )  # fmt: skip
    cross(left, result["prompt"], INK)
    left.plot(*means([result["prompt"]]), "*", color=INK, ms=14, label="the word in the prompt")
    left.set_title("mean over colours", fontsize=11)
    left.legend(loc="lower right", frameon=False)
    curve = {"0": start, **result["strength"]}
    for word in COLOURS:
        levels = [level["words"][word] for level in curve.values()]
        right.plot(
            [v[LIKE] for v in levels], [v[SHARE] for v in levels], "o-",
            color=INKS[word], ms=4, lw=1.5, label=word,
        )  # fmt: skip
        prompted = result["prompt"]["words"][word]
        right.plot(prompted[LIKE], prompted[SHARE], "*", color=INKS[word], ms=13)
    right.set_title("each colour; stars: its word in the prompt", fontsize=11)
    right.legend(loc="lower right", frameon=False)
    left.set_ylim(0, 1.02)
    left.invert_xaxis()
    canvas.savefig(path)


# --- tables of docs/training-free/README.md ------------------------------------------------------

AGAINST = "against the adapter"
ALIKE = "share against the adapter, equally alike"
NAMES = {
    FINE_LAYERS: "only in the layers of the highest resolution",
    "from the end of text on": "only from the end of text on",
    "end of text only": "only at the end of text",
    "words only": "only at the prompt's words",
    "difference of contexts": "at every token the difference of contexts",
    "both": 'both passes of guidance (`apply_to="both"`)',
    "contrast": 'opposite in the other pass (`"contrast"`)',
}


def spread(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.2f} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def strength_table(result: Mapping[str, Any]) -> str:
    levels = {"unsteered": result["unsteered"]}
    levels |= {f"λ = {scale}": level for scale, level in result["strength"].items()}
    levels["the word in the prompt"] = result["prompt"]
    lines = [
        [
            name,
            *(spread(level[m]) for m in (SHARE, FOUND)),
            "1" if name == "unsteered" else spread(level[LIKE]),
            spread(level[AGAINST], "+") if AGAINST in level else "",
        ]
        for name, level in levels.items()
    ]
    return rows(["", SHARE, "main hue is right", LIKE, ALIKE], lines)


def variants_table(result: Mapping[str, Any]) -> str:
    rare, variants = result["strength, rare identifier"], result["variants"]
    name = f"told from a rare identifier, `{result['settings']['rare identifier']}`"
    levels = [("" if place else name, scale, rare[scale]) for place, scale in enumerate(rare)]
    levels += [(NAMES[key], f"{variants[key]['strength']:g}", variants[key]) for key in NAMES]
    lines = [
        [name, scale, *(spread(level[m]) for m in (SHARE, LIKE)), spread(level[AGAINST], "+")]
        for name, scale, level in levels
    ]
    return rows(["", "λ", SHARE, LIKE, ALIKE], lines)


def measure(model: Path) -> tuple[dict[str, Any], Any]:
    """What the report says, and the grid."""
    pairs = [(article(name), SEED + index) for index, name in enumerate(OBJECTS)]
    pipe = open_pipeline(model)
    source, rare = (
        init_adapter(model, [f"{word}: {word}{end}" for word in COLOURS], training_free=True)
        for end in ("", f" | {RARE}")
    )
    fine = {
        "down": {"block_0": FINE, "block_1": 0},
        "mid": 0,
        "up": {"block_0": 0, "block_1": FINE},
    }
    sets = 1 + len(COLOURS) * (2 + len(SCALES) + len(RARE_SCALES))
    sets += len(FEW) * (len(BY_TOKEN) + len(POLICIES))
    with tqdm(total=sets * len(pairs), desc="pictures", unit="") as bar:
        bare = generate(pipe, pairs, bar)
        prompted = named(pipe, pairs, OBJECTS, bar)
        made = steered(pipe, source, COLOURS, pairs, {f"{s:g}": s for s in SCALES}, bar)
        others = steered(pipe, rare, COLOURS, pairs, {f"{s:g}": s for s in RARE_SCALES}, bar)
        variants = by_token(pipe, source, pairs, bar)
        variants |= steered(pipe, source, COLOURS, pairs, {FINE_LAYERS: fine}, bar)
        for policy, scale in POLICIES.items():
            variants |= steered(pipe, source, FEW, pairs, {policy: scale}, bar, policy)

    unsteered = measured(dict.fromkeys(COLOURS, bare), bare)
    strengths = {scale: measured(words, bare) for scale, words in made.items()}
    curve = [unsteered, *strengths.values()]

    def compared(words: Words) -> dict[str, Any]:
        values = measured(words, bare)
        return {**summary(values), AGAINST: against(values, curve)}

    used = [*BY_TOKEN.values(), FINE, *POLICIES.values()]
    result = {
        "settings": {
            "labels": list(COLOURS), "gain": GAIN,
            "apply_to": source.apply_to, "rare identifier": RARE,
            "prompts": [prompt for prompt, _ in pairs], "seeds": [seed for _, seed in pairs],
            "steps": STEPS, "guidance": GUIDANCE, "pictures": sets * len(pairs),
        },
        "unsteered": summary(unsteered),
        "prompt": compared(prompted),
        "strength": {scale: summary(values) for scale, values in strengths.items()},
        "strength, rare identifier": {scale: compared(words) for scale, words in others.items()},
        "variants": {
            name: {"strength": scale, **compared(words)}
            for (name, words), scale in zip(variants.items(), used, strict=True)
        },
    }  # fmt: skip
    return result, draw(bare, made, variants[FINE_LAYERS], prompted)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "training-free")
    parser.add_argument(
        "--plot-only",
        action="store_true",
        help="Draw the curve of report.json, and print its tables.",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "report.json"
    if not args.plot_only:
        result, picture = measure(args.model)
        data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        picture.save(args.out / "grid.png")
    result = json.loads(data.read_text(encoding="utf-8"))
    plot(result, args.out / "curve.png")
    print(strength_table(result), variants_table(result), sep="\n\n")


if __name__ == "__main__":
    main()
