"""The gated recipes: published settings, variants that can be built, thin networks that cost what they say."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.test_rob_recipes import load, variants
from trainer.models.backbones import build_backbone, num_features
from trainer.models.gating import check_target, cost_at, is_gated
from trainer.recipe import Recipe

GATED = sorted((Path(__file__).parents[1] / "recipes/gated").glob("*.yaml"))
CASES = [(path, name) for path in GATED for name in variants(path)]
DENSE = {"cifar10": 555_417_600, "cifar100": 555_417_600, "stl10": 333_103_104, "imagenet100": 1_813_561_344}
BUDGETS = {"cifar10": 5, "cifar100": 5, "stl10": 5, "imagenet100": 3, "imagenet": 3}


def macs_of(network: nn.Module, size: int) -> float:
    """Of one image's convolutions, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").eval()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_every_variant_can_be_built_and_can_meet_its_budget(path: Path, name: str) -> None:
    recipe = load(path, *variants(path)[name])
    network, size = build_backbone(recipe.backbone), recipe.views.global_views.size
    check_target(network, [size])
    method = recipe.method.build(network, recipe.views.counts)
    assert bool(method.budgets) == is_gated(network) == (recipe.backbone.gates is not None)
    assert num_features(network) in (512, 1280)


HALF = "Gated, at half of the cost"
SMOKE = [path for path in sorted((GATED[0].parents[1] / "smoke").glob("*.yaml")) if HALF in variants(path)]


@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_a_smoke_recipe_that_offers_gates_can_meet_half_of_its_cost_at_every_view_size(path: Path) -> None:
    assert {path.stem for path in SMOKE} == {"barlow", "dino_sslight", "moco_demo", "swav_sslight"}
    recipe = load(path, *variants(path)[HALF])
    network = build_backbone(recipe.backbone)
    check_target(network, {view.size for view in recipe.views.each()})
    assert recipe.method.build(network, recipe.views.counts).budgets


THIN = [case for case in CASES if "hin" in case[1].split()[0]]


@pytest.mark.parametrize(("path", "name"), THIN, ids=lambda value: getattr(value, "stem", value))
def test_a_thin_network_costs_its_budget_within_a_fifth_of_a_point(path: Path, name: str) -> None:
    recipe, whole = (load(path, *variants(path)[name], *more) for more in ((), ("backbone.inner_width=1",)))
    size, budget = recipe.views.global_views.size, float(re.findall(r"budget (0\.\d)", name)[0])
    thin, dense = (macs_of(build_backbone(r.backbone), size) for r in (recipe, whole))
    assert thin / dense == pytest.approx(budget, abs=0.002)


def test_there_is_a_recipe_for_each_data_set_with_the_published_budgets() -> None:
    assert {path.stem.rsplit("_", 1)[1] for path in GATED} == set(BUDGETS)
    for path in GATED:
        names = variants(path)
        data_set = path.stem.rsplit("_", 1)[1]
        assert sum(name.startswith("Budget ") for name in names) == BUDGETS[data_set]
        assert sum(name.startswith("Thin from scratch") for name in names) == BUDGETS[data_set]
        if data_set in DENSE:
            recipe = load(path)
            assert cost_at(build_backbone(recipe.backbone), recipe.views.global_views.size).dense == DENSE[data_set]


@pytest.mark.parametrize("path", GATED, ids=lambda path: path.stem)
def test_the_released_settings_are_in_the_recipe(path: Path) -> None:
    recipe: Recipe = load(path)
    optim, view, gates = recipe.optim, recipe.views.global_views, recipe.backbone.gates
    assert gates is not None
    assert (optim.name, optim.peak_lr, optim.warmup_lr, optim.warmup_epochs) == ("lars", 0.6, 0.003, 10)
    assert (optim.global_batch, optim.weight_decay, optim.final_weight_decay) == (512, 1e-4, 1e-4)
    assert optim.epochs == (100 if path.stem.endswith("_imagenet") else 500)
    assert (view.scale, view.jitter_prob, view.solarize_prob) == ((0.2, 1.0), 0.8, 0.1)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
    assert view.blur_prob == ((0.0, 0.2) if "cifar100" in path.stem else 0.0)
    published = (gates.strength, gates.bound_weight, gates.penalty, gates.pairs, gates.initial_bias)
    assert published == (5.0, 1.0, "published", "cross", 0.0)
