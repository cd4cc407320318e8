"""Heads at many learning rates on one pass's features: each as if alone, all reported, none chosen unasked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.evals.test_classification import TINY, trained
from trainer import distributed, weights
from trainer.evals.classification import Training, run, settings_of, summary
from trainer.evals.features import ImageReader
from trainer.evals.resumable import Resumable
from trainer.evals.sources import open_source
from trainer.models.backbones import Backbone, build_backbone
from trainer.protocols import KNN, Classification, Evals, FineTuning, Linear, LinearViT, Transfer
from trainer.recipe import Data, RecipeError

SWEPT: dict[str, Classification] = {
    "lars": Linear(base_lr=30.0, sweep=(300.0, 1e38), epochs=3, global_batch=12),
    "batchnorm": Transfer(base_lr=2.0, sweep=(0.3, 1e38), milestones=(2,), epochs=3, global_batch=12, select="best"),
}
"""The last rate diverges, which must harm no other head."""


class Stops(Resumable):
    """Ends the training after its second epoch."""

    def save(self, step: int, scores: list[Any]) -> None:
        super().save(step, scores)
        if step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", SWEPT)
def test_every_head_of_a_sweep_is_that_of_a_training_at_its_rate_alone_even_after_a_stop(
    synthetic: Path, tmp_path: Path, name: str
) -> None:
    files, swept = (synthetic / "train.beton", synthetic / "val.beton"), SWEPT[name]
    with pytest.raises(KeyboardInterrupt):
        trained(*files, swept, tmp_path / "swept.pt", Stops)
    scores, model = trained(*files, swept, tmp_path / "swept.pt")
    for rate, head in list(zip(swept.rates, model.heads, strict=True))[:2]:
        score, alone = trained(*files, replace(swept, base_lr=rate, sweep=()), tmp_path / f"{rate}.pt")
        assert score == {rate: scores[rate]}
        for key, value in alone.head.state_dict().items():
            assert torch.equal(head.state_dict()[key], value), (rate, key)
    first, second, diverged = (nn.utils.parameters_to_vector(head.parameters()) for head in model.heads)
    assert not torch.equal(first, second)
    assert not diverged.isfinite().all(), "the trap is real"


def test_a_sweep_reports_every_rate_and_chooses_among_them_on_val_only_if_told() -> None:
    scores = [
        {0.05: {"top1": low, "num_images": 10.0}, 0.5: {"top1": high, "num_images": 10.0}}
        for low, high in ((20.0, 60.0), (30.0, 64.0))
    ]
    every = {"top1_at_0.05": 25.0, "top1_at_0.5": 62.0, "num_images": 10.0}
    published = summary(scores, Linear(sweep=(0.5,), repeats=2), scores)
    assert published == every | {"top1": 25.0, "top1_std": pytest.approx(50**0.5), "base_lr": 0.05}
    best = summary(scores, Linear(sweep=(0.5, 0.05), repeats=2, rate="val"), scores)
    assert best == every | {"top1": 62.0, "top1_std": pytest.approx(8**0.5), "base_lr": 0.5}
    others = [
        {rate: {"top1": -measures["top1"], "num_images": 10.0} for rate, measures in score.items()} for score in scores
    ]
    held_out = summary(scores, Linear(sweep=(0.5,), repeats=2, rate="held_out"), others)
    assert held_out == published, "the rate that is worst on val is best there"
    score = [{0.05: score[0.05]} for score in scores]
    alone = summary(score, Linear(repeats=2), score)
    assert alone == {"top1": 25.0, "top1_std": pytest.approx(50**0.5), "num_images": 10.0}


def report_of(rate: str, folder: Path, train: Path, val: Path) -> dict[str, Any]:
    torch.manual_seed(100)
    weights.save_backbone(folder, build_backbone(TINY), TINY, size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    rates = ["evals.linear.base_lr=0.001", "evals.linear.sweep=[3.0,1e38]", f"evals.linear.rate={rate}"]
    small = ["evals.linear.epochs=2", "evals.linear.global_batch=12", "evals.knn.size=32", "evals.knn.resize=32"]
    files = [f"data.train={train}", f"data.val={val}", "data.num_workers=1"]
    source = open_source(folder, "linear", [*rates, *small, *files])
    source.choose(["untrained"])
    settings, results = run(source, "linear")
    assert settings["rate"] == rate
    return results["untrained"]


def test_a_rate_is_chosen_on_held_out_train_images_and_the_result_is_that_of_all_of_them(
    synthetic: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    train, val = synthetic / "train.beton", synthetic / "val.beton"
    on_val = report_of("held_out", tmp_path / "val", train, val)
    on_train = report_of("held_out", tmp_path / "train", train, train)
    assert on_val["base_lr"] == on_train["base_lr"], "the val images have no say"
    assert on_val["num_images"] == 36
    assert on_train["num_images"] == 96
    for each in (on_val, on_train):
        assert each["top1"] == each[f"top1_at_{each['base_lr']}"]
    plain = report_of("base_lr", tmp_path / "plain", train, val)
    of_all = {key: value for key, value in plain.items() if key.startswith("top1_at_")}
    assert len(of_all) == 3
    assert of_all == {key: on_val[key] for key in of_all}, "each head has seen all train images, as without a choice"


def test_held_out_images_are_a_tenth_that_the_choosing_heads_have_not_seen(synthetic: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, range(20, 60))))
    reader = ImageReader(
        size=32, resize=32, batch_size=8, num_workers=1, mean=(0.5,) * 3, std=(0.2,) * 3, device=torch.device("cpu")
    )
    for subset, expected in ((None, range(96)), (listed, range(20, 60))):
        data = Data(train=synthetic / "train.beton", val=synthetic / "val.beton", subset=subset, num_workers=1)
        seen, judges = Training(data, Linear(), reader, 3, "test").held_out().split or ([], [])
        assert len(judges) == -(-len(expected) // 10)
        assert sorted(seen + judges) == list(expected)


def test_a_probe_refuses_settings_that_the_kind_of_network_does_not_read() -> None:
    vit = build_backbone(Backbone(name="vit_tiny_patch16_224", args={"img_size": 32, "embed_dim": 12, "depth": 1}))
    cnn, knn = build_backbone(TINY), KNN(every_epochs=0)
    assert settings_of(Evals(knn=knn, linear=Linear(epochs=3)), "linear", [cnn]) == Linear(epochs=3)
    assert settings_of(Evals(knn=knn, linear_vit=LinearViT(epochs=3)), "linear", [vit]) == LinearViT(epochs=3)
    with pytest.raises(RecipeError, match=r"vision transformers read evals\.linear_vit"):
        settings_of(Evals(knn=knn, linear=Linear(epochs=3)), "linear", [vit])
    with pytest.raises(RecipeError, match=r"this network reads evals\.linear;"):
        settings_of(Evals(knn=knn, linear_vit=LinearViT(epochs=3)), "linear", [cnn])


def test_a_sweep_is_refused_where_the_network_is_trained_and_where_a_choice_has_no_rates() -> None:
    with pytest.raises(ValueError, match=r"one frozen network, got \[0.1\] with trains: all"):
        FineTuning(sweep=(0.1,))
    with pytest.raises(ValueError, match="rate is val, and there is nothing to choose among"):
        Linear(rate="val")
    with pytest.raises(ValueError, match="rate is held_out, and there is nothing"):
        Transfer(rate="held_out")
    with pytest.raises(ValueError, match="sweep must name learning rates above 0"):
        Linear(sweep=(0.1, 0.0))
