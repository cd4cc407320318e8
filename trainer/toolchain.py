"""Where DeepSpeed's compiled parts are made and found: this environment's own tools and folder, whoever starts it."""

import os
import sys
import sysconfig
from pathlib import Path


def use_own() -> None:
    """Put this environment's programs first on PATH, and its folder of compiled extensions in place of the user's.

    ninja 1.11 and 1.13 do not read each other's logs: a run that finds the other compiles again, one that finds none
    dies; either happens to `.venv/bin/deepspeed` when the environment is not activated. A build holds its
    environment's path, so two environments that share a user's cache would rebuild each other's.
    """
    scripts = sysconfig.get_path("scripts")
    others = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder != scripts]
    os.environ["PATH"] = os.pathsep.join([scripts, *others])
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
