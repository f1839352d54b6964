"""Adapters from words: labels fitted on a base by forward passes alone.

A label's words, put into the prompt, change what every cross-attention layer returns. A fit finds
the values V_a that make the same change through the bare prompt's own attention map.

This package knows no host: `vmix.diffusers.fit_vmix` and the command `vmix fit` draw the pictures,
`Collector` rides along, `fitted_adapter` solves.
"""

from vmix.fit.collect import Collector, Picture
from vmix.fit.errors import FitError
from vmix.fit.labels import LABEL_SETS, FitLabel, read_labels
from vmix.fit.prompts import Plan, Side, bare, read_prompts, with_words
from vmix.fit.report import Effect, table
from vmix.fit.result import Fitted, check_rank, fitted_adapter
from vmix.fit.solve import FittedSide
from vmix.fit.sums import Sums, sums_size

__all__ = [
    "LABEL_SETS",
    "Collector",
    "Effect",
    "FitError",
    "FitLabel",
    "Fitted",
    "FittedSide",
    "Picture",
    "Plan",
    "Side",
    "Sums",
    "bare",
    "check_rank",
    "fitted_adapter",
    "read_labels",
    "read_prompts",
    "sums_size",
    "table",
    "with_words",
]
