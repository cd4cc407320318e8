"""Regression and SEED: a student against a frozen teacher's features, without any head of the teacher."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.test_methods import COUNTS, Flat, progress, some_views
from tests.oracles import softmax, unit_rows
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.regression import Regression, RegressionConfig
from trainer.methods.seed import SEED, SEEDConfig
from trainer.models.heads import PlainMLP

D = 5
HEAD = PlainMLP(hidden_dim=8, num_layers=2, norm=False, activation="relu")
REGRESSION = RegressionConfig(name="regression", out_dim=D, mlp_head=HEAD, global_weight=0.4, local_weight=0.6)
SEED_CONFIG = SEEDConfig(
    name="seed", out_dim=D, mlp_head=HEAD, queue_size=16, global_weight=0.4, local_weight=0.6, teacher_temp=0.1
)


def outputs(batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, batch, D, generator=generator), torch.randn(2, batch, D, generator=generator)


def pairs(pairing: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(teacher's view, student's view) of both terms."""
    same = [(0, 0), (1, 1)] if pairing == "same_view" else [(1, 0), (0, 1)]
    return same, [(t, v) for v in range(2, 8) for t in (0, 1)]


def regression(**changes: object) -> Regression:
    torch.manual_seed(0)
    return replace(REGRESSION, **changes).build(Flat(), COUNTS)  # type: ignore[arg-type]


def seed(**changes: object) -> SEED:
    torch.manual_seed(0)
    return replace(SEED_CONFIG, **changes).build(Flat(), COUNTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["same_view", "swapped"])
@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_the_regression_is_the_mean_distance_over_pairs(pairing: str, distance: str) -> None:
    student, teacher = outputs()

    def mean(of: list[tuple[int, int]]) -> float:
        found = []
        for t, v in of:
            for a, b in zip(student[v].double(), teacher[t].double(), strict=True):
                unit = ((a / a.norm() - b / b.norm()) ** 2).sum() if distance == "cosine" else ((a - b) ** 2).sum() / D
                found.append(unit.item())
        return sum(found) / len(found)

    of_globals, of_locals = (mean(of) for of in pairs(pairing))
    loss = regression(pairing=pairing, distance=distance).objective(student, teacher, progress())
    assert loss.total.item() == pytest.approx(0.4 * of_globals + 0.6 * of_locals, rel=1e-5)
    assert loss.parts["loss/global"] == pytest.approx(of_globals, rel=1e-5)


def seed_by_the_paper(student: Tensor, teacher: Tensor, queue: Tensor, of: list[tuple[int, int]]) -> float:
    """Equation 4, an image at a time; (D, Q) queue."""
    found = []
    for t, v in of:
        for s, f in zip(unit_rows(student[v].double()), unit_rows(teacher[t].double()), strict=True):
            keys = torch.cat([f[None], queue.T.double()])
            found.append(-(softmax(keys @ f / 0.1) * softmax(keys @ s / 0.2).log()).sum().item())
    return sum(found) / len(found)


@pytest.mark.parametrize("pairing", ["same_view", "swapped"])
def test_seed_is_the_cross_entropy_of_similarity_distributions(pairing: str) -> None:
    student, teacher = outputs()
    method = seed(pairing=pairing)
    terms = [seed_by_the_paper(student, teacher, method.queue.keys, of) for of in pairs(pairing)]
    loss = method.objective(student, teacher, progress())
    assert loss.total.item() == pytest.approx(0.4 * terms[0] + 0.6 * terms[1], rel=1e-5)


