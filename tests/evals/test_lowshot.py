"""Low-shot accuracy: the classifier that scikit-learn finds, on as many images of each class as were asked for."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from tests.evals.test_linear import blobs
from trainer.evals.features import Features
from trainer.evals.lowshot import few_of_each_class, lowshot_accuracy, preprocess
from trainer.protocols import LowShot
from trainer.recipe import RecipeError


def test_each_class_gives_as_many_images_and_another_seed_gives_others() -> None:
    labels = torch.arange(60) % 4
    few = [few_of_each_class(labels, 5, seed=seed) for seed in (0, 0, 1)]
    assert labels[few[0]].bincount().tolist() == [5, 5, 5, 5]
    assert len(set(few[0].tolist())) == 20
    assert torch.equal(few[0], few[1])
    assert set(few[0].tolist()) != set(few[2].tolist())


@pytest.mark.parametrize("penalty", [2.5e-4, 0.5])
def test_it_is_the_classifier_of_scikit_learn(penalty: float) -> None:
    train, val = blobs(200, spread=1.0, seed=1), blobs(300, spread=1.0, seed=2)
    ours = lowshot_accuracy(train, val, LowShot(images_per_class=(3,), splits=1, penalty=penalty), seed=7)
    few = few_of_each_class(train.labels, 3, seed=7)
    vectors, queries = (
        StandardScaler(with_std=False).fit_transform(each.double().numpy().T).T
        for each in (train.vectors[few], val.vectors)
    )
    vectors, queries = normalize(vectors), normalize(queries)
    theirs = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = 100 * theirs.fit(vectors, train.labels[few].numpy()).score(queries, val.labels.numpy())
    assert ours["top1_3"] == pytest.approx(expected, abs=0.7), "at most two of 300 images may stand on the border"
    assert 100 / 4 < ours["top1_3"] < 100


def test_features_are_prepared_row_by_row() -> None:
    rows = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 7.0]])
    expected = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]) / torch.tensor([[14.0], [6.0]]).sqrt()
    torch.testing.assert_close(preprocess(rows), expected)
    torch.testing.assert_close(preprocess(rows[1:]), expected[1:], msg="no image depends on the others")


def test_more_images_know_more_and_the_splits_spread() -> None:
    train, val = blobs(400, spread=1.2, seed=1), blobs(400, spread=1.2, seed=2)
    result = lowshot_accuracy(train, val, LowShot(), seed=0)
    assert result["top1_1"] < result["top1_5"]
    assert result["top1_1_std"] > 0
    assert result["num_images"] == 400


def test_a_class_with_too_few_images_is_named() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(RecipeError, match="class 1 has 1 train images, wanted 2"):
        lowshot_accuracy(Features(torch.randn(4, 3), labels), Features(torch.randn(4, 3), labels), LowShot(), seed=0)
