"""What ends a fit with a sentence."""


class FitError(ValueError):
    """What was refused, what was expected and what was found."""
