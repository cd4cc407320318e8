"""Training and measuring a detector: published schedule, every image once, and a stop that changes nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.evals.coco_files import write_coco
from tests.spawn import run_ranks
from trainer import distributed, weights
from trainer.__main__ import main as trainer
from trainer.evals.coco import CocoImages
from trainer.evals.detection import batches_of_rank, evaluate, learning_rate, parameter_groups, train
from trainer.evals.resumable import Resumable
from trainer.generators import seed_everything
from trainer.models.backbones import Backbone, build_backbone, synchronise_batchnorm
from trainer.models.detectors import DetectionObjective, build_detector
from trainer.protocols import Detection

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8})
TINY = Detection(
    steps=4, global_batch=2, base_lr=0.02, warmup_steps=1, train_sizes=(48, 56), test_size=48, max_size=80, regions=16,
    num_workers=0, log_every_steps=1, save_every_steps=2,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, "train", number=8, seed=1)
    write_coco(folder, "val", number=7, seed=2)
    return folder


@pytest.fixture
def alone() -> None:
    distributed.start(CPU)  # and not stopped: DeepSpeed keeps the first group that it sees in a process


def annotations(folder: Path, split: str) -> Path:
    return folder / f"annotations/instances_{split}.json"


def objective(*, masks: bool = True) -> DetectionObjective:
    seed_everything(0)
    sizes = {"train_sizes": TINY.train_sizes, "test_size": TINY.test_size, "max_size": TINY.max_size}
    detector = build_detector(
        build_backbone(SPEC), num_classes=2, masks=masks, regions=TINY.regions, mean=MEAN, std=STD, **sizes
    )
    built = DetectionObjective(detector)
    synchronise_batchnorm(built, CPU)
    return built


class StopsAt(Resumable):
    """The process dies after the first save."""

    def save(self, step: int, scores: list[Any]) -> None:
        super().save(step, scores)
        distributed.barrier()
        raise KeyboardInterrupt


def trained(coco: Path, kept: Resumable) -> dict[str, Tensor]:
    module = objective()
    train(module, CocoImages(annotations(coco, "train"), train=True, masks=True), TINY, CPU, seed=0, kept=kept)
    return module.state_dict()


def straight_and_stopped(coco: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    straight = trained(coco, Resumable(folder / "straight.pt", "same"))
    with pytest.raises(KeyboardInterrupt):
        trained(coco, StopsAt(folder / "stopped.pt", "same"))
    return straight, trained(coco, Resumable(folder / "stopped.pt", "same"))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.usefixtures("alone")
def test_a_training_that_was_stopped_ends_with_the_weights_of_one_that_was_not(coco: Path, tmp_path: Path) -> None:
    straight, resumed = straight_and_stopped(coco, tmp_path)
    assert torch.load(tmp_path / "stopped.pt", weights_only=True)["step"] == TINY.steps
    assert not differing(straight, resumed)
    start = objective().state_dict()
    assert "detector.roi_heads.mask_predictor.mask_fcn_logits.weight" in differing(straight, start)
    assert "detector.backbone.stages.network.conv1.weight" in differing(straight, start)


class Knowing(nn.Module):
    """Finds exactly what is there, so that an image that is left out or counted twice costs average precision."""

    def __init__(self, images: CocoImages) -> None:
        super().__init__()
        self.answers = {}
        for index, image_id in enumerate(images.ids):
            image, target = images[index, False]
            masks = images.masks_of(image_id)[:, None].float()
            self.answers[float(image.double().sum())] = target | {"scores": torch.ones(len(masks)), "masks": masks}

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.answers[float(image.double().sum())] for image in images]


def _measured(coco: Path) -> dict[str, float]:
    images = CocoImages(annotations(coco, "val"), train=False, masks=True)
    return evaluate(Knowing(images), images, CPU, num_workers=0)


def _on_ranks(coco: Path, folder: Path) -> tuple[list[str], dict[str, float], dict[str, float]]:
    straight, resumed = straight_and_stopped(coco, folder)
    sums = {name: float(each.double().sum()) for name, each in straight.items()}
    return differing(straight, resumed), _measured(coco), sums


@pytest.fixture(scope="module")
def on_two_ranks(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(_on_ranks, coco, tmp_path_factory.mktemp("two"), world=2)


def test_the_same_holds_on_two_ranks_which_keep_equal_weights(on_two_ranks: list[Any]) -> None:
    (first, _, sums_of_first), (second, _, sums_of_second) = on_two_ranks
    assert not first
    assert not second
    assert sums_of_first == sums_of_second


def test_every_image_counts_once_on_any_number_of_ranks(coco: Path, on_two_ranks: list[Any]) -> None:
    alone = _measured(coco)
    assert alone.pop("num_images") == 7  # which neither 2 nor 3 divides
    assert list(alone.values()) == pytest.approx([100.0] * len(alone))
    alone["num_images"] = 7
    assert [measured for _, measured, _ in on_two_ranks] == [alone] * 2
    assert run_ranks(_measured, coco, world=3) == [alone] * 3


def test_an_epoch_sees_every_image_once_over_the_ranks_and_mirrors_half() -> None:
    epochs: list[list[tuple[int, bool]]] = [[], []]
    for rank in range(2):
        for step, batch in enumerate(batches_of_rank(200, 5, rank, 2, seed=3, steps=range(40))):
            assert len(batch) == 5
            epochs[step // 20] += batch
    for epoch in epochs:
        assert sorted(image for image, _ in epoch) == list(range(200))
        assert 80 < sum(mirrored for _, mirrored in epoch) < 120
    first, second = (dict(epoch) for epoch in epochs)
    assert 60 < sum(first[image] != second[image] for image in range(200)) < 140
    assert [image for image, _ in epochs[0]] != [image for image, _ in epochs[1]]


def test_the_order_goes_on_where_it_stopped_and_does_not_depend_on_the_number_of_ranks() -> None:
    alone = list(batches_of_rank(17, 4, 0, 1, seed=0, steps=range(10)))
    assert list(batches_of_rank(17, 4, 0, 1, seed=0, steps=range(6, 10))) == alone[6:]
    halves = [list(batches_of_rank(17, 2, rank, 2, seed=0, steps=range(10))) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == alone


def test_the_rate_follows_the_1x_schedule() -> None:
    settings = Detection()
    rates = {0: 0.00002, 500: 0.01001, 1000: 0.02, 59_999: 0.02, 60_000: 0.002, 79_999: 0.002, 80_000: 0.0002}
    assert {step: learning_rate(settings, step) for step in rates} == pytest.approx(rates)
    assert learning_rate(Detection(global_batch=8), 1000) == pytest.approx(0.01)


@pytest.mark.parametrize(("decay", "groups"), [(1e-4, [1e-4, 0.0]), (0.0, [0.0])])
def test_norms_do_not_decay_and_everything_else_does(decay: float, groups: list[float]) -> None:
    module = objective()
    made = parameter_groups(module, decay)
    assert [group["weight_decay"] for group in made] == groups
    assert sorted(id(each) for group in made for each in group["params"]) == sorted(map(id, module.parameters()))
    norms = {id(each) for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) for each in norm.parameters()}
    assert norms
    assert norms <= {id(each) for each in made[-1]["params"]}
    assert len(groups) == 1 or len(norms) == len(made[-1]["params"])


def settings_of(coco: Path, **changes: object) -> list[str]:
    given = {"steps": 2, "global_batch": 2, "warmup_steps": 1, "train_sizes": "[48,56]", "test_size": 48}
    given |= {"max_size": 80, "regions": 16, "num_workers": 0, "log_every_steps": 1} | changes
    data = [f"data.{split}={annotations(coco, split)}" for split in ("train", "val")]
    return [*data, "evals.knn.size=32", "evals.knn.resize=32", *(f"evals.detection.{k}={v}" for k, v in given.items())]


def saved(folder: Path, spec: Backbone = SPEC) -> Path:
    weights.save_backbone(folder / "student", build_backbone(spec), spec, size=32, mean=MEAN, std=STD)
    return folder


def test_the_command_reports_boxes_and_masks_of_the_networks_that_were_asked_for(coco: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(saved(tmp_path)), "--protocol", "segmentation", *settings_of(coco, num_workers=1)]
    assert trainer([*command, "--networks", "student,untrained"]) == 0
    report = json.loads((tmp_path / "evals/segmentation.json").read_text())
    assert report["settings"]["train_sizes"] == [48, 56]
    assert list(report["results"]) == ["student", "untrained"]
    assert {"box_AP", "mask_AP", "mask_AP75", "num_images"} <= set(report["results"]["student"])
    assert not list((tmp_path / "evals").glob(".*.pt"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_batch": 9}, "7 images with objects are less than a batch; set evals.detection.global_batch below 9"),
        ({"test_size": 16}, "test_size must be at least 32"),
        ({"train_sizes": "[]"}, "train_sizes must name sizes"),
        (
            {"base_lr": 1e12, "steps": 8, "warmup_steps": 0},
            r"detection step \d: loss (nan|inf).* Lower evals\.detection\.base_lr",
        ),
    ],
)
def test_settings_that_cannot_work_are_said(
    changes: dict[str, object], said: str, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["evaluate", str(saved(tmp_path)), "--protocol", "detection", *settings_of(coco, **changes)]
    assert trainer(command) != 0
    assert re.search(said, caplog.text.replace("\n", " "))
