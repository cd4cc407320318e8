"""`python -m trainer.launch [flags] --module trainer ...`: the `deepspeed` command for those who read its exit code.

It is DeepSpeed's own, which mends two things of it (seen in 0.19.8): a launcher process that a signal has killed leaves
the command an exit code of 0, though nothing was finished; and SIGTERM to the command on one host ends it alone, while
its ranks train on unseen.
"""

import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from trainer import stopping


class Launcher(subprocess.Popen[bytes]):
    """A child whose death by signal n is the exit code 128 + n, as in a shell, and which hears of stop requests.

    They reach it as SIGTERM, which DeepSpeed's launcher process hands on to its ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for number in stopping.SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """As Popen's."""
        code = super().wait(timeout)
        if code < 0:
            print(f"the launcher {self.pid} was killed by signal {-code}", file=sys.stderr)
            self.returncode = 128 - code
        return self.returncode


def main() -> None:
    """DeepSpeed's runner; it leaves with its launcher's exit code."""
    from deepspeed.launcher import runner  # takes seconds

    runner.subprocess.Popen = Launcher
    runner.main()


if __name__ == "__main__":
    main()
