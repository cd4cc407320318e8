"""iBOT: its patches' loss by the paper, masks that reach the student alone, centres, ranks and micro-batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.vits import COUNTS, IBOT_CONFIG, IDS, LINEAR, ibot, progress, views, vit
from tests.oracles import dino_by_the_paper, patch_loss_by_the_paper
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.ibot import IBOT, predicted
from trainer.methods.losses import weighted_prediction
from trainer.methods.masks import block_masks
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, Branch, build_backbone
from trainer.models.heads import DINOHead, PlainMLP
from trainer.models.tokens import TokenBranch, tokens_of

TOLERANCE = 2e-5


def masks_of(epoch: int = 1, seed: int = 0, ids: list[int] = IDS) -> Tensor:
    """(G, B, N), as the method must have drawn them."""
    drawn = block_masks(ids, num_views=2, grid=(4, 4), prob=0.5, ratio=(0.1, 0.5), seed=seed, epoch=epoch)
    return torch.from_numpy(drawn).view(2, len(ids), 16)


def masked_ids() -> list[int]:
    """Four samples of which both views have a mask, so that no term is empty."""
    found = [i for i in range(200) if masks_of(ids=[i]).any(-1).all()]
    return found[:4]


def teacher_output(method: IBOT, batch: int = 4) -> Tensor:
    return EMATeacher(method.student)(method.teacher_views(views(batch)))


@pytest.mark.parametrize("pairing", ["swapped", "same_view"])
def test_the_loss_is_dinos_and_the_patches_by_the_paper(pairing: str) -> None:
    """All of it by hand: the student on masked views, both centres, warm-up temperatures of the second epoch."""
    method, ids = ibot(pairing=pairing, patch_weight=0.7), masked_ids()
    generator = torch.Generator().manual_seed(3)
    method.center.copy_(torch.randn(12, generator=generator) / 10)
    method.patch_center.copy_(torch.randn(12, generator=generator) / 10)
    with torch.no_grad():
        assert method.mask_token is not None
        method.mask_token.normal_(generator=generator)
    of_teacher, masks = teacher_output(method), masks_of(ids=ids)
    loss = method(views(), of_teacher, progress(), None, ids)

    student = method.student
    tokens = tokens_of(student.backbone, views()[0], masked=masks.flatten(0, 1), mask_token=method.mask_token)
    logits = student.head(tokens.flatten(0, 1)).view(2, 4, 17, 12)
    of_locals = student.head(student.backbone(views()[1])).view(2, 4, 12)
    classes, targets = torch.cat([logits[:, :, 0], of_locals]).detach(), of_teacher.view(2, 4, 17, 12)
    temp = 0.04 + 0.03 * 1 / 2  # the second of three epochs
    if pairing == "swapped":
        of_globals, of_pairs = dino_by_the_paper(classes, targets[:, :, 0], method.center, 0.1, temp)
        assert float(loss.parts["loss/global"]) == pytest.approx(of_globals, rel=TOLERANCE)
        assert float(loss.parts["loss/local"]) == pytest.approx(of_pairs, rel=TOLERANCE)
    patches = patch_loss_by_the_paper(
        logits[:, :, 1:].detach(), targets[:, :, 1:], method.patch_center, masks, 0.1, temp
    )
    assert float(loss.parts["loss/patch"]) == pytest.approx(patches, rel=TOLERANCE)
    of_classes = 0.4 * float(loss.parts["loss/global"]) + 0.6 * float(loss.parts["loss/local"])
    assert loss.total.item() == pytest.approx(of_classes + 0.7 * patches, rel=TOLERANCE)


def test_without_masks_every_patch_counts_and_the_student_sees_all() -> None:
    method = ibot(mask="none", centering="none")
    assert method.mask_token is None
    of_teacher = teacher_output(method)
    loss = method(views(), of_teacher, progress())
    own = method.student([views()[0]]).view(2, 4, 17, 12)
    every = torch.ones(2, 4, 16, dtype=torch.bool)
    expected = patch_loss_by_the_paper(
        own[:, :, 1:].detach(), of_teacher.view(2, 4, 17, 12)[:, :, 1:], torch.zeros(12), every, 0.1, 0.055
    )
    assert float(loss.parts["loss/patch"]) == pytest.approx(expected, rel=TOLERANCE)


def test_a_batch_in_which_nothing_is_masked_costs_nothing_for_patches() -> None:
    method = ibot(mask_prob=0.0)
    loss = method(views(), teacher_output(method), progress(), None, IDS)
    assert float(loss.parts["loss/patch"]) == 0
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    assert weighted_prediction(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), temperature=0.1) == 0


def test_local_views_and_the_teacher_are_never_masked() -> None:
    """Check (f) too: teacher and student get the very tensor, but for the mask."""
    method, seen = ibot(), []
    method.student.backbone.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    teacher = EMATeacher(method.student)
    of_teacher = method.teacher_views(views())
    assert torch.equal(of_teacher[0], views()[0])
    method(views(), teacher(of_teacher), progress(), None, IDS)
    assert [len(images) for images in seen[-2:]] == [8, 8], "one pass over globals, one over locals"
    masked = method.outputs(views(), progress(), IDS)[0]
    plain = method.student.features(views())
    hidden = masks_of().flatten(0, 1).any(1)
    assert hidden.any()
    assert not hidden.all()
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(masked, plain, strict=True)]
    assert same == [*(~hidden).tolist(), *[True] * 8]


def test_another_epoch_sample_or_seed_has_another_mask_and_another_step_has_not() -> None:
    method, teacher = ibot(centering="none"), teacher_output(ibot())

    def loss(ids: list[int] = IDS, **at: int) -> float:
        return float(method(views(), teacher, progress(**at), None, ids).parts["loss/patch"])

    assert loss() == loss(step=4)
    assert len({loss(), loss(epoch=2), loss(seed=1), loss(ids=[1, 2, 30, 4])}) == 4
    with pytest.raises(ValueError, match="wanted sample_ids beside the views, got none"):
        method(views(), teacher, progress())


def test_gradients_reach_the_mask_token_and_everything_else_and_never_the_teacher() -> None:
    method = ibot()
    teacher = EMATeacher(method.student)
    method(views(), teacher(method.teacher_views(views())), progress(), None, masked_ids()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
    assert "mask_token" in dict(method.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_both_centres_are_means_over_micro_batches_and_a_skipped_step_leaves_them() -> None:
    whole, halves, skipped = ibot(), ibot(), ibot()
    rows = torch.randn(2, 8, 17, 12, generator=torch.Generator().manual_seed(1))
    ids = list(range(8))
    for method in (whole, skipped):
        method(views(8), rows.flatten(0, 1), progress(), None, ids)
    for half in (slice(0, 4), slice(4, 8)):
        halves(views(4), rows[:, half].flatten(0, 1), progress(), None, ids[half])
    for method in (whole, halves):
        method.after_step(applied=True)
    skipped.after_step(applied=False)
    assert not skipped.center.any()
    assert not skipped.patch_center.any()
    for name, mean in (("center", rows[:, :, 0].mean((0, 1))), ("patch_center", rows[:, :, 1:].mean((0, 1, 2)))):
        assert torch.allclose(getattr(whole, name), 0.1 * mean, atol=1e-6)
        assert torch.allclose(getattr(halves, name), 0.1 * mean, atol=1e-6)


def share_of_rank() -> dict[str, list[float]]:
    """A rank's half of a batch of 8: losses, centres, and the gradient that DeepSpeed would average."""
    method, batch = ibot(), 8
    mine = slice(
        distributed.rank() * batch // distributed.world(), (distributed.rank() + 1) * batch // distributed.world()
    )
    share = [view.unflatten(0, (-1, batch))[:, mine].flatten(0, 1) for view in views(batch)]
    teacher = EMATeacher(method.student)
    loss = method(share, teacher(method.teacher_views(share)), progress(), None, list(range(batch))[mine])
    loss.total.backward()
    method.after_step(applied=True)
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    return {
        "loss": [float(distributed.mean_over_ranks(loss.total.detach()))],
        "gradient": distributed.mean_over_ranks(gradient)[::50].tolist(),
        "centres": [*method.center.tolist(), *method.patch_center.tolist()],
    }


