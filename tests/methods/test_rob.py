"""RoB: the student's side of every method under a frozen teacher, check by check of its specification."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.test_swav import unit
from tests.methods.vits import COUNTS, IBOT_CONFIG, LINEAR, MSN_CONFIG, ibot, msn, progress, views, vit
from tests.oracles import rob_by_the_paper, sinkhorn_by_the_paper
from trainer.methods.dino import DINO, DINOConfig
from trainer.methods.joint_embedding import Method, ViewCounts
from trainer.methods.swav import SwAV, SwAVConfig
from trainer.methods.teacher import EMATeacher
from trainer.models.heads import PlainMLP

K, BATCH = 12, 4
WEIGHTS = {"global_weight": 1 / 3, "local_weight": 2 / 3}
"""RoB's plain mean over all terms: 1 / (V - 1) and (V - 2) / (V - 1) with 4 views."""
ROB = WEIGHTS | {"pairing": "same_view"}
DINO_CONFIG = DINOConfig(
    name="dino", hidden_dim=16, bottleneck_dim=8, num_prototypes=K, head_norm=False, warmup_teacher_temp_epochs=0,
    freeze_last_layer_epochs=0, centering="none", **ROB,  # type: ignore[arg-type]
)  # fmt: skip
SWAV_CONFIG = SwAVConfig(
    name="swav", hidden_dim=16, out_dim=8, num_prototypes=K, codes="teacher", epsilon=0.03, queue_size=0,
    renormalise_prototypes=False, freeze_prototypes_epochs=0, **ROB,  # type: ignore[arg-type]
)  # fmt: skip
ROB_MSN: dict[str, Any] = ROB | {
    "mlp_head": LINEAR, "targets": "global_views", "sinkhorn_iterations": 0, "me_max_weight": 0.0, "patch_drop": 0.0
}  # fmt: skip
ROB_IBOT: dict[str, Any] = ROB | {"centering": "none", "warmup_teacher_temp_epochs": 0}


def dino(counts: ViewCounts = COUNTS, **more: Any) -> DINO:
    network = vit()
    return replace(DINO_CONFIG, **more).build(network, counts)


def swav(counts: ViewCounts = COUNTS, **more: Any) -> SwAV:
    network = vit()
    method = replace(SWAV_CONFIG, **more).build(network, counts)
    if method.config.mlp_head is None:
        method.student.head.mlp[1] = nn.Identity()  # its BatchNorm counts over ranks only when synchronised
    return method


def scores(seed: int = 0, batch: int = BATCH) -> Tensor:
    """(T, B, K) of a frozen teacher: cosines with its prototypes."""
    return unit(2, batch, 8, seed=seed) @ unit(K, 8, seed=9).T


def logits_of(method: Method) -> Tensor:
    """(V, B, K) of the student, by the same code as in training."""
    output: Tensor = method.outputs(views(), progress(), range(BATCH))[1]
    return output.detach()


def balanced(of: Tensor) -> Tensor:
    return torch.stack([sinkhorn_by_the_paper(view, 0.03, 3) for view in of])


