"""Objectives without images: the base itself, steered in another way, is the teacher.

The student is the base with VMix and the bare prompt, on noised pictures of the base's own: half of
them without labels, half as the teacher draws one label, since that is what the student will see of
its own pictures when it follows. The teacher's prediction is the base's own plus what every label i at weight w_i should change:

    text-pairs    s(w)·η·(ε(x, t, prompt + positive) − ε(x, t, prompt + negative))
    lora          ε_LoRA(x, t, prompt) − ε(x, t, prompt),   LoRA at scale negative + w·(positive − negative)

With a negative, s(w) = 2w − 1: the label pushes both ways, as a Concept Slider (Gandikota et al. 2023),
and changes nothing at w = ½. Without one, s(w) = w, the bare prompt stands in its place, and the label
changes nothing at w = 0. Several labels add up, which stacked LoRAs do not.

Words take the place of {words} in a prompt, else --teacher_template says where they go.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmix.fit.prompts import PLACE, bare
from vmix.loading import WeightsError, check_lora
from vmix.train.base import Base
from vmix.train.cache import Store, in_parts, key_of, store_texts
from vmix.train.errors import TrainingError, complain
from vmix.train.labels import read_labels
from vmix.train.model import ValueBranch
from vmix.train.objective import Batch, Chances, step_size, weighted_loss
from vmix.train.options import read_lines, read_yaml
from vmix.train.order import Order, generator

_ACTIVE = (0.1, 0.5, 0.2, 0.2)
"""Shares of examples with no label, one, two and any number of them away from neutral."""
_SAMPLES = 8  # made at a time, at most
Drawn = tuple[int, float] | None
"""A label and its weight, 1 or 0."""


def told(prompt: str, words: str, template: str) -> str:
    """The prompt that the teacher is given."""
    if PLACE in prompt:
        return prompt.replace(PLACE, words)
    return template.replace("{prompt}", prompt).replace(PLACE, words) if prompt else words


@dataclass(frozen=True)
class Words:
    """A label of text pairs."""

    positive: str
    negative: str | None

    @property
    def neutral(self) -> float:
        return 0.0 if self.negative is None else 0.5

    def push(self, weight: float) -> float:
        """s(w)."""
        return weight if self.negative is None else 2 * weight - 1


@dataclass(frozen=True)
class Lora:
    """A label of LoRA teachers: a file, and its scale at weight 1 and at weight 0."""

    file: Path
    positive: float
    negative: float

    def scale(self, weight: float) -> float:
        return self.negative + weight * (self.positive - self.negative)

    @property
    def neutral(self) -> float | None:
        """The weight whose scale is 0, if there is one."""
        place = self.negative / (self.negative - self.positive) + 0.0  # not -0
        return place if 0 <= place <= 1 else None


def distillation(
    base: Base, branch: ValueBranch, args: argparse.Namespace, world: int
) -> Distillation:
    labels = read_labels(args.labels)
    given: Any = {}
    if args.teachers is not None:
        problem, given = read_yaml(args.teachers)
        if problem or not isinstance(given, dict):
            raise TrainingError(f"--teachers {args.teachers}: {problem or 'expected labels'}")
        unknown = sorted(set(map(str, given)) - {label.name for label in labels})
        complain(f"--teachers {args.teachers}", [f"unknown label '{name}'" for name in unknown])
    names = [label.name for label in labels]
    prompts = read_lines(args.prompts, "--prompts")
    if args.objective == "text-pairs":
        words = [_words(label.positive[0], given.get(label.name)) for label in labels]
        return TextPairs(base, names, prompts, words, args, world)
    loras = [_lora(args.teachers, name, given.get(name)) for name in names]
    return Loras(base, names, prompts, loras, args, world)


def _words(default: str, entry: Any) -> Words:
    pair = {"positive": entry} if isinstance(entry, str) else entry or {}
    words = pair if isinstance(pair, dict) else {"positive": None}
    positive, negative = words.get("positive", default), words.get("negative")
    if not isinstance(positive, str) or not isinstance(negative, (str, type(None))):
        raise TrainingError(f"--teachers: expected words as positive and negative, found {entry}")
    return Words(positive, negative)


def _lora(listing: Path, name: str, entry: Any) -> Lora:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise TrainingError(f"--teachers {listing}: label '{name}' needs a file")
    file = listing.parent / entry["file"]
    if not file.is_file() or file.suffix != ".safetensors":
        raise TrainingError(f"--teachers {listing}: label '{name}': no .safetensors file {file}")
    positive, negative = entry.get("positive", 1.0), entry.get("negative", 0.0)
    if not all(isinstance(v, (int, float)) for v in (positive, negative)) or positive == negative:
        raise TrainingError(f"--teachers {listing}: label '{name}' needs two different scales")
    return Lora(file, float(positive), float(negative))


class Distillation:
    """Noised pictures of the base's own, and a teacher's prediction on them."""

    name = ""
    weights_shared = False

    def __init__(
        self,
        base: Base,
        labels: Sequence[str],
        prompts: Sequence[str],
        teachers: Sequence[Words | Lora],
        args: argparse.Namespace,
        world: int,
    ) -> None:
        self.base, self.labels, self.prompts, self.args = base, labels, list(prompts), args
        self.neutral = {n: t.neutral for n, t in zip(labels, teachers, strict=True)}
        self.rest = torch.tensor([t.neutral or 0.0 for t in teachers])
        count = len(self.prompts) * args.samples_per_prompt
        self.order = Order([0] * count, args.train_batch_size * world, args.seed)
        self.step = step_size(args, world)
        self.side = args.resolution or base.resolution
        self.texts = self.samples = Store(args.cache_dir)

    def captions(self) -> list[str]:
        """All texts that either side is given."""
        return ["", *map(bare, self.prompts)]

    def prepare(self, bar: Any, rank: int, world: int, together: Any) -> None:
        args, base = self.args, self.base
        self.texts = Store(args.cache_dir / base.fingerprint() / "texts")
        store_texts(base, self.texts, self.captions(), bar, rank, world)
        recipe = key_of(
            base.fingerprint(unet=True), args.seed, self.side,
            base.scheduler.config.prediction_type, base.scheduler.config.rescale_betas_zero_snr,
            args.sample_guidance, args.sample_steps, *self.prompts, *self._means(),
        )  # fmt: skip
        self.samples = Store(args.cache_dir / f"samples-{recipe}")
        count = len(self.prompts) * args.samples_per_prompt
        drawn: dict[Drawn, list[int]] = {}
        for index in range(count):
            drawn.setdefault(self._drawn(index), []).append(index)
        # A process's own are the same whatever the others have written by now.
        todo = [
            [i for i in group[rank::world] if str(i) not in self.samples]
            for group in drawn.values()
        ]
        size = min(_SAMPLES, args.train_batch_size)
        parts = [part for group in todo for part in in_parts(group, size)]
        for part in bar(parts, desc="The base's own pictures"):
            latents = self._draw(part)
            self.samples.put({str(i): {"latents": x} for i, x in zip(part, latents, strict=True)})
        together()
        self.texts.refresh()
        self.samples.refresh()
        base.place_encoders("cpu")

    def _prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def _drawn(self, index: int) -> Drawn:
        """Which label a picture is drawn with, and at which of its ends; every other has none."""
        turn, place = divmod(index, len(self.prompts))
        if turn % 2 == 0:
            return None
        side, label = divmod(turn // 2 + place, len(self.labels))
        return label, float(self.rest[label] == 0 or side % 2 == 0)

    @torch.no_grad()
    def _draw(self, numbers: Sequence[int]) -> Tensor:
        """Pictures that have the same label."""
        args, base, drawn = self.args, self.base, self._drawn(numbers[0])
        random = [generator(args.seed, 5, number) for number in numbers]
        prompts = [self._prompt(number) for number in numbers]
        exact = torch.autocast(base.device.type, base.dtype, base.dtype != torch.float32)
        with self._as_taught(prompts, drawn) as texts, exact:
            return base.pipe(  # type: ignore[no-any-return]
                texts,
                height=self.side,
                width=self.side,
                generator=random,
                num_inference_steps=args.sample_steps,
                guidance_scale=args.sample_guidance,
                output_type="latent",
            ).images.float()

    def _means(self) -> list[str]:
        """All that the pictures depend on of the teacher."""
        raise NotImplementedError

    @contextmanager
    def _as_taught(self, prompts: Sequence[str], drawn: Drawn) -> Iterator[list[str]]:
        """The prompts as the pipeline is given them, while it draws as the teacher does."""
        raise NotImplementedError

    def dataset(self) -> torch.utils.data.Dataset[Batch]:
        count = len(self.prompts) * self.args.samples_per_prompt
        return _Samples([(self._prompt(i), self._drawn(i)) for i in range(count)], self.samples)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        base, args = self.base, self.args
        latents = batch["latents"].to(base.device)
        last = base.scheduler.config.num_train_timesteps - 1
        chances = Chances.of(
            batch["number"], args.seed, latents.shape[1:], len(self.labels), self.step, last
        )
        noise, timesteps = chances.noise.to(latents), chances.timesteps.to(base.device)
        noisy = base.scheduler.add_noise(latents, noise, timesteps).to(base.dtype)
        dropped = chances.drop < (args.text_dropout if args.apply_to == "both" else 0.0)
        prompts = ["" if d else p for d, p in zip(dropped, batch["prompt"], strict=True)]
        weights = self._weights(batch["number"], batch["drawn"])
        with torch.no_grad():
            target = self._teach(model, noisy, timesteps, prompts, weights)
        context, conditions = self._conditions(prompts)
        prediction: Tensor = model(
            noisy, timesteps, context, weights.to(base.device), None, conditions
        )
        return weighted_loss(base, prediction, target, timesteps, args.snr_gamma)

    def _weights(self, numbers: Sequence[int], drawn: Sequence[Drawn]) -> Tensor:
        """[B, N]: which labels an example has is drawn for it, that of its picture first; how much
        of each is drawn for it too, or for the whole batch where the teacher is slower otherwise.
        """
        rows = []
        for number, own in zip(numbers, drawn, strict=True):
            random = generator(self.args.seed, 3, number)
            kind = int(torch.multinomial(torch.tensor(_ACTIVE), 1, generator=random))
            order = torch.randperm(len(self.labels), generator=random)
            if kind == 3:
                kind = int(torch.randint(1, len(self.labels) + 1, (), generator=random))
            if self.weights_shared:
                random = generator(self.args.seed, 4, number // self.order.batch)
            ends, between, where = torch.rand(3, len(self.labels), generator=random)
            # What changes nothing at 0 has one end.
            values = torch.where(where < 0.5, ((ends < 0.5) | (self.rest == 0)).float(), between)
            if own is not None:
                label, end = own
                order = torch.cat([torch.tensor([label]), order[order != label]])
                if not self.weights_shared and self.rest[label] and (values[label] > 0.5) != end:
                    values[label] = 1 - values[label]  # the side that the picture is on
            row = self.rest.clone()
            row[order[:kind]] = values[order[:kind]]
            rows.append(row)
        return torch.stack(rows)

    def _conditions(self, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor] | None]:
        found = [self.texts[key_of(bare(prompt))] for prompt in prompts]
        context, pooled = (
            torch.stack([text[part] for text in found]).to(self.base.device)
            for part in ("context", "pooled")
        )
        sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side]).float()
        return context, self.base.conditions(pooled, sizes.expand(len(prompts), -1))

    def _own(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """The base's prediction, without values, in parts no larger than the batch."""
        size = self.args.train_batch_size
        parts = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            context, conditions = self._conditions(prompts[part])
            parts.append(
                model(noisy[part], timesteps[part], context, None, None, conditions).float()
            )
        return torch.cat(parts)

    def _teach(
        self,
        model: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        prompts: Sequence[str],
        weights: Tensor,
    ) -> Tensor:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        args = self.args
        return {
            "objective": self.name,
            "prompts": len(self.prompts),
            "samples_per_prompt": args.samples_per_prompt,
            "sample_guidance": args.sample_guidance,
            "sample_steps": args.sample_steps,
            "resolution": self.side,
            **({"text_dropout": args.text_dropout} if args.apply_to == "both" else {}),
        }

    def contents(self) -> str:
        return f"{len(self.prompts)} prompts ({key_of(*self.prompts, *self._means())[:8]})"


