"""MSN: targets, me-max and the whole loss by the paper; dropped patches; ranks."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.methods.test_swav import unit
from tests.methods.vits import COUNTS, IDS, LINEAR, MSN_CONFIG, msn, progress, views
from tests.oracles import me_max_by_the_paper, msn_targets_by_the_paper, rob_by_the_paper
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.losses import weigh
from trainer.methods.masks import kept_patches
from trainer.methods.msn import MSN, me_max
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.heads import CosinePrototypes
from trainer.models.tokens import pooled, tokens_of

TOLERANCE = 2e-5
PLAIN_MEAN = {"global_weight": 1 / 3, "local_weight": 2 / 3}
"""One anchor and two focal views."""


@pytest.mark.parametrize("iterations", [0, 3])
def test_targets_are_sharpened_and_balanced_by_the_paper(iterations: int) -> None:
    """Check (e): softmax(x / 0.025) is softmax(x / 0.1) to the power of 4, normalised."""
    method = msn(sinkhorn_iterations=iterations, mlp_head=LINEAR)
    cosines = unit(2, 6, 8) @ unit(12, 8, seed=1).T
    ours = method._targets(cosines)
    assert ours.dtype == torch.float32
    for view, expected in zip(ours, cosines, strict=True):
        by_paper = msn_targets_by_the_paper(expected, 0.1, 0.25, iterations).float()
        assert torch.allclose(view, by_paper, rtol=1e-4, atol=1e-7)
    if iterations == 0:
        assert torch.allclose(ours, (cosines / 0.025).softmax(-1), rtol=1e-5)
    assert torch.allclose(ours.sum(-1), torch.ones(2, 6), atol=1e-5)


def test_targets_survive_scores_whose_powers_underflow() -> None:
    method = msn(mlp_head=LINEAR)
    scores = 30 * unit(1, 6, 8) @ unit(12, 8, seed=1).T
    assert method._targets(scores).isfinite().all()
    assert not msn_targets_by_the_paper(scores[0].float() * 10, 0.1, 0.25, 3).isfinite().all(), "the trap is real"


def test_the_whole_loss_is_the_papers() -> None:
    """The first view is the target, the second and the locals are anchors; both sides meet the same prototypes."""
    method = msn(**PLAIN_MEAN, me_max_weight=0.8)
    embeddings = EMATeacher(method.student)(method.teacher_views(views()))
    assert embeddings.shape == (4, 8)
    loss = method(views(), embeddings, progress())
    (globals_, locals_), student = views(), method.student
    kept = torch.from_numpy(kept_patches(16, drop=0.15, seed=0, step=3))
    assert len(kept) == 13
    tokens = tokens_of(student.backbone, globals_[4:], kept=kept)
    features = torch.cat([pooled(student.backbone, tokens), student.backbone(locals_)])
    assert method.prototypes is not None
    directions = F.normalize(method.prototypes.weight.double(), dim=1).detach()
    anchors, target = (
        F.normalize(rows.double(), dim=-1) @ directions.T for rows in (student.head(features).detach(), embeddings)
    )
    targets = msn_targets_by_the_paper(target, 0.1, 0.25, 3)
    logits = anchors.view(3, 4, 12)
    terms = [rob_by_the_paper(view[None], targets[None], 0.1, "same_view") for view in logits]
    unevenness = me_max_by_the_paper(logits, 0.1)
    assert loss.total.item() == pytest.approx(sum(terms) / 3 + 0.8 * unevenness, rel=TOLERANCE)
    assert float(loss.parts["loss/me_max"]) == pytest.approx(unevenness, rel=TOLERANCE)
    assert float(loss.parts["loss/global"]) == pytest.approx(terms[0], rel=TOLERANCE)


def test_me_max_is_zero_where_prototypes_are_used_evenly_and_ln_k_where_one_is() -> None:
    assert me_max(torch.zeros(2, 3, 8), temperature=0.1).item() == pytest.approx(0, abs=1e-6)
    one = F.one_hot(torch.zeros(2, 3, dtype=torch.long), 8).float()
    assert me_max(one, temperature=0.01).item() == pytest.approx(math.log(8), rel=1e-5)
    each_its_own = torch.eye(8).view(2, 4, 8)
    assert me_max(each_its_own, temperature=0.01).item() == pytest.approx(0, abs=1e-6)


def test_only_global_anchors_lose_patches_and_all_images_of_a_step_the_same() -> None:
    method, seen = msn(), []
    teacher = EMATeacher(method.student)
    for branch in (method.student, teacher.branch):
        branch.backbone.blocks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    teacher(method.teacher_views(views()))
    method(views(), torch.zeros(4, 8), progress())
    assert seen == [17, 1 + 13, 1 + 4], "target whole, anchors without 3 of 16, focal views whole"

    def features(step: int) -> torch.Tensor:
        return method.outputs(views(), progress(step=step), IDS)[0]

    assert torch.equal(features(3), features(3))
    assert not torch.allclose(features(3)[:4], features(4)[:4])
    assert torch.allclose(features(3)[4:], features(4)[4:])


def test_prototypes_are_directions_of_any_length() -> None:
    torch.manual_seed(0)
    prototypes = CosinePrototypes(8, 12)
    embeddings = unit(4, 8)
    before = prototypes(embeddings)
    with torch.no_grad():
        prototypes.weight.mul_(7)
    assert torch.allclose(prototypes(5 * embeddings), before, atol=1e-6)
    assert before.abs().max() <= 1 + 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prototypes(embeddings).dtype == torch.float32


def test_gradients_reach_everything_and_never_the_teacher() -> None:
    method = msn()
    teacher = EMATeacher(method.student)
    method(views(), teacher(method.teacher_views(views())), progress()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
    assert "prototypes.weight" in dict(method.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def share_of_rank() -> dict[str, list[float]]:
    """A rank's half of a batch of 8: loss and the gradient that DeepSpeed would average."""
    method, batch = msn(), 8
    mine = slice(*(batch * (distributed.rank() + end) // distributed.world() for end in (0, 1)))
    share = [view.unflatten(0, (-1, batch))[:, mine].flatten(0, 1) for view in views(batch)]
    loss = method(share, EMATeacher(method.student)(method.teacher_views(share)), progress())
    loss.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    return {
        "loss": [float(distributed.mean_over_ranks(loss.total.detach()))],
        "gradient": distributed.mean_over_ranks(gradient)[::50].tolist(),
        "me_max": [float(loss.parts["loss/me_max"])],
    }


def test_two_ranks_balance_and_learn_as_one_with_the_whole_batch() -> None:
    first, second = run_ranks(share_of_rank)
    alone = share_of_rank()
    assert first == second, "me-max is of all ranks"
    for key, values in alone.items():
        assert first[key] == pytest.approx(values, rel=2e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("change", "teacher", "said"),
    [
        ({}, "none", "MSN needs a teacher"),
        ({}, "frozen", "give mlp_head"),
        ({"mlp_head": LINEAR}, "ema", "set mlp_head=null, or teacher.kind=frozen"),
        ({}, "ema", None),
        ({"mlp_head": LINEAR, "pairing": "same_view", "targets": "global_views"}, "frozen", None),
    ],
)
def test_head_and_teacher_must_belong_together(change: dict[str, object], teacher: str, said: str | None) -> None:
    fault = replace(MSN_CONFIG, **change).check(COUNTS, teacher=teacher, global_batch=8)  # type: ignore[arg-type]
    assert (fault is None) if said is None else (said in str(fault))


@pytest.mark.parametrize("change", [{"patch_drop": 1.0}, {"sharpening": 0.0}, {"me_max_weight": -1.0}])
def test_settings_out_of_range_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(MSN_CONFIG, **change)  # type: ignore[arg-type]


def test_a_network_without_patches_drops_none_or_is_refused() -> None:
    resnet = build_backbone(Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}))
    with pytest.raises(ValueError, match=r"patch_drop 0.15 needs a vision transformer .* set method.patch_drop=0"):
        MSN_CONFIG.build(resnet, COUNTS)
    method: MSN = replace(MSN_CONFIG, patch_drop=0.0).build(resnet, COUNTS)
    loss = method(views(), EMATeacher(method.student)(method.teacher_views(views())), progress())
    parts = [loss.parts[name] for name in ("loss/global", "loss/local")]
    total = weigh(*parts, global_weight=0.4, local_weight=0.6) + loss.parts["loss/me_max"]  # type: ignore[arg-type]
    assert loss.total.item() == pytest.approx(float(total), rel=1e-6)
