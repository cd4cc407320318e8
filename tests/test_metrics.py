"""Records: averages over micro-batches, and a metrics.jsonl that reads as one run after a pause."""

import json
from pathlib import Path

import pytest
import torch

from trainer.metrics import Averages, MetricLog


def test_averages_are_means_since_the_last_reading_of_tensors_and_numbers() -> None:
    averages = Averages()
    for value in (1.0, 2.0, 6.0):
        averages.add({"loss": torch.tensor(value), "bad": value})
    assert averages.read() == {"bad": 3.0, "loss": 3.0}
    averages.add({"loss": torch.tensor(5.0)})
    assert averages.read() == {"loss": 5.0}
    assert averages.read() == {}


def test_averages_keep_no_graph() -> None:
    averages = Averages()
    weight = torch.ones((), requires_grad=True)
    averages.add({"loss": weight * 2})
    assert not any(value.requires_grad for value in averages._sums.values() if isinstance(value, torch.Tensor))


def test_a_continued_run_forgets_the_steps_that_it_trains_again(tmp_path: Path) -> None:
    for first, steps in ((0, range(6)), (3, range(3, 5))):
        with MetricLog(tmp_path, first, 6, tensorboard=False) as log:
            for step in steps:
                log.write({"step": step, "loss": float(first)})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)]


def test_a_line_that_a_dying_run_left_half_written_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with MetricLog(tmp_path, 2, 6, tensorboard=False):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLog(tmp_path, 0, 2, tensorboard=True) as log:
        for step in range(2):
            log.write({"step": step, "loss": 1.0 + step, "lr": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [1.0, 2.0]
    assert [event.step for event in events.Scalars("lr")] == [0, 1]
