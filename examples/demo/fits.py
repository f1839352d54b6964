"""Labels fitted from words, beside the words themselves, text pairs, and training on pictures.

    python examples/demo/fits.py

measures all of it on the demo's model and writes docs/demo/fitted: README.md from report.json.
Pictures are made by two processes; it takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import ways
from demo import FIT_PROMPTS as PROMPTS
from demo import FIT_STEPS, GUIDANCE, HERE, Images, fitted, generate, with_vmix
from demo import open_pipeline as open_demo
from matplotlib.figure import Figure
from objects import ObjectClassifier
from report import FIDELITY, PAIRS, by_way, cell, colour_of, concept_of, interval, measured, rows
from tqdm.auto import tqdm
from vmix import Adapter
from vmix.measures import MEASURES

OUT = HERE.parents[1] / "docs" / "demo" / "fitted"
SCALES = (0.5, 1.0, 1.5)
RANKS: Mapping[str, Any] = {"fitted, rank 4": 4, "fitted, rank 2": 2, "fitted, bias": "bias"}
OTHERS = (ways.PAIRS, ways.TRAINED)
WAYS = (ways.PROMPT, *RANKS, *OTHERS)
NUMBER = 40  # of prompts, where nothing else is said
NUMBERS, STEPS = (3, 6, 12, 24, 40, 60), (2, 4, 8, 15, 25)
OWN = dict(zip(ways.WORDS, MEASURES, strict=True))
TABLED = ("vibrant color", "natural lighting", "balanced composition")

Values = Mapping[str, Any]
_PROCESS: dict[str, Any] = {}
"""What a process opens once."""


def fit(pipe: Any, **options: Any) -> tuple[Adapter, float]:
    words = {name: (w["positive"], w["negative"]) for name, w in ways.WORDS.items()}
    return fitted(pipe, words, **{"prompts": PROMPTS[:NUMBER], **options})


# --- in a process of its own ---------------------------------------------------------------------


def begin(folder: str, count: int, objects: ObjectClassifier, fits: Mapping[str, bytes]) -> None:
    torch.set_num_threads(1)
    adapters = {way: Adapter.from_bytes(data) for way, data in fits.items()}
    _PROCESS.update(pipe=open_demo(), pairs=PAIRS[:count], objects=objects, adapters=adapters)
    _PROCESS["adapters"] |= {
        ways.PAIRS: Adapter.open(Path(folder) / "ablation" / "pairs.safetensors"),
        ways.TRAINED: Adapter.open(
            Path(folder).parents[1] / "comfy_nodes/demo/adapter.safetensors"
        ),
    }


def judged(images: Images) -> Values:
    pairs = _PROCESS["pairs"][: len(images)]
    prompts = [prompt for prompt, _ in pairs]
    return measured(
        images, [*map(colour_of, prompts)], [*map(concept_of, prompts)], _PROCESS["objects"]
    )


def sides(way: str, adapter: Adapter, label: str) -> tuple[dict[str, float], dict[str, float]]:
    if way in RANKS:
        return {label: 1.0}, {label: -1.0}
    return ways.sides(way, adapter, label)


def bare(guidance: float) -> Values:
    return judged(generate(_PROCESS["pipe"], _PROCESS["pairs"], guidance=guidance))


def both(task: tuple[float, str, float, str]) -> tuple[Values, Values]:
    """What is measured of the positive side and of the negative one."""
    guidance, way, scale, label = task
    pipe, pairs = _PROCESS["pipe"], _PROCESS["pairs"]
    if way == ways.PROMPT:
        words = ways.WORDS[label]
        told = [[(f"{p}, {words[end]}", s) for p, s in pairs] for end in ("positive", "negative")]
        made = [generate(pipe, part, guidance=guidance) for part in told]
    else:
        source = _PROCESS["adapters"][way]
        made = [
            with_vmix(pipe, source, pairs, side, scale, guidance=guidance)
            for side in sides(way, source, label)
        ]
    positive, negative = map(judged, made)
    return positive, negative


def point(task: tuple[int, int]) -> tuple[float, dict[str, Any]]:
    """Seconds of a fit with so many prompts and steps, and each label's effect at λ = 1."""
    number, steps = task
    pipe, pairs = _PROCESS["pipe"], _PROCESS["pairs"][:32]
    adapter, seconds = fit(pipe, prompts=PROMPTS[:number], steps=steps)
    found = {}
    for label in TABLED:
        made = [with_vmix(pipe, adapter, pairs, {label: w}) for w in (1.0, -1.0)]
        positive, negative = (MEASURES[OWN[label]](images) for images in made)
        found[label] = interval(positive - negative)
    return seconds, found


