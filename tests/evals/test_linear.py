"""The probe on cached features is logistic regression, and chooses nothing on the val images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from trainer.evals.features import Features
from trainer.evals.linear import WEIGHT_DECAYS, fit_logistic, linear_accuracy


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
