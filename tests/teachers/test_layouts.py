"""Teachers out of files in every published layout: right ones answer as their networks did, wrong ones are named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.teachers import checkpoints
from tests.teachers.checkpoints import K, prefixed
from tests.teachers.runs import DINO, recipe_of, stir
from tests.teachers.test_frozen import frozen
from tests.teachers.test_headless import REGRESSION
from trainer.models.heads import DINOHead, SwAVHead
from trainer.recipe import RecipeError
from trainer.teachers.build import build_frozen
from trainer.weights import WeightsError

RED = 0.229 / 0.228
"""Of SwAV's own normalisation and ours."""


def teacher_of(path: Path, *more: str, overrides: tuple[str, ...] = ()) -> Any:
    return build_frozen(recipe_of(*DINO, f"method.num_prototypes={K}", frozen(f"file:{path}", *more), *overrides))


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", checkpoints.RIGHT)
def test_a_teacher_out_of_a_file_answers_as_the_network_that_was_saved(
    make: Callable[[], checkpoints.Case], tmp_path: Path
) -> None:
    case = make()
    torch.save(case.tree, tmp_path / "checkpoint.pth")
    theirs = images()
    if "swav" in make.__name__ or make is checkpoints.deepcluster:
        theirs = theirs * torch.tensor([RED, 1, 1]).view(3, 1, 1)
    with torch.no_grad():
        expected = case.answer(theirs)
    torch.testing.assert_close(teacher_of(tmp_path / "checkpoint.pth")([images()]), expected, rtol=1e-4, atol=1e-5)


