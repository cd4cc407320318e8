"""What a step may cost: copies of K-wide logits, and no wait for the device; gradients made by hand are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.methods.test_methods import dino, moco, progress, some_views
from tests.methods.test_swav import swav, unit
from tests.methods.vits import ibot, msn
from tests.methods.vits import views as vit_views
from trainer.guards import FiniteGuard
from trainer.methods.joint_embedding import Method
from trainer.methods.losses import (
    _WeightedPrediction,
    dino_targets,
    info_nce,
    mean_entropy,
    paired_prediction,
    weighted_prediction,
)
from trainer.methods.teacher import EMATeacher
from trainer.metrics import Averages
from trainer.optim import LARS, param_groups, set_progress

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount"}
"""Operators whose result the host needs, and so must wait for."""
COPIES = {"tolist", "cpu", "numpy"}
"""Methods that would wait too, and that never become an operator where the device is the CPU."""


class NoOperatorReads(TorchDispatchMode):
    """Fails as soon as an operator needs a tensor's value, a mask among indices included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:2])
        )
        assert not by_mask, f"{name} with a mask waits for the device"
        assert name not in READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class NothingIsCopied(TorchFunctionMode):
    """Fails as soon as a tensor is handed to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in COPIES, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [dino, ibot, moco, msn, swav])
def test_no_step_of_training_waits_for_the_device(make: Callable[[], Method]) -> None:
    """Forward, backward, optimizer, buffers, teacher, averages and guard, while queues fill and when they are full."""
    method = make()
    method.add_probe(num_classes=3)
    teacher, averages, guard = EMATeacher(method.student), Averages(), FiniteGuard()
    optimizer = LARS(param_groups(method, method.frozen_parameters()), lr=0.1, momentum=0.9)
    labels, views_of = torch.tensor([0, 1, 2, 0]), vit_views if make in (ibot, msn) else some_views
    with NoOperatorReads(), NothingIsCopied():
        for step in range(6):
            set_progress(optimizer, progress(epoch=1), frozen=method.frozen(progress(epoch=1)))
            views = views_of(seed=step)
            output = teacher(method.teacher_views(views))
            loss, parts, views_finite = method(views, output, progress(epoch=1), labels, range(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(applied=True)
            teacher.follow(method.student, 0.9)
            averages.add({"loss": loss, **parts})
            guard.see(step, loss, views_finite, output)
    assert len(averages.read()) >= 4


def test_reading_a_value_would_be_noticed() -> None:
    for read in (float, bool, Tensor.tolist, Tensor.nonzero, Tensor.cpu, lambda tensor: tensor[tensor > 0]):
        with pytest.raises(AssertionError, match="for the device"), NoOperatorReads(), NothingIsCopied():
            read(torch.ones(1))


def peak_bytes(function: Callable[[], None]) -> int:
    """The most memory that was allocated at once while the function ran, temporaries inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_the_measure_of_memory_counts_what_is_there() -> None:
    assert peak_bytes(lambda: torch.ones(1000, 1000).add(1).sum()) == pytest.approx(8e6, rel=0.01)


def test_dino_and_swav_hold_the_logits_and_their_gradient_and_little_more() -> None:
    """12 views: beside two copies of the students' logits the targets (2 views), their sum, and three of a view."""
    views, batch, num_prototypes = 12, 16, 8192
    prototypes = nn.Parameter(torch.zeros(num_prototypes, 2))
    students, teacher = torch.zeros(views * batch, 2), torch.zeros(2, batch, num_prototypes)

    def step() -> None:
        logits = F.linear(students, prototypes).view(views, batch, num_prototypes)
        targets = dino_targets(teacher, torch.zeros(num_prototypes), temperature=0.04)
        of_globals, of_locals = paired_prediction(logits, targets, temperature=0.1)
        del logits
        mean_entropy(targets)
        assert of_locals is not None
        (of_globals + of_locals).backward()

    one_copy = 4 * views * batch * num_prototypes
    assert peak_bytes(step) <= (2 + 6 / views) * one_copy + 1e6


def test_moco_never_holds_the_logits_of_all_its_queries() -> None:
    views, batch, queue_size = 7, 8, 16_384
    queries = unit(views, batch, 16).requires_grad_()
    keys, queue = unit(batch, 16), unit(queue_size, 16).T
    one_view = 4 * batch * queue_size
    assert peak_bytes(lambda: info_nce(queries, keys, queue, temperature=0.2).mean().backward()) <= 3 * one_view + 1e6


