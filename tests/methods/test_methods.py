"""DINO and MoCo as modules: centre, queue, teacher, freezing, and what a skipped step must leave alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import unit_rows, waves
from tests.spawn import run_ranks
from trainer import distributed
from trainer.methods.dino import DINO, DINOConfig
from trainer.methods.joint_embedding import ViewCounts, split_views
from trainer.methods.moco import MoCo, MoCoConfig
from trainer.methods.queue import KeyQueue
from trainer.methods.teacher import EMATeacher
from trainer.schedules import Progress

COUNTS = ViewCounts(global_views=2, local_views=6)


class Flat(nn.Module):
    """A backbone of one layer that takes any size: the mean colour of each of 3 channels."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.gain


def progress(epoch: int = 0) -> Progress:
    return Progress(step=epoch * 10, epoch=epoch, lr=0.1, weight_decay=0.0, momentum=0.9)


def dino(num_prototypes: int = 8) -> DINO:
    torch.manual_seed(0)
    config = DINOConfig(
        name="dino", hidden_dim=16, bottleneck_dim=8, num_prototypes=num_prototypes, head_norm=False,
        warmup_teacher_temp_epochs=50, global_weight=0.4, local_weight=0.6,
    )  # fmt: skip
    return config.build(Flat(), COUNTS)


def moco(queue_size: int = 16) -> MoCo:
    torch.manual_seed(0)
    config = MoCoConfig(
        name="moco", hidden_dim=16, out_dim=8, queue_size=queue_size, global_weight=0.4, local_weight=0.6
    )
    return config.build(Flat(), COUNTS)


def some_views(batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count * batch, 3, size, size, generator=generator) for count, size in ((2, 8), (6, 4))]


def test_the_centre_after_one_step_is_the_published_one() -> None:
    method = dino()
    teacher = waves(8, 8, 0.53, 1.13).float()
    method(some_views(), teacher, progress())
    method.after_step(applied=True)
    expected = [.02881914, -.01370622, -.04051493, -.02086597, .02270959, .04024450, .01163185, -.03031882]  # fmt: skip
    assert method.center.tolist() == pytest.approx(expected, abs=1e-7)


def test_dinos_steps_have_the_published_losses() -> None:
    """Through the module, whose centre has moved before the second step."""
    method = dino()
    student, teacher = waves(32, 8, 0.37, 0.91).view(8, 4, 8), waves(8, 8, 0.53, 1.13).view(2, 4, 8)
    for expected in (10.454348, 10.458574):
        assert method.objective(student, teacher, progress()).total.item() == pytest.approx(expected, abs=5e-6)
        method.after_step(applied=True)
    assert dino().objective(student, teacher, progress(epoch=49)).total.item() == pytest.approx(10.451325, abs=5e-6)


def test_mocos_step_has_the_published_loss() -> None:
    """The first query is global, the other six are local."""
    method = moco()
    queries, keys = unit_rows(waves(28, 8, 0.37, 0.91)).view(7, 4, 8), unit_rows(waves(4, 8, 0.53, 1.13))
    method.queue.keys.copy_(unit_rows(waves(8, 16, 0.29, 0.77).T).T)
    loss = method.objective(queries, keys[None], progress())
    assert loss.total.item() == pytest.approx(2.502839, abs=5e-6)
    assert float(loss.parts["loss/global"]) == pytest.approx(1.064989, abs=5e-6)
    assert float(loss.parts["loss/local"]) == pytest.approx(3.461405, abs=5e-6)


def test_two_micro_batches_move_the_centre_as_one_batch_does() -> None:
    whole, halves = dino(), dino()
    teacher = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    whole(some_views(8), teacher.flatten(0, 1), progress())
    for half in (slice(0, 4), slice(4, 8)):
        halves(some_views(4), teacher[:, half].flatten(0, 1), progress())
    for method in (whole, halves):
        method.after_step(applied=True)
    assert torch.allclose(whole.center, halves.center, atol=1e-7)


def center_of_rank_share() -> list[float]:
    method = dino()
    teacher = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    mine = teacher[:, distributed.rank() :: distributed.world()]
    method(some_views(mine.shape[1]), mine.flatten(0, 1), progress())
    method.after_step(applied=True)
    queue = moco().queue
    queue.push(distributed.gather_equal_rows(torch.full((2, 8), float(distributed.rank()))))
    return [*method.center.tolist(), *queue.keys[0, :4].tolist()]


def test_centre_and_queue_over_two_ranks_are_those_of_one_with_the_whole_batch() -> None:
    first, second = run_ranks(center_of_rank_share)
    assert first == second
    assert first[:8] == pytest.approx(center_of_rank_share()[:8], abs=1e-7)
    assert first[8:] == [0.0, 0.0, 1.0, 1.0], "keys of all ranks, in rank order"


@pytest.mark.parametrize("make", [dino, moco])
def test_a_skipped_step_changes_no_buffer(make: type[DINO] | type[MoCo]) -> None:
    method = make()
    views = some_views()
    teacher = EMATeacher(method.student)
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    method(views, teacher(method.teacher_views(views)), progress())
    method.after_step(applied=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.named_buffers())
    method(views, teacher(method.teacher_views(views)), progress())
    method.after_step(applied=True)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in method.named_buffers())