def cost(fits: bool) -> tuple[float, float]:
    """Seconds, and the most memory in MB, of drawing the prompts of a fit, or of fitting too."""
    pipe = open_demo()
    before = time.perf_counter()
    if fits:
        fit(pipe)
    else:
        pairs = [(prompt, i) for i, prompt in enumerate(PROMPTS[:NUMBER])]
        for first in range(0, len(pairs), 16):
            part = pairs[first : first + 16]
            pipe(
                [prompt for prompt, _ in part],
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                num_inference_steps=FIT_STEPS,
                guidance_scale=GUIDANCE,
                output_type="latent",
            )
    seconds = time.perf_counter() - before
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# --- all of it -----------------------------------------------------------------------------------


def measure(count: int, cache: Path) -> dict[str, Any]:
    context = get_context("spawn")

    def alone(fits: bool) -> tuple[float, float]:
        with ProcessPoolExecutor(1, context) as pool:  # of its own, for its memory
            return pool.submit(cost, fits).result()

    costs = {name: alone(fits) for name, fits in (("drawing", False), ("fitting", True))}
    pipe = open_demo()
    adapters = {way: fit(pipe, rank=rank)[0] for way, rank in RANKS.items()}
    fits, file = {}, cache / "fitted.safetensors"
    for way, adapter in adapters.items():  # processes are given bytes
        adapter.save(file)
        fits[way] = file.read_bytes()
    objects = ObjectClassifier.fit(cache)
    tasks = [
        (guidance, way, scale, label)
        for guidance in ways.GUIDANCES
        for way in WAYS
        for scale in ((1.0,) if way == ways.PROMPT else SCALES)
        for label in ways.WORDS
    ]
    points = [*dict.fromkeys([*((n, FIT_STEPS) for n in NUMBERS), *((NUMBER, s) for s in STEPS)])]
    begun = (str(HERE), count, objects, fits)
    with ProcessPoolExecutor(2, context, begin, begun) as pool:
        bases = [*pool.map(bare, ways.GUIDANCES)]
        found = [*tqdm(pool.map(both, tasks), total=len(tasks), desc="ways")]
        curve = [*tqdm(pool.map(point, points), total=len(points), desc="curve")]
    result: dict[str, Any] = {"guidance": {}}
    for guidance, base in zip(ways.GUIDANCES, bases, strict=True):
        levels = {name: interval(base[name]) for name in (*OWN.values(), *FIDELITY)}
        result["guidance"][f"{guidance:g}"] = {"base": levels, "ways": {}}
    lost: dict[tuple[str, str, str], dict[str, list[Any]]] = {}
    for (guidance, way, scale, label), (positive, negative) in zip(tasks, found, strict=True):
        part = result["guidance"][f"{guidance:g}"]
        row = part["ways"].setdefault(way, {}).setdefault(f"{scale:g}", {})
        row[label] = interval(positive[OWN[label]] - negative[OWN[label]])
        base = bases[ways.GUIDANCES.index(guidance)]
        kept = lost.setdefault((f"{guidance:g}", way, f"{scale:g}"), {n: [] for n in FIDELITY})
        for name in FIDELITY:
            kept[name].append((positive[name] + negative[name]) / 2 - base[name])
    for (guidance, way, scale), kept in lost.items():
        row = result["guidance"][guidance]["ways"][way][scale]
        row |= {name: interval(np.mean(parts, axis=0)) for name, parts in kept.items()}
    return {
        **result,
        "pairs": count,
        "prompts": NUMBER,
        "steps": FIT_STEPS,
        "cost": {name: {"seconds": s, "megabytes": m} for name, (s, m) in costs.items()},
        "effects": {
            way: {label.name: label.effect for label in adapter.labels}
            for way, adapter in adapters.items()
        },
        "warnings": adapters["fitted, rank 4"].made.get("warnings", []),
        "curve": [
            {"prompts": n, "steps": s, "seconds": seconds, "labels": labels}
            for (n, s), (seconds, labels) in zip(points, curve, strict=True)
        ],
    }


