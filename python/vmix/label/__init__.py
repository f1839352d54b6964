"""Labels for training, proposed by measures: `vmix label`, described in docs/training.md."""
