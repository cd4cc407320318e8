"""Teachers without a head: features as they are, or prototypes fitted on them; never a random head."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.launch import DEMO, TINY, losses, metrics
from tests.spawn import run_ranks
from tests.teachers.runs import DINO, recipe_of, write_run
from tests.teachers.test_frozen import frozen, views
from tests.test_rob_recipes import RECIPES, load
from trainer.assemble import check_teacher
from trainer.methods.frozen import Fit
from trainer.models.backbones import build_backbone
from trainer.recipe import RecipeError
from trainer.teachers.build import build_frozen
from trainer.teachers.prototypes import fit

WEIGHTS = "pairing: same_view, global_weight: 0.4, local_weight: 0.6"
HEAD = "mlp_head: {hidden_dim: 32, num_layers: 2, norm: true, activation: relu}"
REGRESSION = (*TINY, f"method={{name: regression, out_dim: 32, {HEAD}, {WEIGHTS}}}")
SEED = (*TINY, f"method={{name: seed, out_dim: 32, queue_size: 32, {HEAD}, {WEIGHTS}}}")
FITTED = "prototypes: {count: 24, num_images: 60, iterations: 5}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder without a head, as timm writes them."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    write_run(run_dir, *DINO)
    (run_dir / "weights/teacher/head.safetensors").unlink()
    return run_dir / "weights/teacher"


def clusters(num: int = 200, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(count, 6, generator=generator), dim=1)
    of = torch.arange(num) % count
    return F.normalize(centers[of] + 0.05 * torch.randn(num, 6, generator=generator), dim=1), centers


def test_prototypes_are_the_directions_around_which_features_gather() -> None:
    features, centers = clusters()
    prototypes, similarity = fit(features, Fit(count=4, iterations=20, seed=1))
    assert (centers @ prototypes.T).max(dim=1).values.min() > 0.99
    assert similarity == pytest.approx((features @ prototypes.T).max(1).values.mean().item())
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(4))
    again, _ = fit(features, Fit(count=4, iterations=20, seed=1))
    assert torch.equal(prototypes, again)


def test_every_prototype_is_used_even_where_most_images_are_the_same() -> None:
    same = F.normalize(torch.ones(50, 6), dim=1)
    features = torch.cat([same, F.normalize(torch.eye(6), dim=1)])
    prototypes, _ = fit(features, Fit(count=7, iterations=10))
    assert len((features @ prototypes.T).argmax(1).unique()) == 7


def test_features_come_as_the_backbone_gives_them(backbone: Path) -> None:
    teacher = build_frozen(recipe_of(*REGRESSION, frozen(f"file:{backbone}")))
    assert torch.equal(teacher(views()), teacher.branch.backbone(views()[0]))


def test_a_method_of_features_passes_over_a_head(tmp_path: Path) -> None:
    write_run(tmp_path / "run", *DINO)
    teacher = build_frozen(recipe_of(*SEED, frozen(f"run:{tmp_path / 'run'}")))
    assert teacher(views()).shape == (6, 32)


def test_a_run_whose_head_gives_no_scores_teaches_features_alone(tmp_path: Path) -> None:
    vicreg = ("method={name: vicreg, hidden_dim: 32, out_dim: 16}", "views.local_views.count=0")
    write_run(tmp_path / "run", *TINY, *vicreg, "teacher={kind: none}")
    source = frozen(f"run:{tmp_path / 'run'}")
    assert build_frozen(recipe_of(*REGRESSION, source))(views()).shape == (6, 32)
    with pytest.raises(RecipeError, match=r"without a head: vicreg's gives no scores"):
        build_frozen(recipe_of(*DINO, source))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*REGRESSION, "method.out_dim=33"), "method.out_dim is 33, and .* has 32 numbers; set method.out_dim=32"),
        ((*REGRESSION, "teacher.prototypes={count: 9}"), "method.regression compares features and has no use for any"),
        ((*DINO, "teacher.prototypes={count: 23}"), "method.num_prototypes is 24, and .* has 23 numbers"),
        ((*DINO, "teacher.prototypes={count: 200}", "method.num_prototypes=200"), "needs as many images, .* are 96"),
        (
            (*DINO, "teacher.prototypes={count: 9, num_images: 5}"),
            "num_images must be 0 or at least count 9",
        ),
    ],
)
def test_a_faulty_recipe_is_refused_with_what_to_change(
    overrides: tuple[str, ...], message: str, backbone: Path, synthetic: Path
) -> None:
    method, changes = overrides[: len(TINY) + 1], overrides[len(TINY) + 1 :]
    data = f"data.train={synthetic / 'train.beton'}"
    with pytest.raises(RecipeError, match=message):
        check_teacher(recipe_of(*method, frozen(f"file:{backbone}"), *changes, data))


def train_without_a_head(data: Path, backbone: Path, out: Path) -> None:
    """On one rank: regression, SEED, and DINO with fitted prototypes, 12 steps each; of the last six steps twice."""
    from trainer import distributed
    from trainer.loop import pretrain

    def train(name: str, *overrides: str) -> None:
        paths = [f"data.train={data / 'train.beton'}", f"run.dir={out / name}", "run.keep_checkpoints=9"]
        recipe = recipe_of(*overrides, *paths, "evals.knn.every_epochs=0")
        pretrain(recipe, DEMO, None)

    source = frozen(f"file:{backbone}")
    train("regression", *REGRESSION, source)
    train("seed", *SEED, source)
    fitted = (*DINO, "method.pairing=same_view", frozen(f"file:{backbone}", FITTED))
    train("fitted", *fitted)
    if distributed.is_main():
        shutil.copytree(out / "fitted", out / "resumed")
        shutil.rmtree(out / "resumed/checkpoints/step_0000012")
    distributed.barrier()
    train("resumed", *fitted)


@pytest.fixture(scope="module")
def runs(synthetic: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("headless")
    run_ranks(train_without_a_head, synthetic, backbone, out, timeout_s=500)
    return out


@pytest.mark.parametrize("name", ["regression", "seed", "fitted"])
def test_a_student_learns_from_a_teacher_without_a_head(runs: Path, name: str) -> None:
    found = losses(runs / name)
    assert list(found) == list(range(12))
    assert min(list(found.values())[6:]) < found[0]


def test_a_run_goes_on_with_the_prototypes_that_it_fitted(runs: Path) -> None:
    first, second = (runs / name / "teacher_prototypes.safetensors" for name in ("fitted", "resumed"))
    assert second.stat().st_mtime_ns == first.stat().st_mtime_ns, "it was fitted once more"
    times = [[record["images_per_s"] for record in metrics(runs / name)] for name in ("fitted", "resumed")]
    assert times[0][:6] == times[1][:6]
    assert times[0][6:] != times[1][6:], "the second half was not trained again"
    assert losses(runs / "resumed") == losses(runs / "fitted")


@pytest.mark.parametrize("name", ["regression_resnet18", "smoke/regression"])
def test_the_recipe_and_every_variant_of_its_header_can_be_built(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    lines = path.read_text().splitlines()
    offered = [re.split(r" (?=teacher\.)", line[line.index("method=") :]) for line in lines if ": method={" in line]
    assert offered, "SEED at least"
    for overrides in ([], *offered):
        recipe = load(path, *overrides)
        with torch.device("meta"):
            recipe.method.build(build_backbone(recipe.backbone), recipe.views.counts)
