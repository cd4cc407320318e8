"""What can be evaluated: a run of ours, a weights folder, a timm network; always beside what it must beat."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from trainer import weights
from trainer.assemble import build_method, seed_everything
from trainer.evals.features import Pixels
from trainer.recipe import Recipe, RecipeError
from trainer.recipe_file import load_recipe


@dataclass
class Source:
    """Networks to evaluate by name, and where each came from."""

    recipe: Recipe
    networks: dict[str, nn.Module]
    origins: dict[str, str] = field(default_factory=dict)
    """What identifies each network: the hash of its weights, or how it was made."""


def open_run(run_dir: Path, overrides: list[str]) -> Source:
    """A run's student and teacher, with the untrained network of the same recipe and raw pixels beside them.

    raises: RecipeError if the folder holds no run with weights; WeightsError if weights and recipe differ
    """
    if not (run_dir / "resolved.yaml").is_file():
        raise RecipeError(f"{run_dir}: no resolved.yaml; wanted the run.dir of a `trainer pretrain`")
    recipe = load_recipe(run_dir / "resolved.yaml", overrides)
    branches = sorted(path.parent for path in (run_dir / "weights").glob(f"*/{weights.MODEL}"))
    if not branches:
        raise RecipeError(f"{run_dir}: no weights yet; the run has not reached its first checkpoint")
    source = Source(
        recipe,
        {"pixels": Pixels(), "untrained": build_method(recipe).student.backbone},
        {"pixels": "16 x 16 raw pixels", "untrained": f"the same network as initialised by seed {recipe.seed}"},
    )
    for folder in branches:
        source.networks[folder.name] = weights.load_backbone(folder)[0]
        with (folder / weights.MODEL).open("rb") as file:
            source.origins[folder.name] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    seed_everything(recipe.seed)
    return source
