"""Heads at many learning rates on one pass's features: each as if alone, all reported, none chosen unasked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.evals.test_classification import trained
from trainer.evals.classification import summary
from trainer.evals.resumable import Resumable
from trainer.protocols import Classification, FineTuning, Linear, Transfer

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
    published = summary(scores, Linear(sweep=(0.5,), repeats=2))
    assert published == every | {"top1": 25.0, "top1_std": pytest.approx(50**0.5), "base_lr": 0.05}
    best = summary(scores, Linear(sweep=(0.5, 0.05), repeats=2, rate="val"))
    assert best == every | {"top1": 62.0, "top1_std": pytest.approx(8**0.5), "base_lr": 0.5}
    alone = summary([{0.05: score[0.05]} for score in scores], Linear(repeats=2))
    assert alone == {"top1": 25.0, "top1_std": pytest.approx(50**0.5), "num_images": 10.0}


def test_a_sweep_is_refused_where_the_network_is_trained_and_where_a_choice_has_no_rates() -> None:
    with pytest.raises(ValueError, match=r"one frozen network, got \[0.1\] with trains: all"):
        FineTuning(sweep=(0.1,))
    with pytest.raises(ValueError, match="rate is val, and there is nothing to choose among"):
        Linear(rate="val")
    with pytest.raises(ValueError, match="sweep must name learning rates above 0"):
        Linear(sweep=(0.1, 0.0))
