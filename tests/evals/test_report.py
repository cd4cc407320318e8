"""One table of many runs: seeds meet in a row, and numbers that are unlike never meet in a column."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.__main__ import main as trainer
from trainer.report import ReportError, report

RECIPE = {"method": {"name": "dino"}, "backbone": {"name": "resnet18"}}


def run(
    folder: Path, protocol: str, results: dict[str, dict[str, float]], *, seed: int = 0, k: int = 20, sha: str = "ab",
    recipe: dict[str, Any] | None = RECIPE, on: str = "train", step: int | None = 100, file: str | None = None,
) -> Path:  # fmt: skip
    (folder / "evals").mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        (folder / "resolved.yaml").write_text(yaml.safe_dump({"seed": seed, **recipe}))
    data = {"train": {"path": f"{on}.beton", "bytes": 1, "sha256": sha or None}}
    tree = {"protocol": protocol, "seed": seed, "settings": {"k": k}, "data": data, "results": results}
    tree["step"] = step
    file = file or f"{protocol}-{Path(on).name}-{sha or Path(on).parent.name}-0000100"
    (folder / f"evals/{file}.json").write_text(json.dumps(tree))
    return folder


def top1(value: float) -> dict[str, dict[str, float]]:
    return {"student": {"top1": value, "num_images": 10}}


def test_seeds_of_one_training_share_a_row_with_their_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run(tmp_path / f"dino-seed{seed}", "knn", top1(40 + 2 * seed), seed=seed) for seed in range(3)]
    report(runs, tmp_path / "out/table.md")
    said = capsys.readouterr().out
    assert "| dino | student | 42.00 ± 2.00 (3 seeds) |" in said
    assert (tmp_path / "out/table.md").read_text() in said
    numbers = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert [row["value"] for row in numbers if row["measure"] == "top1"] == ["40", "42", "44"]
    assert r"42.00 $\pm$ 2.00 (3 seeds) \\" in (tmp_path / "out/table.tex").read_text()


def test_published_figures_stand_beside_and_not_in_a_column_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report([run(tmp_path / "a", "linear", top1(50))], tmp_path / "table.md")
    ours, published = capsys.readouterr().out.split("Published")
    assert "| a | student | 50.00 |" in ours
    assert "65.7" not in ours
    assert "| dino | resnet18 | SSLight | linear | 65.7 |" in published


def test_one_protocol_run_in_two_ways_is_refused(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", "knn", top1(40)), run(tmp_path / "b", "knn", top1(41), k=5)]
    with pytest.raises(ReportError, match=r"settings\.k is 20 and 5"):
        report(runs, tmp_path / "table.md")
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("hashes", "names"),
    [
        (("ab", "cd"), ("train (ab)", "train (cd)")),
        (("", ""), ("train (/data/x/train.beton of 1 bytes)", "train (/data/y/train.beton of 1 bytes)")),
    ],
    ids=["hashed", "without hashes"],
)
def test_data_sets_of_one_name_stand_in_columns_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hashes: tuple[str, str], names: tuple[str, str]
) -> None:
    folder = run(tmp_path / "a", "knn", top1(40), on="/data/x/train", sha=hashes[0])
    run(folder, "knn", top1(60), on="/data/y/train", sha=hashes[1])
    report([folder], tmp_path / "table.md")
    said = capsys.readouterr().out
    assert f"| run | network | knn {names[0]} | knn {names[1]} |" in said
    assert "| a | student | 40.00 | 60.00 |" in said
    numbers = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert {row["data"]: row["value"] for row in numbers if row["measure"] == "top1"} == dict(
        zip(names, ("40", "60"), strict=True)
    )


def test_the_newest_of_two_results_on_one_file_is_shown_whatever_path_named_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", "knn", top1(40), on="/data/train", step=100, file="knn-train-1a2b3c-0000100")
    run(folder, "knn", top1(60), step=9000, file="knn-0009000")
    report([folder], tmp_path / "table.md")
    assert "| a | student | 60.00 |" in capsys.readouterr().out


def test_weights_of_one_name_keep_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        run(tmp_path / name / "student", "knn", top1(value), recipe=None, step=None)
        for name, value in (("A", 30), ("B", 60))
    ]
    report(folders, tmp_path / "table.md")
    said = capsys.readouterr().out
    for folder, value in zip(folders, ("30.00", "60.00"), strict=True):
        assert f"| {folder} | student | {value} |" in said


@pytest.mark.parametrize(
    ("other", "said"),
    [({"seed": 1, "step": 900}, "of step 100 and .* of step 900"), ({"seed": 0}, "are both of seed 0")],
    ids=["steps", "seed"],
)
def test_only_other_seeds_of_as_many_steps_are_averaged(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    runs = [
        run(tmp_path / "one/a-seed2", "knn", top1(50), seed=2),
        run(tmp_path / "one/a-seed0", "knn", top1(40)),
        run(tmp_path / f"two/a-seed{other['seed']}", "knn", top1(60), **other),
    ]
    with pytest.raises(ReportError, match=said):
        report(runs, tmp_path / "table.md")


def test_one_run_named_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", "knn", top1(40))
    report([folder, folder, folder / "../a"], tmp_path / "table.md")
    assert "| a | student | 40.00 |" in capsys.readouterr().out


def test_a_row_of_different_steps_says_so_and_one_of_different_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", "knn", top1(40))
    run(folder, "linear", top1(60), step=900)
    report([folder], tmp_path / "table.md")
    assert "- a, after how many steps: knn on train 100, linear on train 900" in capsys.readouterr().out
    run(folder, "linear", {"student": {"top1": 60, "origin": "sha256:1"}})  # type: ignore[dict-item]
    with pytest.raises(ReportError, match="different weights of student"):
        report([folder], tmp_path / "table.md")


def test_a_protocol_on_two_data_sets_after_different_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", "knn", top1(40), on="caltech")
    run(folder, "knn", top1(60), on="scenes", sha="cd", step=900)
    report([folder], tmp_path / "table.md")
    assert "- a, after how many steps: knn on caltech 100, knn on scenes 900" in capsys.readouterr().out


def test_different_trainings_are_not_averaged_as_seeds(tmp_path: Path) -> None:
    longer = RECIPE | {"optim": {"epochs": 9}}
    runs = [
        run(tmp_path / "a-seed0", "knn", top1(40)),
        run(tmp_path / "a-seed1", "knn", top1(41), seed=1, recipe=longer),
    ]
    with pytest.raises(ReportError, match="optim"):
        report(runs, tmp_path / "table.md")


def test_each_protocol_shows_the_measure_that_it_is_known_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a", "segmentation", {"student": {"box_AP": 3.0, "mask_AP": 2.5}})
    run(folder, "lowshot", {"student": {"top1_1": 10.0, "top1_1_std": 0.5, "top1_5": 20.0, "top1_5_std": 0.25}})
    run(folder, "knn", {"untrained": {"top1": 1.0}, **top1(40)})
    report([folder], tmp_path / "table.md")
    said = capsys.readouterr().out
    assert "| run | network | knn | lowshot top1_1 | lowshot top1_5 | segmentation mask_AP |" in said
    assert "| a | student | 40.00 | 10.00 ± 0.50 | 20.00 ± 0.25 | 2.50 |" in said
    assert "| a | untrained | 1.00 |  |  |  |" in said


def test_results_on_two_data_sets_stand_in_two_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", "transfer", top1(40), on="caltech")
    run(folder, "transfer", top1(60), on="scenes", sha="cd")
    report([folder], tmp_path / "table.md")
    said = capsys.readouterr().out
    assert "| run | network | transfer caltech | transfer scenes |" in said
    assert "| a | student | 40.00 | 60.00 |" in said


def test_a_folder_without_evaluations_is_refused_by_the_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("ERROR", logger="trainer"):
        assert trainer(["report", str(tmp_path), "--out", str(tmp_path / "table.md")]) == 2
    assert "run `trainer evaluate" in caplog.text
