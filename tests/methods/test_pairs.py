"""VICReg, Barlow Twins, SimSiam: the papers' formulas, image by image; ranks; what may have a gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.methods.test_methods import Flat, progress
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.barlow import BarlowConfig, BarlowTwins
from trainer.methods.joint_embedding import ViewCounts
from trainer.methods.pairs import PairMethod
from trainer.methods.simsiam import SimSiam, SimSiamConfig
from trainer.methods.vicreg import VICReg, VICRegConfig

COUNTS = ViewCounts(2, 0)


def vicreg() -> VICReg:
    torch.manual_seed(0)
    return VICRegConfig(name="vicreg", hidden_dim=8, out_dim=6).build(Flat(), COUNTS)


def barlow() -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowConfig(name="barlow", hidden_dim=8, out_dim=6).build(Flat(), COUNTS)


def simsiam() -> SimSiam:
    torch.manual_seed(0)
    return SimSiamConfig(name="simsiam", hidden_dim=8, out_dim=6, predictor_dim=3).build(Flat(), COUNTS)


def rows(num: int = 8, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, num, dim, generator=generator, dtype=torch.float64) * 0.7
    return first, second


def views(batch: int = 8, seed: int = 0) -> list[Tensor]:
    return [torch.randn(2 * batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))]


def vicreg_by_the_paper(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Invariance, variance and covariance, with plain loops."""
    num, dim = first.shape
    invariance = sum((a - b) ** 2 for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    variance = covariance = 0.0
    for z in (first, second):
        columns = [[x - sum(column) / num for x in column] for column in z.T.tolist()]
        c = [[sum(x * y for x, y in zip(a, b, strict=True)) / (num - 1) for b in columns] for a in columns]
        variance += sum(max(0.0, 1 - math.sqrt(c[j][j] + 1e-4)) for j in range(dim)) / dim
        covariance += sum(c[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
    return invariance / (num * dim), variance, covariance


def test_vicreg_is_the_papers_three_terms() -> None:
    first, second = rows()
    loss = vicreg().compare(first, second)
    expected = vicreg_by_the_paper(first, second)
    found = [float(loss.parts[f"loss/{name}"]) for name in ("invariance", "variance", "covariance")]
    assert found == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(25 * expected[0] + 25 * expected[1] + expected[2], rel=1e-5)


@pytest.mark.parametrize(
    ("corner", "invariance", "covariance", "total"),
    [(1.0, 0.5, 0.0, 17.08605385), (2.0, 0.625, 0.11111116, 20.32216453)],
)
def test_vicregs_worked_example_has_the_known_value(
    corner: float, invariance: float, covariance: float, total: float
) -> None:
    first = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    second = torch.tensor([[corner, 1.0], [-1, 1], [-1, -1], [1, -1]])
    loss = vicreg().compare(first, second)
    assert loss.total.item() == pytest.approx(total, abs=2e-5)
    assert float(loss.parts["loss/invariance"]) == pytest.approx(invariance)
    assert float(loss.parts["loss/variance"]) == pytest.approx(0.18344218, abs=1e-7)
    assert float(loss.parts["loss/covariance"]) == pytest.approx(covariance, abs=1e-7)


def barlow_by_the_paper(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Invariance and redundancy, with plain loops."""
    num, dim = first.shape

    def standardised(z: Tensor) -> list[list[float]]:
        columns = [[x - sum(column) / num for x in column] for column in z.T.tolist()]
        return [[x / math.sqrt(sum(y * y for y in column) / num + 1e-5) for x in column] for column in columns]

    a, b = standardised(first), standardised(second)
    c = [[sum(x * y for x, y in zip(a[i], b[j], strict=True)) / num for j in range(dim)] for i in range(dim)]
    off_diagonal = sum(c[i][j] ** 2 for i in range(dim) for j in range(dim) if i != j)
    return sum((1 - c[i][i]) ** 2 for i in range(dim)), off_diagonal


def test_barlow_twins_is_the_papers_two_terms_and_does_not_mind_the_order_of_views() -> None:
    first, second = rows()
    loss, swapped = barlow().compare(first, second), barlow().compare(second, first)
    expected = barlow_by_the_paper(first, second)
    assert [float(loss.parts[f"loss/{n}"]) for n in ("invariance", "redundancy")] == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(0.024 * (expected[0] + 0.0051 * expected[1]), rel=1e-5)
    assert swapped.total.item() == pytest.approx(loss.total.item(), rel=1e-6)


def test_simsiam_is_the_papers_symmetric_cosine_with_the_projections_held_still() -> None:
    method = simsiam()
    first, second = (z.float().requires_grad_() for z in rows())
    loss = method.compare(first, second)
    p1, p2 = method.predictor(first), method.predictor(second)

    def cosine(p: Tensor, z: Tensor) -> float:
        return sum((a @ b / (a.norm() * b.norm())).item() for a, b in zip(p, z, strict=True)) / len(p)

    assert loss.total.item() == pytest.approx(-cosine(p1, second) / 2 - cosine(p2, first) / 2, rel=1e-5)
    loss.total.backward()
    held = -torch.nn.functional.cosine_similarity(method.predictor(first), second.detach()).mean() / 2
    (expected,) = torch.autograd.grad(held, first)
    assert first.grad is not None
    assert torch.allclose(first.grad, expected, atol=1e-7), "only through its own predictor"


def test_simsiams_last_norm_has_no_weights_to_train() -> None:
    head = simsiam().student.head
    assert isinstance(head, nn.Sequential)
    assert not any(p.requires_grad for p in head[-1].parameters())
    assert torch.allclose(head(torch.randn(64, 3)).var(0, correction=0), torch.ones(6), atol=1e-2)


@pytest.mark.parametrize("make", [vicreg, barlow, simsiam])
def test_a_step_gives_every_trained_parameter_a_gradient(make: Callable[[], PairMethod]) -> None:
    method = make()
    loss = method(views(), None, progress())
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
    assert loss.views_finite is not None
    assert loss.views_finite.tolist() == [True, True]


@pytest.mark.parametrize("make", [vicreg, barlow, simsiam])
def test_each_view_has_batch_statistics_of_its_own(make: Callable[[], PairMethod]) -> None:
    """As published: another second view changes nothing of what the head says of the first."""
    method = make()
    seen: list[Tensor] = []
    method.student.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    one, other = views(), views()
    other[0][8:] += 5
    method(one, None, progress())
    method(other, None, progress())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[1], seen[3])


def gradient_of_rank_share() -> list[float]:
    """The mean over ranks of the gradients, as an engine would make it."""
    first, second = (z.float() for z in rows())
    mine = slice(distributed.rank(), None, distributed.world())
    found: list[float] = []
    for method, part in ((vicreg(), "loss/covariance"), (barlow(), "loss/redundancy")):
        weight = (torch.linspace(0.5, 1.5, 36).view(6, 6) + torch.eye(6)).requires_grad_()
        loss = method.compare(first[mine] @ weight, second[mine] @ weight)
        loss.total.backward()
        assert weight.grad is not None
        found += [*distributed.mean_over_ranks(weight.grad).flatten().tolist(), float(loss.parts[part])]
    return found


def test_statistics_and_gradients_over_two_ranks_are_those_of_one_with_the_whole_batch() -> None:
    first, second = run_ranks(gradient_of_rank_share)
    assert first == second
    assert first == pytest.approx(gradient_of_rank_share(), rel=1e-4)


def test_recipes_that_a_pair_cannot_be_made_of_are_refused() -> None:
    config = VICRegConfig(name="vicreg")
    assert config.check(COUNTS, teacher="none", global_batch=8) is None
    assert "got 2 and 6 local ones" in str(config.check(ViewCounts(2, 6), teacher="none", global_batch=8))
    assert "set it to none" in str(config.check(COUNTS, teacher="ema", global_batch=8))