CASES: dict[str, tuple[Callable[..., Method], Callable[[Tensor], Tensor]]] = {
    "dino": (dino, lambda t: (t.double() / 0.07).softmax(-1)),
    "dino, linear head": (lambda: dino(mlp_head=LINEAR), lambda t: (t.double() / 0.07).softmax(-1)),
    "swav, own head": (lambda: swav(prototypes="none", mlp_head=LINEAR), balanced),
    "swav, no sinkhorn": (
        lambda: swav(prototypes="none", mlp_head=LINEAR, sinkhorn_iterations=0),
        lambda t: (t.double() / 0.03).softmax(-1),
    ),
    "msn": (lambda: msn(**ROB_MSN), lambda t: (t.double() / 0.025).softmax(-1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_plain_mean_over_same_view_pairs(case: str) -> None:
    """The generic loss of RoB with each method's target distribution; 18 terms of 10 views in DINO, 6 of 4 here."""
    make, target = CASES[case]
    method = make()
    loss = method(views(), scores().flatten(0, 1), progress())
    expected = rob_by_the_paper(logits_of(method), target(scores()), 0.1, "same_view")
    assert loss.total.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_other_global_views_target_changes_nothing_for_a_global_view(case: str) -> None:
    """Check (c): the cross-global pair is skipped; teacher's output for view 1 reaches view 0's loss in no method."""
    method = CASES[case][0]()
    swapped = torch.stack([scores()[0], scores(seed=5)[1]])
    method.counts = ViewCounts(2, 2)
    gradients = []
    for of_teacher in (scores(), swapped):
        student = logits_of(method).requires_grad_()
        method.objective(student, of_teacher, progress()).total.backward()
        gradients.append(student.grad)
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert same == [True, False, False, False]


def test_ibots_class_tokens_follow_the_same_rule_and_its_patches_have_no_centre() -> None:
    """Same view, no centre; CLS and patches at a constant 0.07; the patches' loss is tests/methods/test_ibot.py's."""
    method = ibot(**ROB_IBOT)
    teacher = torch.randn(8, 17, K, generator=torch.Generator().manual_seed(2))
    method(views(), teacher, progress(), None, range(BATCH))
    method.after_step(applied=True)
    assert not method.center.any()
    assert not method.patch_center.any()
    loss = method(views(), teacher, progress(), None, range(BATCH))
    student = method.outputs(views(), progress(), range(BATCH))[1].class_tokens.detach()
    targets = (teacher.view(2, BATCH, 17, K)[:, :, 0].double() / 0.07).softmax(-1)
    of_classes = loss.total.item() - float(loss.parts["loss/patch"])
    assert of_classes == pytest.approx(rob_by_the_paper(student, targets, 0.1, "same_view"), rel=2e-5)


# --- check (b): a student that is its teacher ---


ALONE = COUNTS._replace(local_views=0)


def as_teacher(method: Method) -> Tensor:
    """What a copy of the student says of the global views."""
    return copy.deepcopy(method.student)(views()[:1]).detach()


def largest_gradient(method: Method, of_teacher: Tensor) -> float:
    method.zero_grad()
    method(views()[:1], of_teacher, progress()).total.backward()
    return max(float(p.grad.abs().max()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dino(ALONE, global_only=True, teacher_temp=0.1),
        lambda: swav(ALONE, global_only=True, prototypes="none", mlp_head=LINEAR, sinkhorn_iterations=0, epsilon=0.1),
        lambda: replace(MSN_CONFIG, **ROB_MSN | {"global_only": True, "sharpening": 1.0}).build(vit(), ALONE),
    ],
    ids=["dino", "swav", "msn"],
)
def test_a_student_that_is_its_teacher_pays_the_entropy_and_learns_nothing(make: Callable[[], Method]) -> None:
    method = make()
    loss = method(views()[:1], as_teacher(method), progress())
    targets = (as_teacher(method) / 0.1).softmax(-1)
    assert loss.total.item() == pytest.approx(torch.special.entr(targets).sum(-1).mean().item(), rel=1e-5)
    others = largest_gradient(method, as_teacher(method).roll(1, 0))
    assert largest_gradient(method, as_teacher(method)) < 1e-4 * others, "what rounding leaves"


def test_an_ibot_student_that_is_its_teacher_learns_nothing_from_patches_either() -> None:
    settings = ROB_IBOT | {"mask": "none", "teacher_temp": 0.1, "teacher_patch_temp": 0.1, "global_only": True}
    method = replace(IBOT_CONFIG, **settings).build(vit(), ALONE)
    loss = method(views()[:1], as_teacher(method), progress())
    entropies = torch.special.entr((as_teacher(method) / 0.1).softmax(-1)).sum(-1)
    assert loss.total.item() == pytest.approx((entropies[:, 0].mean() + entropies[:, 1:].mean()).item(), rel=1e-5)
    others = largest_gradient(method, as_teacher(method).roll(1, 1))
    assert largest_gradient(method, as_teacher(method)) < 1e-4 * others


# --- check (f): the same augmented tensor ---


@pytest.mark.parametrize("make", [dino, lambda: swav(prototypes="none", mlp_head=LINEAR), lambda: msn(**ROB_MSN)])
def test_teacher_and_student_get_the_very_same_pixels(make: Callable[[], Method]) -> None:
    method, given = make(), views()
    (of_teacher,), of_student = method.teacher_views(given), method.student_views(given)
    assert of_teacher.data_ptr() == of_student[0].data_ptr() == given[0].data_ptr()
    assert len(of_teacher) == 2 * BATCH


# --- check (g): the loss at the start ---


@pytest.mark.parametrize(("num_prototypes", "ln_k"), [(65_536, 11.09), (3000, 8.006), (8192, 9.01), (1024, 6.93)])
def test_the_first_loss_is_ln_k_and_half_the_variance_of_the_logits(num_prototypes: int, ln_k: float) -> None:
    """About 0.2 for heads whose logits are cosines of 256 dimensions over 0.1."""
    torch.manual_seed(0)
    config = replace(DINO_CONFIG, hidden_dim=64, bottleneck_dim=256, num_prototypes=num_prototypes)
    assert math.log(num_prototypes) == pytest.approx(ln_k, abs=0.005)
    method = config.build(vit(), COUNTS)
    teacher = unit(8, 16, seed=3) @ unit(num_prototypes, 16, seed=4).T
    loss = method(views(), teacher, progress()).total.item()
    assert loss == pytest.approx(ln_k + 0.2, abs=0.15)
    variance = (method.student(views()) / 0.1).var(-1).mean().item()
    assert variance / 2 == pytest.approx(0.2, abs=0.05)


def test_a_plain_mlp_starts_as_the_released_code_has_it_and_is_linear_without_activation() -> None:
    """The trap: no activation, and BatchNorm only for CNNs. The corrected form has one between the two layers."""
    torch.manual_seed(0)
    faithful = PlainMLP(hidden_dim=16, norm=False, activation="none").build(24, K)
    assert [type(layer).__name__ for layer in faithful] == ["Linear", "Linear"]
    x, y = unit(5, 24), unit(5, 24, seed=1)
    assert torch.allclose(faithful(x + y) + faithful(torch.zeros(24)), faithful(x) + faithful(y), atol=1e-5)
    assert faithful[0].weight.abs().max() <= 24**-0.5, "drawn as torch draws it"
    for norm, activation, expected in [
        (True, "none", ["Linear", "BatchNorm1d", "Linear"]),
        (True, "relu", ["Linear", "BatchNorm1d", "ReLU", "Linear"]),
        (False, "gelu", ["Linear", "GELU", "Linear"]),
    ]:
        head = PlainMLP(norm=norm, activation=activation).build(24, K)  # type: ignore[arg-type]
        assert [type(layer).__name__ for layer in head] == expected
        assert head[0].out_features == 2048
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        PlainMLP(norm=True, activation="none", num_layers=0)


def test_an_ema_teacher_still_works_with_every_pairing() -> None:
    """The rule is the method's, the teacher is another axis."""
    for pairing in ("swapped", "same_view"):
        method = dino(pairing=pairing, centering="ema")
        loss = method(views(), EMATeacher(method.student)(method.teacher_views(views())), progress())
        assert loss.total.isfinite()


@pytest.mark.parametrize("make", [ibot, msn, lambda: msn(**ROB_MSN)], ids=["ibot", "msn", "rob-msn"])
def test_bfloat16_autocast_changes_the_loss_by_rounding_only(make: Callable[[], Method]) -> None:
    """Temperatures of 0.025 and 0.07 follow the rounded logits; everything behind these is in full precision."""
    method = make()
    rob = method.config.mlp_head is not None  # type: ignore[union-attr]

    def loss() -> Tensor:
        teacher = scores().flatten(0, 1) if rob else EMATeacher(method.student)(method.teacher_views(views()))
        return method(views(), teacher, progress(), None, range(BATCH)).total

    exact = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)
    rounded.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
