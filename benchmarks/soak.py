"""Kill a running job again and again, in every way that a cluster does, and see whether anything is lost or made up.

python -m benchmarks.soak DATA OUT [--kills 20] [--first 1] [--kinds rank launcher host] [--seed 0]

DATA holds train.beton and val.beton (`make demo` leaves one in demo/synthetic), OUT becomes the folder of both runs: an
uninterrupted one, and one that is killed with SIGKILL at random moments, start-up included, and started again by the
same command. What is killed: one rank; the launcher between the command and the ranks; a whole host of two, its
command, launcher and rank. After every kill the rest of the job must end by itself and not report success, every
checkpoint that counts must be what its manifest says, and the next start must continue from the newest of them. At the
end the losses of both runs must be the same to the bit. One JSON line a kill and one for the whole; exit code 1 if a
promise was broken.
"""

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RANKS, STEPS_PER_EPOCH, BATCH = 2, 6, 16
TINY = (
    f"optim.global_batch={BATCH}", "method.hidden_dim=32", "method.queue_size=64", "backbone.args.stem_width=8",
    "backbone.args.channels=[8, 16, 16, 32]", "views.global_views.size=32", "run.checkpoint_every_epochs=0.5",
    "run.log_every_steps=1", "run.tensorboard=false", "evals.knn.every_epochs=10", "evals.knn.size=32",
    "evals.knn.resize=32", "evals.knn.k=5",
)  # fmt: skip
ALONE_TIMEOUT_S, START_TIMEOUT_S = 900.0, 1200.0
"""How long what is left of a killed job may live: a rank waits up to 750 s for one that died before they met. And how
long a start may take to its first new step."""


class BrokenPromiseError(AssertionError):
    """What must never happen."""


@dataclass
class Job:
    """A started job: one command a host."""

    commands: list[subprocess.Popen[bytes]]
    processes: dict[int, psutil.Process]
    """All that were seen of it; the launchers' deaths hide their children from a later look."""

    def look(self) -> list[psutil.Process]:
        """Every process of the job that is alive."""
        for command in self.commands:
            for process in tree_of(command.pid):
                self.processes.setdefault(process.pid, process)
        return [process for process in self.processes.values() if is_alive(process)]


