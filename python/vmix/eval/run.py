"""The command: pictures, then measures, then tables, plots and the preference page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from vmix.eval.errors import EvalError, PictureError
from vmix.eval.measuring import measure_rows, write_json, write_text
from vmix.eval.metrics import FID, open_metrics
from vmix.eval.options import parse_args
from vmix.eval.pictures import Gallery, Protocol, make_pictures, try_rows
from vmix.eval.pipelines import DTYPES, Pipelines
from vmix.eval.plots import plot_grid, plot_sweeps
from vmix.eval.preference import tally, write_page
from vmix.eval.prompts import PromptSet, read_prompts, read_references
from vmix.eval.results import FEW, results, text
from vmix.eval.rows import Comparison, rows_of_file, rows_of_flags, sweeps
from vmix.eval.weights import find_weights, is_standard

PATIENCE = timedelta(days=30)
"""For the slowest process; the usual ten minutes are less than one GPU may be behind another."""


class Evaluation:
    """One run of the command, in each of its processes."""

    def __init__(self, args: argparse.Namespace, state: PartialState) -> None:
        self.args, self.state = args, state
        self.comparison = _rows(args)
        self.prompts = _prompts(args)
        self.weights = find_weights(args, len(self.prompts.references))
        texts = [prompt for prompt in self.prompts.prompts for _ in range(args.samples)]
        dtype = args.dtype or ("f16" if state.device.type == "cuda" else "f32")
        protocol = Protocol(args.seed, args.steps, args.guidance, args.size, dtype)
        self.gallery = Gallery(args.out, texts, protocol, args.batch_size)

    def run(self) -> None:
        if self.state.is_main_process:
            # Weights that are not what they should be are told of now, not after the pictures.
            open_metrics(
                self.args.metrics, self.weights, self.prompts.references, torch.device("cpu")
            )
        self._draw()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self._measure()

    def _draw(self) -> None:
        gallery, rows = self.gallery, self.comparison.rows
        missing = gallery.missing(rows, self.args.remake)
        self.state.wait_for_everyone()  # until all have looked
        todo = {
            name: batches[self.state.process_index :: self.state.num_processes]
            for name, batches in missing.items()
        }
        if not any(missing.values()):
            return
        pipelines = Pipelines(self.state.device, DTYPES[gallery.protocol.dtype])
        try_rows([row for row in rows if missing[row.name]], pipelines)
        self.state.wait_for_everyone()
        total = sum(last - first for batches in todo.values() for first, last in batches)
        hidden = not self.state.is_main_process
        with tqdm(total=total, desc="pictures", unit="img", disable=hidden) as bar:
            make_pictures(gallery, rows, todo, pipelines, bar.update)

    def _measure(self) -> None:
        gallery, comparison, args = self.gallery, self.comparison, self.args
        references = self.prompts.references
        metrics = open_metrics(args.metrics, self.weights, references, self.state.device)
        values = measure_rows(gallery, comparison.rows, metrics)
        fid = any(FID in columns for columns in values.values())
        result = results(
            comparison, gallery, values, len(references) if fid else 0, self._notes(fid)
        )
        write_json(args.out / "results.json", result)
        levels = {row["name"]: row["values"] for row in result["rows"]}
        plots = [("Prompts by rows", "grid.png")]
        found = sweeps(comparison.rows)
        if found:
            plot_sweeps(found, levels, args.out / "scales.png")
            plots.insert(0, ("Measures against λ", "scales.png"))
        plot_grid(gallery, comparison.rows, args.out / "grid.png")
        write_text(args.out / "results.md", text(result, comparison.rows, plots))
        if args.preference:
            _page(args)
        for note in result["notes"]:
            print(note)
        print(f"see {args.out / 'results.md'}")

    def _notes(self, fid: bool) -> list[str]:
        notes = [f"Left out: {why}." for why in self.weights.absent.values()]
        count = len(self.gallery.prompts)
        if fid and count < FEW:
            notes.append(
                f"FID of {count} pictures is far above that of many; compare rows, and no other "
                "numbers."
            )
        if fid and self.weights.inception and not is_standard(self.weights.inception):
            notes.append(
                f"{self.weights.inception.name} is not the usual file of Inception, so FID is not "
                "what others mean by it."
            )
        return notes


def _rows(args: argparse.Namespace) -> Comparison:
    return rows_of_file(args.rows, args.base) if args.rows else rows_of_flags(args)


def _prompts(args: argparse.Namespace) -> PromptSet:
    found = read_prompts(args.prompts)
    references = read_references(args.reference) if args.reference else found.references
    return PromptSet(found.prompts[: args.limit], references)


def _page(args: argparse.Namespace) -> None:
    print(f"see {write_page(args.out, args.preference, args.pairs, args.seed)}")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args = parse_args(argv)
        if args.tally:
            print(tally(args.tally))
        elif args.prompts is None:
            _page(args)
        else:
            cpu = bool(parse_flag_from_env("ACCELERATE_USE_CPU"))  # `accelerate launch --cpu`
            Evaluation(args, PartialState(cpu, timeout=PATIENCE)).run()
    except PictureError as error:
        raise SystemExit(f"vmix eval: {error}") from None
    except (EvalError, OSError) as error:  # the same in every process
        first = not dist.is_initialized() or dist.get_rank() == 0
        raise SystemExit(f"vmix eval: {error}" if first else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