def test_seeds_gradient_is_that_of_its_formula() -> None:
    student, teacher = (rows.double() for rows in outputs())
    method = seed().double()
    wanted, queue = student.clone().requires_grad_(), method.queue.keys
    targets = F.normalize(teacher, dim=-1)

    def loss_of(rows: Tensor, t: int) -> Tensor:
        def similarities(x: Tensor) -> Tensor:
            return torch.cat([(x * targets[t]).sum(-1, keepdim=True), x @ queue], dim=1)

        p = F.softmax(similarities(targets[t]) / 0.1, dim=-1)
        return -(p * F.log_softmax(similarities(F.normalize(rows, dim=-1)) / 0.2, dim=-1)).sum(-1).mean()

    terms = [torch.stack([loss_of(wanted[v], t) for t, v in of]).mean() for of in pairs("same_view")]
    (0.4 * terms[0] + 0.6 * terms[1]).backward()
    ours = student.float().requires_grad_()
    seed().objective(ours, teacher.float(), progress()).total.backward()
    assert wanted.grad is not None
    torch.testing.assert_close(ours.grad, wanted.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [regression, seed])
def test_a_student_that_says_the_teachers_features_has_nothing_to_learn_from_its_own_views(
    make: type[Regression] | type[SEED],
) -> None:
    method = make(student_temp=0.1) if make is seed else make()  # type: ignore[call-arg]
    _, teacher = outputs()
    student = torch.cat([teacher, torch.randn(6, 4, D)]).requires_grad_()
    method.objective(student, teacher, progress()).total.backward()
    assert student.grad is not None
    assert student.grad[:2].abs().max() < 1e-6
    assert student.grad[2:].abs().max() > 1e-3


def test_the_queue_takes_the_first_views_features_once_a_step() -> None:
    method = seed()
    before = method.queue.keys.clone()
    student, teacher = outputs()
    method.objective(student, teacher, progress())
    assert torch.equal(method.queue.keys, before), "not before the step was applied"
    method.after_step(applied=False)
    assert torch.equal(method.queue.keys, before)
    method.objective(student, teacher, progress())
    method.after_step(applied=True)
    torch.testing.assert_close(method.queue.keys[:, :4], F.normalize(teacher[0], dim=-1).T)
    assert torch.equal(method.queue.keys[:, 4:], before[:, 4:])


def seed_on_a_rank() -> Tensor:
    method = seed()
    student, teacher = outputs(batch=8)
    mine = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    method.objective(student[:, mine], teacher[:, mine], progress())
    method.after_step(applied=True)
    return method.queue.keys


def test_ranks_fill_seeds_queue_as_one_process_does() -> None:
    method = seed()
    method.objective(*outputs(batch=8), progress())
    method.after_step(applied=True)
    for keys in run_ranks(seed_on_a_rank):
        torch.testing.assert_close(keys, method.queue.keys)


@pytest.mark.parametrize("make", [regression, seed])
def test_the_teacher_sees_the_global_views_and_gradients_reach_every_parameter(
    make: type[Regression] | type[SEED],
) -> None:
    method, views = make(), some_views()
    assert [len(group) for group in method.teacher_views(views)] == [8]
    method(views, torch.randn(8, D), progress()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


@pytest.mark.parametrize(
    ("config", "counts", "teacher", "batch", "fault"),
    [
        (REGRESSION, COUNTS, "ema", 8, "got teacher.kind ema; set it to frozen"),
        (SEED_CONFIG, COUNTS, "none", 8, "got teacher.kind none; set it to frozen"),
        (SEED_CONFIG, COUNTS, "frozen", 6, "queue_size 16 must be a multiple of optim.global_batch 6; 18 is near"),
        (REGRESSION, ViewCounts(0, 6), "frozen", 8, "at least 1 global views, got 0"),
        (replace(REGRESSION, pairing="swapped"), ViewCounts(1, 6), "frozen", 8, "at least 2 global views, got 1"),
        (REGRESSION, ViewCounts(2, 0), "frozen", 8, "local_weight is 0.6 but there are no local views"),
        (REGRESSION, COUNTS, "frozen", 8, None),
        (SEED_CONFIG, COUNTS, "frozen", 8, None),
    ],
)
def test_recipes_that_cannot_work_are_named(
    config: RegressionConfig | SEEDConfig, counts: ViewCounts, teacher: str, batch: int, fault: str | None
) -> None:
    found = config.check(counts, teacher=teacher, global_batch=batch)
    assert found is None if fault is None else fault in str(found)