class TextPairs(Distillation):
    """The teacher is told in words."""

    name = "text-pairs"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.words: Sequence[Words] = given[3]

    def captions(self) -> list[str]:
        both = {w for pair in self.words for w in (pair.positive, pair.negative) if w is not None}
        return [
            *super().captions(),
            *(self._told(prompt, words) for prompt in ("", *self.prompts) for words in both),
        ]

    def _means(self) -> list[str]:
        words = [f"{pair.positive} | {pair.negative}" for pair in self.words]
        return [self.args.teacher_template, *words]

    @contextmanager
    def _as_taught(self, prompts: Sequence[str], drawn: Drawn) -> Iterator[list[str]]:
        texts = [bare(prompt) for prompt in prompts]
        if drawn is not None:
            words = self.words[drawn[0]]
            text = words.positive if drawn[1] or words.negative is None else words.negative
            texts = [self._told(prompt, text) for prompt in prompts]
        with self.base.without_lora():  # a resumed run's is trained already
            yield texts

    def _told(self, prompt: str, words: str) -> str:
        return told(prompt, words, self.args.teacher_template)

    def _teach(
        self,
        model: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        prompts: Sequence[str],
        weights: Tensor,
    ) -> Tensor:
        # Rows of the batch that are seen with other texts, and by how much these count; by how much
        # the rows' own predictions do.
        rows, texts, factors = [], [], []
        own = [1.0] * len(prompts)
        for row, prompt in enumerate(prompts):
            for words, weight in zip(self.words, weights[row].tolist(), strict=True):
                if weight == words.neutral:
                    continue
                push: float = self.args.teacher_strength * words.push(weight)
                rows.append(row)
                texts.append(self._told(prompt, words.positive))
                factors.append(push)
                if words.negative is None:
                    own[row] -= push
                else:
                    rows.append(row)
                    texts.append(self._told(prompt, words.negative))
                    factors.append(-push)
        places = [*range(len(prompts)), *rows]
        with self.base.without_lora():
            predictions = self._own(model, noisy[places], timesteps[places], [*prompts, *texts])
        index = torch.tensor(places, device=predictions.device)
        scale = torch.tensor([*own, *factors], device=predictions.device)[:, None, None, None]
        return torch.zeros_like(predictions[: len(prompts)]).index_add(
            0, index, scale * predictions
        )

    def record(self) -> dict[str, Any]:
        pairs: Mapping[str, Any] = {
            name: [words.positive, words.negative]
            for name, words in zip(self.labels, self.words, strict=True)
        }
        more = {key: getattr(self.args, key) for key in ("teacher_strength", "teacher_template")}
        return {**super().record(), "pairs": pairs, **more}


