"""The cache of a teacher's outputs: the same training without the teacher's work, or no cache at all."""

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.launch import DEMO, losses
from tests.spawn import run_ranks
from tests.teachers.runs import DINO, recipe_of, write_run
from tests.teachers.test_frozen import frozen
from trainer.assemble import build_method
from trainer.data.loader import ViewLoader
from trainer.data.views import View
from trainer.methods.frozen import FrozenTeacher
from trainer.recipe import Recipe, RecipeError
from trainer.show import show
from trainer.teachers.build import build_frozen
from trainer.teachers.cache import FOLDER, ROWS, SUMS, EmbeddingCache, create_files, num_bytes, open_cache

IDS = np.array([7, 3, 11, 5])
CACHED = "cache_epochs: 1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    write_run(run_dir, *DINO)
    return run_dir


def recipe_with(source: Path, out: Path, *overrides: str) -> Recipe:
    return recipe_of(*DINO, frozen(f"run:{source}", "cache_epochs: 2"), "optim.epochs=5", f"run.dir={out}", *overrides)


def opened(recipe: Recipe) -> tuple[EmbeddingCache, FrozenTeacher]:
    teacher = build_frozen(recipe)
    cache = open_cache(recipe, build_method(recipe), teacher, IDS)
    assert cache is not None
    return cache, teacher


def test_what_was_written_is_read_for_the_same_images_of_the_same_epoch_alone(source: Path, tmp_path: Path) -> None:
    cache, _ = opened(recipe_with(source, tmp_path))
    first, second = torch.randn(2, 2, 16), torch.randn(2, 2, 16)  # (T, B, D)
    cache.write(0, torch.tensor([3, 11]), first.flatten(0, 1))
    cache.write(1, torch.tensor([3, 11]), second.flatten(0, 1))
    assert torch.equal(cache.read(0, torch.tensor([3, 11])), first.flatten(0, 1))
    assert torch.equal(cache.read(0, torch.tensor([11, 3])), first.flip(1).flatten(0, 1)), "in any order"
    assert torch.equal(cache.read(1, torch.tensor([11])), second[:, 1])
    assert cache.read(0, torch.tensor([3, 5])) is None, "5 was never written"
    again, _ = opened(recipe_with(source, tmp_path))
    assert torch.equal(again.read(1, torch.tensor([11])), second[:, 1]), "a resumed run finds it"


def test_patches_are_kept_with_their_class_token(tmp_path: Path) -> None:
    create_files(tmp_path, epochs=1, num_samples=4, shape=(2, 3, 5))
    cache = EmbeddingCache(tmp_path, epochs=1, sample_ids=IDS, shape=(2, 3, 5))
    tokens = torch.randn(2, 4, 3, 5)  # (T, B, 1 + N, D)
    cache.write(0, torch.from_numpy(IDS), tokens.flatten(0, 1))
    assert torch.equal(cache.read(0, torch.tensor([11, 7])), tokens[:, [2, 0]].flatten(0, 1))


def test_a_row_that_was_half_written_does_not_count(source: Path, tmp_path: Path) -> None:
    cache, _ = opened(recipe_with(source, tmp_path))
    cache.write(0, torch.tensor([3]), torch.randn(2, 16))
    assert cache.read(0, torch.tensor([3])) is not None
    cache._rows[0, 0, 31] += 1
    assert cache.read(0, torch.tensor([3])) is None


def test_another_teacher_or_other_views_find_an_empty_cache(source: Path, tmp_path: Path) -> None:
    for change in ("teacher.branch=student", "views.global_views.scale=[0.2, 1.0]", "seed=1"):
        cache, _ = opened(recipe_with(source, tmp_path))
        cache.write(0, torch.tensor([3]), torch.randn(2, 16))
        other, _ = opened(recipe_with(source, tmp_path, change))
        assert other.read(0, torch.tensor([3])) is None, change


def test_the_size_that_is_stated_is_the_size_on_the_disk(source: Path, tmp_path: Path) -> None:
    opened(recipe_with(source, tmp_path))
    on_disk = [(tmp_path / FOLDER / name).stat().st_blocks * 512 for name in (ROWS, SUMS)]
    stated = num_bytes(2, 4, (2, 16))
    assert stated == 2 * 4 * (2 * 16 * 4 + 4) == sum((tmp_path / FOLDER / name).stat().st_size for name in (ROWS, SUMS))
    assert sum(on_disk) >= stated, "room is reserved, not promised"


