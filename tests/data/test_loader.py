"""The loader's promises: pure views, pure order, exact shares, no leaks, no silent end."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

from data_prep.schema import read_samples
from tests.data.conftest import NUM_IMAGES
from tests.data.pictures import picture
from trainer.data import multicrop
from trainer.data.kernel import Kernel
from trainer.data.loader import DataError, ViewLoader
from trainer.data.views import CenterView, View

VIEWS = [View(size=24, scale=(0.3, 1.0)), View(size=24, scale=(0.3, 1.0), solarize_prob=0.5),
         View(size=17, scale=(0.05, 0.3))]  # fmt: skip


@contextmanager
def opened(beton: Path, **options: Any) -> Iterator[ViewLoader]:
    loader = ViewLoader(beton, options.pop("views", VIEWS), **{"batch_size": 8, "seed": 5, **options})
    try:
        yield loader
    finally:
        loader.close()


def seen(loader: ViewLoader, epoch: int, start: int = 0) -> list[tuple[int, bytes]]:
    """(sample id, the bytes of all its views), in order."""
    result = []
    for batch in loader.epoch(epoch, start=start):
        for slot, sample_id in enumerate(batch.sample_ids.tolist()):
            result.append((sample_id, b"".join(run[:, slot].numpy().tobytes() for run in batch.views)))
    return result


def test_a_batch_has_the_promised_shapes_types_and_memory_layout(beton: Path) -> None:
    with opened(beton) as loader:
        batch = next(loader.epoch(0))
    assert [tuple(run.shape) for run in batch.views] == [(2, 8, 3, 24, 24), (1, 8, 3, 17, 17)]
    assert all(run.dtype == torch.uint8 for run in batch.views)
    assert all(run.permute(0, 1, 3, 4, 2).is_contiguous() for run in batch.views)
    assert batch.sample_ids.dtype == batch.labels.dtype == torch.int64
    assert (batch.labels == 10 * batch.sample_ids).all()
    assert (batch.num_bad, batch.params) == (0, None)
    assert (loader.num_samples, loader.num_batches) == (NUM_IMAGES, NUM_IMAGES // 8)


def test_views_and_order_are_the_same_on_any_number_of_ranks_threads_and_samples_a_batch(beton: Path) -> None:
    with opened(beton, drop_last=False) as loader:
        alone = dict(seen(loader, 3))
    shares = []
    for rank in range(2):
        with opened(beton, drop_last=False, batch_size=3, num_workers=4, rank=rank, world=2) as loader:
            shares.append(seen(loader, 3))
    assert not set(dict(shares[0])) & set(dict(shares[1]))
    assert {**dict(shares[0]), **dict(shares[1])} == alone
    assert len(alone) == NUM_IMAGES


def test_what_the_loader_yields_is_what_the_kernel_draws_and_renders(beton: Path) -> None:
    kernel = Kernel(VIEWS, seed=5)
    kernel.set_epoch(2)
    with opened(beton) as loader:
        batch = next(loader.epoch(2))
        sample_id = int(batch.sample_ids[3])
    ((_, data),) = read_samples(beton, [sample_id])
    width, height = 40 + 7 * (sample_id % 9), 30 + 5 * (sample_id % 7)
    views = kernel.render(data, kernel.draw([sample_id], [width], [height])[:, 0], size=(width, height))
    for ours, run in zip(views, batch.views, strict=True):
        assert (ours == run[:, 3].permute(0, 2, 3, 1).numpy()).all()


def test_epochs_and_seeds_differ_and_repeat(beton: Path) -> None:
    with opened(beton) as loader:
        first, second, again = seen(loader, 0), seen(loader, 1), seen(loader, 0)
    with opened(beton, seed=6) as loader:
        other = seen(loader, 0)
    assert first == again
    assert [i for i, _ in first] != [i for i, _ in second]
    assert not set(first) & set(second)
    assert not set(first) & set(other)


def test_an_epoch_resumed_anywhere_goes_on_bit_for_bit(beton: Path) -> None:
    with opened(beton, drop_last=False) as loader:
        straight = seen(loader, 4)
        for start in (8, 24, 37, NUM_IMAGES):
            assert seen(loader, 4, start=start) == straight[start:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once_whatever_the_sizes(beton: Path, world: int) -> None:
    ids: list[int] = []
    for rank in range(world):
        with opened(beton, views=[CenterView(size=16, resize=20)], batch_size=6, shuffle=False, drop_last=False,
                    rank=rank, world=world) as loader:  # fmt: skip
            mine = [i for i, _ in seen(loader, 0)]
            assert loader.num_batches == -(-len(mine) // 6)
        ids += mine
    assert sorted(ids) == list(range(NUM_IMAGES))


def test_a_subset_keeps_the_betons_sample_ids_and_views(beton: Path) -> None:
    with opened(beton, drop_last=False) as loader:
        everything = dict(seen(loader, 1))
    with opened(beton, subset=[3, 30, 7], batch_size=2, drop_last=False) as loader:
        assert loader.num_samples == 3
        assert dict(seen(loader, 1)) == {i: everything[i] for i in (3, 30, 7)}


def test_a_file_made_by_ffcvs_own_writer_raw_and_without_labels_works(tmp_path: Path) -> None:
    class Pictures:
        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return picture(50 + index, 40, seed=index), index

    fields = {"image": RGBImageField("raw"), "number": IntField()}
    DatasetWriter(str(tmp_path / "ffcv.beton"), fields, num_workers=1).from_indexed_dataset(Pictures())
    with opened(tmp_path / "ffcv.beton", views=[CenterView(size=40, resize=40)], batch_size=4, drop_last=False,
                shuffle=False) as loader:  # fmt: skip
        batches = [(run.views[0].clone(), run.labels.tolist()) for run in loader.epoch(0)]
    assert [labels for _, labels in batches] == [[-1] * 4, [-1] * 3]
    for index, view in enumerate(torch.cat([views[0] for views, _ in batches])):
        left = round((50 + index - 40) / 2)
        expected = picture(50 + index, 40, seed=index)[:, left : left + 40]
        assert (view.permute(1, 2, 0).numpy() == expected).all()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208  # the shortest way to count


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_leaving_an_epoch_early_leaks_neither_threads_nor_memory(beton: Path) -> None:
    with opened(beton, batch_size=4, num_workers=2) as loader:
        for attempt in range(50):
            for count, _ in enumerate(loader.epoch(attempt)):
                if count == attempt % 3:
                    break
            if attempt == 4:
                gc.collect()
                threads, python_threads, memory = num_threads(), threading.active_count(), resident_mib()
    gc.collect()
    assert num_threads() <= threads
    assert threading.active_count() <= python_threads
    assert resident_mib() < memory + 5


def test_memory_does_not_grow_over_epochs(beton: Path) -> None:
    with opened(beton, batch_size=4) as loader:
        for epoch in range(25):
            for _ in loader.epoch(epoch):
                pass
            if epoch == 4:
                gc.collect()
                before = resident_mib()
    gc.collect()
    assert resident_mib() < before + 5


def test_an_error_in_the_training_loop_ends_the_thread(beton: Path) -> None:
    with opened(beton) as loader:

        def train() -> None:
            for _ in loader.epoch(0):
                raise KeyError("training")

        with pytest.raises(KeyError):
            train()
        gc.collect()
        assert not any(isinstance(thread, multicrop.EpochThread) for thread in threading.enumerate())
        assert len(seen(loader, 0)) == 40


def test_starting_an_epoch_ends_the_one_before(beton: Path) -> None:
    with opened(beton) as loader:
        first = loader.epoch(0)
        next(first)
        expected = seen(loader, 1)
        assert sum(isinstance(thread, multicrop.EpochThread) for thread in threading.enumerate()) == 0
        assert seen(loader, 1) == expected


def test_torch_keeps_its_number_of_threads(beton: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with opened(beton) as loader:
            assert torch.get_num_threads() == 2
            for _ in loader.epoch(0):
                assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_ffcvs_thread_reaches_the_training_process(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(multicrop.EpochIterator, "run_pipeline", broken)
    with opened(beton) as loader, pytest.raises(DataError, match="the disk is gone"):
        next(loader.epoch(0))


def test_a_thread_that_hangs_is_reported_with_where_it_hangs(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    woken = threading.Event()

    def asleep(*_: Any) -> None:
        woken.wait(20)

    monkeypatch.setattr(multicrop.EpochIterator, "run_pipeline", asleep)
    with opened(beton, timeout_s=0.5) as loader:
        begin = time.monotonic()
        epoch = loader.epoch(0)
        threading.Timer(1.0, woken.set).start()
        with pytest.raises(DataError, match=r"no batch for 0.5 s(.|\n)*asleep"):
            next(epoch)
        assert time.monotonic() - begin < 15


def test_a_closed_loader_says_so(beton: Path) -> None:
    with opened(beton) as loader:
        pass
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader.epoch(0))


def test_a_batch_larger_than_the_data_is_refused_not_skipped(beton: Path) -> None:
    with pytest.raises(DataError, match="41 samples make no full batch of 64"), opened(beton, batch_size=32, world=2):
        pass


def test_a_subset_outside_the_file_is_refused(beton: Path) -> None:
    with pytest.raises(DataError, match="asks for sample 41, samples are 0 to 40"), opened(beton, subset=[3, 41]):
        pass
