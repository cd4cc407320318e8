"""The batch script that SLURM would run, with stand-ins for SLURM's own two programs."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch import DEMO, ROOT, TINY_MOCO, environment, launcher, losses, run

SCRIPT = ROOT / "scripts/slurm/pretrain.sbatch"
SRUN = """#!/usr/bin/env bash
# Two tasks on one node; its code is the highest of theirs, as srun's is.
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; [ $code -gt $worst ] && worst=$code; }; done
exit $worst
"""
STOPPED_SRUN = "#!/usr/bin/env bash\nexit 75\n"
FAILED_SRUN = "#!/usr/bin/env bash\nexit 1\n"
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$*" >> "$SCONTROL_LOG"; fi
"""


def submit(folder: Path, srun: str, *args: str) -> tuple[int, str, str]:
    """Run the script as a job of two tasks; its exit code, its output, and what it asked scontrol for."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = folder / "scontrol.log"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node", "SLURM_NTASKS": "2"}
    ours = environment()
    ours |= job | {"PATH": f"{programs}:{ours['PATH']}", "SCONTROL_LOG": str(log)}
    done = subprocess.run(
        [str(SCRIPT), *args], cwd=ROOT, env=ours, capture_output=True, text=True, timeout=400, check=False
    )
    return done.returncode, done.stdout + done.stderr, log.read_text() if log.exists() else ""


def test_tasks_of_a_job_train_the_same_as_ranks_of_a_launcher(synthetic: Path, tmp_path: Path) -> None:
    settings = [str(DEMO), *TINY_MOCO, "evals.knn.every_epochs=0", f"data.train={synthetic / 'train.beton'}"]
    code, output, asked = submit(tmp_path, SRUN, *settings, f"run.dir={tmp_path / 'slurm'}")
    assert code == 0, output
    assert asked == "", "a job that has finished is not queued again"
    assert (tmp_path / "slurm/finished").exists()
    run([*launcher("torchrun"), "pretrain", *settings, f"run.dir={tmp_path / 'torchrun'}"])
    assert losses(tmp_path / "slurm") == losses(tmp_path / "torchrun")


@pytest.mark.parametrize(
    ("srun", "code", "asks"), [(STOPPED_SRUN, 75, True), (FAILED_SRUN, 1, False)], ids=["stopped", "failed"]
)
def test_only_a_job_that_was_stopped_is_queued_again(srun: str, code: int, asks: bool, tmp_path: Path) -> None:
    ended, output, asked = submit(tmp_path, srun, "recipe.yaml")
    assert (ended, asked) == (code, f"requeue {os.getpid()}\n" if asks else ""), output