@settings(max_examples=25, deadline=None)
@given(
    num_globals=st.integers(2, 3), num_locals=st.integers(0, 3), batch=st.integers(1, 4), seed=st.integers(0, 2**31),
    weights=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_paired_predictions_gradient_is_autograds(
    num_globals: int, num_locals: int, batch: int, seed: int, weights: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_globals + num_locals, batch, 7, generator=generator).requires_grad_()
    targets = torch.randn(num_globals, batch, 7, generator=generator).mul(5).softmax(-1)

    def total(losses: tuple[Tensor, Tensor | None]) -> Tensor:
        return weights[0] * losses[0] + (0 if losses[1] is None else weights[1] * losses[1])

    def over_pairs() -> tuple[Tensor, Tensor | None]:
        log_probs = (logits / 0.1).log_softmax(-1)
        pairs = {(i, v): -(targets[i] * log_probs[v]).sum(-1).mean()
                 for i in range(num_globals) for v in range(len(logits)) if i != v}  # fmt: skip
        of_globals = [value for (_, v), value in pairs.items() if v < num_globals]
        of_locals = [value for (_, v), value in pairs.items() if v >= num_globals]
        return torch.stack(of_globals).mean(), torch.stack(of_locals).mean() if of_locals else None

    (ours,) = torch.autograd.grad(total(paired_prediction(logits, targets, temperature=0.1)), logits)
    (expected,) = torch.autograd.grad(total(over_pairs()), logits)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), rows_at_once=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_weighted_predictions_gradient_is_autograds(rows: int, rows_at_once: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 7, generator=generator).requires_grad_()
    targets = torch.randn(rows, 7, generator=generator).mul(5).softmax(-1)
    weights = torch.rand(rows, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_WeightedPrediction, "ROWS", rows_at_once)
        ours = 3 * weighted_prediction(logits, targets, weights, temperature=0.2)
    expected = 3 * F.cross_entropy(logits / 0.2, targets, reduction="none") @ weights
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_a_loss_of_patches_holds_their_logits_and_their_gradient_and_a_thousand_rows() -> None:
    rows, num_prototypes = 16 * 1024, 1024
    targets, weights = torch.full((rows, num_prototypes), 1 / num_prototypes), torch.full((rows,), 1 / rows)
    prototypes, students = nn.Parameter(torch.zeros(num_prototypes, 2)), torch.zeros(rows, 2)

    def step() -> None:
        weighted_prediction(F.linear(students, prototypes), targets, weights, temperature=0.1).backward()

    assert peak_bytes(step) <= (2 + 3 / 16) * 4 * rows * num_prototypes + 1e6


@settings(max_examples=25, deadline=None)
@given(views=st.integers(1, 3), batch=st.integers(1, 4), queue_size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_info_nces_gradient_is_autograds(views: int, batch: int, queue_size: int, seed: int) -> None:
    queries = unit(views, batch, 6, seed=seed).requires_grad_()
    keys, queue = unit(batch, 6, seed=seed + 1), unit(queue_size, 6, seed=seed + 2).T
    logits = torch.cat([(queries * keys).sum(-1, keepdim=True), queries @ queue], -1) / 0.2
    expected = F.cross_entropy(logits.flatten(0, 1), torch.zeros(views * batch, dtype=torch.long), reduction="none")
    weights = torch.arange(1.0, views * batch + 1).view(views, batch)
    ours = info_nce(queries, keys, queue, temperature=0.2)
    gradients = [
        torch.autograd.grad((losses * weights).sum(), queries)[0] for losses in (ours, expected.view(views, batch))
    ]
    assert torch.allclose(ours, expected.view(views, batch), rtol=1e-5, atol=1e-6)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_bfloat16_logits_get_a_bfloat16_gradient() -> None:
    """As under autocast: half the memory, and the loss in full precision all the same."""
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    exact = logits.detach().float().requires_grad_()
    targets = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1)).softmax(-1)
    losses = [sum(paired_prediction(x, targets, temperature=0.1), start=torch.zeros(())) for x in (logits, exact)]  # type: ignore[arg-type]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert torch.allclose(logits.grad.float(), exact.grad, rtol=2**-7), "rounded when made and when scaled"


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    logits = torch.zeros(2, 1, 3, requires_grad=True)
    loss, _ = paired_prediction(logits, torch.full((2, 1, 3), 1 / 3), temperature=0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