class Loras(Distillation):
    """The teachers are LoRAs of the U-Net, one per label."""

    name = "lora"
    weights_shared = True  # a LoRA has one scale at a time

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.loras: Sequence[Lora] = given[3]
        for number, lora in enumerate(self.loras):
            self._load(lora, f"teacher{number}")
        self.base.unet.requires_grad_(False)
        self.base.restore_lora()

    def _load(self, lora: Lora, name: str) -> None:
        pipe, unet = self.base.pipe, self.base.unet
        try:
            found = pipe.lora_state_dict(str(lora.file), unet_config=unet.config)
            state, alphas = found[0], found[1]
            kept = {k: v for k, v in state.items() if not k.startswith("text_encoder")}
            if len(kept) < len(state):
                print(f"{lora.file}: its part for the text encoder is left out")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of adapters that are there already
                pipe.load_lora_into_unet(kept, network_alphas=alphas, unet=unet, adapter_name=name)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise TrainingError(f"{lora.file} is no LoRA of this base: {error}") from error
        if name not in getattr(unet, "peft_config", {}):
            raise TrainingError(f"{lora.file} has no LoRA of a U-Net")
        try:
            check_lora(kept, name, unet)
        except WeightsError as error:
            raise TrainingError(f"{lora.file}: {error}") from error

    def _means(self) -> list[str]:
        return [
            f"{hashlib.sha256(lora.file.read_bytes()).hexdigest()} {lora.negative} {lora.positive}"
            for lora in self.loras
        ]

    @contextmanager
    def _as_taught(self, prompts: Sequence[str], drawn: Drawn) -> Iterator[list[str]]:
        texts = [bare(prompt) for prompt in prompts]
        scale = 0.0 if drawn is None else self.loras[drawn[0]].scale(drawn[1])
        if drawn is None or scale == 0:
            with self.base.without_lora():
                yield texts
        else:
            with self._taught(drawn[0], scale):
                yield texts

    @contextmanager
    def _taught(self, number: int, scale: float) -> Iterator[None]:
        unet = self.base.unet
        unet.set_adapters([f"teacher{number}"], [scale])
        unet.enable_adapters()
        try:
            yield
        finally:
            for name, parameter in unet.named_parameters():
                if ".teacher" in name:  # becoming active made it trainable
                    parameter.requires_grad_(False)
            self.base.restore_lora()

    def _teach(
        self,
        model: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        prompts: Sequence[str],
        weights: Tensor,
    ) -> Tensor:
        with self.base.without_lora():
            own = self._own(model, noisy, timesteps, prompts)
        target = own.clone()
        for number, lora in enumerate(self.loras):
            column = weights[:, number]
            # At its rest a LoRA's scale is 0, but for rounding.
            rest = float("nan") if lora.neutral is None else float(self.rest[number])
            rows = [r for r, w in enumerate(column.tolist()) if w != rest and lora.scale(w) != 0]
            # All rows of a batch that have the label have it at one weight, or at its rest.
            for weight in sorted({float(column[r]) for r in rows}):
                same = [r for r in rows if float(column[r]) == weight]
                with self._taught(number, lora.scale(weight)):
                    seen = self._own(
                        model, noisy[same], timesteps[same], [prompts[r] for r in same]
                    )
                target[same] += seen - own[same]
        return target

    def record(self) -> dict[str, Any]:
        teachers = {
            name: [lora.file.name, lora.negative, lora.positive]
            for name, lora in zip(self.labels, self.loras, strict=True)
        }
        return {**super().record(), "teachers": teachers}


@dataclass(frozen=True)
class _Samples(torch.utils.data.Dataset[Batch]):
    """Prompts, and how their pictures were drawn. It knows no models: workers may be sent it."""

    prompts: Sequence[tuple[str, Drawn]]
    latents: Store

    def __getitem__(self, place: Any) -> Batch:
        number, index = place
        prompt, drawn = self.prompts[index]
        latents = self.latents[str(index)]["latents"]
        return {"number": number, "prompt": prompt, "drawn": drawn, "latents": latents}