def test_dinos_teacher_sees_both_globals_and_mocos_only_the_first_view() -> None:
    views = some_views(batch=4)
    assert [tuple(v.shape) for v in dino().teacher_views(views)] == [(8, 3, 8, 8)]
    (keys,) = moco().teacher_views(views)
    assert torch.equal(keys, views[0][:4])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), share=st.floats(0, 1))
def test_splitting_views_loses_and_reorders_no_row(sizes: list[int], share: float) -> None:
    views = [torch.arange(100 * i, 100 * i + size)[:, None] for i, size in enumerate(sizes)]
    rows = round(share * sum(sizes))
    before, after = split_views(views, rows)
    assert torch.equal(torch.cat([*before, *after]), torch.cat(views))
    assert sum(len(group) for group in before) == rows


def test_views_of_one_size_throughout_need_no_second_group() -> None:
    """Where locals are as large as globals the loader makes one group of all eight views."""
    joined = [torch.cat([group.new_zeros(len(group), 3, 8, 8) for group in some_views()])]
    method = dino()
    assert method.batch_size(joined) == 4
    assert [len(v) for v in method.teacher_views(joined)] == [8]
    method(joined, EMATeacher(method.student)(method.teacher_views(joined)), progress())


def test_prototypes_are_frozen_in_the_first_epoch_only() -> None:
    method = dino()
    assert [method.frozen(progress(epoch)) for epoch in (0, 1, 2)] == [True, False, False]
    (direction,) = method.frozen_parameters()
    assert direction.shape == (8, 8)
    assert not method.student.head.last_layer.weight_g.requires_grad, "the gain stays 1 with norm_last_layer"


def test_gradients_reach_every_trained_parameter_and_never_the_teacher() -> None:
    for method in (dino(), moco()):
        views, teacher = some_views(), EMATeacher(method.student)
        method(views, teacher(method.teacher_views(views)), progress()).total.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
        assert all(p.grad is None for p in teacher.parameters())


def test_the_queue_replaces_its_oldest_keys_and_wraps() -> None:
    queue = KeyQueue(embed_dim=2, size=6)
    for value in range(4):
        queue.push(torch.full((2, 2), float(value)))
    assert queue.keys[0].tolist() == [3, 3, 1, 1, 2, 2]
    assert int(queue.pointer) == 2
    with pytest.raises(ValueError, match="multiple of the batch of 4"):
        queue.push(torch.zeros(4, 2))


def test_a_fresh_queue_holds_unit_keys() -> None:
    assert torch.allclose(KeyQueue(embed_dim=16, size=64).keys.norm(dim=0), torch.ones(64))


def test_the_current_keys_are_not_among_their_own_negatives() -> None:
    method = moco()
    views, teacher = some_views(), EMATeacher(method.student)
    loss = method(views, teacher(method.teacher_views(views)), progress()).total
    again = method(views, teacher(method.teacher_views(views)), progress()).total
    assert torch.equal(loss, again), "keys enter the queue after the step, not in forward"


def test_a_bfloat16_average_stalls_where_the_teacher_does_not() -> None:
    """The trap that keeps the teacher in fp32, outside the engine: 1 - m is below bfloat16's resolution."""
    method = dino()
    teacher = EMATeacher(method.student)
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    stalled = start.bfloat16()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.01)
    goal = torch.cat([p.detach().flatten() for p in method.student.parameters()])
    for _ in range(6):
        teacher.follow(method.student, 0.9995)
        stalled.lerp_(goal.bfloat16(), 0.0005)
    moved = torch.cat([p.flatten() for p in teacher.parameters()])
    trained = start != goal
    assert (moved != start)[trained].all()
    assert (stalled != start.bfloat16())[trained].float().mean() < 0.5


def test_the_teacher_starts_as_the_student_and_ends_between_both() -> None:
    method = moco()
    teacher = EMATeacher(method.student)
    views = some_views()
    assert torch.equal(teacher(views), method.student(views))
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in teacher.parameters()]
    teacher.follow(method.student, 0.75)
    for old, new, goal in zip(before, teacher.parameters(), method.student.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * goal.detach(), atol=1e-6)


@pytest.mark.parametrize("make", [dino, moco])
def test_global_only_is_the_global_term_alone_with_weight_one(make: type[DINO] | type[MoCo]) -> None:
    plain = make()
    config = replace(plain.config, global_only=True, global_weight=0.4)  # type: ignore[arg-type]
    method = type(plain)(config, plain.student, ViewCounts(2, 0))  # type: ignore[arg-type]
    views, teacher = some_views()[:1], EMATeacher(method.student)
    loss = method(views, teacher(method.teacher_views(views)), progress())
    assert torch.equal(loss.total, loss.parts["loss/global"])
    assert "loss/local" not in loss.parts


@pytest.mark.parametrize("make", [dino, moco])
def test_a_forward_takes_one_pass_of_the_backbone_a_view_size_and_one_of_the_head(
    make: type[DINO] | type[MoCo],
) -> None:
    method, rows = make(), []
    for module in (method.student.backbone, method.student.head):
        module.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    views, teacher = some_views(), EMATeacher(method.student)
    rows.clear()
    method(views, teacher(method.teacher_views(views)), progress())
    of_teacher, of_student = ([8, 8], [8, 24, 32]) if make is dino else ([4, 4], [4, 24, 28])
    assert rows == of_teacher + of_student