def test_two_ranks_mask_and_learn_as_one_with_the_whole_batch() -> None:
    first, second = run_ranks(share_of_rank)
    alone = share_of_rank()
    assert first == second
    for key, values in alone.items():
        assert first[key] == pytest.approx(values, rel=1e-4, abs=1e-6), key


def test_a_network_without_patches_learns_from_class_tokens_alone() -> None:
    """Or is refused, if it shall predict patches."""
    config = replace(IBOT_CONFIG, patch_weight=0.0, mask="none")
    resnet = build_backbone(Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}))
    assert not config.wants_tokens
    method = config.build(resnet, COUNTS)
    loss = method(views(), torch.randn(8, 12), progress())
    assert type(method.student) is Branch
    assert "loss/patch" not in loss.parts
    assert type(ibot().student) is TokenBranch
    with pytest.raises(ValueError, match=r"is a ResNet; set method.patch_weight=0"):
        IBOT_CONFIG.build(resnet, COUNTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_weight": 0.0}, "gives masks nothing to predict; set mask=none"),
        ({"head_norm": True}, "set head_norm=false"),
        ({"pairing": "swapped"}, None),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change: dict[str, object], said: str | None) -> None:
    config = replace(IBOT_CONFIG, **change)  # type: ignore[arg-type]
    fault = config.check(COUNTS, teacher="ema", global_batch=8)
    assert (fault is None) if said is None else (said in str(fault))
    assert "needs a teacher" in str(
        replace(config, head_norm=False, patch_weight=1.0).check(COUNTS, teacher="none", global_batch=8)
    )


