"""The budget: penalties with their published values, and a controller that meets targets where those miss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_cost import NoOperatorReads, NothingIsCopied
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.budget import Budget, Spent, annealed, bound, density_for, lagrangian, published_penalty, spent
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.pairs import PAIRS
from trainer.methods.simsiam import SimSiamConfig
from trainer.methods.vicreg import VICReg, VICRegConfig
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.gates import Gates
from trainer.models.gating import cost_at, gate_parameters, gated_pass, gates_of
from trainer.optim import Optim, build_optimizer, param_groups, set_progress
from trainer.schedules import Progress

SIZE = 32
GATES = Gates(target=0.75, initial_bias=0.0, anneal=0.0)
BACKBONE = Backbone(
    name="resnet18", gates=GATES, args={"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], "stem_width": 8}
)
COUNTS = ViewCounts(2, 0)
OPTIM = Optim(
    name="adamw",
    epochs=1,
    global_batch=8,
    base_lr=0.1,
    final_lr=0,
    warmup_epochs=0,
    weight_decay=0,
    final_weight_decay=0,
)


def at(done: float) -> Progress:
    return Progress(step=0, epoch=0, lr=0.1, weight_decay=0, momentum=0, done=done)


def gated(**changes: object) -> VICReg:
    torch.manual_seed(0)
    backbone = build_backbone(replace(BACKBONE, gates=replace(GATES, **changes)))  # type: ignore[arg-type]
    return VICRegConfig(name="vicreg", hidden_dim=16, out_dim=16).build(backbone, COUNTS)


def views(batch: int = 8, seed: int = 0) -> list[Tensor]:
    return [torch.randn(2 * batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("ratio", "target", "expected"),
    [
        (0.01497626, 0.1, 0.03614518), (0.50765915, 0.3, 0.21561160), (1.00034203, 0.5, 1.25171074),
        (0.07582990, 0.1, 0.00292097), (0.53798129, 0.5, 0.00721289),
    ],
)  # fmt: skip
def test_the_published_penalty_has_the_published_values(ratio: float, target: float, expected: float) -> None:
    assert published_penalty(torch.tensor(ratio), target, 5.0).item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(
    ("target", "grip", "expected"),
    [
        (0.5, 1.0, {0: 0.5, 0.25: 0.20894661, 0.5: 0.04289322, 0.75: 0.00183983, 1: 0.08578644}),
        (0.5, 0.5, {0: 0.125, 0.25: 0.01072330, 0.5: 0.0, 1: 0.02144661}),
        (0.3, 1.0, {0: 0.3, 0.25: 0.08863872, 0.5: 0.00227744, 0.75: 0.04091616, 1: 0.20455488}),
        (0.1, 0.1, {0: 0.001, 0.25: 0.0, 0.75: 0.0, 1: 0.00467544}),
    ],
)
def test_the_bound_has_the_published_values(target: float, grip: float, expected: dict[float, float]) -> None:
    for density, value in expected.items():
        assert bound(torch.full((8,), float(density)), target**0.5, grip).item() == pytest.approx(value, abs=5e-8)


def test_the_lagrangians_force_at_the_target_is_its_multiplier() -> None:
    ratio = torch.tensor(0.3, requires_grad=True)
    lagrangian(ratio, 0.3, 5.0, torch.tensor(0.85)).backward()
    assert ratio.grad is not None
    assert ratio.grad.item() == pytest.approx(0.85)


def test_the_target_falls_from_one_over_its_share_of_the_run() -> None:
    assert [annealed(0.3, done, 0.2) for done in (0, 0.1, 0.2, 0.9)] == pytest.approx([1, 0.65, 0.3, 0.3])
    assert annealed(0.3, 0, 0) == 0.3


def test_the_cost_of_a_pass_is_that_of_its_counts_and_its_gradient_reaches_the_gates() -> None:
    network = build_backbone(BACKBONE).train()
    opened = gated_pass(network, views()[0], "sampled").openings
    found = spent(opened, cost_at(network, SIZE))
    by_hand = [[int(o.mask[i].sum().item()) for o in opened] for i in range(16)]
    assert found.ratio.tolist() == pytest.approx([cost_at(network, SIZE).ratio_at(row) for row in by_hand], rel=1e-6)
    assert found.densities.shape == (16, 4)
    found.hard_ratio.mean().backward()
    assert all(bool(gate.expand.bias.grad.abs().sum() > 0) for gate in gates_of(network))  # type: ignore[union-attr]


@pytest.mark.parametrize(("pairs", "num_passes"), [("cross", 2), ("cross_symmetric", 4), ("full", 4)])
def test_a_gated_step_trains_both_networks_in_one_backward(pairs: str, num_passes: int) -> None:
    method = gated(pairs=pairs)
    loss = method(views(), None, at(0.5))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
    assert loss.views_finite is not None
    assert len(loss.views_finite) == num_passes
    assert {"gates/ratio", "gates/hard_ratio", "gates/multiplier"} <= set(loss.parts)
    assert sum(pair.weight for pair in PAIRS[pairs]) == pytest.approx(1)


def test_the_cross_pair_is_one_view_gated_against_the_other_dense() -> None:
    """The published step: two passes, no other pair, the penalties on top."""
    method = gated()
    torch.manual_seed(3)
    loss = method(views(), None, at(0.5))
    torch.manual_seed(3)
    other = gated()
    torch.manual_seed(3)
    first, second = views()[0].split(8)
    dense = other.student.head(other.student.backbone(second))
    sparse = other.student.head(gated_pass(other.student.backbone, first, "sampled").features)
    expected = other.compare(sparse, dense).total + loss.parts["gates/penalty"] + loss.parts["gates/bound"]
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_simsiam_trains_gates_too() -> None:
    torch.manual_seed(0)
    config = SimSiamConfig(name="simsiam", hidden_dim=16, out_dim=16, predictor_dim=4)
    method = config.build(build_backbone(BACKBONE), COUNTS)
    loss = method(views(), None, at(0.5))
    loss.total.backward()
    assert all(gate.expand.bias.grad is not None for gate in gates_of(method.student.backbone))


def test_a_step_that_was_skipped_leaves_the_multiplier_and_one_that_was_not_moves_it_by_the_hard_ratios_error() -> None:
    method = gated(multiplier_lr=0.5)
    (budget,) = method.budgets.values()
    assert isinstance(budget, Budget)
    method(views(), None, at(0.5))
    method.after_step(applied=False)
    assert budget.multiplier.item() == 0
    ratios = [float(method(views(seed=seed), None, at(0.5)).parts["gates/hard_ratio"]) for seed in (1, 2)]
    method.after_step(applied=True)
    assert budget.multiplier.item() == pytest.approx(0.5 * (sum(ratios) / 2 - 0.75), abs=1e-6)


def test_no_gated_step_waits_for_the_device() -> None:
    method = gated(pairs="full")
    with NoOperatorReads(), NothingIsCopied():
        for seed in range(2):
            method(views(seed=seed), None, at(0.5)).total.backward()
            method.after_step(applied=True)


def test_gates_neither_decay_nor_adapt() -> None:
    method = gated()
    groups = {group["name"]: group for group in param_groups(method, (), gate_parameters(method))}
    assert {id(p) for gate in gates_of(method.student.backbone) for p in gate.parameters()} == ids(groups["gates"])
    assert not groups["gates"]["decays"]
    assert not groups["gates"]["adapts"]


def ids(group: dict[str, Any]) -> set[int]:
    return {id(parameter) for parameter in group["params"]}


def test_gates_learn_at_a_rate_of_their_own() -> None:
    method = gated()
    groups = param_groups(method, (), gate_parameters(method), gate_lr_scale=10.0)
    optimizer = build_optimizer(OPTIM, groups)
    set_progress(optimizer, at(0.5), frozen=False)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["gates"] == 10 * rates["decay"] == 10 * at(0.5).lr


def settle(force: float, steps: int = 200, **settings: object) -> float:
    """The hard ratio that a budget ends at while an objective pulls every gate open with a constant force."""
    torch.manual_seed(0)
    gates = replace(Gates(target=0.65, initial_bias=0.0, bound_weight=0.0), **settings)  # type: ignore[arg-type]
    network = build_backbone(replace(BACKBONE, gates=gates)).train()
    budget = Budget(network)
    optimizer = torch.optim.Adam([p for gate in gates_of(network) for p in gate.parameters()], lr=0.02)
    images, ratios = views()[0], []
    for step in range(steps):
        found = spent(gated_pass(network, images, "sampled").openings, cost_at(network, SIZE))
        loss, parts = budget.loss([found], density_for(network, SIZE), at(step / steps))
        (loss - force * found.ratio.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.after_step(applied=True)
        ratios.append(float(parts["gates/hard_ratio"]))
    return sum(ratios[-50:]) / 50


def test_the_lagrangian_comes_to_the_target_whatever_pulls_the_gates_open_and_the_published_penalty_does_not() -> None:
    assert settle(1.5) == pytest.approx(0.65, abs=0.01)
    assert settle(5.0) == pytest.approx(0.65, abs=0.01)
    assert settle(1.5, penalty="published", strength=5.0) > 0.8


def penalties_of_rank_share() -> list[float]:
    """Loss, the gradient of each of eight images' ratios as an engine would average it, the multiplier behind."""
    torch.manual_seed(0)
    budget = Budget(build_backbone(BACKBONE))
    ratios = torch.linspace(0.2, 0.9, 8).requires_grad_()
    mine = ratios[distributed.rank() :: distributed.world()]
    share = Spent(mine, mine * 1.1, mine[:, None].expand(-1, 4))
    loss, _ = budget.loss([share], 0.4, at(0.1))
    loss.backward()
    budget.after_step(applied=True)
    assert ratios.grad is not None
    return [loss.item(), budget.multiplier.item(), *distributed.mean_over_ranks(ratios.grad).tolist()]


def test_penalties_and_multiplier_on_two_ranks_are_those_of_one_with_all_images() -> None:
    first, second = run_ranks(penalties_of_rank_share)
    assert first == second
    assert first == pytest.approx(penalties_of_rank_share(), rel=1e-5)
