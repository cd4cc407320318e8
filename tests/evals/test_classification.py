"""Trained protocols against plain PyTorch, over ranks, after a kill; and what their heads start from."""

import copy
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests import launch
from tests.spawn import run_ranks
from trainer import distributed, weights
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.views import View
from trainer.evals.classification import WHOLE, Scores, Training, mean_and_spread, set_rate
from trainer.evals.classifier import Classifier, ClassTokens, build_classifier
from trainer.evals.features import ImageReader
from trainer.evals.resumable import Resumable
from trainer.guards import TrainingError
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.heads import DINOHead, MoCoHead, MSNHead, SwAVHead
from trainer.protocols import Classification, FineTuning, Linear, Transfer
from trainer.recipe import Data, RecipeError

SMOOTH = {"act_layer": "gelu", "replace_stem_pool": True}
"""No jump in any gradient, which would carry the last bit of a sum into all weights; see tests/test_parity.py."""
TINY = Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8, **SMOOTH})
SMALL = {"epochs": 3, "global_batch": 12}
CASES: dict[str, Classification] = {
    "linear": Linear(optimizer="sgd", base_lr=2.0, sweep=(0.5,), **SMALL),
    "transfer": Transfer(base_lr=2.0, milestones=(1, 2), epochs=3, global_batch=12),
    "finetune": FineTuning(base_lr=0.1, **SMALL),
}