# --- the page ------------------------------------------------------------------------------------


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Each label's effect against the number of prompts, and of steps."""
    canvas = Figure(figsize=(11, 3.6), layout="constrained", dpi=110)
    axes = canvas.subplots(1, 2, sharey=True)
    told = result["guidance"][f"{GUIDANCE:g}"]["ways"][ways.PROMPT]["1"]
    inks = dict(zip(TABLED, ("#8250df", "#bf8700", "#0969da"), strict=True))
    for axis, key, fixed, value in (
        (axes[0], "prompts", "steps", FIT_STEPS),
        (axes[1], "steps", "prompts", NUMBER),
    ):
        shown = sorted((r for r in result["curve"] if r[fixed] == value), key=lambda r: r[key])
        for label, ink in inks.items():
            shares = [r["labels"][label]["mean"] / told[label]["mean"] for r in shown]
            axis.plot([r[key] for r in shown], shares, "o-", color=ink, label=label)
        axis.axhline(1, color="#8c959f", ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([r[key] for r in shown], [str(r[key]) for r in shown])
        axis.set_xlabel(f"{key} ({value} {fixed})")
        axis.grid(color="#eaeef2")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the words' effect")
    axes[0].legend(frameon=False, fontsize=9)
    canvas.savefig(path)


def numbers(result: Mapping[str, Any]) -> str:
    keys = [
        f"{what}_{side}"
        for what in ("explained", "size", "words")
        for side in ("positive", "negative")
    ]
    lines = [
        [label, *(f"{effect[key]:.1%}" for key in keys)]
        for label, effect in result["effects"]["fitted, rank 4"].items()
    ]
    return rows(["label", *(key.replace("_", ", ") for key in keys)], lines)


def curve(result: Mapping[str, Any]) -> str:
    lines = [
        [
            f"{r['prompts']}", f"{r['steps']}", f"{r['seconds']:.1f} s",
            *(cell(r["labels"][label]) for label in TABLED),
        ]
        for r in result["curve"]
    ]  # fmt: skip
    return rows(["prompts", "steps", "time, one core", *TABLED], lines)


NOTES = """\
- **Colour and light**: at λ = 1 a fitted label does what its words do, +0.26 against +0.27 and
  +0.46 against +0.45 at guidance 3, +0.28 against +0.26 and +0.41 against +0.40 at 7.5.
- **Composition**: three quarters of what the words do at guidance 3 (−0.35 against −0.46), half
  at 7.5 (−0.24 against −0.47), and nine tenths at λ = 1.5 with either. Half a λ does little:
  this model moves an object or does not.
- **Focus**: the words do nothing on this base, nor does the fit, which warns of it.
- **Rank**: 2 does nearly what 4 does. One row for all tokens (*bias*) does as much for colour
  and more than the words for light, less for composition, and at 7.5 the prompt's colour is
  lost in an eighth of the pictures.
- **The prompt** is met as with the words: its colour in as many pictures at guidance 3 and in 2
  % fewer at 7.5, its object in 7 % and 6 % fewer pictures, with the words in 6 % and 3 %.
- **Prompts and steps** hardly matter here: all intervals of the last table overlap.
"""


def text(result: Mapping[str, Any]) -> str:
    drawing, fitting = result["cost"]["drawing"], result["cost"]["fitting"]
    warned = "\n".join(f"- {line}" for line in result["warnings"])
    return f"""# Labels fitted from words

    python examples/demo/fits.py

measures all of this on the demo's model (64 px, 25 steps) and writes this page from
[report.json](report.json). Labels are fitted with {result["prompts"]} prompts of objects that no
measure uses ([fit_prompts.txt](../../../examples/demo/fit_prompts.txt)), {result["steps"]} steps,
guidance {GUIDANCE:g}. Measured on {result["pairs"]} held-out pairs of prompt and seed: the change
from a label's negative side to its positive side on the label's own measure, and what both sides
cost of the prompt's colour and object against the base. Square brackets are 95 % bootstrap
intervals over pairs. How the ways other than fitting are made is told in [the demo
report](../README.md#three-ways-to-a-label).

{NOTES.strip()}

## Effects

{by_way(result["guidance"], OWN)}

## Cost

Four labels, eight sides, two cores: drawing the {result["prompts"]} prompts takes
{drawing["seconds"]:.1f} s and {drawing["megabytes"]:.0f} MB, and fitting the labels while they are
drawn {fitting["seconds"]:.1f} s and {fitting["megabytes"]:.0f} MB, everything that the process has
loaded included.

## What the fit says of itself

`explained` is the share of what the words change in the attention's output that the rows reproduce,
on prompts that were not fitted; `size` is what the rows change, relative to the output; `words` is
what the words change.

{numbers(result)}

{warned}

## How many prompts, how many steps

32 pairs, guidance {GUIDANCE:g}, λ = 1, rank 4.

{curve(result)}

![Share of the words' effect against the number of prompts and of steps](curve.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "vmix-demo")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="Fewer, for a quick look.")
    parser.add_argument("--text-only", action="store_true", help="Rewrite README from report.json.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    data = args.out / "report.json"
    if not args.text_only:
        result = measure(args.pairs, args.cache)
        data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(data.read_text(encoding="utf-8"))
    plot(result, args.out / "curve.png")
    (args.out / "README.md").write_text(text(result), encoding="utf-8")


if __name__ == "__main__":
    main()
