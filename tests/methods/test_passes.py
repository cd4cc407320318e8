"""Gates under methods whose targets are dense: which view passes how, what it meets, and what it may cost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_cost import NoOperatorReads, NothingIsCopied
from trainer.methods.dino import DINOConfig
from trainer.methods.joint_embedding import Method, ViewCounts
from trainer.methods.moco import MoCoConfig
from trainer.methods.passes import groups_for
from trainer.methods.swav import SwAVConfig
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.gates import Gates
from trainer.models.gating import cost_at, dense_state, gates_of, gating_of
from trainer.models.heads import PlainMLP
from trainer.recipe import RecipeError
from trainer.recipe_file import load_recipe
from trainer.schedules import Progress

BATCH, SIZES = 4, (32, 24)
COUNTS = ViewCounts(2, 3)
WEIGHTS: dict[str, Any] = {"hidden_dim": 16, "global_weight": 0.4, "local_weight": 0.6}
METHODS: dict[str, Any] = {
    "dino": DINOConfig(
        name="dino", bottleneck_dim=8, num_prototypes=8, head_norm=True, warmup_teacher_temp_epochs=0, **WEIGHTS
    ),
    "moco": MoCoConfig(name="moco", out_dim=8, queue_size=16, **WEIGHTS),
    "swav": SwAVConfig(name="swav", out_dim=8, num_prototypes=8, queue_size=0, **WEIGHTS),
}
BACKBONE = Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32]})
AT = Progress(step=9, epoch=2, lr=0.1, weight_decay=0, momentum=0.9, done=0.5)


def method_of(name: str, pairs: str | None, *, bias: float = 0.0, counts: ViewCounts = COUNTS) -> Method:
    torch.manual_seed(0)
    gates = None if pairs is None else Gates(target=0.75, initial_bias=bias, pairs=pairs)  # type: ignore[arg-type]
    method: Method = METHODS[name].build(build_backbone(replace(BACKBONE, gates=gates)), counts)
    return method


def views(counts: ViewCounts = COUNTS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = [(count, size) for count, size in zip(counts, SIZES, strict=True) if count]
    return [torch.randn(count * BATCH, 3, size, size, generator=generator) for count, size in groups]


def step(method: Method, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """A micro-batch with a teacher that is the student's copy."""
    given = views(method.counts, seed)
    loss = method(given, EMATeacher(method.student)(method.teacher_views(given)), AT)
    return loss.total, loss.parts


RULE = {
    ("cross", 0, 0): ([1, 3, 5, 7], [0, 2, 4, 6]),
    ("cross", 1, 0): ([1, 3, 5, 7], [1, 2, 4, 6]),
    ("cross", 0, 2): ([0, 1, 3, 5, 7], [0, 2, 4, 6]),
    ("cross_symmetric", 0, 0): ([0, 1, 3, 5, 7], [0, 1, 2, 4, 6]),
    ("full", 1, 0): ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]),
}


@pytest.mark.parametrize(("pairs", "num_unseen", "num_dense"), RULE)
def test_views_pass_as_the_rule_says(pairs: str, num_unseen: int, num_dense: int) -> None:
    """Of 2 + 6 views; DINO's, MoCo's (one unseen), SwAV's (two with codes)."""
    groups = groups_for(pairs, (2, 6), num_unseen=num_unseen, num_dense=num_dense)
    dense, gated = ([v for g in groups if g.mode == mode for v in g.views] for mode in ("dense", "sampled"))
    assert (dense, gated) == RULE[pairs, num_unseen, num_dense]
    assert [group.mode for group in groups] == ["dense", "dense", "sampled", "sampled"]


@pytest.mark.parametrize("name", METHODS)
def test_with_all_gates_open_every_term_is_that_of_the_network_without_gates(name: str) -> None:
    """Each view passes twice and says the same; means over both are means over one."""
    gated, plain = method_of(name, "full", bias=100.0), method_of(name, None)
    of_method = {key: value for key, value in gated.state_dict().items() if not key.startswith("budgets.")}
    plain.load_state_dict(dense_state(of_method))
    (_, found), (_, expected) = step(gated), step(plain)
    for term in ("loss/global", "loss/local"):
        assert float(found[term]) == pytest.approx(float(expected[term]), rel=1e-5), term