@pytest.mark.parametrize("change", [{"mask_ratio": (0.6, 0.5)}, {"mask_prob": 1.5}, {"teacher_patch_temp": 0.0}])
def test_settings_out_of_range_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(IBOT_CONFIG, **change)  # type: ignore[arg-type]


def test_a_plain_mlp_takes_class_tokens_and_patches_too() -> None:
    method = ibot(mlp_head=replace(LINEAR, num_layers=3, activation="gelu"))
    assert [type(layer).__name__ for layer in method.student.head] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert method.frozen_parameters() == []
    assert method.student([views()[0]]).shape == (8, 17, 12)
    assert len(predicted(np.ones((2, 4), dtype=np.bool_))[0]) == 8
    assert method(views(), teacher_output(method), progress(), None, IDS).total.isfinite()


def test_the_first_feature_is_that_of_plain_timm() -> None:
    """What is evaluated and exported is the backbone, which knows nothing of masks."""
    assert list(ibot().student.backbone.state_dict()) == list(vit().state_dict())


ROB: dict[str, Any] = {"centering": "none", "warmup_teacher_temp_epochs": 0, "pairing": "same_view"}


def test_the_teachers_prototypes_score_the_students_embeddings_and_never_move() -> None:
    method = ibot(**ROB, prototypes="teacher")
    head = method.student.head
    assert isinstance(head, DINOHead)
    assert head.last_layer.weight_v.isnan().all(), "until the teacher's are there, nothing can be trained by mistake"
    prototypes = 3 * torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    method.adopt(prototypes)
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(head(rows), F.normalize(head.mlp(rows), dim=1) @ prototypes.T)
    teacher = torch.randn(2 * 4, 17, 12, generator=torch.Generator().manual_seed(6))
    method(views(), teacher, progress(), sample_ids=IDS).total.backward()
    method.after_step(applied=True)
    assert all(p.grad is None for p in head.last_layer.parameters())
    assert all(p.grad is not None for p in head.mlp.parameters())
    assert method.frozen_parameters() == []
    for wrong, came in ((torch.zeros(12, 5), r"\(12, 5\)"), (None, "in a plain MLP")):
        with pytest.raises(ValueError, match=rf"wanted \(12, 8\) of .* the teacher's are {came}"):
            method.adopt(wrong)


@pytest.mark.parametrize(("teacher", "head"), [("ema", None), ("frozen", LINEAR)])
def test_only_a_frozen_teacher_lends_its_prototypes_and_only_to_a_head_that_meets_some(
    teacher: str, head: PlainMLP | None
) -> None:
    config = replace(IBOT_CONFIG, **ROB, prototypes="teacher", mlp_head=head)
    assert "prototypes: teacher needs a frozen one" in str(config.check(COUNTS, teacher=teacher, global_batch=4))