@pytest.fixture(scope="module")
def uneven(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 val images, which neither 2 nor 3 ranks share evenly."""
    folder = tmp_path_factory.mktemp("uneven")
    shutil.copytree(synthetic / "images/val", folder / "images")
    sorted((folder / "images").rglob("*.*"))[7].unlink()
    command = [sys.executable, "-m", "data_prep", "convert", str(folder / "images"), str(folder / "val.beton")]
    subprocess.run(command, check=True, timeout=400)
    return folder / "val.beton"


def classifier(
    settings: Classification, projection: dict[str, torch.Tensor] | None = None, method: str | None = None
) -> Classifier:
    torch.manual_seed(5)
    return build_classifier(build_backbone(TINY), settings, 12, projection or {}, seed=3, method=method)


def trained(
    train: Path, val: Path, settings: Classification, state: Path, kept: type[Resumable] = Resumable
) -> tuple[Scores, Classifier]:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    model = classifier(settings)
    data = Data(train=train, val=val, num_workers=1)
    reader = ImageReader(
        size=32, resize=32, batch_size=8, num_workers=1, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        device=torch.device("cpu"),
    )  # fmt: skip
    score = Training(data, settings, reader, 3, "test").run(model, kept(state, "test"))
    return score, model


def heads_of(model: Classifier) -> dict[str, torch.Tensor]:
    """`head.weight` ..., and of further rates `others.0.weight` ..."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("network.")}


def on_this_rank(train: Path, val: Path, folder: Path) -> dict[str, Any]:
    results = {}
    for name, settings in CASES.items():
        score, model = trained(train, val, settings, folder / f"{distributed.world()}-{name}.pt")
        results[name] = score, {key: value.numpy() for key, value in heads_of(model).items()}
    return results


@pytest.fixture(scope="module")
def over_ranks(synthetic: Path, uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (synthetic / "train.beton", uneven, folder)
    return {world: run_ranks(on_this_rank, *arguments, world=world) for world in (1, 2, 3)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_trains_the_same_and_counts_every_image_once(
    over_ranks: dict[int, Any], world: int, name: str
) -> None:
    alone, head = over_ranks[1][0][name]
    assert list(alone) == list(CASES[name].rates)
    assert max(value.std() for key, value in head.items() if key.endswith("weight")) > 0.02, "it started at 0.01"
    for result in over_ranks[world]:
        score, other = result[name]
        for key, value in head.items():
            np.testing.assert_allclose(other[key], value, rtol=1e-3, atol=1e-4)
        for rate in CASES[name].rates:
            assert score[rate]["num_images"] == alone[rate]["num_images"] == 35
            tipped = 100 / 35 + 1e-6
            assert score[rate] == pytest.approx(alone[rate], abs=tipped), "rounding may tip one image between classes"


def plain_pytorch(train: Path, settings: Classification) -> tuple[nn.Module, nn.Module]:
    """The same training written down plainly: torch's SGD and nothing of ours but the images."""
    model = classifier(settings)
    network, head = copy.deepcopy(model.network), copy.deepcopy(model.head)
    network.requires_grad_(settings.trains == "all")
    modules = [head] if settings.trains == "head" else [network, head]
    network.train(settings.trains == "all")
    groups = [
        {"params": module.parameters(), "factor": settings.head_lr_factor if module is head else 1}
        for module in modules
    ]
    sgd = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=settings.nesterov, weight_decay=settings.weight_decay)
    view = View(size=32, scale=(0.08, 1), jitter_prob=0, gray_prob=0, blur_prob=0)
    loader = ViewLoader(train, [view], batch_size=12, seed=3)
    for epoch in range(3):
        peak = settings.base_lr * 12 / 256
        cosine = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * epoch / 3)) / 2
        for group in sgd.param_groups:
            group["lr"] = group["factor"] * (peak * 0.1**epoch if settings.milestones else cosine)
        for batch in loader.epoch(epoch):
            images = to_float(batch.views[0], torch.device("cpu"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
            sgd.zero_grad()
            F.cross_entropy(head(network(images)), batch.labels).backward()
            sgd.step()
    loader.close()
    return network, head


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_training_that_plain_pytorch_does(over_ranks: dict[int, Any], synthetic: Path, name: str) -> None:
    torch.set_num_threads(1)
    network, head = plain_pytorch(synthetic / "train.beton", CASES[name])
    for key, value in head.state_dict().items():
        np.testing.assert_allclose(over_ranks[1][0][name][1][f"head.{key}"], value.numpy(), rtol=1e-4, atol=1e-5)
    assert network.training == (name == "finetune")


def test_a_frozen_network_stays_as_it_was(synthetic: Path, uneven: Path, tmp_path: Path) -> None:
    before = classifier(CASES["transfer"]).network.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    score, model = trained(synthetic / "train.beton", uneven, CASES["transfer"], tmp_path / "state.pt")
    assert score[2.0]["num_images"] == 35
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.head[0].num_batches_tracked == 3 * 8, "the head's BatchNorm does follow"  # type: ignore[index]


@pytest.mark.parametrize("head", ["dino", "swav", "moco", "msn"])
def test_few_labels_start_from_the_hidden_layers_of_the_projection_head(head: str) -> None:
    torch.manual_seed(0)
    module: Any = {
        "dino": DINOHead(16, hidden_dim=6, bottleneck_dim=4, num_prototypes=9, norm=True, train_gain=False),
        "swav": SwAVHead(16, hidden_dim=6, out_dim=4),
        "moco": MoCoHead(16, hidden_dim=6, out_dim=4),
        "msn": MSNHead(16, hidden_dim=6, out_dim=4, norm=True),
    }[head]
    for norm in (each for each in module.modules() if isinstance(each, nn.BatchNorm1d)):
        nn.init.uniform_(norm.running_mean)
    ours = classifier(Classification(head="projection"), module.state_dict(), head).head.eval()
    features, hidden = torch.randn(5, 16), module.mlp.eval()[:-1]
    assert ours[-1].out_features == 12
    assert torch.equal(ours[:-1](features), hidden(features))


def test_without_a_projection_head_few_labels_say_what_to_do() -> None:
    with pytest.raises(RecipeError, match="head=linear"):
        classifier(Classification(head="projection"))


def test_a_training_that_diverges_ends_with_its_rate(synthetic: Path, tmp_path: Path) -> None:
    settings = FineTuning(base_lr=1e30, **SMALL)
    with pytest.raises(TrainingError, match=r"the loss of epoch \d is (nan|inf); .* Lower its base_lr, 1e\+30"):
        trained(synthetic / "train.beton", synthetic / "val.beton", settings, tmp_path / "state.pt")


def test_settings_that_would_do_nothing_or_fail_later_are_refused() -> None:
    with pytest.raises(ValueError, match=r"milestones \[8, 16, 24\] lie behind the last of 5 epochs"):
        Transfer(epochs=5)
    with pytest.raises(ValueError, match=r"scale must be a lower and an upper fraction in \(0, 1\], got \[1.0, 0.5\]"):
        Linear(scale=(1.0, 0.5))


def test_a_vit_without_class_token_is_refused_where_its_class_token_is_read() -> None:
    args = {"img_size": 32, "embed_dim": 12, "depth": 4, "class_token": False, "global_pool": "avg"}
    vit = build_backbone(Backbone(name="vit_tiny_patch16_224", args=args))
    with pytest.raises(RecipeError, match="this one has none; take linear_cached"):
        build_classifier(vit, Transfer(), 3, {}, seed=0)


def test_in_bfloat16_logits_and_weights_stay_in_fp32() -> None:
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    full, half = (
        build_classifier(copy.deepcopy(network), CASES["finetune"], 12, {}, seed=3, bf16=bf16)
        for network in (build_backbone(TINY),)
        for bf16 in (False, True)
    )
    (logits,), (expected,) = half.logits(images), full.logits(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.02)
    half(images, labels)[0].backward()
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in half.parameters())


def test_a_vits_probe_sees_the_class_tokens_of_its_last_four_blocks() -> None:
    vit = build_backbone(Backbone(name="vit_tiny_patch16_224", args={"img_size": 32, "embed_dim": 12, "depth": 6}))
    probe = build_classifier(vit.eval(), Linear(), 3, {}, seed=0)
    assert isinstance(probe.network, ClassTokens)
    images = torch.randn(2, 3, 32, 32)
    tokens: list[torch.Tensor] = []
    for block in vit.blocks[-4:]:  # type: ignore[union-attr,index]
        block.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    vit(images)
    expected = torch.cat([vit.norm(each)[:, 0] for each in tokens], dim=1)  # type: ignore[operator]
    torch.testing.assert_close(probe.network(images), expected)
    assert probe.head.in_features == 48


def test_squashed_images_are_whole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a/picture.png")
    command = [sys.executable, "-m", "data_prep", "convert", str(tmp_path), str(tmp_path / "a.beton")]
    subprocess.run(command, check=True, timeout=400)
    view = View(size=32, flip_prob=0, jitter_prob=0, gray_prob=0, blur_prob=0, **WHOLE)  # type: ignore[arg-type]
    loader = ViewLoader(tmp_path / "a.beton", [view], batch_size=1, drop_last=False)
    (batch,) = [each.views[0][0, 0].permute(1, 2, 0).numpy().astype(int) for each in loader.epoch(0)]
    loader.close()
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(batch - expected).mean() < 8, "JPEG's loss alone"


def test_rates_follow_the_published_schedules() -> None:
    def rates(settings: Classification) -> list[float]:
        group = {"params": [torch.zeros(1)], "factor": 2.0, "base_lr": settings.base_lr}
        sgd, found = torch.optim.SGD([group], lr=0), []
        for epoch in range(settings.epochs):
            set_rate(sgd, settings, epoch)
            found.append(sgd.param_groups[0]["lr"] / 2)
        return found

    linear, transfer = rates(Linear()), rates(Transfer())
    assert linear[0] == pytest.approx(0.8)
    assert linear[50] == pytest.approx(0.4, abs=1e-5)
    assert [transfer[epoch] for epoch in (0, 7, 8, 16, 24)] == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5])


