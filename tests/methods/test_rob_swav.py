"""RoB-SwAV: codes out of a frozen teacher's scores, whose prototypes the student predicts, one or two teacher crops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.methods.test_rob import BATCH, SWAV_CONFIG, WEIGHTS, K, balanced, logits_of, scores, swav
from tests.methods.test_swav import unit
from tests.methods.vits import COUNTS, LINEAR, progress, views
from tests.oracles import rob_by_the_paper, sinkhorn_by_the_paper
from tests.spawn import run_ranks
from trainer import distributed

# --- check (d): Sinkhorn on the teacher's scores ---


def test_codes_of_a_teacher_sum_to_one_and_use_every_prototype_equally() -> None:
    method = swav(prototypes="none", mlp_head=LINEAR, sinkhorn_iterations=60)
    codes = method._codes(scores(batch=48))
    assert torch.allclose(codes.sum(-1), torch.ones(2, 48), atol=1e-5)
    assert torch.allclose(codes.sum(1), torch.full((2, K), 48 / K), rtol=0.02)
    three = swav(prototypes="none", mlp_head=LINEAR)._codes(scores(batch=48))
    unbalanced = (scores(batch=48) / 0.03).softmax(-1)
    assert torch.allclose(three.sum(-1), torch.ones(2, 48), atol=1e-5)
    assert (three.sum(1) - 48 / K).square().mean() < 0.5 * (unbalanced.sum(1) - 48 / K).square().mean()


def test_a_queue_of_scores_takes_part_once_it_is_full_and_keeps_what_the_teacher_said() -> None:
    method = swav(prototypes="none", mlp_head=LINEAR, queue_size=8, queue_start_epoch=0)
    for seed in range(2):
        assert not method.queue.is_full
        method(views(), scores(seed).flatten(0, 1), progress())
        method.after_step(applied=True)
    assert torch.equal(method.queue.rows, torch.cat([scores(0), scores(1)], 1).transpose(0, 1))
    codes = method._codes(scores(2))
    for view in range(2):
        joined = torch.cat([method.queue.rows[:, view], scores(2)[view]])
        assert torch.allclose(codes[view], sinkhorn_by_the_paper(joined, 0.03, 3)[-4:].float(), rtol=1e-4, atol=1e-6)


def codes_of_rank() -> tuple[list[float], list[float]]:
    """A rank's share of 8 samples: its codes against a full queue, and the queue."""
    method = swav(prototypes="none", mlp_head=LINEAR, queue_size=16, queue_start_epoch=0)
    mine = slice(*(8 * (distributed.rank() + end) // distributed.world() for end in (0, 1)))
    share = [view.unflatten(0, (-1, 8))[:, mine].flatten(0, 1) for view in views(8)]
    for seed in range(2):
        method(share, scores(seed, batch=8)[:, mine].flatten(0, 1), progress())
        method.after_step(applied=True)
    return method._codes(scores(5, batch=8)[:, mine]).flatten().tolist(), method.queue.rows.flatten().tolist()


def test_two_ranks_assign_as_one() -> None:
    (first, queue), (second, same) = run_ranks(codes_of_rank)
    codes, expected = codes_of_rank()
    assert queue == same == pytest.approx(expected, abs=1e-7)
    both = torch.cat([torch.tensor(part).view(2, 4, K) for part in (first, second)], 1)
    assert torch.allclose(both, torch.tensor(codes).view(2, 8, K), atol=1e-6)


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_hard_code_is_the_strongest_prototype_of_the_soft_one(iterations: int) -> None:
    hard = swav(prototypes="none", mlp_head=LINEAR, sinkhorn_iterations=iterations, hard_codes=True)
    soft = swav(prototypes="none", mlp_head=LINEAR, sinkhorn_iterations=iterations)
    wanted = F.one_hot(soft._codes(scores()).argmax(-1), K).float()
    assert torch.equal(hard._codes(scores()), wanted)
    loss = hard(views(), scores().flatten(0, 1), progress())
    assert loss.total.item() == pytest.approx(rob_by_the_paper(logits_of(hard), wanted, 0.1, "same_view"), rel=2e-5)
    assert loss.parts["code_entropy"] == 0


# --- SwAV's prototypes: own, the teacher's, none ---


def test_the_teachers_prototypes_score_the_students_embedding_as_it_is_and_never_move() -> None:
    """An embedding out of a plain MLP is not normalised; gradients pass through the prototypes to it."""
    method = swav(prototypes="teacher", mlp_head=LINEAR)
    assert method.prototypes is not None
    assert method.prototypes.weight.isnan().all(), "until the teacher's are there, nothing can be trained by mistake"
    prototypes = unit(K, 8, seed=4)
    method.adopt(prototypes)
    loss = method(views(), scores().flatten(0, 1), progress())
    embeddings = logits_of(method)
    assert not torch.allclose(embeddings.norm(dim=-1), torch.ones(4, BATCH), atol=0.1)
    expected = rob_by_the_paper(embeddings @ prototypes.T, balanced(scores()), 0.1, "same_view")
    assert loss.total.item() == pytest.approx(expected, rel=2e-5)
    loss.total.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    method.after_step(applied=True)
    assert torch.equal(method.prototypes.weight, prototypes)
    assert method.frozen_parameters() == method.rewritten_parameters() == []
    assert not method.prototypes.weight.requires_grad
    with pytest.raises(ValueError, match=r"wanted \(12, 8\) .* are \(12, 5\); set method.num_prototypes"):
        method.adopt(torch.zeros(12, 5))


def test_own_prototypes_are_neither_renormalised_nor_frozen_under_a_teacher() -> None:
    method = swav()
    assert method.prototypes is not None
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.adopt(torch.zeros(K, 8))
    method(views(), scores().flatten(0, 1), progress()).total.backward()
    method.after_step(applied=True)
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.full((K,), 3.0))
    assert method.prototypes.weight.grad is not None
    assert not method.frozen(progress(epoch=0))


@pytest.mark.parametrize(("pairing", "rows"), [("same_view", 16), ("swapped", 12)])
def test_one_teacher_crop_is_predicted_by_every_view_or_every_other(pairing: str, rows: int) -> None:
    weights = {"global_weight": 1 / 2, "local_weight": 1 / 2} if pairing == "same_view" else WEIGHTS
    method = swav(prototypes="none", mlp_head=LINEAR, targets="first_view", **weights | {"pairing": pairing})
    assert [len(v) for v in method.teacher_views(views())] == [BATCH]
    assert sum(len(v) for v in method.student_views(views())) == rows
    loss = method(views(), scores()[:1].flatten(0, 1), progress())
    targets = balanced(scores()[:1])[0]
    terms = [rob_by_the_paper(view[None], targets[None], 0.1, "same_view") for view in logits_of(method)]
    assert loss.total.item() == pytest.approx(sum(terms) / len(terms), rel=2e-5)


# --- what does not go together ---


@pytest.mark.parametrize(
    ("change", "teacher", "said"),
    [
        ({}, "frozen", None),
        ({}, "none", "codes: teacher needs a frozen teacher, got teacher.kind none"),
        ({}, "ema", "codes: teacher needs a frozen teacher, got teacher.kind ema"),
        ({"prototypes": "none"}, "frozen", "prototypes: none needs an mlp_head"),
        ({"codes": "student", "prototypes": "teacher"}, "none", "prototypes, mlp_head and targets are for codes"),
        ({"codes": "student"}, "none", "collapse with sinkhorn_iterations 0 or pairing same_view"),
        ({"codes": "student"}, "frozen", "or method.codes=teacher for a frozen one"),
    ],
)
def test_swavs_settings_must_belong_to_the_teacher(change: dict[str, Any], teacher: str, said: str | None) -> None:
    fault = replace(SWAV_CONFIG, **change).check(COUNTS, teacher=teacher, global_batch=8)
    assert (fault is None) if said is None else (said in str(fault))
