"""COCO's files are read as COCO means them, and average precision is pycocotools' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.evals.coco_files import write_coco
from trainer.evals.coco import CocoImages, as_results, average_precision
from trainer.evals.detection import open_coco
from trainer.recipe import RecipeError

MINI = Path(__file__).parents[3] / "shared/data/coco_mini/annotations"
shared = pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/coco_mini beside the checkout")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), "val", number=9)


def truth(images: CocoImages) -> list[dict[str, Any]]:
    """What a detector would say that knows the answers."""
    results = []
    for index, image_id in enumerate(images.ids):
        _, target = images[index, False]
        masks = images.masks_of(image_id)[:, None].float()
        found = target | {"scores": torch.ones(len(target["labels"])), "masks": masks}
        results += as_results(images, image_id, found)
    return results


def guesses(images: CocoImages, seed: int = 0) -> list[dict[str, Any]]:
    """What a middling detector would say: shifted boxes and masks, wrong classes, inventions."""
    draw = torch.Generator().manual_seed(seed)
    results = []
    for index, image_id in enumerate(images.ids):
        image, target = images[index, False]
        number, size = len(target["labels"]) + 2, image.shape[1:]
        boxes = torch.cat([target["boxes"], torch.tensor([[2.0, 3.0, 30.0, 20.0], [20.0, 9.0, 50.0, 40.0]])])
        boxes += torch.randint(-3, 4, boxes.shape, generator=draw)
        masks = torch.cat([images.masks_of(image_id), torch.ones(2, *size, dtype=torch.uint8)])
        masks = masks.roll(int(torch.randint(-3, 4, (), generator=draw)), dims=2)
        labels = torch.cat([target["labels"], torch.tensor([1, 2])])
        labels = torch.where(torch.rand(number, generator=draw) < 0.2, 3 - labels, labels)
        scores = torch.rand(number, generator=draw)
        found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks[:, None].float()}
        results += as_results(images, image_id, found)
    return results


def by_hand(annotations: Path, results: list[dict[str, Any]], kind: str, folder: Path) -> list[float]:
    """pycocotools alone, from results files as the COCO server takes them."""
    keys = {"bbox": ("image_id", "category_id", "bbox", "score"), "segm": ("image_id", "category_id", "segmentation")}
    file = folder / f"{kind}.json"
    file.write_text(json.dumps([{key: each[key] for key in (*keys[kind], "score")} for each in results]))
    annotated = COCO(str(annotations))
    evaluation = COCOeval(annotated, annotated.loadRes(str(file)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * float(value) for value in evaluation.stats[:6] if value >= 0]


def test_the_truth_as_predictions_has_an_average_precision_of_100_for_boxes_and_masks(drawn: Path) -> None:
    images = CocoImages(drawn, train=False, masks=True)
    measures = average_precision(images, truth(images), ("bbox", "segm"))
    assert {"box_AP", "box_AP50", "box_AP75", "mask_AP", "mask_AP50", "mask_AP75"} <= set(measures)
    assert list(measures.values()) == pytest.approx([100.0] * len(measures), abs=1e-9)


def test_average_precision_is_pycocotools_own_on_the_same_results(drawn: Path, tmp_path: Path) -> None:
    images = CocoImages(drawn, train=False, masks=True)
    results = guesses(images)
    measures = average_precision(images, results, ("bbox", "segm"))
    expected = by_hand(drawn, results, "bbox", tmp_path) + by_hand(drawn, results, "segm", tmp_path)
    assert list(measures.values()) == pytest.approx(expected, abs=1e-6)
    assert 5 < measures["box_AP"] < 95
    assert 5 < measures["mask_AP"] < 95


def test_sizes_of_masks_are_counted_by_their_own_area(drawn: Path) -> None:
    """pycocotools takes the area of a box that stands beside the mask, and calls other objects small."""
    images = CocoImages(drawn, train=False, masks=True)
    results = truth(images)
    for each in results:
        each["bbox"] = [0.0, 0.0, 2000.0, 2000.0]
    assert average_precision(images, results, ("segm",))["mask_AP_small"] == pytest.approx(100.0)


def test_nothing_found_is_an_average_precision_of_0(drawn: Path) -> None:
    images = CocoImages(drawn, train=False, masks=True)
    measures = average_precision(images, [], ("bbox", "segm"))
    assert measures["box_AP"] == measures["mask_AP"] == 0.0


def test_sizes_without_an_object_have_no_average_precision(drawn: Path) -> None:
    images = CocoImages(drawn, train=False, masks=False)
    assert "box_AP_small" in average_precision(images, truth(images), ("bbox",))
    assert "box_AP_large" not in average_precision(images, truth(images), ("bbox",))


def test_images_come_in_the_order_of_their_ids_and_training_leaves_out_those_without_objects(drawn: Path) -> None:
    every, trained = (CocoImages(drawn, train=train, masks=True) for train in (False, True))
    assert every.ids == sorted(every.ids)
    assert (len(every), len(trained)) == (9, 8)
    assert set(every.ids) - set(trained.ids) == {1000 - 7 * 3}


def test_crowds_are_not_learnt_from(drawn: Path) -> None:
    images = CocoImages(drawn, train=True, masks=True)
    crowded = 1000 - 7 * 2
    _, target = images[images.ids.index(crowded), False]
    assert len(target["boxes"]) == len(target["masks"]) == len(images.coco.imgToAnns[crowded]) - 1


@pytest.mark.parametrize("mirror", [False, True])
def test_boxes_and_masks_lie_on_what_is_drawn(drawn: Path, mirror: bool) -> None:
    images = CocoImages(drawn, train=True, masks=True)
    for index in range(len(images)):
        image, target = images[index, mirror]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            y, x = mask.nonzero(as_tuple=True)
            inside = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (inside - box).abs().max() <= 1.5  # a triangle's tip is thinner than a pixel
            colour = image[:, mask.bool()].median(dim=1).values
            if len(target["labels"]) == 1:
                assert colour.argmax() == {1: 0, 2: 2}[int(label)]  # rectangles are red, triangles blue


def _without(path: Path, **changes: object) -> Path:
    tree = json.loads(path.read_text()) | changes
    changed = path.with_name(f"instances_{path.parents[1].name}.json")
    changed.write_text(json.dumps(tree))
    (path.parents[1] / path.parents[1].name).mkdir(exist_ok=True)
    return changed


def test_what_is_not_cocos_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a", "train", number=2)
    with pytest.raises(RecipeError, match=r"missing\.json: no such file; give data\.train .*instances_val2017\.json"):
        CocoImages(tmp_path / "missing.json", train=True, masks=False)
    beton = tmp_path / "train.beton"
    beton.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"train\.beton: not COCO annotations"):
        CocoImages(beton, train=True, masks=False)
    with pytest.raises(RecipeError, match="names no categories or no images"):
        CocoImages(_without(path, categories=[]), train=True, masks=False)
    with pytest.raises(RecipeError, match="holds no image with objects"):
        CocoImages(_without(path, annotations=[]), train=True, masks=False)
    broken = path.with_name("instances_train2.json")
    (path.parents[1] / "train2").mkdir()
    broken.write_text("{")
    with pytest.raises(RecipeError, match="not in COCO's format"):
        CocoImages(broken, train=True, masks=False)
    (path.parents[1] / "train").rename(path.parents[1] / "elsewhere")
    with pytest.raises(RecipeError, match=r"images were looked for in .*train, which is no folder"):
        CocoImages(path, train=True, masks=False)


def test_images_that_are_missing_or_of_another_size_are_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "train", number=2)
    images = CocoImages(path, train=True, masks=True)
    images.coco.imgs[images.ids[0]]["width"] += 1
    with pytest.raises(RecipeError, match=r"000000000993\.jpg: .* its boxes would not fit"):
        images[0, False]
    (tmp_path / "train/000000001000.jpg").unlink()
    with pytest.raises(RecipeError, match=r"000000001000\.jpg: cannot be read"):
        images[1, False]


def test_two_files_of_different_categories_are_not_one_data_set(tmp_path: Path) -> None:
    train, val = write_coco(tmp_path, "train", number=2), write_coco(tmp_path, "val", number=2)
    with pytest.raises(RecipeError, match=r"give data\.val"):
        open_coco(train, None, masks=False)
    tree = json.loads(val.read_text())
    tree["categories"] += [{"id": 20, "name": "circle"}]
    val.write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match="different categories"):
        open_coco(train, val, masks=False)


@pytest.mark.shared
@shared
def test_the_truth_of_real_images_has_an_average_precision_of_100_for_boxes_and_masks() -> None:
    images = CocoImages(MINI / "instances_val2017.json", train=False, masks=True)
    measures = average_precision(images, truth(images), ("bbox", "segm"))
    assert len(images) == 103
    assert list(measures.values()) == pytest.approx([100.0] * len(measures), abs=1e-9)


@pytest.mark.shared
@shared
def test_average_precision_on_real_images_is_pycocotools_own(tmp_path: Path) -> None:
    annotations = MINI / "instances_val2017.json"
    images = CocoImages(annotations, train=False, masks=True)
    results = guesses(images)
    measures = average_precision(images, results, ("bbox", "segm"))
    expected = by_hand(annotations, results, "bbox", tmp_path) + by_hand(annotations, results, "segm", tmp_path)
    assert list(measures.values()) == pytest.approx(expected, abs=1e-6)
