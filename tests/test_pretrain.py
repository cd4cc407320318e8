"""The whole run under the real launchers: the same from each of them, and the same after signals and kills."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.launch import DEMO, TINY, TINY_MOCO, launcher, losses, metrics, run, start, wait_for_step
from trainer.__main__ import main as trainer
from trainer.evals.command import evaluate
from trainer.recipe import RecipeError
from trainer.recipe_file import load_recipe

CHECKPOINTS = "run.checkpoint_every_epochs=0.5"


def pretrain(kind: str, data: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    paths = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"run.dir={run_dir}"]
    return [*launcher(kind, ranks), "pretrain", str(DEMO), *TINY_MOCO, CHECKPOINTS, "probe=true", *paths, *overrides]


@pytest.fixture(scope="module")
def straight(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run: deepspeed launcher, 2 ranks, 12 steps, checkpoints every 3."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    run(pretrain("deepspeed", synthetic, run_dir))
    return run_dir


def test_a_run_directory_holds_what_the_documentation_says(straight: Path) -> None:
    names = {str(path.relative_to(straight)) for path in straight.rglob("*")}
    assert names >= {
        "recipe.yaml", "resolved.yaml", "environment.json", "ds_config.json", "train.log", "metrics.jsonl", "finished",
        "checkpoints/latest", "checkpoints/step_0000012/manifest.json", "weights/student/model.safetensors",
        "weights/student/config.json", "weights/teacher/model.safetensors",
    }  # fmt: skip
    assert (straight / "recipe.yaml").read_text() == DEMO.read_text()
    kept = {path.name for path in (straight / "checkpoints").iterdir()}
    assert kept == {"latest", "best", "step_0000012", "step_0000009"}, "the last two stay"
    first = metrics(straight)[0]
    assert set(first) >= {
        "step", "epoch", "loss", "loss/global", "loss/local", "lr", "weight_decay", "momentum", "images_per_s",
        "data_time_s", "step_time_s", "loss/ssl", "probe/loss", "probe/accuracy",
    }  # fmt: skip
    assert first["loss"] == pytest.approx(first["loss/ssl"] + first["probe/loss"], rel=1e-6)
    assert list(losses(straight)) == list(range(12))
    evaluations = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert sum("knn/student_top1" in record for record in evaluations) == 1
    probed = [record["probe/val_accuracy"] for record in evaluations if "probe/val_accuracy" in record]
    assert len(probed) == 2, "after every epoch"
    assert all(0 <= accuracy <= 100 for accuracy in probed)


def test_the_command_reads_the_joint_probe_as_the_run_did(straight: Path, tmp_path: Path) -> None:
    assert trainer(["evaluate", str(straight), "--protocol", "linear_online"]) == 0
    (written,) = (straight / "evals").glob("linear_online-*.json")
    results = json.loads(written.read_text())["results"]
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    last = [record["probe/val_accuracy"] for record in records if "probe/val_accuracy" in record][-1]
    assert list(results) == ["student"]
    assert (results["student"]["top1"], results["student"]["num_images"]) == (pytest.approx(last, abs=1e-4), 36)
    copied = tmp_path / "student"
    shutil.copytree(straight / "weights/student", copied)
    data = load_recipe(straight / "resolved.yaml").data
    given = [f"data.train={data.train}", f"data.val={data.val}", "evals.knn.size=32", "evals.knn.resize=32"]
    of_others = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    save_file(of_others, copied / "probe.safetensors")
    with pytest.raises(RecipeError, match="a probe of 3 classes, and the images have 12"):
        evaluate(copied, "linear_online", given)
    (copied / "probe.safetensors").unlink()
    with pytest.raises(RecipeError, match="wanted a run with `probe: true`"):
        evaluate(copied, "linear_online", given)


def test_timm_loads_the_weights_of_a_run(straight: Path) -> None:
    folder = straight / "weights/student"
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in saved.items())
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_torchrun_trains_the_same_as_the_deepspeed_launcher(straight: Path, synthetic: Path, tmp_path: Path) -> None:
    run(pretrain("torchrun", synthetic, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(straight)


def test_one_process_without_a_launcher_trains_the_same_but_for_rounding(
    straight: Path, synthetic: Path, tmp_path: Path
) -> None:
    run(pretrain("python", synthetic, tmp_path / "run"))
    ours, theirs = losses(tmp_path / "run"), losses(straight)
    assert list(ours) == list(theirs)
    assert list(ours.values())[:4] == pytest.approx(list(theirs.values())[:4], rel=2e-4), "before rounding has grown"


def test_a_run_that_is_stopped_loses_its_launcher_and_loses_a_rank_goes_on_bit_for_bit(
    straight: Path, synthetic: Path, tmp_path: Path
) -> None:
    """Each time the same command continues; benchmarks/soak.py does this at random moments, often."""
    run_dir = tmp_path / "run"
    command = pretrain("deepspeed", synthetic, run_dir)

    with started(command) as launched:
        wait_for_step(run_dir, 1)
        rank_1 = rank_of(launched, 1)
        rank_1.send_signal(signal.SIGUSR1)
        rank_1.send_signal(signal.SIGTERM)  # the second changes nothing
        output, _ = launched.communicate(timeout=200)
    assert launched.returncode == 75, output
    stopped_at = max(losses(run_dir)) + 1
    assert newest_checkpoint(run_dir) == stopped_at, "the step at which all ranks stopped is saved"
    assert f"asked to stop: the run is saved in {run_dir}" in output

    with started(pretrain("trainer.launch", synthetic, run_dir)) as launched:
        wait_for_step(run_dir, stopped_at)
        ranks = [rank_of(launched, rank) for rank in (0, 1)]
        ranks[0].parent().kill()
        _, alive = psutil.wait_procs(ranks, timeout=100)
        assert not alive, "a rank without its launcher trains on"
        launched.communicate(timeout=60)
    assert launched.returncode == 128 + signal.SIGKILL, "DeepSpeed's own command would report success"
    assert not (run_dir / "finished").exists()

    stopped_at = newest_checkpoint(run_dir)
    with started(command) as launched:
        wait_for_step(run_dir, min(stopped_at + 1, 10))
        rank_of(launched, 1).kill()
        output, _ = launched.communicate(timeout=200)
    assert f"continuing after step {stopped_at}" in output
    assert launched.returncode != 0, output
    assert not (run_dir / "finished").exists()

    run(command)
    assert losses(run_dir) == losses(straight)
    ours, theirs = (load_file(folder / "weights/teacher/model.safetensors") for folder in (run_dir, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The launched command, which ends with the block."""
    launched = start(command)
    try:
        yield launched
    finally:
        launched.kill()