def kill(process: psutil.Process) -> None:
    """SIGKILL, if it still runs."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def end(job: Job) -> None:
    """Leave nothing of it behind."""
    while alive := job.look():
        for process in alive:
            kill(process)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a dead one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree_of(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing once it is dead."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing once it is dead."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="go on with an earlier soak in OUT, at this kill")
    parser.add_argument("--kinds", nargs="+", choices=sorted(VICTIMS), default=["rank", "launcher", "host"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    share = 2 * STEPS_PER_EPOCH  # steps that a start may get before it is killed, on average half of them
    overrides = [f"optim.epochs={(args.kills + 1) * share // STEPS_PER_EPOCH}"]
    try:
        straight = run_to_the_end(args.data, args.out / "straight", overrides)
        for number in range(args.first, args.kills + 1):
            kind = args.kinds[(number - 1) % len(args.kinds)]
            draw = random.Random(f"{args.seed} {number}")
            line = kill_once(args.data, args.out / "killed", overrides, kind, draw, share)
            print(json.dumps({"kill": number, **line}), flush=True)
        killed = run_to_the_end(args.data, args.out / "killed", overrides)
        if killed != straight:
            raise BrokenPromiseError("the losses of the killed run are not those of the straight one")
    except BrokenPromiseError as broken:
        print(json.dumps({"broken": str(broken)}))
        return 1
    print(json.dumps({"kills": args.kills, "steps": len(straight), "losses_equal_to_the_bit": True}))
    return 0


def kill_once(
    data: Path, run_dir: Path, overrides: list[str], kind: str, draw: random.Random, share: int
) -> dict[str, Any]:
    """Start the job, kill a part of it at a random moment, and look at what is left; what happened."""
    newest, logged = newest_checkpoint(run_dir), size_of_log(run_dir)
    in_start_up = draw.random() < 0.2
    job = start(data, run_dir, overrides, hosts=2 if kind == "host" else 1)
    if in_start_up:
        sleep_watching(job, draw.uniform(0, 15))
    else:
        wait_for_step(job, run_dir, newest + draw.randrange(share))
        sleep_watching(job, draw.uniform(0, 0.5))
    step = newest if in_start_up else last_step(run_dir)
    for victim in VICTIMS[kind](job, draw) or tree_of(job.commands[0].pid):  # all of it, if that part is not there yet
        kill(victim)
    alone_s = wait_until_gone(job)
    codes = [command.wait() for command in job.commands]
    if (run_dir / "finished").exists() or 0 in codes:
        raise BrokenPromiseError(f"after the kill at step {step} the job reports success: exit codes {codes}")
    check_checkpoints(run_dir)
    said = check_log(run_dir, logged, newest)
    return {
        "killed": kind, "moment": "start-up" if in_start_up else f"step {step}", "continued_from": said,
        "newest_afterwards": newest_checkpoint(run_dir), "exit_codes": codes, "rest_gone_after_s": round(alone_s, 1),
    }  # fmt: skip


def one_of(job: Job, draw: random.Random, module: str) -> list[psutil.Process]:
    """One of the processes that run this module; none if none has started."""
    found = [process for process in job.look() if command_of(process)[1:4] == ["-u", "-m", module]]
    return [draw.choice(found)] if found else []


def host_of(job: Job, draw: random.Random) -> list[psutil.Process]:
    """Everything on one host."""
    return tree_of(draw.choice(job.commands).pid)


VICTIMS = {
    "rank": partial(one_of, module="trainer"),
    "launcher": partial(one_of, module="deepspeed.launcher.launch"),
    "host": host_of,
}


def start(data: Path, run_dir: Path, overrides: list[str], *, hosts: int) -> Job:
    """The command of the README, on one host with all ranks, or on two that share this machine."""
    port = free_port()
    verb = ["pretrain", str(ROOT / "recipes/smoke/moco_demo.yaml"), *TINY, *overrides]
    paths = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"run.dir={run_dir}"]
    launch = [sys.executable, "-m", "trainer.launch", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    if hosts == 1:
        commands = [[*launch, "--num_gpus", str(RANKS)]]
    else:
        hostfile = run_dir.with_suffix(".hosts")
        hostfile.write_text("".join(f"host{number} slots={RANKS // hosts}\n" for number in range(hosts)))
        nodes = [*launch, "--hostfile", str(hostfile), "--no_ssh", "--node_rank"]
        commands = [[*nodes, str(number)] for number in range(hosts)]
    log = run_dir.with_suffix(".log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    whole = [[*command, "--module", "trainer", *verb, *paths] for command in commands]
    return Job([subprocess.Popen(each, cwd=ROOT, env=environment, stdout=log, stderr=log) for each in whole], {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_to_the_end(data: Path, run_dir: Path, overrides: list[str]) -> dict[int, float]:
    """The loss of every step, once the job has ended well and said so; what has finished before is not run again."""
    if not (run_dir / "finished").exists():
        codes = [command.wait() for command in start(data, run_dir, overrides, hosts=1).commands]
        if any(codes) or not (run_dir / "finished").exists():
            raise BrokenPromiseError(f"a job that nobody killed failed; {run_dir.with_suffix('.log')} says why")
    return {record["step"]: record["loss"] for record in records(run_dir)}


def records(run_dir: Path) -> Iterator[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n") and '"loss"' in line:
            yield json.loads(line)


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=-1)


def wait_for_step(job: Job, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    before = (run_dir / "metrics.jsonl").stat().st_mtime_ns if (run_dir / "metrics.jsonl").exists() else 0
    while True:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.stat().st_mtime_ns > before and last_step(run_dir) >= step:
            return
        if not job.look():
            raise BrokenPromiseError(f"the job has ended by itself; {run_dir.with_suffix('.log')} says why")
        if time.monotonic() > deadline:
            end(job)
            raise BrokenPromiseError(f"no step {step} after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.01)


def sleep_watching(job: Job, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job.look()
        time.sleep(0.01)


def wait_until_gone(job: Job) -> float:
    """Seconds until the rest of the job has ended by itself."""
    began = time.monotonic()
    while job.look():
        if time.monotonic() - began > ALONE_TIMEOUT_S:
            left = [" ".join(command_of(process)[:6]) for process in job.look()]
            end(job)
            raise BrokenPromiseError(f"{ALONE_TIMEOUT_S:.0f} s after the kill these still run: {left}")
        time.sleep(0.1)
    return time.monotonic() - began


def complete(run_dir: Path) -> list[Path]:
    return sorted(path.parent for path in (run_dir / "checkpoints").glob("step_*/manifest.json"))


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 for none."""
    return max((int(path.name.removeprefix("step_")) for path in complete(run_dir)), default=0)


def check_checkpoints(run_dir: Path) -> None:
    """Every checkpoint that counts is what its manifest says, and `latest` names one of them."""
    for folder in complete(run_dir):
        for name, facts in json.loads((folder / "manifest.json").read_text())["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != facts["sha256"]:
                raise BrokenPromiseError(f"{folder / name} is not what its manifest says")
    latest = run_dir / "checkpoints/latest"
    if latest.exists() and not (latest.parent / latest.read_text().strip() / "manifest.json").exists():
        raise BrokenPromiseError(f"{latest} names {latest.read_text().strip()}, which is not complete")


def size_of_log(run_dir: Path) -> int:
    path = run_dir / "train.log"
    return path.stat().st_size if path.exists() else 0


def check_log(run_dir: Path, logged: int, newest: int) -> int | None:
    """The step that this start continued from, which must be the newest checkpoint's; None if it came not so far."""
    path = run_dir / "train.log"
    said = path.read_text()[logged:] if path.exists() else ""
    if "damaged" in said:
        raise BrokenPromiseError(f"{path}: a checkpoint was damaged")
    steps = [int(line.rsplit("step ", 1)[1]) for line in said.splitlines() if "continuing after step" in line]
    steps += [0 for line in said.splitlines() if "a new run in" in line]
    if steps and steps != [newest]:
        raise BrokenPromiseError(f"{path}: continued from {steps}, and the newest checkpoint was {newest}")
    return steps[0] if steps else None


if __name__ == "__main__":
    sys.exit(main())
