"""Training of adapters: `python -m vmix.train`, described in docs/training.md."""
