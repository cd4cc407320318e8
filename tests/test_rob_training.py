"""iBOT, MSN, and all four methods under frozen teachers, through the whole loop: ranks, ZeRO 3, pauses."""

from pathlib import Path

import pytest
import torch

from tests.launch import DEMO, TINY, losses, metrics
from tests.spawn import run_ranks
from tests.test_equivalence import LIVELY, PIECES, VIT, go_back_to_step_3

SMALL = "num_prototypes: 24, global_weight: 0.4, local_weight: 0.6"
IBOT = f"name: ibot, hidden_dim: 32, bottleneck_dim: 16, head_norm: false, warmup_teacher_temp_epochs: 1, {SMALL}"
MSN = f"name: msn, hidden_dim: 32, out_dim: 16, head_norm: false, {SMALL}"
DINO = f"name: dino, hidden_dim: 32, bottleneck_dim: 16, head_norm: false, warmup_teacher_temp_epochs: 1, {SMALL}"
SWAV = f"name: swav, hidden_dim: 32, out_dim: 16, queue_size: 0, {SMALL}"
SAME = "pairing: same_view"
MLP = "mlp_head: {hidden_dim: 16, norm: false, activation: none}"
EMA = "teacher={kind: ema, momentum: 0.99, final_momentum: 1}"

OWN: dict[str, tuple[tuple[str, ...], str | None]] = {
    "ibot": ((f"method={{{IBOT}}}", EMA), None),
    "ibot-zero3": ((f"method={{{IBOT}}}", EMA), PIECES),
    "ibot-accumulated": ((f"method={{{IBOT}}}", EMA, "optim.accumulation=2"), None),
    "msn": ((f"method={{{MSN}}}", EMA), None),
    "msn-zero3": ((f"method={{{MSN}}}", EMA), PIECES),
    "dino": ((f"method={{{DINO}}}", EMA), None),
    "swav": ((f"method={{{SWAV}}}", "teacher={kind: none}"), None),
}
ROB = {
    "dino": f"{DINO}, {SAME}, centering: none, freeze_last_layer_epochs: 0",
    "swav": f"{SWAV}, {SAME}, {MLP}, codes: teacher, prototypes: teacher, epsilon: 0.03",
    "ibot": f"{IBOT}, {SAME}, centering: none",
    "msn": f"{MSN}, {SAME}, {MLP}, targets: global_views, sinkhorn_iterations: 0, me_max_weight: 0, patch_drop: 0.1",
}
"""Each learns from the run of its own method above."""
PAUSED = ("ibot", "msn-zero3", "rob-ibot", "rob-swav")


def cases(out: Path) -> dict[str, tuple[tuple[str, ...], str | None]]:
    return OWN | {
        f"rob-{name}": ((f"method={{{method}}}", f"teacher={{kind: frozen, source: 'run:{out / name}'}}"), None)
        for name, method in ROB.items()
    }


def train(data: Path, out: Path, names: list[str]) -> None:
    """On each rank: 12 steps of every case; then the last nine of some once more, as after a pause."""
    from trainer import distributed
    from trainer.loop import pretrain
    from trainer.recipe_file import load_recipe

    pieces = data / f"pieces_{distributed.rank()}_{distributed.world()}.json"
    pieces.write_text(PIECES)

    def once(name: str, case: str) -> None:
        overrides, config = cases(out)[case]
        paths = [f"data.train={data / 'train.beton'}", f"run.dir={out / name}"]
        paths += ["run.checkpoint_every_epochs=0.5", "run.keep_checkpoints=9"]
        settings = [*TINY, *LIVELY, *VIT, *overrides, *paths]
        pretrain(load_recipe(DEMO, settings), DEMO, None if config is None else pieces)

    for name in names:
        once(name, name)
    for name in PAUSED:
        if name in names and distributed.world() > 1:
            go_back_to_step_3(out / name, out / f"{name}-paused")
            once(f"{name}-paused", name)


@pytest.fixture(scope="module")
def folder(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run a case, on two ranks."""
    out = tmp_path_factory.mktemp("rob")
    run_ranks(train, synthetic, out, list(cases(out)), timeout_s=900)
    return out


def values(run_dir: Path) -> list[float]:
    return list(losses(run_dir).values())


@pytest.mark.parametrize("method", ["ibot", "msn"])
def test_zero_3_trains_the_same(folder: Path, method: str) -> None:
    """Position embeddings, class and mask token are read outside of the modules that hold them."""
    assert values(folder / f"{method}-zero3") == pytest.approx(values(folder / method), abs=2e-5)


def test_masks_do_not_care_how_a_batch_is_cut_up(folder: Path) -> None:
    assert values(folder / "ibot-accumulated") == pytest.approx(values(folder / "ibot"), rel=1e-4)


def test_one_rank_trains_as_two(folder: Path, synthetic: Path, tmp_path: Path) -> None:
    """Masks and dropped patches included; a run goes on with them on any number of ranks."""
    run_ranks(train, synthetic, tmp_path, ["ibot", "msn"], world=1, timeout_s=400)
    for name in ("ibot", "msn"):
        assert values(tmp_path / name) == pytest.approx(values(folder / name), rel=1e-4), name


@pytest.mark.parametrize("case", PAUSED)
def test_a_paused_run_continues_to_the_bit(folder: Path, case: str) -> None:
    assert values(folder / f"{case}-paused") == values(folder / case)


@pytest.mark.parametrize("case", [*OWN, *(f"rob-{name}" for name in ROB)])
def test_every_case_moved_its_weights_and_stayed_finite(folder: Path, case: str) -> None:
    series = torch.tensor(values(folder / case))
    assert series.isfinite().all()
    assert series.unique().numel() == 12


@pytest.mark.parametrize("method", ROB)
def test_a_student_comes_nearer_to_its_teacher(folder: Path, method: str) -> None:
    """What is above the targets' own entropy falls; the mean of the second epoch against that of the first step."""
    records = metrics(folder / f"rob-{method}")
    entropy = {"dino": "teacher_entropy", "ibot": "teacher_entropy", "swav": "code_entropy", "msn": "target_entropy"}

    def excess(record: dict[str, float]) -> float:
        of_classes = 0.4 * record["loss/global"] + 0.6 * record["loss/local"]
        return of_classes - record[entropy[method]]

    assert sum(excess(record) for record in records[6:]) / 6 < excess(records[0])


def test_patches_are_compared_with_a_teacher_that_has_as_many(folder: Path, synthetic: Path, tmp_path: Path) -> None:
    from trainer.assemble import check_teacher
    from trainer.recipe import RecipeError
    from trainer.recipe_file import load_recipe

    overrides, _ = cases(folder)["rob-ibot"]
    settings = [*TINY, *LIVELY, *VIT, *overrides, f"data.train={synthetic / 'train.beton'}", f"run.dir={tmp_path}"]
    check_teacher(load_recipe(DEMO, settings))
    with pytest.raises(RecipeError, match="has 4 for the student, 16 for the teacher"):
        check_teacher(load_recipe(DEMO, [*settings, "backbone.args.patch_size=16"]))


def test_the_teachers_prototypes_are_in_the_students_checkpoint_and_its_own(folder: Path) -> None:
    """RoB-SwAV's run can be read without its teacher."""
    from safetensors.torch import load_file

    ours = load_file(folder / "rob-swav/weights/student/head.safetensors")["prototypes.weight"]
    theirs = load_file(folder / "swav/weights/student/head.safetensors")["prototypes.weight"]
    assert torch.equal(ours, theirs)