def test_files_of_torch_before_16_are_read_and_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    case = checkpoints.dino_vit()
    torch.save(case.tree | {"extra": Trap()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher_of(tmp_path / "old.pth")([images()]), case.answer(images()))
    assert not (tmp_path / "sprung").exists()


def test_ibots_tokens_are_the_class_token_and_then_the_patches(tmp_path: Path) -> None:
    torch.save(checkpoints.ibot().tree, tmp_path / "checkpoint.pth")
    teacher = teacher_of(tmp_path / "checkpoint.pth")
    alone = teacher([images()])
    teacher.tokens = True
    assert teacher([images()]).shape == (4, 1 + 16, K)
    torch.testing.assert_close(teacher([images()])[:, 0], alone)
    assert not torch.allclose(teacher([images()])[:, 1], alone, atol=1e-3)


def test_a_file_of_a_backbone_alone_is_a_teacher_of_features(tmp_path: Path) -> None:
    """As DINOv2's are: flat, with LayerScale and a mask token."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    backbone = checkpoints.ready(VisionTransformer(**sizes, init_values=0.1, num_classes=0))
    torch.save(backbone.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "checkpoint.pth")
    teacher = build_frozen(recipe_of(*REGRESSION, "method.out_dim=64", frozen(f"file:{tmp_path / 'checkpoint.pth'}")))
    with torch.no_grad():
        torch.testing.assert_close(teacher([images()]), backbone(images()), rtol=1e-4, atol=1e-5)


def test_the_students_branch_of_a_file_can_be_asked_for(tmp_path: Path) -> None:
    torch.save(checkpoints.ibot().tree, tmp_path / "checkpoint.pth")
    assert not teacher_of(tmp_path / "checkpoint.pth", "branch: student")([images()]).any(), "it is all zeros there"


class SSLight(nn.Module):
    """A branch as the published code nests it; prototypes, of SwAV, lie in the head."""

    def __init__(self, head: nn.Module, *, nested: bool) -> None:
        super().__init__()
        self.backbone = checkpoints.ready(_tiny_vit())
        self.head = nn.Module() if nested else head
        if nested:
            self.head.projection, self.head.prototypes = head, nn.Linear(8, K, bias=False)


def _tiny_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=12)


@pytest.mark.parametrize("method", ["dino", "swav"])
def test_sslights_checkpoints_are_teachers(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if method == "dino":
        head: nn.Module = DINOHead(192, hidden_dim=16, bottleneck_dim=8, num_prototypes=K, norm=True, train_gain=False)
    else:
        head = SwAVHead(192, hidden_dim=16, out_dim=8)
    branch = SSLight(head, nested=method == "swav").eval()
    stir(branch.head)
    names = ("student", "teacher") if method == "dino" else ("network",)
    state = {key: value for name in names for key, value in prefixed(f"module.{name}.", branch.state_dict()).items()}
    torch.save({"epoch": 2, "steps": 9, "state_dict": state, "config": {}}, tmp_path / "checkpoint.pth.tar")
    with torch.no_grad():
        answer = branch.head(branch.backbone(images(224)[:2])) if method == "dino" else (
            branch.head.prototypes(branch.head.projection(branch.backbone(images(224)[:2])))
        )  # fmt: skip
    teacher = teacher_of(tmp_path / "checkpoint.pth.tar", overrides=("views.global_views.size=224",))
    torch.testing.assert_close(teacher([images(224)[:2]]), answer, rtol=1e-4, atol=1e-5)


def without(key: str) -> Callable[[Any], None]:
    return lambda tree: tree["teacher"].pop(key)


def put(key: str, shape: tuple[int, ...]) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        tree["teacher"][key] = torch.ones(shape)

    return change


def keep_backbone(tree: Any) -> None:
    tree["teacher"] = {name: value for name, value in tree["teacher"].items() if name.startswith("backbone.")}


WRONG = {
    "missing": (without("backbone.blocks.1.norm1.bias"), WeightsError, r"backbone.*missing: blocks\.1\.norm1\.bias$"),
    "missing in the head": (without("head.mlp.2.bias"), WeightsError, r"head\.mlp: .*missing: 2\.bias$"),
    "unexpected": (put("backbone.norm2.weight", (64,)), WeightsError, r"unexpected: norm2\.weight$"),
    "unexpected in the head": (put("head.gain", (1,)), WeightsError, "unexpected in the head: gain"),
    "of another shape": (
        put("backbone.blocks.0.attn.proj.weight", (64, 32)), WeightsError,
        r"blocks\.0\.attn\.proj\.weight is \(64, 32\), wanted \(64, 64\)",
    ),
    "prototypes of another shape": (
        put("head.last_layer.weight_v", (K, 9)), WeightsError, r"wanted prototypes \(K, 8\), .* got \(12, 9\)",
    ),
    "without prototypes": (
        without("head.last_layer.weight_g"), WeightsError, r"no prototypes: wanted last_layer\.weight_g and",
    ),
    "without a head": (keep_backbone, RecipeError, r"needs a teacher with a head, and .*, without a head; give a full"),
    "without a teacher": (lambda tree: tree.update(teacher=3, student=4), WeightsError, "has student, teacher"),
    "two heads": (put("head.last_layer2.weight_v", (K, 8)), WeightsError, "wanted a checkpoint with a shared head"),
    "an unknown network": (without("backbone.cls_token"), WeightsError, "are of no vision transformer or ResNet; name"),
    "other prototypes": (lambda _: None, RecipeError, "method.num_prototypes is 13, and .* has 12 numbers; set"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_is_not_right_is_refused_with_what_is_wrong(fault: str, tmp_path: Path) -> None:
    change, error, message = WRONG[fault]
    tree = checkpoints.dino_vit().tree
    change(tree)
    torch.save(tree, tmp_path / "checkpoint.pth")
    number = 13 if fault == "other prototypes" else K
    with pytest.raises(error, match=message):
        teacher_of(tmp_path / "checkpoint.pth", overrides=(f"method.num_prototypes={number}",))


@pytest.mark.parametrize(
    ("make", "key", "message"),
    [
        (checkpoints.msn, "prototypes", "the head has no prototypes"),
        (checkpoints.swav, "module.prototypes.weight", "the head has no prototypes"),
        (checkpoints.swav, "module.projection_head.0.bias", r"head\.mlp: .*missing: 0\.bias"),
        (checkpoints.swav, "module.projection_head.1.running_var", r"missing: 1\.running_var"),
        (checkpoints.swav, "module.layer2.0.bn2.weight", r"missing: layer2\.0\.bn2\.weight"),
    ],
)
def test_msn_and_swav_files_are_read_strictly_too(
    make: Callable[[], checkpoints.Case], key: str, message: str, tmp_path: Path
) -> None:
    tree = make().tree
    del tree[key]
    torch.save(tree, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=message):
        teacher_of(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_file_is_said_to_be_damaged(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoints.dino_vit().tree, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(WeightsError, match=r"cannot be read|wanted a checkpoint of torch\.save"):
        teacher_of(path)


def test_a_file_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match="wanted a dict of tensors, got list"):
        teacher_of(tmp_path / "checkpoint.pth")
