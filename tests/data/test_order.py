"""Who sees what: permutations, shares, resumption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import epoch_order, rank_batches

FIRST = [0, 2, 1, 5, 4, 3, 6, 7]


def test_the_order_is_a_permutation_fixed_for_ever() -> None:
    assert epoch_order(8, seed=0, epoch=0).tolist() == FIRST
    assert epoch_order(8, seed=0, epoch=1).tolist() != FIRST
    assert epoch_order(8, seed=1, epoch=0).tolist() != FIRST
    assert (epoch_order(5, seed=3, epoch=2, shuffle=False) == np.arange(5)).all()


def test_every_place_is_equally_likely() -> None:
    places = np.array([epoch_order(6, seed=7, epoch=epoch) for epoch in range(3000)])
    counts = np.array([np.bincount(column, minlength=6) for column in places.T])
    assert ((counts - 500) ** 2 / 500).sum() < 52.6  # chi-square, 25 degrees of freedom, 0.1 %


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 5), st.integers(0, 40), st.booleans())
def test_ranks_share_an_epoch_without_overlap_or_loss(
    num_samples: int, batch_size: int, world: int, start: int, drop_last: bool
) -> None:
    order, start = epoch_order(num_samples, seed=1, epoch=0), min(start, num_samples)
    shares = [
        rank_batches(order, batch_size=batch_size, rank=rank, world=world, start=start, drop_last=drop_last)
        for rank in range(world)
    ]
    seen = np.concatenate([batch for share in shares for batch in share] or [np.empty(0, int)])
    kept = num_samples - start
    if drop_last:
        kept -= kept % (batch_size * world)
    assert sorted(seen) == sorted(order[start : start + kept])
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)
    assert all(len(batch) == batch_size for share in shares for batch in share[:-1])
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_global_batches_are_the_same_on_any_number_of_ranks(total: int, batch: int, world: int, skip: int) -> None:
    """A run stopped after `skip` global batches goes on with the same remaining ones, on other ranks too."""
    order, step = epoch_order(total, seed=4, epoch=3), batch * world
    alone = rank_batches(order, batch_size=step, rank=0, world=1, drop_last=True)
    start = min(skip * step, total)
    shares = [
        rank_batches(order, batch_size=batch, rank=rank, world=world, start=start, drop_last=True)
        for rank in range(world)
    ]
    together = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    assert len(together) == max(len(alone) - skip, 0)
    assert all((a == b).all() for a, b in zip(together, alone[skip:], strict=True))


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"rank": -1}, {"batch_size": 0}, {"start": 11}])
def test_a_rank_outside_the_world_is_refused(wrong: dict[str, int]) -> None:
    settings = {"batch_size": 2, "rank": 0, "world": 2, "start": 0, **wrong}
    with pytest.raises(ValueError, match=r"need batch_size|start must lie"):
        rank_batches(np.arange(10), drop_last=True, **settings)
