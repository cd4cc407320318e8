"""The command that schedulers read: DeepSpeed's own, but for what it makes of signals."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launch import launcher, start

SCRIPT = """
import pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def leave(number, frame):
    (folder / "heard").write_text(str(number))
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
(folder / "started").touch()
while not (folder / "end").exists():
    time.sleep(0.05)
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("what", "code"), [("rank fails", 3), ("launcher is killed", 137), ("SIGTERM", 1), ("SIGUSR1", 1)]
)
def test_the_command_reports_what_became_of_its_ranks(what: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    with start([*launcher("trainer.launch", ranks=1)[:-2], str(script)]) as command:
        wait_for(tmp_path / "started")
        (launch,) = [each for each in psutil.Process(command.pid).children() if sys.executable in each.cmdline()]
        if what == "rank fails":
            (tmp_path / "end").touch()
        elif what == "launcher is killed":
            launch.kill()
            (tmp_path / "end").touch()
        else:
            command.send_signal(signal.Signals[what])
        output, _ = command.communicate(timeout=60)
    assert command.returncode == code, output
    assert (tmp_path / "heard").exists() == what.startswith("SIG"), "both signals reach the ranks as SIGTERM"
    assert ("killed by signal 9" in output) == (what == "launcher is killed")


def wait_for(path: Path, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} after {timeout_s} s"
        time.sleep(0.05)
