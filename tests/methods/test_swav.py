"""SwAV: Sinkhorn against the published pseudo-code, the published losses, prototypes, the queue on 1 and 2 ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.test_methods import COUNTS, Flat, progress, some_views
from tests.oracles import sinkhorn_by_the_paper, swav_by_the_paper, unit_rows, waves
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.losses import paired_prediction, weigh
from trainer.methods.queue import EmbeddingQueue
from trainer.methods.sinkhorn import sinkhorn
from trainer.methods.swav import SwAV, SwAVConfig
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.heads import Prototypes

BASELINE = (1 / 7, 6 / 7)


def swav(queue_size: int = 16, queue_start_epoch: int = 1) -> SwAV:
    torch.manual_seed(0)
    config = SwAVConfig(
        name="swav", hidden_dim=16, out_dim=8, num_prototypes=12, queue_size=queue_size,
        queue_start_epoch=queue_start_epoch, global_weight=0.4, local_weight=0.6,
    )  # fmt: skip
    method = config.build(Flat(), COUNTS)
    method.student.head.mlp[1] = nn.Identity()  # its BatchNorm counts over ranks only when synchronised
    return method


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def fixture_scores() -> Tensor:
    prototypes, embeddings = unit_rows(waves(6, 4, 0.7, 1.9)), unit_rows(waves(32, 4, 0.37, 0.91))
    return (embeddings @ prototypes.T).view(8, 4, 6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(BASELINE, 5.456012), ((0.4, 0.6), 5.609987), ((1.0, 0.0), 5.969261), ((0.0, 1.0), 5.370470)],
)
def test_swav_gives_the_published_losses(weights: tuple[float, float], expected: float) -> None:
    scores = fixture_scores()
    losses = paired_prediction(scores, sinkhorn(scores[:2], epsilon=0.05, iterations=3), temperature=0.1)
    total = weigh(*losses, global_weight=weights[0], local_weight=weights[1])
    assert total.item() == pytest.approx(expected, abs=5e-6)


def test_swavs_step_has_the_published_loss() -> None:
    """Through the module: six prototypes, four dimensions, weights 0.4 and 0.6."""
    method = swav()
    method.prototypes = Prototypes(4, 6)
    with torch.no_grad():
        method.prototypes.weight.copy_(unit_rows(waves(6, 4, 0.7, 1.9)))
    embeddings = unit_rows(waves(32, 4, 0.37, 0.91)).view(8, 4, 4)
    assert method.objective(embeddings, None, progress()).total.item() == pytest.approx(5.609987, abs=5e-6)


def test_sinkhorn_gives_the_published_codes() -> None:
    codes = sinkhorn(fixture_scores()[0], epsilon=0.05, iterations=3)
    row = [1.00058e-5, 3.79037e-5, 0.00169125, 0.08016325, 0.45645347, 0.46164414]
    assert codes[0].tolist() == pytest.approx(row, rel=1e-5)
    columns = [0.69383, 0.69292, 0.69308, 0.68008, 0.62046, 0.61963]
    assert codes.sum(0).tolist() == pytest.approx(columns, abs=5e-6)


def test_the_baseline_weights_are_the_plain_mean_over_all_fourteen_pairs() -> None:
    scores = fixture_scores()
    codes = sinkhorn(scores[:2], epsilon=0.05, iterations=3)
    of_globals, of_locals = swav_by_the_paper(scores, codes, 0.1)
    ours = weigh(*paired_prediction(scores, codes, temperature=0.1), global_weight=1 / 7, local_weight=6 / 7)
    assert ours.item() == pytest.approx((2 * of_globals + 12 * of_locals) / 14, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("num_prototypes", [2, 17])
@pytest.mark.parametrize("num_locals", [1, 4])
def test_swav_equals_the_loop_over_pairs(batch: int, num_prototypes: int, num_locals: int) -> None:
    scores = unit(2 + num_locals, batch, 8) @ unit(num_prototypes, 8, seed=1).T
    codes = sinkhorn(scores[:2], epsilon=0.05, iterations=3)
    ours = paired_prediction(scores, codes, temperature=0.1)
    assert [loss.item() for loss in ours if loss is not None] == pytest.approx(
        swav_by_the_paper(scores, codes, 0.1), rel=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 9),
    num_prototypes=st.integers(1, 9),
    iterations=st.integers(1, 5),
    epsilon=st.sampled_from([0.02, 0.05, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_log_space_sinkhorn_is_the_published_one_and_treats_samples_alike(
    batch: int, num_prototypes: int, iterations: int, epsilon: float, seed: int
) -> None:
    scores = unit(batch, 6, seed=seed) @ unit(num_prototypes, 6, seed=seed + 1).T
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    expected = sinkhorn_by_the_paper(scores, epsilon, iterations).float()
    assert torch.allclose(codes, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(codes.sum(1), torch.ones(batch), atol=1e-5)
    turned = sinkhorn(scores.roll(1, 0), epsilon=epsilon, iterations=iterations)
    assert torch.allclose(turned, codes.roll(1, 0), atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_sinkhorn_survives_scores_that_overflow_exp(size: float) -> None:
    scores = size * unit(6, 5)
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert codes.isfinite().all()
    assert torch.allclose(codes.sum(1), torch.ones(6), atol=1e-5)
    assert not sinkhorn_by_the_paper(scores.float(), 0.05, 3).isfinite().all(), "the trap is real"


def test_enough_iterations_give_every_prototype_the_same_mass() -> None:
    codes = sinkhorn(unit(12, 8) @ unit(6, 8, seed=1).T, epsilon=0.05, iterations=200)
    assert torch.allclose(codes.sum(0), torch.full((6,), 2.0), rtol=1e-3)


GRID = [(1, 2, 3, 0.05), (2, 8, 5, 0.05), (1, 6, 17, 0.02), (3, 4, 1, 1.0)]
"""Views, samples of all ranks, prototypes, epsilon."""


def my_share(samples: int) -> slice:
    """This rank's part of the samples."""
    return slice(*(samples * (distributed.rank() + end) // distributed.world() for end in (0, 1)))


def train_three_steps() -> dict[str, list[float]]:
    """On one rank: its share of three global batches of 8; losses and buffers, which all ranks must agree on."""
    codes = [
        sinkhorn(unit(views, samples, prototypes)[:, my_share(samples)], epsilon=epsilon, iterations=3)
        for views, samples, prototypes, epsilon in GRID
    ]
    method = swav(queue_size=16)
    losses = []
    for step in range(3):
        views = [view.unflatten(0, (-1, 8))[:, my_share(8)].flatten(0, 1) for view in some_views(8, seed=step)]
        loss = method(views, None, progress(epoch=1))
        losses.append(float(distributed.mean_over_ranks(loss.total.detach())))
        method.after_step(applied=True)
    return {
        "codes": torch.cat([part.flatten() for part in codes]).tolist(),
        "losses": losses,
        "queue": method.queue.rows.flatten().tolist(),
        "num_pushed": [method.queue.num_pushed],
        "prototypes": method.prototypes.weight.detach().flatten().tolist(),
    }


def test_two_ranks_assign_queue_and_lose_as_one_with_the_whole_batch() -> None:
    """The third step's codes are balanced together with the full queue."""
    first, second = run_ranks(train_three_steps)
    alone = train_three_steps()
    assert {key: first[key] for key in ("queue", "num_pushed", "prototypes")} == {
        key: second[key] for key in ("queue", "num_pushed", "prototypes")
    }
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["queue"] == pytest.approx(alone["queue"], abs=1e-6), "rows in rank order"
    sizes = [views * samples * prototypes // 2 for views, samples, prototypes, _ in GRID]
    halves = [torch.tensor(rank["codes"]).split(sizes) for rank in (first, second)]
    for (views, samples, prototypes, epsilon), *parts in zip(GRID, *halves, strict=True):
        both = torch.cat([part.view(views, samples // 2, prototypes) for part in parts], 1)
        whole = sinkhorn(unit(views, samples, prototypes), epsilon=epsilon, iterations=3)
        assert torch.allclose(both, whole, atol=1e-6)


def test_a_full_queue_takes_part_in_the_assignment_and_a_filling_one_does_not() -> None:
    method, without = swav(queue_size=8), swav(queue_size=0)
    views = [some_views(4, seed=step) for step in range(3)]
    same = []
    for step in range(3):
        losses = [model(views[step], None, progress(epoch=1)).total for model in (method, without)]
        same.append(torch.equal(*losses))
        for model in (method, without):
            model.after_step(applied=True)
    assert same == [True, True, False]
    rows = method.queue.share()
    scores = method.prototypes(method.student(views[2])).view(8, 4, 12)
    codes = method._codes(scores[:2])
    for view in range(2):
        joined = torch.cat([rows[view] @ method.prototypes.weight.T, scores[view]])
        expected = sinkhorn_by_the_paper(joined.detach(), 0.05, 3)[-4:].float()
        assert torch.allclose(codes[view], expected, rtol=1e-4, atol=1e-6)


def test_the_queue_stays_empty_before_its_first_epoch() -> None:
    method = swav(queue_size=8, queue_start_epoch=2)
    for epoch in range(3):
        method(some_views(4), None, progress(epoch))
        method.after_step(applied=True)
        assert method.queue.num_pushed == (4 if epoch == 2 else 0)


def test_a_skipped_step_leaves_the_queue_alone() -> None:
    method = swav()
    method(some_views(4), None, progress(1))
    method.after_step(applied=False)
    assert method.queue.num_pushed == 0
    assert not method.queue.rows.any()
    method(some_views(4), None, progress(1))
    method.after_step(applied=True)
    assert method.queue.num_pushed == 4, "what the skipped step brought is gone"


def test_two_micro_batches_fill_the_queue_with_the_rows_of_both() -> None:
    method = swav(queue_size=8)
    for half in range(2):
        method(some_views(4, seed=half), None, progress(1))
    method.after_step(applied=True)
    expected = [method.student(some_views(4, seed=half)).view(8, 4, 8)[:2] for half in range(2)]
    assert method.queue.is_full
    assert torch.allclose(method.queue.rows, torch.cat(expected, 1).transpose(0, 1), atol=1e-6)


def test_the_embedding_queue_replaces_its_oldest_rows_and_names_a_batch_that_does_not_fit() -> None:
    queue = EmbeddingQueue(6, num_views=1, embed_dim=1)
    for value in range(1, 5):
        assert queue.is_full == (value > 3)
        queue.push(torch.full((2, 1, 1), float(value)))
    assert queue.rows.flatten().tolist() == [4, 4, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="6 rows must be a multiple of the batch of 4"):
        queue.push(torch.zeros(4, 1, 1))


def test_the_queue_and_how_full_it_is_are_in_the_methods_state() -> None:
    method, fresh = swav(queue_size=8), swav(queue_size=8)
    for step in range(3):
        method(some_views(4, seed=step), None, progress(1))
        method.after_step(applied=True)
    fresh.load_state_dict(method.state_dict())
    assert fresh.queue.is_full
    losses = [model(some_views(4, seed=9), None, progress(1)).total for model in (method, fresh)]
    assert torch.equal(*losses)


def test_prototypes_have_unit_length_at_every_forward_and_are_frozen_in_the_first_epoch_only() -> None:
    method = swav()
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(12))
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method(some_views(), None, progress())
    method.after_step(applied=True)
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(12))
    assert method.prototypes.weight.requires_grad
    assert method.frozen_parameters() == [method.prototypes.weight]
    assert [method.frozen(progress(epoch)) for epoch in (0, 1, 2)] == [True, False, False]


def test_scores_stay_in_full_precision_under_autocast() -> None:
    prototypes = Prototypes(8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototypes(unit(4, 8)), prototypes(unit(4, 8)).float())
        assert prototypes(unit(4, 8)).dtype == torch.float32


def test_gradients_reach_student_and_prototypes_and_the_codes_pass_none() -> None:
    method = swav()
    method(some_views(), None, progress()).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_every_linear_layer_of_the_head_starts_as_published() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name="mobilenetv2_100"))
    method = SwAVConfig(
        name="swav", num_prototypes=3000, queue_size=3072, global_weight=0.4, local_weight=0.6
    ).build(backbone, COUNTS)  # fmt: skip
    wide, narrow = method.student.head.mlp[0], method.student.head.mlp[3]
    assert wide.weight.shape == (4096, 1280)
    assert narrow.weight.shape == (128, 4096)
    for linear in (wide, narrow):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert not linear.bias.any()
    assert method.queue.rows.shape == (3072, 2, 128)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == 2_223_872 + 6_163_584
