"""What must end a run ends it: on all ranks at once, with the step, the view and the likely cause."""

import subprocess
import sys
import time

import pytest
import torch

from tests.spawn import run_ranks
from trainer.guards import MAX_SKIPPED, FiniteGuard, TrainingError

NAN, FINE = torch.tensor(float("nan")), torch.tensor(1.0)
ALL_FINITE = torch.tensor([True, True, True])


def fault(guard: FiniteGuard) -> str:
    with pytest.raises(TrainingError) as caught:
        guard.check({"step": 9, "loss": 1.0})
    return str(caught.value)


@pytest.mark.parametrize(
    ("views_finite", "teacher", "cause"),
    [
        ([True, False, True], FINE, "step 4, rank 0: the features of the student's pass 1 of 0 to 2 are not finite"),
        ([True, False, False], FINE, "pass 1, 2 of 0 to 2"),
        ([False, False, False], NAN, "the weights are not: the update before this step diverged"),
        ([True, True, True], NAN, "the teacher's output is not finite"),
        ([True, True, True], FINE, "it overflows in the head or in the loss"),
    ],
)
def test_the_first_step_that_is_not_finite_is_named_with_its_cause(
    views_finite: list[bool], teacher: torch.Tensor, cause: str
) -> None:
    guard = FiniteGuard()
    guard.see(3, FINE, ALL_FINITE, FINE)
    guard.check({"step": 3, "loss": 1.0})
    guard.see(4, NAN, torch.tensor(views_finite), teacher)
    guard.see(5, NAN, torch.tensor([False, False, False]), NAN)
    assert cause in fault(guard)
    assert "The last checkpoint is sound" in fault(guard)


def test_a_method_without_a_teacher_is_watched_too() -> None:
    guard = FiniteGuard()
    guard.see(0, NAN, ALL_FINITE, None)
    assert "step 0, rank 0: the loss is not finite" in fault(guard)


def test_a_diagnostic_that_is_not_finite_ends_the_run_by_its_name() -> None:
    guard = FiniteGuard()
    guard.see(0, FINE, ALL_FINITE, None)
    with pytest.raises(TrainingError, match="center_norm not finite at or before step 7"):
        guard.check({"step": 7, "center_norm": float("inf")})


def test_steps_that_are_all_skipped_end_the_run_and_one_that_is_applied_starts_the_count_anew() -> None:
    guard = FiniteGuard()
    for _ in range(2):
        for _ in range(MAX_SKIPPED - 1):
            guard.count(applied=False)
        guard.count(applied=True)
    for _ in range(MAX_SKIPPED - 1):
        guard.count(applied=False)
    with pytest.raises(TrainingError, match="loss scale"):
        guard.count(applied=False)


def one_rank_breaks() -> str:
    from trainer import distributed

    guard = FiniteGuard()
    for step in range(4):
        is_broken = (distributed.rank(), step) == (1, 2)
        guard.see(step, NAN if is_broken else FINE, torch.tensor([True, not is_broken]), FINE)
    return fault(guard)


def test_every_rank_stops_with_what_one_rank_saw() -> None:
    first, second = run_ranks(one_rank_breaks)
    assert first == second
    assert "step 2, rank 1: the features of the student's pass 1 of 0 to 1" in first


HANGS = """
import time
from trainer.guards import watchdog
with watchdog(1.0) as dog:
    for _ in range(3):
        time.sleep(0.5)
        dog.heard()
    dog.rest()
    time.sleep(1.5)
    print("alive", flush=True)
    dog.heard()
    time.sleep(60)  # the step that never ends
"""


def test_a_step_that_never_ends_is_ended_with_the_line_where_it_stands() -> None:
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "alive" in ended.stdout, "neither heard nor rested"
    assert "Timeout" in ended.stderr
    assert "line 12" in ended.stderr, ended.stderr
    assert time.monotonic() - started < 60
