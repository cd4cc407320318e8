"""Who sees what: the order of an epoch and each rank's share of it, as pure functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The order in which an epoch visits its samples; the same on every machine and in every numpy.

    Sorts Philox's raw words, whose stream numpy guarantees for ever; the shuffling of `Generator` may change.

    returns: (num_samples,) a permutation of 0 .. num_samples - 1
    raises: ValueError for a negative seed or epoch
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got seed {seed}, epoch {epoch}")
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def rank_batches(
    order: NDArray[np.int64], *, batch_size: int, rank: int, world: int, start: int = 0, drop_last: bool
) -> list[NDArray[np.int64]]:
    """This rank's batches of an epoch, from sample position `start` on.

    The order is cut into global batches of batch_size * world samples, and each rank takes its slice of each. A last
    global batch that is short is dropped, or (drop_last=False) shared as evenly as possible: nothing is padded, nothing
    is seen twice, and the last ranks may have one sample less, or no last batch at all.

    raises: ValueError for a rank outside the world, an empty batch or a start outside the order
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"need batch_size >= 1 and 0 <= rank < world, got {batch_size}, rank {rank}, world {world}")
    if not 0 <= start <= len(order):
        raise ValueError(f"start must lie in [0, {len(order)}], the samples of an epoch, got {start}")
    step = batch_size * world
    blocks: Sequence[NDArray[np.int64]] = [order[i : i + step] for i in range(start, len(order), step)]
    batches = [_share(block, rank, world) for block in blocks if len(block) == step or not drop_last]
    return [batch for batch in batches if len(batch)]


def _share(block: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Contiguous shares whose sizes differ by one at most, the larger ones first."""
    size, extra = divmod(len(block), world)
    first = rank * size + min(rank, extra)
    return block[first : first + size + (rank < extra)]