def test_repeats_are_reported_with_their_spread() -> None:
    scores = [{"top1": value, "num_images": 35.0} for value in (40.0, 44.0)]
    assert mean_and_spread(scores) == {"top1": 42.0, "num_images": 35.0, "top1_std": pytest.approx(8**0.5)}


def test_a_killed_evaluation_goes_on_and_ends_as_the_straight_one(synthetic: Path, tmp_path: Path) -> None:
    results = []
    for name in ("straight", "killed"):
        torch.manual_seed(100)
        folder = tmp_path / name
        weights.save_backbone(folder, build_backbone(TINY), TINY, size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
        settings = ["evals.finetune.epochs=60", "evals.finetune.global_batch=16", "evals.finetune.repeats=2"]
        command = [
            *launch.launcher("python"), "evaluate", str(folder), "--protocol", "finetune", *settings,
            f"data.train={synthetic / 'train.beton'}", f"data.val={synthetic / 'val.beton'}", "data.num_workers=1",
            "evals.knn.size=32", "evals.knn.resize=32",
        ]  # fmt: skip
        if name == "killed":
            process = launch.start(command)
            second = f".finetune-*-{name}-1.pt"
            deadline = time.monotonic() + 300
            while not list((folder / "evals").glob(second)):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
            process.communicate()
            assert not list((folder / "evals").glob("finetune*.json"))
        output = launch.run(command)
        assert ("continuing" in output) == (name == "killed")
        (report,) = (folder / "evals").glob("finetune*.json")
        results.append(json.loads(report.read_text())["results"][name])
        assert "sweep" not in json.loads(report.read_text())["settings"], "it compares with reports that knew none"
        assert not list((folder / "evals").glob(".finetune*")), "nothing is left behind"
    assert results[0] == results[1]
