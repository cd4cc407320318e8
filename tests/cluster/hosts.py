"""Two hosts on one machine: namespaces of their own, a cable between them, and an sshd in each.

A host is a bash that is process 1 of its own PID, network, mount and host-name namespaces. It waits for its input to
end; with it end all its processes, its end of the cable and its mounts. So whatever becomes of the test, the kernel
cleans up, and nothing of this machine is changed: not /etc, not its network, not its users' keys.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch import ROOT

PROGRAMS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
"""What the hosts are made with, and the Debian package that has it."""
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}

BOOT = """
set -e
hostname "$1"
for name in hosts nsswitch.conf shadow; do mount --bind "$2/$name" "/etc/$name"; done
mount --bind "$2/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
echo up
read -r _ || true
"""
FILES = {
    # Names come from this file alone: no look-up ever waits for a name server that the hosts cannot reach.
    "hosts": "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()),
    "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
    # sshd refuses users whose account is locked, as root's is on many machines; * is no password, but no lock.
    "shadow": "root:*:20000:0:99999:7:::\nsshd:!:20000:0:99999:7:::\n",
    "ssh/sshd_config": (
        "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/key.pub\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\n"
    ),
    "ssh/ssh_config": (
        "Host *\n  IdentityFile /etc/ssh/key\n  IdentitiesOnly yes\n  BatchMode yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    ),
}


@dataclass(frozen=True)
class Host:
    """One of the two; `pid` is its process 1, as this machine numbers it."""

    name: str
    address: str
    pid: int

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one there, in the checkout."""
        inside = ("--net", "--mount", "--uts", "--pid", f"--wd={ROOT}")
        return ["nsenter", f"--target={self.pid}", *inside, *command]

    def run(self, *command: str) -> None:
        """Run a command there to its end; an error if it fails."""
        subprocess.run(self.command(command), check=True, timeout=60)

    def ranks(self) -> dict[int, psutil.Process]:
        """The trainer's processes that run there, by their rank."""
        here = [process for process in psutil.process_iter() if _namespace(process.pid) == _namespace(self.pid)]
        found = {}
        for process in here:
            try:
                environment, command = process.environ(), process.cmdline()
            except psutil.Error:  # it has just ended
                continue
            if "RANK" in environment and "trainer" in " ".join(command):
                found[int(environment["RANK"])] = process
        return found


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return "gone"


def why_not() -> str:
    """Why this machine cannot hold two hosts; empty if it can."""
    if os.geteuid() != 0:
        return "two hosts on one machine need root, for network namespaces and sshd"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None})
    if missing:
        return f"two hosts on one machine need {' '.join(missing)}: make test-cluster installs it"
    probe = [*UNSHARE, "ip", "link", "add", "type", "veth"]
    tried = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    return f"this machine allows no network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Both hosts, up and able to log into each other; they are gone afterwards, with all that runs on them.

    folder: for keys and configuration; the file system is common to both, as on a cluster
    """
    _write_files(folder)
    with _host("node-a", folder) as one, _host("node-b", folder) as two:
        cable = f"ip link add name eth0 netns {one.pid} type veth peer name eth0 netns {two.pid}"
        subprocess.run(cable.split(), check=True, timeout=60)
        for host in (one, two):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("/usr/sbin/sshd", "-E", str(folder / f"sshd-{host.name}.log"))
        yield one, two


def _write_files(folder: Path) -> None:
    (folder / "ssh").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for key in ("key", "host_key"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / key)]
        subprocess.run(generate, check=True, timeout=60)


@contextmanager
def _host(name: str, folder: Path) -> Iterator[Host]:
    boot = [*UNSHARE, "bash", "-c", BOOT, "boot", name, str(folder)]
    with subprocess.Popen(boot, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "up\n", f"{name} did not start; its complaint stands above"
            (init,) = psutil.Process(holder.pid).children()
            yield Host(name, ADDRESSES[name], init.pid)
        finally:
            holder.kill()  # --kill-child: process 1 dies with it, and the kernel ends what runs beside process 1
