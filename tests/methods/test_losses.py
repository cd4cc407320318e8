"""DINO's, SwAV's and MoCo's objectives against the published fixtures and against the papers' formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.oracles import dino_by_the_paper, info_nce_by_the_paper, unit_rows, waves
from trainer.methods.losses import dino_targets, info_nce, paired_prediction, weigh

WEIGHTS = {"baseline": (1 / 7, 6 / 7), "sslight": (0.4, 0.6), "global only": (1.0, 0.0), "local only": (0.0, 1.0)}


def dino_loss(
    student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor, *, student_temp: float, teacher_temp: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DINO's two terms, from the teacher's logits."""
    targets = dino_targets(teacher, center, temperature=teacher_temp)
    return paired_prediction(student, targets, temperature=student_temp)


def dino_fixture(center: torch.Tensor, teacher_temp: float, weights: tuple[float, float]) -> float:
    student = waves(32, 8, 0.37, 0.91).view(8, 4, 8)
    teacher = waves(8, 8, 0.53, 1.13).view(2, 4, 8)
    losses = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=teacher_temp)
    return weigh(*losses, global_weight=weights[0], local_weight=weights[1]).item()


@pytest.mark.parametrize(
    ("weights", "first", "second", "warm"),
    [
        ("baseline", 9.946596, 9.949373, 9.941560),
        ("sslight", 10.454348, 10.458574, 10.451325),
        ("global only", 11.639098, 11.646708, 11.640776),
        ("local only", 9.664513, 9.666484, 9.658357),
    ],
)
def test_dino_gives_the_published_losses(weights: str, first: float, second: float, warm: float) -> None:
    zero = torch.zeros(8)
    center = 0.1 * waves(8, 8, 0.53, 1.13).mean(0).float()
    assert dino_fixture(zero, 0.04, WEIGHTS[weights]) == pytest.approx(first, abs=5e-6)
    assert dino_fixture(center, 0.04, WEIGHTS[weights]) == pytest.approx(second, abs=5e-6)
    assert dino_fixture(zero, 0.07, WEIGHTS[weights]) == pytest.approx(warm, abs=5e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("baseline", 3.119060), ("sslight", 2.502839), ("global only", 1.064989), ("local only", 3.461405)],
)
def test_moco_gives_the_published_losses(weights: str, expected: float) -> None:
    queries = unit_rows(waves(28, 8, 0.37, 0.91)).view(7, 4, 8)
    keys, queue = unit_rows(waves(4, 8, 0.53, 1.13)), unit_rows(waves(8, 16, 0.29, 0.77).T).T.float()
    losses = info_nce(queries, keys, queue, temperature=0.2)
    global_weight, local_weight = WEIGHTS[weights]
    total = weigh(losses[0].mean(), losses[1:].mean(), global_weight=global_weight, local_weight=local_weight)
    assert total.item() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("num_globals", [2, 3])
@pytest.mark.parametrize("num_locals", [1, 4])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("num_prototypes", [3, 17])
def test_dino_equals_the_loop_over_pairs(num_globals: int, num_locals: int, batch: int, num_prototypes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(num_globals + num_locals, batch, num_prototypes, generator=generator)
    teacher = torch.randn(num_globals, batch, num_prototypes, generator=generator)
    center = torch.randn(num_prototypes, generator=generator)
    ours = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.05)
    assert [loss.item() for loss in ours if loss is not None] == pytest.approx(
        dino_by_the_paper(student, teacher, center, 0.1, 0.05), rel=1e-5
    )


def test_the_baseline_weights_are_the_plain_mean_over_all_fourteen_pairs() -> None:
    student, teacher = waves(32, 8, 0.37, 0.91).view(8, 4, 8), waves(8, 8, 0.53, 1.13).view(2, 4, 8)
    of_globals, of_locals = dino_by_the_paper(student, teacher, torch.zeros(8), 0.1, 0.04)
    mean_over_pairs = (2 * of_globals + 12 * of_locals) / 14
    assert dino_fixture(torch.zeros(8), 0.04, WEIGHTS["baseline"]) == pytest.approx(mean_over_pairs, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.integers(1, 3))
def test_dino_does_not_care_in_which_order_local_views_come(seed: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(6, 3, 8, generator=generator)
    teacher = torch.randn(2, 3, 8, generator=generator)
    turned = torch.cat([student[:2], student[2:].roll(shift, 0)])
    values = [
        dino_loss(views, teacher, torch.zeros(8), student_temp=0.1, teacher_temp=0.04)[1] for views in (student, turned)
    ]
    assert torch.allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize("queue_size", [1, 33])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_info_nce_equals_the_papers_formula(queue_size: int, num_queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(num_queries, 4, 6, generator=generator), dim=-1)
    keys = F.normalize(torch.randn(4, 6, generator=generator), dim=-1)
    queue = F.normalize(torch.randn(6, queue_size, generator=generator), dim=0)
    expected = [[info_nce_by_the_paper(q, k, queue, 0.2) for q, k in zip(view, keys, strict=True)] for view in queries]
    ours = info_nce(queries, keys, queue, temperature=0.2)
    assert torch.allclose(ours, torch.tensor(expected), rtol=1e-5)


def test_losses_stay_in_full_precision_under_autocast() -> None:
    keys = F.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)), dim=-1)
    queue = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(3)), dim=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = info_nce(keys[None], keys, queue, temperature=0.2)
    assert torch.equal(lowered, info_nce(keys[None], keys, queue, temperature=0.2))


def test_a_single_global_view_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 global views, got 1"):
        dino_loss(torch.zeros(3, 1, 4), torch.zeros(1, 1, 4), torch.zeros(4), student_temp=0.1, teacher_temp=0.04)


@pytest.mark.parametrize(("num_prototypes", "expected"), [(4096, 8.317766), (65_536, 11.090355), (3000, 8.006368)])
def test_logits_that_say_nothing_lose_the_logarithm_of_the_number_of_prototypes(
    num_prototypes: int, expected: float
) -> None:
    flat = torch.zeros(3, 2, num_prototypes)
    targets = torch.rand(2, 2, num_prototypes, generator=torch.Generator().manual_seed(0)).mul(9).softmax(-1)
    for loss in paired_prediction(flat, targets, temperature=0.1):
        assert loss is not None
        assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_query_that_knows_nothing_of_65536_negatives_is_at_chance() -> None:
    queue = F.normalize(torch.ones(2, 65_536), dim=0)
    query = F.normalize(torch.tensor([[[1.0, -1.0]]]), dim=-1)
    assert info_nce(query, queue[:, 0][None], queue, temperature=0.2).item() == pytest.approx(11.090370, abs=1e-5)
