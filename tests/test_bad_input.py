"""Whatever is wrong ends in one clear message, a code other than 0 on every rank, and nothing half-written."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.schema import read_samples, sample_names
from tests.launch import DEMO, TINY_MOCO, launcher, metrics, run
from trainer.__main__ import main as trainer


def pretrain(data: Path, run_dir: Path, *overrides: str, recipe: Path = DEMO) -> int:
    """The command in this process, one rank."""
    paths = (f"data.train={data / 'train.beton'}", f"run.dir={run_dir}", "evals.knn.every_epochs=0", "optim.epochs=1")
    warmup = "optim.warmup_epochs=0"
    return trainer(["pretrain", str(recipe), *TINY_MOCO, *paths, warmup, *overrides])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    """What the trainer logged as errors, filled while the test runs."""

    class Errors(list[str]):
        def __getitem__(self, index: int) -> str:  # type: ignore[override]
            return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"][index]

    return Errors()


def test_an_unknown_key_ends_every_rank_of_a_launch_with_one_message(synthetic: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    command = [*launcher("deepspeed"), "pretrain", str(DEMO), f"data.train={synthetic / 'train.beton'}"]
    output = run([*command, f"run.dir={tmp_path / 'run'}", "optim.global_bach=8"], code=2, timeout_s=200)
    assert output.count("optim.global_bach: unknown key; did you mean global_batch?") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 150


def test_a_batch_that_the_ranks_do_not_divide_ends_every_rank_with_one_message(synthetic: Path, tmp_path: Path) -> None:
    paths = (f"data.train={synthetic / 'train.beton'}", f"run.dir={tmp_path / 'run'}")
    overrides = (*TINY_MOCO, "optim.global_batch=15", "method.queue_size=60")
    output = run([*launcher("torchrun"), "pretrain", str(DEMO), *overrides, *paths], code=1, timeout_s=200)
    assert output.count("optim.global_batch 15 cannot be shared by 2 ranks x 1 accumulation steps") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "beton"),
        (lambda path: path.write_bytes(b"no beton at all" * 100), "beton"),
        (lambda path: path.mkdir(), "beton"),
    ],
    ids=["missing", "empty", "other", "folder"],
)
def test_a_file_that_is_no_beton_is_refused(tmp_path: Path, said: Sequence[str], make: object, wanted: str) -> None:
    make(tmp_path / "train.beton")  # type: ignore[operator]
    assert pretrain(tmp_path, tmp_path / "run") == 2
    assert str(tmp_path / "train.beton") in said[0]
    assert wanted in said[0].lower()


def test_a_beton_of_another_schema_is_refused(synthetic: Path, tmp_path: Path, said: Sequence[str]) -> None:
    for name in ("train.beton", "train.beton.json"):
        (tmp_path / name).write_bytes((synthetic / name).read_bytes())
    manifest = json.loads((tmp_path / "train.beton.json").read_text())
    (key,) = [key for key in manifest if "schema" in key]
    (tmp_path / "train.beton.json").write_text(json.dumps(manifest | {key: 99}))
    assert pretrain(tmp_path, tmp_path / "run") == 2
    assert "99" in said[0]


def test_less_data_than_one_batch_is_refused(synthetic: Path, tmp_path: Path, said: Sequence[str]) -> None:
    assert pretrain(synthetic, tmp_path / "run", "optim.global_batch=128", "method.queue_size=128") == 2
    assert "less than one global batch of 128" in said[0]
    assert "128" in said[0]


def test_a_subset_trains_on_what_it_lists_and_an_unknown_name_is_refused(
    synthetic: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(sample_names(synthetic / "train.beton")[::2]))
    assert pretrain(synthetic, tmp_path / "run", f"data.subset={tmp_path / 'list.txt'}") == 0
    assert len(metrics(tmp_path / "run")) == 48 // 16
    (tmp_path / "list.txt").write_text("nobody.jpg\n")
    assert pretrain(synthetic, tmp_path / "run2", f"data.subset={tmp_path / 'list.txt'}") == 2
    assert "1 of 1 names are not there (nobody.jpg)" in said[0]
    assert not (tmp_path / "run2").exists()


def test_a_probe_without_labels_is_refused(synthetic: Path, tmp_path: Path, said: Sequence[str]) -> None:
    (tmp_path / "flat").mkdir()
    for index, image in enumerate(sorted((synthetic / "images/train").rglob("*.jpg"))):
        shutil.copy(image, tmp_path / f"flat/{index}.jpg")
    assert data_prep(["convert", str(tmp_path / "flat"), str(tmp_path / "train.beton")]) == 0
    assert pretrain(tmp_path, tmp_path / "run", "probe=true") == 2
    assert f"{tmp_path / 'train.beton'} has images without a label" in said[0]
    assert "set probe=false" in said[0]
    assert pretrain(tmp_path, tmp_path / "run") == 0, "without a probe they are welcome"


def test_another_recipes_run_directory_is_refused_with_the_difference(
    synthetic: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    assert pretrain(synthetic, tmp_path / "run") == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert pretrain(synthetic, tmp_path / "run", "method.temperature=0.5") == 2
    assert said[0].splitlines()[1:] == ["-   temperature: 0.1", "+   temperature: 0.5"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_what_changes_no_weight_may_differ_when_a_run_continues(synthetic: Path, tmp_path: Path) -> None:
    assert pretrain(synthetic, tmp_path / "run") == 0
    assert pretrain(synthetic, tmp_path / "run", "run.log_every_steps=3", "data.num_workers=2") == 0


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half_epochs = "run.checkpoint_every_epochs=0.5"
    assert pretrain(synthetic, tmp_path / "run", half_epochs) == 0
    file = tmp_path / "run/checkpoints/step_0000006/rank_00000.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert pretrain(synthetic, tmp_path / "run", half_epochs) == 0
    assert "step_0000006 is damaged" in caplog.text
    assert "continuing after step 3" in caplog.text


def test_a_checkpoint_of_deepspeeds_shards_is_refused_with_what_to_do(
    synthetic: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    assert pretrain(synthetic, tmp_path / "run") == 0
    manifest = tmp_path / "run/checkpoints/step_0000006/manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in facts.items() if key != "format"}))
    assert pretrain(synthetic, tmp_path / "run") == 1
    assert "is of format 1 and this version reads format 2" in said[0]
    assert "give another run.dir" in said[0]


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_keeps_it(
    synthetic: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    assert pretrain(synthetic, tmp_path / "run", "optim.base_lr=1.0e+30", "optim.final_lr=1.0e+30") == 1
    assert "not finite" in said[0]
    assert "base_lr" in said[0]
    assert not list((tmp_path / "run/checkpoints").glob("*/manifest.json"))


def test_a_network_that_does_not_take_the_local_views_is_refused_before_anything_is_written(
    synthetic: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    vit = ("backbone.name=vit_tiny_patch16_224", "backbone.args={img_size: 32}", "views.local_views.size=16")
    assert pretrain(synthetic, tmp_path / "run", *vit) == 2
    assert "does not take views of 16 px" in said[0]
    assert "backbone.args.dynamic_img_size=true" in said[0]
    assert not (tmp_path / "run").exists()


def test_evaluating_what_is_no_run_is_refused(tmp_path: Path, said: Sequence[str]) -> None:
    assert trainer(["evaluate", str(tmp_path), "--protocol", "knn"]) == 2
    assert f"{tmp_path}: no resolved.yaml" in said[0]


def test_an_argument_that_is_no_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        trainer(["pretrain", str(DEMO), "--epochs", "3"])
    assert left.value.code == 2
    assert "key.sub=value" in capsys.readouterr().err


def test_a_missing_or_empty_folder_is_refused_by_the_converter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("missing", "empty"):
        assert data_prep(["convert", str(tmp_path / folder), str(tmp_path / "out.beton")]) == 2
        assert str(tmp_path / folder) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture(scope="module")
def damaged(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic train.beton with one image's bytes overwritten after the conversion."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in synthetic.glob("train.beton*"):
        (folder / path.name).write_bytes(path.read_bytes())
    content = bytearray((folder / "train.beton").read_bytes())
    _, jpeg = next(iter(read_samples(folder / "train.beton", [5])))
    where = content.find(jpeg)
    content[where : where + len(jpeg)] = b"\x00" * len(jpeg)
    (folder / "train.beton").write_bytes(content)
    return folder


def test_an_image_that_does_not_decode_ends_the_run_by_its_name(
    damaged: Path, tmp_path: Path, said: Sequence[str]
) -> None:
    assert pretrain(damaged, tmp_path / "run") == 1
    assert sample_names(damaged / "train.beton")[5] in said[0]
    assert not (tmp_path / "run/finished").exists()


def test_an_image_that_does_not_decode_is_replaced_and_counted_if_the_recipe_says_so(
    damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert pretrain(damaged, tmp_path / "run", "data.on_bad_image=replace") == 0
    assert sample_names(damaged / "train.beton")[5] in caplog.text
    assert sum(record["bad_images_per_batch"] for record in metrics(tmp_path / "run")) == 1
