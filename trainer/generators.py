"""The process's random generators: seeded, read, and put back."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0, step: int = 0) -> None:
    """Seed every global generator, differently on every rank: drop-path and the like may not agree over ranks.

    step: where a run continues that cannot go on with the generators of its earlier ranks
    """
    mixed = int(np.random.SeedSequence([seed, rank, *([step] if step else [])]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def read_generators() -> dict[str, Any]:
    """Where every global generator stands, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(state: dict[str, Any]) -> None:
    """Let every global generator go on from where it stood."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
