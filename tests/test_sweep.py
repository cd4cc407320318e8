"""A sweep trains what its file says, compares fairly, and goes on where it stopped."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.launch import DEMO, TINY_MOCO
from tests.teachers.runs import DINO, IBOT_CNN, MSN_CNN, SWAV, write_run
from trainer.__main__ import main
from trainer.models.backbones import Backbone, build_backbone
from trainer.recipe import RecipeError
from trainer.sweep import planned_runs, read_sweep
from trainer.sweep_report import Outcome, markdown
from trainer.weights import save_backbone

SWEEPS = sorted((Path(__file__).parents[1] / "recipes/sweeps").glob("*.yaml"))
MINIATURE = SWEEPS[0].with_name("views_miniature.yaml")


SMALL = (
    "optim.global_batch=16", "method.hidden_dim=32",
    "backbone.args={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32], stem_width: 8}",
)  # fmt: skip


def data_of(folder: Path) -> list[str]:
    return [f"data.train={folder / 'train.beton'}", f"data.val={folder / 'val.beton'}"]


def outcome(case: str, seed: int, top1: float) -> Outcome:
    networks = {"student": top1, "untrained": 20.0, "pixels": 25.0}
    return Outcome(case=case, x=None, seed=seed, epochs=4, gmacs_per_image=0.5, top1={"knn": networks})


def write_sweep(folder: Path, **changes: object) -> Path:
    tree = {
        "question": "Does it matter?", "recipe": str(DEMO), "seeds": [0], "equal": "steps",
        "protocols": ["knn"],
        "cases": [{"name": "T 0.1", "set": {}}, {"name": "T 0.5", "set": {"method.temperature": 0.5}}],
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the studies of RoB learn from: earlier runs, and a network of others with 1,280 features."""
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "runs").mkdir()
    write_run(folder / "runs/dino_sslight", *DINO, "method.num_prototypes=256")
    write_run(folder / "runs/swav_sslight", *SWAV, "method.num_prototypes=128")
    write_run(folder / "runs/msn", *MSN_CNN, "method.num_prototypes=128")
    write_run(folder / "runs/ibot", *IBOT_CNN, "method.num_prototypes=256")
    spec = Backbone(name="mobilenetv2_035", init="timm")
    save_backbone(folder / "weights/teacher", build_backbone(spec), spec, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return folder


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_case_of_every_study_is_a_valid_recipe_of_its_own(
    path: Path, synthetic: Path, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_sweep(path)
    monkeypatch.chdir(teachers)
    special = ["method.queue_size=16"] if "moco" in str(plan.recipe) else []
    special += ["backbone.args.channels=[32, 32, 32, 32]"] if "gated" in path.stem else []  # a stem costs more
    of_no_method = [each for each in SMALL if not each.startswith("method.")]  # its cases are of different methods
    small = of_no_method if "regression" in path.stem else [*SMALL, *special]
    runs = planned_runs(plan, path, [*data_of(synthetic), *small], tmp_path)
    assert len(runs) == len(plan.cases) * len(plan.seeds)
    shaping = {str(run.recipe.plain() | {"run": None}) for run in runs}
    assert len(shaping) == len(runs), "two cases are the same training"
    assert f"recipes/sweeps/{path.name}" in path.read_text()


def test_equal_compute_gives_the_cheaper_case_more_epochs(synthetic: Path, tmp_path: Path) -> None:
    sizes = {"views.global_views.size": 56, "views.local_views.count": 4, "method.global_weight": 0.4}
    cases = [
        {"name": str(size), "set": {**sizes, "views.local_views.size": size, "method.local_weight": 0.6}}
        for size in (24, 32)
    ]
    path = write_sweep(tmp_path, cases=cases, equal="compute", recipe=str(DEMO.with_name("moco_demo.yaml")))
    runs = planned_runs(read_sweep(path), path, ["optim.epochs=40", *data_of(synthetic)], tmp_path)
    spent = [run.gmacs_per_image * run.recipe.optim.epochs for run in runs]
    assert runs[1].recipe.optim.epochs < runs[0].recipe.optim.epochs == 40
    assert spent[1] == pytest.approx(spent[0], rel=0.02)
    assert runs[1].gmacs_per_image > 1.1 * runs[0].gmacs_per_image


def test_the_miniature_study_compares_at_equal_steps_and_at_equal_compute(synthetic: Path, tmp_path: Path) -> None:
    baseline, same_steps, same_compute = planned_runs(
        read_sweep(MINIATURE), MINIATURE, [*data_of(synthetic), "seed=0"], tmp_path
    )[:3]
    assert baseline.recipe.optim.epochs == same_steps.recipe.optim.epochs
    spent = [run.gmacs_per_image * run.recipe.optim.epochs for run in (baseline, same_compute)]
    assert spent[1] == pytest.approx(spent[0], rel=0.02)


def test_a_sweep_trains_evaluates_tabulates_plots_and_does_nothing_twice(
    synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, out = write_sweep(tmp_path), tmp_path / "out"
    command = ["sweep", str(path), "--out", str(out), *TINY_MOCO, *data_of(synthetic)]
    assert main(command) == 0
    table = (out / "table.md").read_text()
    assert "| T 0.5 | 2 |" in table
    assert "| untrained |" in table
    assert len((out / "table.csv").read_text().splitlines()) == 1 + 2 * 4, "2 cases, 4 networks"
    with Image.open(out / "plot.png") as plot:
        assert plot.width > plot.height
    before = {file: file.stat().st_mtime_ns for file in out.glob("T_*/**/*") if file.is_file()}
    assert main(command) == 0
    assert caplog.text.count("done before") == 2
    assert {file: file.stat().st_mtime_ns for file in out.glob("T_*/**/*") if file.is_file()} == before


def test_a_run_that_fails_stops_the_sweep_and_says_where_to_look(
    synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_sweep(tmp_path)
    diverging = ["optim.base_lr=1e30", "optim.warmup_epochs=0", "--out", str(tmp_path / "out")]
    assert main(["sweep", str(path), *TINY_MOCO, *data_of(synthetic), *diverging]) == 1
    assert "ended with code" in caplog.text
    assert "T_0.1-seed0/console.log" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds must name at least one"),
        ({"equal": "time"}, "equal: Input should be 'steps' or 'compute'"),
        ({"case": []}, "case: Unexpected keyword argument"),
        ({"cases": [{"name": "a b", "set": {}}, {"name": "a_b", "set": {}}]}, "cases must have different names"),
    ],
)
def test_a_faulty_sweep_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_sweep(write_sweep(tmp_path, **changes))


def test_a_sweep_without_val_images_is_refused_before_anything_runs(synthetic: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    with pytest.raises(RecipeError, match=r"give labelled images as data\.val"):
        planned_runs(read_sweep(path), path, data_of(synthetic)[:1], tmp_path / "out")


def test_a_case_of_an_unknown_key_is_refused_before_anything_runs(synthetic: Path, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, cases=[{"name": "a", "set": {"method.temprature": 1}}])
    with pytest.raises(RecipeError, match="did you mean temperature"):
        planned_runs(read_sweep(path), path, data_of(synthetic), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_case_whose_gates_cannot_meet_their_target_is_named_before_anything_runs(
    synthetic: Path, tmp_path: Path
) -> None:
    gates = {"backbone.gates": {"target": 0.001}}
    path = write_sweep(tmp_path, cases=[{"name": "thin", "set": gates}])
    with pytest.raises(RecipeError, match=r"case thin: backbone\.gates\.target is 0\.001, and views of"):
        planned_runs(read_sweep(path), path, data_of(synthetic), tmp_path / "out")


@pytest.mark.parametrize(
    ("ours", "cell"),
    [([41.0, 43.0], "+1.50 (standard error 0.50)"), ([39.5, 41.5], "+0.00 (standard error 0.50)")],
)
def test_cases_are_compared_seed_by_seed(ours: Sequence[float], cell: str) -> None:
    """The first case's seeds gave 40 and 41; its spread over seeds is no part of the difference's error."""
    first = [outcome("baseline", seed, top1) for seed, top1 in enumerate([40.0, 41.0])]
    second = [outcome("other", seed, top1) for seed, top1 in enumerate(ours)]
    table = markdown("?", "steps", first + second)
    assert "| baseline | 4 | 0.500 | 40.50 ± 0.71 |" in table
    assert f"| {cell} |" in table
    assert "| pixels |  |  | 25.00 ± 0.00 |" in table
