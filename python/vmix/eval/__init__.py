"""Comparing adapters, strengths and baselines on prompts: `vmix eval`, see docs/evaluating.md."""
