"""Recipes: the published values are in them, and whatever is wrong with one is said at once and by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.protocols import EVALS
from trainer.recipe import Recipe, RecipeError, what_shapes_training
from trainer.recipe_file import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
DEMO = RECIPES / "smoke/moco_demo.yaml"
DATA = "data.train=train.beton"
EVERY = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "sweeps")


def fault_of(*overrides: str, recipe: Path = DEMO) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [DATA, *overrides])
    return str(caught.value)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, branch in tree.items() for key, value in leaves(branch, f"{path}.{name}").items()}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_claims(path: Path) -> None:
    load_recipe(path, [DATA])
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Claim:" in line for line in header)
    assert any("--module trainer pretrain" in line and path.name in line for line in header)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_recipe_is_complete_but_for_its_paths(path: Path) -> None:
    """No default fills in what shapes a training; a reader sees all of it in the file."""
    resolved = leaves(load_recipe(path, [DATA]).plain())
    given_keys = set(leaves(yaml.safe_load(path.read_text())))
    silent = {key for key in resolved if not any(k.startswith(key) or key.startswith(k) for k in given_keys)}
    optional = {".data.train", ".data.val", ".data.subset", ".run.dir", ".backbone.args", ".optim.sgd_momentum"}
    protocols = tuple(
        f".evals.{name}" for name in (*EVALS, "bf16") if name != "knn"
    )  # of a finished network: they shape no training
    assert {key for key in silent if not key.endswith(".ratio") and not key.startswith(protocols)} <= optional


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.temprature=1", "method.temprature: unknown key; did you mean temperature?"),
        ("optm.epochs=1", "optm: unknown key; did you mean optim?"),
        ("backbone.name=resnet19", "backbone.name must be a timm model, got 'resnet19'"),
        ("teacher.momentum=1.5", "teacher.momentum must lie in [0, 1], got 1.5"),
        ("method.name=dyno", "method.name must be one of 'barlow', 'dino', 'ibot', 'moco'"),
        ("optim.epochs=-3", "optim.epochs must be above 0, got -3"),
        ("optim.epochs=ten", "optim.epochs: Input should be a valid integer"),
        ("views.local_views.scale=[0.5, 0.1]", "views.local_views.scale must be (low, high)"),
        ("views.global_views.blur_prob=[1, 0, 0]", "views.global_views.blur_prob must be one number, or one for each"),
        ("views.local_views.gray_prob=1.2", "gray_prob must lie in [0, 1], got 1.2"),
        ("method.local_weight=0.6", "local_weight is 0.6 but there are no local views"),
        ("method.local_weight=-1", "global_weight and local_weight must be at least 0, got 1.0, -1.0"),
        ("views.global_views.count=1", "MoCo needs at least 2 global views (one key, one query), got 1"),
        ("method.queue_size=1000", "queue_size 1000 must be a multiple of optim.global_batch 64; 1024 is near"),
        ("teacher={kind: none}", "MoCo needs a teacher"),
        ("data.num_workers=0", "data.num_workers must be at least 1, got 0"),
        ("evals.probe.every_epochs=-1", "evals.probe.every_epochs must be at least 0, got -1"),
        ("evals.knn.k=0", "evals.knn.k must be at least 1, got 0"),
        ("optim.warmup_epochs=.nan", "optim.warmup_epochs must lie in"),
        ("no_equals", "wanted key.sub=value"),
        ("seed.x=1", "seed holds a value, not further keys"),
        ("method={", "not valid YAML"),
    ],
)
def test_a_fault_is_said_by_name(override: str, said: str) -> None:
    assert said in fault_of(override)


SWAV = RECIPES / "smoke/swav_sslight.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.queue_size=200", "queue_size 200 must be a multiple of optim.global_batch 64, or 0 for no queue; 192"),
        ("method.queue_size=60", "or 0 for no queue; 64 is near"),
        ("teacher={kind: ema, momentum: 0.9, final_momentum: 1}", "SwAV has no teacher, got teacher.kind ema; set"),
        ("views.global_views.count=1", "SwAV needs at least 2 global views, got 1"),
        ("method.epsilon=0", "method.epsilon must be above 0, got 0"),
        ("method.queue_start_epoch=-1", "method.queue_start_epoch must be at least 0, got -1"),
    ],
)
def test_a_fault_in_swav_is_said_by_name(override: str, said: str) -> None:
    assert said in fault_of(override, recipe=SWAV)


@pytest.mark.parametrize("method", ["dino", "swav"])
def test_global_only_refuses_local_views_and_needs_no_weights_for_them(method: str) -> None:
    recipe = RECIPES / f"smoke/{method}_sslight.yaml"
    said = fault_of("method.global_only=true", recipe=recipe)
    assert "global_only leaves 4 local views without a use" in said
    assert "set views.local_views.count=0" in said
    alone = load_recipe(recipe, [DATA, "method.global_only=true", "views.local_views.count=0"])
    assert alone.method.local_weight == 0.6, "not used, and so not refused"


def test_clipping_beside_a_probe_is_refused_since_its_gradient_would_count() -> None:
    assert "optim.gradient_clipping 3.0 cuts the norm" in fault_of("probe=true", "optim.gradient_clipping=3.0")


def test_a_probe_shapes_the_training_and_how_often_it_is_evaluated_does_not() -> None:
    plain = load_recipe(DEMO, [DATA]).plain()
    probed = load_recipe(DEMO, [DATA, "probe=true"]).plain()
    seldom = load_recipe(DEMO, [DATA, "evals.probe.every_epochs=7"]).plain()
    assert what_shapes_training(probed) != what_shapes_training(plain)
    assert what_shapes_training(seldom) == what_shapes_training(plain)


def test_all_faults_come_in_one_report_with_the_file() -> None:
    lines = fault_of("method.temprature=1", "teacher.momentum=2", "optim.epochs=0").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{DEMO}: ") for line in lines)


def test_the_device_computes_no_linear_colour() -> None:
    assert "photometric device computes colour exactly" in fault_of("views.photometric=device", "views.colour=linear")


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "on_gpu"),
    [
        ([], "cpu", "device"),
        (["views.colour=linear"], "cpu", "cpu"),
        (["views.photometric=cpu"], "cpu", "cpu"),
        (["views.photometric=device"], "device", "device"),
    ],
)
def test_where_the_photometric_changes_happen(overrides: list[str], on_cpu: str, on_gpu: str) -> None:
    views = load_recipe(DEMO, [DATA, *overrides]).views
    assert [views.photometric_on("cpu"), views.photometric_on("cuda")] == [on_cpu, on_gpu]


def test_a_missing_path_is_asked_for() -> None:
    with pytest.raises(RecipeError, match=r"data.train: .*give it in the recipe or as data.train="):
        load_recipe(DEMO)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(DEMO.read_text() + "seed: 1\n")
    assert "key 'seed' is given twice" in fault_of(recipe=tmp_path / "twice.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\xff\xfe"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="latin-1")
    assert "bad.yaml" in fault_of(recipe=tmp_path / "bad.yaml")


def test_a_missing_recipe_is_named() -> None:
    assert "recipes/nothing.yaml: no such recipe" in fault_of(recipe=Path("recipes/nothing.yaml"))


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 4096), world=st.integers(1, 64), accumulation=st.integers(1, 8))
def test_the_micro_batch_times_everything_is_the_global_batch_or_an_error_says_a_near_one(
    batch: int, world: int, accumulation: int
) -> None:
    recipe = load_recipe(DEMO, [DATA, f"optim.global_batch={batch}", f"optim.accumulation={accumulation}",
                                f"method.queue_size={batch}"])  # fmt: skip
    if batch % (world * accumulation) == 0:
        assert recipe.micro_batch(world) * world * accumulation == batch
    else:
        with pytest.raises(RecipeError, match="cannot be shared") as caught:
            recipe.micro_batch(world)
        proposed = int(str(caught.value).rsplit("=", 1)[1])
        assert proposed > 0
        assert proposed % (world * accumulation) == 0


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, [DATA])
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.plain()))
    again: Recipe = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
