"""Checkpoints on the disk: what counts is whole, what is not whole does not count, and nothing is lost in between."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import run_ranks
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, Checkpoints, newest


def state(value: float) -> dict[str, Any]:
    return {"pieces": {}, "method": {"weight": torch.full((1000,), value)}, "names": ["weight"], "teacher": None}


def save(run_dir: Path, *steps: int, keep: int = 9, judged: dict[int, float] | None = None) -> None:
    with Checkpoints(run_dir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
            if judged:
                checkpoints.judge(step, judged[step])


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_what_is_saved_is_the_state_at_the_call_however_long_the_writing_takes(tmp_path: Path) -> None:
    weight = torch.zeros(3_000_000)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(0) | {"method": {"weight": weight}})
        weight += 1
    found = newest(tmp_path)
    assert found is not None
    assert not found.method()["weight"].any()


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_one_flipped_bit_lets_the_checkpoint_before_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: float
) -> None:
    save(tmp_path, 1, 2)
    file = tmp_path / "checkpoints/step_0000002/rank_00000.pt"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step_0000002 is damaged (rank_00000.pt is missing or not what was written); trying the one" in caplog.text
    assert len(caplog.records) == 1
    save(tmp_path, 2)
    repaired = newest(tmp_path)
    assert repaired is not None
    assert repaired.step == 2


@pytest.mark.parametrize("left", ["rank_00000.pt", "manifest.json"])
def test_a_missing_file_or_a_manifest_cut_in_two_counts_as_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    save(tmp_path, 1, 2)
    file = tmp_path / "checkpoints/step_0000002" / left
    if left == "manifest.json":
        file.write_text(file.read_text()[:40])
    else:
        file.unlink()
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "is damaged" in caplog.text


def test_a_half_written_checkpoint_does_not_count_and_goes_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "checkpoints/.writing_step_0000002_abc"
    half.mkdir()
    (half / "rank_00000.pt").write_bytes(b"half")
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert names(tmp_path) == {"step_0000001", "latest"}


def test_no_checkpoint_at_all_is_a_new_run(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2, judged={1: 30.0, 2: 50.0, 3: 40.0, 4: 50.0})
    assert names(tmp_path) == {"step_0000002", "step_0000003", "step_0000004", "latest", "best"}
    best = json.loads((tmp_path / "checkpoints/best").read_text())
    assert best == {"checkpoint": "step_0000002", "accuracy": 50.0}, "the first of two that are equal"
    save(tmp_path, 5, keep=1, judged={5: 60.0})
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == {"step_0000005", "step_0000006", "latest", "best"}


def fail_on_rank_1(run_dir: Path) -> tuple[str, list[bool], str]:
    """On one rank: a sound save; then one that rank 1 cannot write; what each learns, and when."""
    from trainer import distributed

    with Checkpoints(run_dir, keep=9) as checkpoints:
        checkpoints.save(1, state(1))
    learnt = []
    try:
        with Checkpoints(run_dir, keep=9) as checkpoints, distributed.Agreement() as agreement:
            checkpoints.save(2, state(2) | ({"unwritable": lambda: None} if distributed.rank() == 1 else {}))
            while not (learnt and learnt[-1]):
                (failed,) = agreement.any_claims(checkpoints.failed)
                learnt.append(failed)
                time.sleep(0.01)
            checkpoints.stop_on_failure()
    except CheckpointError as error:
        return str(error), learnt, (run_dir / "checkpoints/latest").read_text()
    raise AssertionError("nothing was raised")


def test_a_rank_that_cannot_write_ends_the_run_on_every_rank_at_the_same_step_and_moves_no_name(tmp_path: Path) -> None:
    (_, steps, latest), (said, same_steps, _) = run_ranks(fail_on_rank_1, tmp_path)
    assert steps == same_steps
    assert latest == "step_0000001\n"
    assert "could not be written" in said
    assert "lambda" in said
    assert not (tmp_path / "checkpoints/step_0000002").exists()


def test_a_failed_write_is_raised_at_the_next_save_or_at_the_end(tmp_path: Path) -> None:
    def unwritable() -> None: ...

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"pieces": unwritable})
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.save(2, state(2))
    with pytest.raises(CheckpointError, match="could not be written"), Checkpoints(tmp_path, keep=1) as another:
        another.save(1, {"pieces": unwritable})
    assert newest(tmp_path) is None


def wait_for_rank_1_in_vain(run_dir: Path) -> str:
    """On one rank: rank 1's file does not come to where rank 0 waits for it; how rank 0's write ends."""
    from trainer import distributed

    checkpoint.CONFIRM_TIMEOUT_S = 0.5
    checkpoints = Checkpoints(run_dir, keep=9)
    if not distributed.is_main():
        checkpoints.folder = run_dir / "elsewhere"
    checkpoints.save(1, state(1))
    for thread in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
        thread.join()
    return str(checkpoints._fault)


def test_a_rank_that_never_confirms_is_named_after_a_while(tmp_path: Path) -> None:
    (said, _) = run_ranks(wait_for_rank_1_in_vain, tmp_path)
    assert "no note of rank_00001 after" in said
    assert newest(tmp_path) is None


def test_a_fault_in_the_training_waits_for_the_write_under_way(tmp_path: Path) -> None:
    def train() -> None:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, state(1) | {"more": torch.zeros(5_000_000)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert names(tmp_path) == {"step_0000001", "latest"}
