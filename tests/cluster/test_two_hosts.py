"""One training on two hosts of one rank each, as the documentation starts it: the same losses, and no half-dead job."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Host, two_hosts, why_not
from tests.launch import BIN, DEMO, TINY_MOCO, launcher, losses, run, start, wait_for_step
from tests.spawn import free_port

REASON = why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(REASON), reason=REASON)]

ENDS_WITHIN_S = 60
"""From the death of a rank to the end of the whole job. Gloo sees the broken connection at once; then launch.py asks
its processes to end, and would kill them after 30 s."""

Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the runs, and for what the launcher reads."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    (folder / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    return folder


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Hosts]:
    """node-a and node-b."""
    with two_hosts(folder / "hosts") as both:
        yield both


def training(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """What follows the launcher."""
    paths = [f"data.train={data / 'train.beton'}", f"run.dir={run_dir}"]
    return ["pretrain", str(DEMO), *TINY_MOCO, "evals.knn.every_epochs=0", *paths, *overrides]


def deepspeed(host: Host, folder: Path, *flags: str, port: int) -> list[str]:
    """The launcher, started on one of the hosts."""
    environment = ("env", f"DS_ENV_FILE={folder / 'environment'}", "GLOO_SOCKET_IFNAME=eth0")
    where = ("--hostfile", str(folder / "hostfile"), "--master_addr", "10.77.0.1", "--master_port", str(port))
    return host.command([*environment, str(BIN / "deepspeed"), *where, *flags, "--module", "trainer"])


@pytest.fixture(scope="module")
def on_one_host(synthetic: Path, folder: Path) -> dict[int, float]:
    """The losses of two ranks on one host."""
    run([*launcher("deepspeed"), *training(synthetic, folder / "one")])
    return losses(folder / "one")


def test_pdsh_and_a_hostfile_train_the_same_as_one_host(
    hosts: Hosts, synthetic: Path, folder: Path, on_one_host: dict[int, float]
) -> None:
    launch = deepspeed(hosts[0], folder, "--launcher", "pdsh", port=free_port())
    output = run([*launch, *training(synthetic, folder / "pdsh")])
    assert "node-a: " in output
    assert "node-b: " in output
    assert (folder / "pdsh/finished").exists()
    assert len(on_one_host) == 12
    assert losses(folder / "pdsh") == on_one_host


def test_a_launcher_on_each_host_without_ssh_trains_the_same(
    hosts: Hosts, synthetic: Path, folder: Path, on_one_host: dict[int, float]
) -> None:
    port = free_port()
    commands = [
        [*deepspeed(host, folder, "--no_ssh", "--node_rank", str(rank), port=port),
         *training(synthetic, folder / "no-ssh")]
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    other = start(commands[1])
    try:
        run(commands[0])
        output, _ = other.communicate(timeout=60)
    finally:
        other.kill()
    assert other.returncode == 0, output
    assert (folder / "no-ssh/finished").exists()
    assert losses(folder / "no-ssh") == on_one_host


def test_a_rank_killed_on_one_host_ends_the_job_on_both(hosts: Hosts, synthetic: Path, folder: Path) -> None:
    """kill -9 on the second host, where nobody looks: no rank may wait for ever, and nothing may look like success."""
    run_dir = folder / "killed"
    launch = deepspeed(hosts[0], folder, "--launcher", "pdsh", port=free_port())
    launched = start([*launch, *training(synthetic, run_dir, "optim.epochs=200")])
    try:
        wait_for_step(run_dir, 3)
        assert [list(host.ranks()) for host in hosts] == [[0], [1]]
        os.kill(hosts[1].ranks()[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        output, _ = launched.communicate(timeout=ENDS_WITHIN_S)
        print(f"the job ended {time.monotonic() - killed:.1f} s after its rank 1")
    finally:
        kill_with_children(launched.pid)
    assert launched.returncode != 0, output
    assert [host.ranks() for host in hosts] == [{}, {}], output
    assert not (run_dir / "finished").exists()


def kill_with_children(pid: int) -> None:
    """End what we started there, if it has not ended by itself."""
    if psutil.pid_exists(pid):
        for process in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
            process.kill()
