"""Accuracy of the joint linear probe on val images: centre crop, networks in eval mode, each image once."""

from typing import Any

import torch

from trainer import distributed, weights
from trainer.evals.features import reader_of
from trainer.evals.labels import count_classes
from trainer.evals.sources import Results, Source
from trainer.methods.joint_embedding import Method
from trainer.methods.probe import LinearProbe, percent_right
from trainer.recipe import Recipe, RecipeError


@torch.no_grad()
def evaluate_probe(recipe: Recipe, method: Method, device: torch.device) -> dict[str, float]:
    """The probe's top-1 in percent, under its name in metrics.jsonl; images are read as for the recipe's k-NN."""
    assert recipe.data.val is not None
    assert method.probe is not None
    networks = {"student": method.student.backbone}
    features = reader_of(recipe, device).features(networks, recipe.data.val)["student"]
    return {"probe/val_accuracy": float(percent_right(method.probe(features.vectors), features.labels))}


def run(source: Source) -> tuple[dict[str, Any], Results]:
    """What the joint probe of a run says of the val images, as during training; nothing is trained.

    raises: RecipeError if the run has no probe, or one for other classes
    """
    if "student" not in source.networks:
        raise RecipeError("linear_online is of the student alone; leave --networks away")
    num_classes, data = count_classes(source.recipe.data), source.recipe.data
    reader, probe = reader_of(source.recipe, distributed.local_device()), _load(source, num_classes)
    assert data.val is not None
    features = reader.features({"student": source.on(reader.device)["student"]}, data.val)["student"]
    with torch.no_grad():
        top1 = percent_right(probe.to(reader.device)(features.vectors), features.labels)
    return reader.stated(), {"student": {"top1": float(top1), "num_images": len(features.labels)}}


def _load(source: Source, num_classes: int) -> LinearProbe:
    folder = source.folders.get("student")
    if folder is None or not (folder / weights.PROBE).is_file():
        raise RecipeError(
            f"linear_online: wanted a run with `probe: true`, which leaves {weights.PROBE} beside its student, and "
            "there is none; take another run, or --protocol linear_cached"
        )
    state = weights.read_tensors(folder / weights.PROBE)
    of_probe, num_features = state["classifier.weight"].shape
    if of_probe != num_classes:
        raise RecipeError(
            f"linear_online: {folder} has a probe of {of_probe} classes, and the images have {num_classes}"
        )
    probe = LinearProbe(num_features, num_classes)
    probe.load_state_dict(state)
    return probe