@pytest.mark.parametrize("pairs", ["cross", "cross_symmetric", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_one_backward_trains_the_dense_network_the_gated_one_and_the_gates(name: str, pairs: str) -> None:
    method = method_of(name, pairs)
    total, _ = step(method)
    total.backward()
    trained = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    untouched = [key for key, gradient in trained.items() if gradient is None or not gradient.any()]
    assert untouched == []


@pytest.mark.parametrize("name", METHODS)
def test_targets_are_dense_whatever_the_gates_do(name: str) -> None:
    """Closed gates change no key, centre or code: they are the teacher's, or SwAV's dense passes."""
    found = []
    for bias in (100.0, -100.0):
        method = method_of(name, "cross", bias=bias)
        _, parts = step(method)
        method.after_step(applied=True)
        kept = [buffer for key, buffer in method.named_buffers() if "student" not in key and "budgets" not in key]
        entropies = [parts[key] for key in ("code_entropy", "teacher_entropy") if key in parts]
        found.append([*kept, *entropies])
    assert all(torch.equal(opened, closed) for opened, closed in zip(*found, strict=True))


def test_views_under_a_frozen_teacher_pass_both_ways_too() -> None:
    """RoB's pairing: a view meets the targets of itself, and SwAV's first view has nothing to predict."""
    head = PlainMLP(hidden_dim=8, norm=True, activation="relu")
    same_view = replace(METHODS["dino"], pairing="same_view", centering="none")
    scores = {"codes": "teacher", "prototypes": "none", "mlp_head": head, "targets": "first_view"}
    for config, num_targets in ((same_view, 2), (replace(METHODS["swav"], **scores), 1)):
        torch.manual_seed(0)
        method: Method = config.build(build_backbone(replace(BACKBONE, gates=Gates(target=0.75))), COUNTS)
        targets = torch.randn(num_targets * BATCH, 8)
        loss = method(views(), targets, AT)
        loss.total.backward()
        assert loss.views_finite is not None
        assert len(loss.views_finite) == len(method.seen_views) == 5
        assert all(gate.expand.bias.grad is not None for gate in gates_of(method.student.backbone))


def test_methods_that_train_no_gates_name_those_that_do() -> None:
    recipe = Path(__file__).parents[2] / "recipes/smoke/regression.yaml"
    with pytest.raises(RecipeError, match=r"regression does not train gates; take one of barlow, dino, moco, simsiam"):
        load_recipe(recipe, ["data.train=train.beton", "backbone.gates={target: 0.5}"])


def test_a_budget_counts_each_crop_size_for_itself() -> None:
    method = method_of("dino", "cross", bias=-100.0)
    _, parts = step(method)
    for size, prefix in zip(SIZES, ("gates/", "gates/local_"), strict=True):
        floor = cost_at(method.student.backbone, size).floor
        assert float(parts[f"{prefix}hard_ratio"]) == pytest.approx(floor, rel=1e-5)
    assert parts["gates/hard_ratio"] != parts["gates/local_hard_ratio"]
    method.after_step(applied=True)
    multipliers = [float(budget.multiplier) for budget in method.budgets.values()]  # type: ignore[arg-type]
    rate = gating_of(method.student.backbone).settings.multiplier_lr
    expected = [rate * (float(parts[f"gates/{name}hard_ratio"]) - 0.75) for name in ("", "local_")]
    assert multipliers == pytest.approx(expected, rel=1e-5)


def test_each_mode_moves_its_own_statistics_and_the_teacher_those_of_its_dense_norms() -> None:
    method = method_of("dino", "cross")
    teacher = EMATeacher(method.student)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    given = views()
    method(given, teacher(method.teacher_views(given)), AT)
    moved = {key for key, value in teacher.state_dict().items() if not torch.equal(value, before[key])}
    assert any(".dense_norm." in key for key in moved)
    assert not any(".gated_norm." in key or ".gates." in key for key in moved)
    state = method.student.backbone.state_dict()
    last = next(key for key in reversed(state) if key.endswith("gated_norm.running_mean"))
    assert not torch.equal(state[last], state[last.replace("gated_norm", "dense_norm")])


@pytest.mark.parametrize("name", METHODS)
def test_without_local_views_one_budget_is_left(name: str) -> None:
    counts = ViewCounts(2, 0)
    method = METHODS[name]
    config = replace(method, global_only=True)
    torch.manual_seed(0)
    gated = config.build(build_backbone(replace(BACKBONE, gates=Gates(target=0.75))), counts)
    _, parts = step(gated)
    assert list(gated.budgets) == ["global"]
    assert not any(key.startswith("gates/local_") for key in parts)


@pytest.mark.parametrize("name", METHODS)
def test_no_gated_step_waits_for_the_device(name: str) -> None:
    method = method_of(name, "cross_symmetric")
    assert gates_of(method.student.backbone)
    with NoOperatorReads(), NothingIsCopied():
        for seed in range(2):
            step(method, seed)[0].backward()
            method.after_step(applied=True)
