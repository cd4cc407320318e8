"""Starts the trainer as users do, with the real launchers, and reads what it wrote."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.spawn import free_port

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes/smoke/moco_demo.yaml"
BIN = Path(sys.executable).parent
TINY = (
    "optim.global_batch=16", "optim.epochs=2", "method.hidden_dim=32", "backbone.args.channels=[8, 16, 16, 32]",
    "backbone.args.stem_width=8", "views.global_views.size=32", "views.local_views.size=24",
    "views.local_views.count=2", "method.global_weight=0.4", "method.local_weight=0.6", "data.num_workers=1",
    "run.log_every_steps=1", "run.tensorboard=false", "evals.knn.size=32", "evals.knn.resize=32", "evals.knn.k=5",
)  # fmt: skip
"""Overrides that make a recipe small enough for a test: 6 steps an epoch of the 96 synthetic images."""
TINY_MOCO = (*TINY, "method.queue_size=64")


def launcher(kind: str, ranks: int = 2) -> list[str]:
    """The command before `pretrain` or `evaluate`, as in the README."""
    port = str(free_port())
    flags = ["--num_gpus", str(ranks), "--master_port", port, "--module", "trainer"]
    return {
        "trainer.launch": [sys.executable, "-m", "trainer.launch", *flags],
        "deepspeed": [str(BIN / "deepspeed"), *flags],
        "torchrun": [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={port}", "-m", "trainer"],
        "python": [sys.executable, "-m", "trainer"],
    }[kind]


def environment() -> dict[str, str]:
    """One thread a rank, so that sums have one order; no rank variables of an outer launcher."""
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return outer | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start it in the checkout; both outputs in one pipe."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(command: list[str], *, timeout_s: float = 400, code: int = 0) -> str:
    """Run it to its end and return its output; any other exit code fails the test with that output."""
    process = start(command)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output}") from None
    assert process.returncode == code, f"exit code {process.returncode}, wanted {code}:\n{output}"
    return output


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The training records of metrics.jsonl, without evaluations."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of every step."""
    return {record["step"]: record["loss"] for record in metrics(run_dir)}


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 400) -> None:
    """Return once the run has written that step's loss."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().count('"loss"') > step):
        assert time.monotonic() < deadline, f"no step {step} after {timeout_s} s"
        time.sleep(0.02)
