"""The probe on cached features is logistic regression, and chooses nothing on the val images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from trainer.evals.features import Features
from trainer.evals.linear import WEIGHT_DECAYS, choose_decay, fit_logistic, folds, linear_accuracy


def blobs(num: int, *, spread: float, seed: int, classes: int = 4, dim: int = 6) -> Features:
    """Gaussian clouds around one centre a class."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    labels = random.integers(classes, size=num)
    vectors = centres[labels] + spread * random.normal(size=(num, dim))
    return Features(torch.from_numpy(vectors).float(), torch.from_numpy(labels))


@pytest.mark.parametrize("weight_decay", [1e-4, 1e-2])
def test_it_finds_the_optimum_that_scikit_learn_finds(weight_decay: float) -> None:
    data = blobs(300, spread=1.0, seed=1)
    weight, bias = fit_logistic(data.vectors, data.labels, num_classes=4, weight_decay=weight_decay)
    theirs = LogisticRegression(C=1 / (300 * weight_decay), tol=1e-8, max_iter=5000).fit(
        data.vectors.double().numpy(), data.labels.numpy()
    )
    ours = torch.nn.functional.linear(data.vectors, weight, bias).softmax(1)
    assert torch.allclose(ours, torch.from_numpy(theirs.predict_proba(data.vectors.numpy())).float(), atol=2e-3)


def test_separable_classes_are_told_apart_and_noise_is_not() -> None:
    easy = linear_accuracy(blobs(400, spread=0.05, seed=1), blobs(100, spread=0.05, seed=2))
    assert easy["top1"] == 100
    noise = linear_accuracy(blobs(400, spread=100.0, seed=1), blobs(400, spread=100.0, seed=2))
    assert noise["top1"] < 40, "chance is 25"
    assert easy["num_images"] == 100
    assert noise["weight_decay"] in WEIGHT_DECAYS


def test_features_of_any_scale_give_the_same() -> None:
    train, val = blobs(400, spread=1.0, seed=1), blobs(200, spread=1.0, seed=2)
    scale = torch.logspace(-3, 3, 6)
    scaled = [Features(features.vectors * scale, features.labels) for features in (train, val)]
    assert linear_accuracy(*scaled)["top1"] == pytest.approx(linear_accuracy(train, val)["top1"], abs=1.0)


@pytest.mark.parametrize(("num_images", "count"), [(23, 5), (20, 10), (3, 5)])
def test_every_image_is_held_out_once_and_never_beside_itself(num_images: int, count: int) -> None:
    parts = folds(num_images, count)
    assert sorted(torch.cat([held for held, _ in parts]).tolist()) == list(range(num_images))
    for held, rest in parts:
        assert sorted([*held.tolist(), *rest.tolist()]) == list(range(num_images))
        assert len(held) in (num_images // count, num_images // count + 1)


def test_a_fit_ends_where_it_ends_wherever_it_starts() -> None:
    data = blobs(300, spread=1.0, seed=1)
    start = fit_logistic(data.vectors, data.labels, num_classes=4, weight_decay=1e-1)
    kept = start[0].clone()
    cold, warm = (
        fit_logistic(data.vectors, data.labels, num_classes=4, weight_decay=1e-3, start=each) for each in (None, start)
    )
    assert torch.allclose(cold[0], warm[0], atol=1e-3)
    assert torch.equal(start[0], kept), "what it starts from stays as it was"


def test_the_choice_is_that_of_plain_cross_validation() -> None:
    """By scikit-learn, every fold and decay from nothing; 30 numbers of 36 are noise, so that weak decays overfit."""
    data = blobs(150, spread=1.0, seed=1)
    noise = torch.randn(150, 30, generator=torch.Generator().manual_seed(0))
    vectors, labels = torch.cat([data.vectors, noise], dim=1), data.labels

    def accuracy(weight_decay: float) -> float:
        right = 0
        for held, rest in folds(150, 5):
            theirs = LogisticRegression(C=1 / (len(rest) * weight_decay), tol=1e-6, max_iter=5000)
            right += (theirs.fit(vectors[rest], labels[rest]).predict(vectors[held]) == labels[held].numpy()).sum()
        return right / 1.5

    chosen, found = choose_decay(vectors, labels, num_classes=4)
    wanted = {each: accuracy(each) for each in WEIGHT_DECAYS[:6]}
    assert chosen == max(wanted, key=lambda each: wanted[each])
    assert found == pytest.approx(wanted[chosen], abs=0.7), "one image of 150"
    assert wanted[chosen] > wanted[WEIGHT_DECAYS[5]] + 1, "the choice matters here"


def test_of_equal_decays_the_strongest_is_chosen() -> None:
    data = blobs(100, spread=0.01, seed=1)
    assert choose_decay(data.vectors, data.labels, num_classes=4) == (WEIGHT_DECAYS[0], 100)
