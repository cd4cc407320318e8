"""Evaluations: `trainer.evals.command` runs one by name, from a run, exported weights or a timm name."""
