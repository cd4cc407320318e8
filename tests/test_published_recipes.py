"""The twelve published rows: what distinguishes them, what they show, and that each of them trains and resumes."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch import losses
from tests.spawn import run_ranks
from trainer.__main__ import main
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
ROWS = sorted(path for path in RECIPES.glob("*.yaml") if path.stem.endswith(("_baseline", "_sslight")))
PAIRS = sorted({path.stem.rsplit("_", 1)[0] for path in ROWS})


def load(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", ["data.train=train.beton", "run.dir=x"])


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, branch in tree.items() for key, value in leaves(branch, f"{path}.{name}").items()}


def test_there_are_the_twelve_rows_of_the_table() -> None:
    cnns = {f"dino_{network}" for network in ("resnet18", "resnet34", "mobilenetv2")}
    assert set(PAIRS) == cnns | {"dino_vit_tiny", "moco_mobilenetv2", "swav_mobilenetv2"}
    assert len(ROWS) == 12


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_differs_in_exactly_the_four_published_keys(pair: str) -> None:
    trees = [leaves(load(f"{pair}_{views}").plain()) for views in ("baseline", "sslight")]
    differing = {key: (trees[0][key], trees[1][key]) for key in trees[0] if trees[0][key] != trees[1][key]}
    split, weights = (0.25, (0.090909, 0.909091)) if "vit" in pair else (0.14, (0.142857, 0.857143))
    assert differing == {
        ".views.global_views.scale": ([split, 1.0], [0.3, 1.0]),
        ".views.local_views.scale": ([0.05, split], [0.05, 0.3]),
        ".views.local_views.size": (96, 128),
        ".method.global_weight": (weights[0], 0.4),  # the two weights are one published key, LAMBDAS
        ".method.local_weight": (weights[1], 0.6),
    }


LR_AT_62550 = {"dino": 1.7180809518, "moco": 1.7180809518, "swav": 1.0739903684, "vit": 0.00179019481}


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_the_optimisation_and_the_photometric_changes_are_the_published_ones(path: Path) -> None:
    recipe = load(path.stem)
    is_vit, is_swav = "vit" in path.stem, recipe.method.name == "swav"
    schedules = recipe.schedules(steps_per_epoch=1_281_167 // recipe.optim.global_batch)
    assert schedules.num_steps == 250_200
    at = schedules.at(62_550)
    assert at.lr == pytest.approx(LR_AT_62550["vit" if is_vit else recipe.method.name], rel=1e-8)
    assert at.weight_decay == pytest.approx(0.0927207794 if is_vit else 1e-6, rel=1e-8)
    assert schedules.at(0).lr == (0.075 if is_swav else 0)
    if recipe.method.name == "dino":
        assert schedules.at(125_100).momentum == pytest.approx(0.998)
    if recipe.method.name == "moco":
        assert {schedules.at(step).momentum for step in (0, 1000, 250_199)} == {0.999}
    num_locals = 10 if is_vit else 6
    assert recipe.views.counts == (2, num_locals)
    blur = [0.5, 0.5] if is_swav else [1.0, 0.1]
    assert [view.blur_prob for view in recipe.views.each()] == blur + [0.5] * num_locals
    assert [view.solarize_prob for view in recipe.views.each()][:2] == ([0.0, 0.0] if is_swav else [0.0, 0.2])
    strengths = {(v.brightness, v.contrast, v.saturation, v.hue) for v in recipe.views.each()}
    assert strengths == {(0.8, 0.8, 0.8, 0.2) if is_swav else (0.4, 0.4, 0.2, 0.1)}


SHOWN = {
    "dino_mobilenetv2": ("2,223,872", "8,405,248", "11,906,024", "22,539,240", "1.718080952"),
    "dino_resnet18": ("11,176,512", "6,832,384", "18,517,800", "36,530,792", "1.718080952"),
    "dino_resnet34": ("21,284,672", "6,832,384", "28,625,960", "56,747,112", "1.718080952"),
    "dino_vit_tiny": ("5,524,416", "21,958,912", "27,676,328", "55,159,656", "0.00179019480"),
    "swav_mobilenetv2": ("2,223,872", "5,779,584", "9,668,456", "9,668,456", "1.073990368"),
    "moco_mobilenetv2": ("2,223,872", "2,885,760", "6,390,632", "11,500,264", "1.718080952"),
}
"""Published: backbone, head, trained and all parameters, the learning rate at epoch 50."""


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_show_prints_the_published_figures(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(path)]) == 0
    output = capsys.readouterr().out
    for figure in (*SHOWN[path.stem.rsplit("_", 1)[0]], "250,200 steps, 1,251 an epoch"):
        assert figure in output, figure
    assert "one image" in output


SMALL = (
    "optim.global_batch=16", "optim.epochs=2", "optim.warmup_epochs=0", "views.global_views.size=32",
    "views.local_views.size=16", "data.num_workers=1", "run.log_every_steps=1", "run.tensorboard=false",
    "evals.knn.every_epochs=0", "evals.probe.every_epochs=0",
)  # fmt: skip
"""Views and batch that a CPU can take; everything else stays as published."""


def train_twice(data: Path, out: Path) -> None:
    """On one rank: each recipe's two epochs; then the second one again, from the checkpoint between them."""
    import shutil

    from trainer import distributed
    from trainer.loop import pretrain

    for path in ROWS:
        run_dir = out / path.stem
        paths = (f"data.train={data / 'train.beton'}", f"data.subset={data / 'few.txt'}", f"run.dir={run_dir}")
        recipe = load_recipe(path, [*SMALL, *paths])
        pretrain(recipe, path, None)
        distributed.barrier()
        if distributed.is_main():
            straight = (run_dir / "metrics.jsonl").read_text()
            (out / f"{path.stem}.straight").write_text(straight)
            (run_dir / "metrics.jsonl").write_text(straight.replace('"loss":', '"was_loss":', 1))
            shutil.rmtree(run_dir / "checkpoints/step_0000004")
            (run_dir / "finished").unlink()
        distributed.barrier()
        pretrain(recipe, path, None)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(run_dir / "checkpoints")


@pytest.fixture(scope="module")
def runs(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run a recipe, on two ranks, and beside each the metrics of its first, straight run."""
    from data_prep.schema import sample_names

    out = tmp_path_factory.mktemp("published")
    (synthetic / "few.txt").write_text("\n".join(sample_names(synthetic / "train.beton")[::3]))
    run_ranks(train_twice, synthetic, out, timeout_s=1800)
    return out


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_every_row_trains_on_two_ranks_and_resumes_to_the_bit(path: Path, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text((runs / f"{path.stem}.straight").read_text())
    straight, resumed = losses(tmp_path), losses(runs / path.stem)
    assert list(straight) == [0, 1, 2, 3]
    assert all(abs(value) < 100 for value in straight.values()), straight
    assert resumed == {step: straight[step] for step in (1, 2, 3)}, "step 0 was not trained again"
