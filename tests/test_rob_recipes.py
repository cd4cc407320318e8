"""RoB's recipes: the released settings are in them, and every student and variant that a header names can be built."""

import re
from pathlib import Path

import pytest
import torch

from trainer.models.backbones import build_backbone, num_features
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
ROB = sorted((RECIPES / "rob").glob("*.yaml"))
ALL = [*ROB, RECIPES / "ibot_vit_tiny.yaml", RECIPES / "msn_vit_tiny.yaml"]
STUDENTS = {
    "resnet18": {"ResNet-34", "ResNet-50", "MobileNetV2", "MobileNetV3-L", "EfficientNet-B0"},
    "vit_tiny": {"ViT-S"},
}
OVERRIDE = re.compile(r"[\w.]+=(?:\{[^}]*\}|\[[^\]]*\]|[^\s()]+)")


def variants(path: Path) -> dict[str, list[str]]:
    """What a header offers: "# NAME: key=value key=value"."""
    found: dict[str, list[str]] = {"as it is": []}
    for line in path.read_text().splitlines():
        name, _, rest = line.removeprefix("# ").partition(": ")
        if line.startswith("# ") and OVERRIDE.match(rest):
            found[name] = OVERRIDE.findall(rest)
    return found


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, ["data.train=train.beton", "run.dir=x", *overrides])


CASES = [(path, name) for path in ALL for name in variants(path)]


@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_every_student_and_variant_can_be_built(path: Path, name: str) -> None:
    recipe = load(path, *variants(path)[name])
    with torch.device("meta"):
        network = build_backbone(recipe.backbone)
        method = recipe.method.build(network, recipe.views.counts)
    assert num_features(network) > 0
    assert recipe.teacher.kind == ("frozen" if path in ROB else "ema")
    assert sum(p.numel() for p in method.parameters()) > 0


def test_there_is_a_recipe_for_each_method_and_student() -> None:
    names = {path.stem for path in ROB}
    assert names == {f"{m}_{s}" for m in ("dino", "ibot", "msn") for s in STUDENTS} | {"swav_resnet18"}
    for path in ROB:
        wanted = STUDENTS[path.stem.split("_", 1)[1]]
        assert wanted <= set(variants(path)), path
        assert "SSLight views" in variants(path), path


@pytest.mark.parametrize("path", ROB, ids=lambda path: path.stem)
def test_the_weights_are_the_plain_mean_over_robs_terms(path: Path) -> None:
    recipe = load(path)
    views = sum(recipe.views.counts)
    assert recipe.method.global_weight == pytest.approx(1 / (views - 1), abs=1e-6)  # type: ignore[union-attr]
    assert recipe.method.local_weight == pytest.approx((views - 2) / (views - 1), abs=1e-6)  # type: ignore[union-attr]
    assert recipe.method.pairing == "same_view"  # type: ignore[union-attr]


RELEASED = {
    "dino": (65536, 8, 300, 1024, 0.002, 10, (0.04, 0.4), (0.25, 1.0), (0.05, 0.25), 0.4),
    "swav": (3000, 4, 100, 4096, 4.8, 10, (1e-6, 1e-6), (0.14, 1.0), (0.05, 0.14), 0.8),
    "ibot": (8192, 10, 100, 1024, 0.002, 10, (0.04, 0.48), (0.25, 1.0), (0.05, 0.25), 0.4),
    "msn": (1024, 10, 150, 1024, 0.001, 15, (0.04, 0.4), (0.3, 1.0), (0.05, 0.3), 0.8),
}
"""Prototypes, local views, epochs, batch, peak rate, warm-up, weight decay, scales, colour strength x 0.8."""


@pytest.mark.parametrize("path", ROB, ids=lambda path: path.stem)
def test_the_released_settings_are_in_the_recipe(path: Path) -> None:
    recipe = load(path)
    optim, views = recipe.optim, recipe.views
    found = (
        recipe.method.num_prototypes, views.local_views.count, optim.epochs, optim.global_batch, optim.peak_lr,
        optim.warmup_epochs, (optim.weight_decay, optim.final_weight_decay), views.global_views.scale,
        views.local_views.scale, views.global_views.saturation,
    )  # type: ignore[union-attr]  # fmt: skip
    assert found == RELEASED[recipe.method.name]
    assert (views.global_views.size, views.local_views.size) == (224, 96)
    blurs_differ = recipe.method.name in ("dino", "ibot")
    assert views.global_views.blur_prob == ((1.0, 0.1) if blurs_differ else 0.5)
    assert views.global_views.solarize_prob == ((0.0, 0.2) if blurs_differ else 0.0)


def test_no_anti_collapse_is_left_but_swavs_sinkhorn() -> None:
    for path in ROB:
        plain = load(path).plain()["method"]
        assert plain.get("centering", "none") == "none", path
        assert plain.get("me_max_weight", 0) == 0, path
        assert plain.get("freeze_last_layer_epochs", 0) == plain.get("warmup_teacher_temp_epochs", 0) == 0, path
        assert plain.get("sinkhorn_iterations", 0) == (3 if plain["name"] == "swav" else 0), path
    msn = load(RECIPES / "rob/msn_vit_tiny.yaml").method
    assert msn.temperature * msn.sharpening == pytest.approx(0.025)  # type: ignore[union-attr]
    assert load(RECIPES / "rob/swav_resnet18.yaml").method.epsilon == 0.03  # type: ignore[union-attr]


def test_masks_follow_the_runs_seed() -> None:
    schedules = load(RECIPES / "ibot_vit_tiny.yaml", "seed=3").schedules(steps_per_epoch=10)
    assert {schedules.at(step).seed for step in (0, 25)} == {3}