def test_a_cache_without_room_is_refused_with_its_size(source: Path, tmp_path: Path) -> None:
    recipe = recipe_with(source, tmp_path, "optim.epochs=2000000000000", "teacher.cache_epochs=1000000000000")
    with pytest.raises(RecipeError, match=r"takes 5.28e\+05 GB in .*, and .* GB are free; lower cache_epochs"):
        opened(recipe)
    assert not (tmp_path / FOLDER).exists()


def test_a_cache_that_is_never_read_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.cache_epochs 5 must be below optim\.epochs 5, or nothing is read"):
        recipe_with(source, tmp_path, "teacher.cache_epochs=5")


def test_an_epoch_shows_the_views_of_another_in_its_own_order(synthetic: Path) -> None:
    loader = ViewLoader(synthetic / "train.beton", [View(size=16, scale=(0.2, 1.0))], batch_size=96, num_workers=1)

    def by_id(epoch: int, view_epoch: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        (batch,) = [(b.views[0][0].clone(), b.sample_ids) for b in loader.epoch(epoch, view_epoch=view_epoch)]
        return batch[0][batch[1].argsort()], batch[1]

    (own, order), (shown, order_too), (plain, other) = by_id(1, None), by_id(4, 1), by_id(4, None)
    loader.close()
    assert torch.equal(own, shown)
    assert torch.equal(order_too, other)
    assert not torch.equal(order, other)
    assert not torch.equal(own, plain)


def train_with_a_cache(data: Path, source: Path, out: Path) -> None:
    """On one rank of two: 3 epochs with the first's views, then the last two in copies of the run, as after a pause."""
    from trainer import distributed
    from trainer.loop import pretrain

    def train(name: str, *overrides: str) -> None:
        paths = [f"data.train={data / 'train.beton'}", f"run.dir={out / name}", "run.keep_checkpoints=9"]
        settings = ("optim.epochs=3", "evals.knn.every_epochs=0", "method.pairing=same_view")
        pretrain(recipe_of(*DINO, frozen(f"run:{source}", *overrides), *settings, *paths), DEMO, None)

    train("plain")
    train("straight", CACHED)
    if distributed.is_main():
        for name in ("kept", "lost", "false"):
            shutil.copytree(out / "straight", out / name)
            for checkpoint in ("step_0000012", "step_0000018"):
                shutil.rmtree(out / name / "checkpoints" / checkpoint)
        shutil.rmtree(out / "lost" / FOLDER)
        falsify(out / "false" / FOLDER)
    distributed.barrier()
    for name in ("kept", "lost", "false"):
        train(name, CACHED)


def falsify(folder: Path) -> None:
    """Other rows, each with its right checksum."""
    rows, sums = np.fromfile(folder / ROWS, np.float32).reshape(96, -1), np.empty(96, np.uint32)
    rows[:] = rows[::-1].copy()
    sums[:] = [zlib.crc32(row) for row in rows]
    rows.tofile(folder / ROWS)
    sums.tofile(folder / SUMS)


@pytest.fixture(scope="module")
def runs(synthetic: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached")
    run_ranks(train_with_a_cache, synthetic, source, out, timeout_s=500)
    return out


def test_training_from_the_cache_is_training_with_the_teacher_but_for_rounding(runs: Path) -> None:
    cached, computed = losses(runs / "straight"), losses(runs / "lost")
    assert list(cached) == list(computed) == list(range(18))
    assert list(cached.values()) == pytest.approx(list(computed.values()), rel=1e-4)
    assert list(losses(runs / "plain").values())[:6] == list(cached.values())[:6], "the first epoch is everybody's"
    assert list(losses(runs / "plain").values())[6:] != pytest.approx(list(cached.values())[6:], rel=1e-4)


def test_a_resumed_run_reads_the_cache_and_is_the_same_to_the_bit(runs: Path) -> None:
    assert losses(runs / "kept") == losses(runs / "straight")
    wrong, right = (list(losses(runs / name).values()) for name in ("false", "straight"))
    assert wrong[:6] == right[:6]
    assert wrong[6:] != pytest.approx(right[6:], rel=1e-3), "the cache was not read"


def test_show_says_how_large_the_cache_will_be(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(DEMO, [*DINO, frozen(f"run:{source}", CACHED)], out=None, num_images=1)
    words = " ".join(capsys.readouterr().out.split())
    assert "teacher cache: 0.169 GB: 1 epochs of 1,281,167 images, 2 x 16 numbers each in fp32" in words
