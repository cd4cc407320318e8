"""k-NN against the published fixture, the formula and scikit-learn; counts over ranks; collapse measures."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.oracles import knn_by_the_paper, unit_rows, waves
from tests.spawn import run_ranks
from trainer.evals.collapse import feature_std, rank_me
from trainer.evals.features import Features, Pixels
from trainer.evals.knn import knn_accuracy, knn_votes


def clusters(per_class: int, noise: float, seed: int) -> Features:
    """Four classes around four corners, 5 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(per_class)
    corners = torch.eye(5)[:4]
    return Features(corners[labels] + noise * torch.randn(len(labels), 5, generator=generator), labels)


def test_leave_one_out_gives_the_published_accuracy() -> None:
    features, labels = unit_rows(waves(200, 6, 1.7, 0.91)).float(), torch.arange(200) % 5
    hits = 0
    for i in range(200):
        others = torch.arange(200) != i
        votes = knn_votes(features[others], labels[others], features[i : i + 1], k=5, temperature=0.07, num_classes=5)
        hits += int(votes.argmax()) == int(labels[i])
    assert hits / 2 == 45.0


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5)])
def test_every_vote_goes_where_the_formula_says(k: int, temperature: float) -> None:
    bank, queries = clusters(20, 0.8, 0), clusters(10, 0.8, 1)
    votes = knn_votes(
        bank.vectors * 7, bank.labels, queries.vectors, k=k, temperature=temperature, num_classes=4
    )  # the bank's length must not matter
    rows = unit_rows(bank.vectors.double())
    expected = [
        knn_by_the_paper(rows, bank.labels, query / query.norm(), k, temperature, 4)
        for query in queries.vectors.double()
    ]
    assert votes.argmax(1).tolist() == expected


def test_it_agrees_with_scikit_learn() -> None:
    bank, queries = clusters(50, 0.7, 2), clusters(30, 0.7, 3)
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.vectors.numpy(), bank.labels.numpy())
    expected = 100 * reference.score(queries.vectors.numpy(), queries.labels.numpy())
    assert knn_accuracy(bank, queries, k=20, temperature=0.07)["top1"] == pytest.approx(expected)


def accuracy_on_this_rank() -> dict[str, float]:
    return knn_accuracy(clusters(10, 0.9, 4), clusters(9, 0.9, 5), k=5, temperature=0.07)


@pytest.mark.parametrize("world", [2, 3])
def test_every_query_counts_once_on_any_number_of_ranks(world: int) -> None:
    alone = accuracy_on_this_rank()
    assert 0 < alone["top1"] < 100, "a fixture that decides nothing proves nothing"
    assert run_ranks(accuracy_on_this_rank, world=world) == [pytest.approx(alone)] * world


def test_more_neighbours_than_images_are_refused() -> None:
    bank = clusters(2, 0.1, 0)
    with pytest.raises(ValueError, match=r"\[1, 8 bank images\], got 9"):
        knn_votes(bank.vectors, bank.labels, bank.vectors, k=9, temperature=0.07, num_classes=4)


def test_sharp_temperatures_do_not_overflow() -> None:
    bank = clusters(5, 0.1, 0)
    votes = knn_votes(bank.vectors, bank.labels, bank.vectors, k=5, temperature=1e-4, num_classes=4)
    assert votes.isfinite().all()
    assert torch.exp(torch.tensor(1 / 1e-4)).isinf(), "the trap is real"


def test_collapse_measures_tell_one_point_from_a_full_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, 16, generator=generator)
    point = torch.ones(4000, 16) + 1e-6 * spread
    line = spread[:, :1] * torch.ones(1, 16)
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(point) < 1e-4
    assert rank_me(spread) == pytest.approx(16, rel=0.02)
    assert rank_me(line) < 1.01
    assert rank_me(point) < 1.01


def test_rank_me_is_the_entropy_of_the_papers_formula() -> None:
    values = [3.0, 2.0, 1.0]
    shares = [value / 6 + 1e-7 for value in values]
    assert rank_me(torch.diag(torch.tensor(values))) == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in shares))
    )


def test_pixels_are_the_mean_of_each_sixteenth() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[0, 1, :2, :2] = 4.0
    features = Pixels(16)(image)
    assert features.shape == (1, 768)
    assert features[0, 256] == 4.0
    assert features.sum() == 4.0
