"""Alignment, uniformity and the use of prototypes against their formulas; the command on runs with a head."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.evals.test_sources import TINY, data
from trainer import weights
from trainer.__main__ import main as trainer
from trainer.evals.collapse import alignment, drawn, prototype_logits, prototype_use, uniformity
from trainer.models.backbones import build_backbone
from trainer.models.heads import CosinePrototypes, DINOHead, MSNHead, Prototypes, SwAVHead
from trainer.teachers.heads import head_of
from trainer.weights import HeadSpec


def test_views_that_agree_are_aligned_at_any_length() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert alignment(features, 3 * features) == pytest.approx(0, abs=1e-12)
    assert alignment(features, -features) == pytest.approx(4), "opposite ends of the sphere are 2 apart"


def test_uniformity_is_the_mean_of_the_papers_kernel() -> None:
    corners = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 5.0]])
    pairs = [4.0, 2.0, 2.0]
    assert uniformity(corners) == pytest.approx(math.log(sum(math.exp(-2 * each) for each in pairs) / 3))
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-9)


def test_of_many_images_those_drawn_are_of_every_class_and_always_the_same() -> None:
    class_by_class = torch.arange(100).repeat_interleave(50)[:, None]
    few = drawn(class_by_class, 1000)
    assert len(few) == 1000
    assert len(few.unique()) == 100
    assert torch.equal(few, drawn(class_by_class, 1000))
    assert torch.equal(drawn(class_by_class, 5000), class_by_class)


def test_prototypes_that_nobody_meets_are_counted_out() -> None:
    logits = F.one_hot(torch.tensor([0, 0, 1, 1]), 10).float()
    assert prototype_use(logits) == {"prototypes_used": 50.0, "prototype_perplexity": pytest.approx(2)}
    assert prototype_use(logits[:2])["prototype_perplexity"] == pytest.approx(1)


def test_prototypes_are_met_as_the_heads_meet_them() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 16)
    dino = DINOHead(16, hidden_dim=8, bottleneck_dim=4, num_prototypes=9, norm=True, train_gain=False).eval()
    logits = prototype_logits(features, head_of(HeadSpec("dino"), dino.state_dict(), "here"))
    assert logits is not None
    torch.testing.assert_close(logits, dino(features))
    swav, prototypes = SwAVHead(16, hidden_dim=8, out_dim=4).eval(), Prototypes(4, 7)
    msn, directions = MSNHead(16, hidden_dim=8, out_dim=4, norm=True).eval(), CosinePrototypes(4, 7)
    for name, head, vectors in (("swav", swav, prototypes), ("msn", msn, directions)):
        state = head.state_dict() | {"prototypes.weight": vectors.weight.detach()}
        logits = prototype_logits(features, head_of(HeadSpec(name), state, "here"))
        torch.testing.assert_close(logits, vectors(head(features)).detach())
    assert prototype_logits(features, None) is None, "a head without prototypes"


def test_the_command_needs_no_labels_and_reads_the_head(synthetic: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights.save_backbone(tmp_path / "student", build_backbone(TINY), TINY, size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    head = DINOHead(16, hidden_dim=8, bottleneck_dim=4, num_prototypes=9, norm=True, train_gain=False)
    weights.save_head(tmp_path / "student", head.state_dict(), HeadSpec("dino"))
    assert trainer(["evaluate", str(tmp_path), "--protocol", "collapse", *data(synthetic)]) == 0
    (report,) = (tmp_path / "evals").glob("collapse*.json")
    results = json.loads(report.read_text())["results"]
    assert 1 <= results["student"]["prototype_perplexity"] <= 9
    assert "prototype_perplexity" not in results["pixels"]
    assert results["student"]["num_images"] == 36
    assert 0 < results["pixels"]["alignment"] < 2, "crops of one picture are nearer than pictures are"
    assert results["pixels"]["uniformity"] < 0
