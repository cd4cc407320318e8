"""Masks: iBOT's blocks, MSN's dropped patches, both pure functions of seed, time, sample and view."""

import math
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.methods.ibot import predicted
from trainer.methods.masks import add_blocks, block_masks, kept_patches


def masks(ids: list[int], *, seed: int = 0, epoch: int = 0, num_views: int = 2, prob: float = 0.5) -> np.ndarray:
    return block_masks(
        ids, num_views=num_views, grid=(14, 14), prob=prob, ratio=(0.1, 0.5), seed=seed, epoch=epoch
    ).reshape(num_views, len(ids), 196)


def test_a_mask_depends_on_seed_epoch_sample_and_view_and_on_nothing_else() -> None:
    """Neither on the company that a sample is in, so not on ranks or micro-batches, nor on earlier draws."""
    whole = masks(list(range(20)))
    assert np.array_equal(whole[:, 5:9], masks([5, 6, 7, 8]))
    assert np.array_equal(whole[:, ::-1], masks(list(range(19, -1, -1))))
    assert np.array_equal(whole[:1], masks(list(range(20)), num_views=1))
    for other in (masks(list(range(20)), seed=1), masks(list(range(20)), epoch=1), masks(list(range(20, 40)))):
        assert not np.array_equal(whole, other)
    assert not np.array_equal(whole[0], whole[1])


def test_half_of_the_views_are_masked_by_three_tenths_on_average() -> None:
    shares = masks(list(range(1000))).mean(-1).flatten()
    masked = shares[shares > 0]
    assert len(masked) / len(shares) == pytest.approx(0.5, abs=0.04)
    assert masked.max() <= 0.5
    assert masked.mean() == pytest.approx(0.3, abs=0.02), "as drawn, a little less: the last block may not fit"
    assert masks(list(range(50)), prob=1).any(-1).all()
    assert not masks(list(range(50)), prob=0).any()


def test_every_patch_gets_masked_the_middle_more_often_and_no_side_more_than_the_opposite_one() -> None:
    often = masks(list(range(2000)), prob=1).reshape(-1, 14, 14).mean(0)
    assert often.min() > 0.01
    assert often[5:9, 5:9].mean() > 2 * often[0].mean()
    assert often == pytest.approx(often[::-1, ::-1], abs=0.05)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(2, 16), width=st.integers(2, 16), share=st.floats(0, 1),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=8, max_size=40),
)  # fmt: skip
def test_blocks_never_mask_more_than_asked_for_and_come_to_an_end(
    height: int, width: int, share: float, draws: list[float]
) -> None:
    """Whatever is drawn, the same few numbers for ever included."""
    mask = np.zeros((height, width), dtype=np.bool_)
    add_blocks(mask, share * height * width, cycle(draws))
    assert mask.sum() <= share * height * width


def test_a_single_block_is_a_rectangle() -> None:
    mask = np.zeros((14, 14), dtype=np.bool_)
    add_blocks(mask, 20, iter([0.9, 0.5, 0.3, 0.6] + [0.0] * 400))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    area = 16 + 0.9 * 4  # between a ninth of a side squared and what is wanted; aspect 1
    assert len(rows) == len(columns) == round(math.sqrt(area))
    assert mask.sum() == len(rows) * len(columns)
    assert (rows[0], columns[0]) == (int(0.3 * 11), int(0.6 * 11))


def test_the_kept_patches_are_a_random_share_the_same_for_a_step() -> None:
    kept = kept_patches(196, drop=0.15, seed=0, step=5)
    assert len(kept) == math.floor(0.85 * 196)
    assert len(set(kept.tolist())) == len(kept)
    assert np.array_equal(kept, kept_patches(196, drop=0.15, seed=0, step=5))
    assert set(kept.tolist()) != set(kept_patches(196, drop=0.15, seed=0, step=6).tolist())
    assert set(kept.tolist()) != set(kept_patches(196, drop=0.15, seed=1, step=5).tolist())
    counts = np.zeros(16)
    for step in range(500):
        counts[kept_patches(16, drop=0.5, seed=0, step=step)] += 1
    assert counts == pytest.approx(np.full(16, 250), abs=60)


def test_patches_count_by_image_whatever_their_number() -> None:
    some = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.bool_)
    rows, weights = predicted(some)
    assert rows.tolist() == [0, 2, 8, 9, 10, 11]
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6] + [1 / 12] * 4)
    assert [len(part) for part in predicted(some & False)] == [0, 0]
