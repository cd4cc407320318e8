"""Accuracy of the joint linear probe on val images: centre crop, networks in eval mode, each image once."""

import torch

from trainer.evals.features import reader_of
from trainer.methods.joint_embedding import Method
from trainer.methods.probe import percent_right
from trainer.recipe import Recipe


@torch.no_grad()
def evaluate_probe(recipe: Recipe, method: Method, device: torch.device) -> dict[str, float]:
    """The probe's top-1 in percent, under its name in metrics.jsonl; images are read as for the recipe's k-NN."""
    assert recipe.data.val is not None
    assert method.probe is not None
    networks = {"student": method.student.backbone}
    features = reader_of(recipe, device).features(networks, recipe.data.val)["student"]
    return {"probe/val_accuracy": float(percent_right(method.probe(features.vectors), features.labels))}