def rank_of(launched: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The worker of that rank below the launcher that we started."""
    for process in psutil.Process(launched.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank} below {launched.pid}")


def newest_checkpoint(run_dir: Path) -> int:
    return int((run_dir / "checkpoints/latest").read_text().strip().removeprefix("step_"))


def test_a_finished_run_started_again_trains_nothing_and_keeps_its_records(straight: Path, synthetic: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    output = run(pretrain("deepspeed", synthetic, straight))
    assert "continuing after step 12" in output
    assert (straight / "metrics.jsonl").read_text() == before


def test_a_method_without_a_teacher_trains_stops_and_is_evaluated(synthetic: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    swav = ["method.queue_size=32", "method.queue_start_epoch=1", "method.num_prototypes=16", "optim.warmup_epochs=0"]
    paths = [f"data.train={synthetic / 'train.beton'}", f"data.val={synthetic / 'val.beton'}", f"run.dir={run_dir}"]
    recipe = str(DEMO.with_name("swav_sslight.yaml"))
    run([*launcher("deepspeed"), "pretrain", recipe, *TINY, *swav, *paths])
    assert list(losses(run_dir)) == list(range(12))
    assert {path.name for path in (run_dir / "weights").iterdir()} == {"student"}
    run([*launcher("python"), "evaluate", str(run_dir), "--protocol", "knn"])
    report = json.loads((run_dir / "evals/knn-0000012.json").read_text())
    assert list(report["results"]) == ["pixels", "untrained", "student"]


def test_evaluate_reports_the_network_beside_pixels_and_the_untrained_one(straight: Path) -> None:
    output = run([*launcher("deepspeed"), "evaluate", str(straight), "--protocol", "knn", "evals.knn.k=3"])
    report = json.loads((straight / "evals/knn-0000012.json").read_text())
    assert list(report["results"]) == ["pixels", "untrained", "student", "teacher"]
    assert report["settings"]["k"] == 3
    assert all(len(data["sha256"]) == 64 for data in report["data"].values())
    assert report["results"]["student"]["origin"].startswith("sha256:")
    assert all(0 <= result["top1"] <= 100 for result in report["results"].values())
    for name, result in report["results"].items():
        assert f"{result['top1']:.2f}" in next(line for line in output.splitlines() if name in line)
