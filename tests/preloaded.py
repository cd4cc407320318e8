"""What every rank of a test imports, which takes over ten seconds: once, by the process that ranks are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from trainer import loop  # noqa: F401
from trainer.data import multicrop  # noqa: F401
from trainer.engine import import_deepspeed

import_deepspeed()
