"""VICReg, SimSiam and gated networks through the whole loop: ranks, ZeRO, pauses, weights of all networks."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch

from tests.launch import DEMO, TINY, TINY_MOCO, losses, metrics
from tests.spawn import run_ranks
from tests.test_equivalence import DINO, LIVELY, PIECES, go_back_to_step_3
from trainer import weights
from trainer.evals.features import reader_of
from trainer.models.gating import gated_pass, gates_of, in_mode
from trainer.models.slicing import at_least, open_rates, slice_network, widths
from trainer.recipe_file import load_recipe
from trainer.settling import HardCost

VICREG = ("method={name: vicreg, hidden_dim: 32, out_dim: 32}", "teacher={kind: none}", "views.local_views.count=0")
SIMSIAM = ("method={name: simsiam, hidden_dim: 32, out_dim: 32, predictor_dim: 8}", *VICREG[1:])
WIDE = "backbone.args.channels=[32, 32, 32, 32]"
"""In narrower networks the stem of 64 channels costs more than any target leaves."""
GATES = ("backbone.gates={target: 0.75, initial_bias: 0.0}", WIDE)
FULL = ("backbone.gates={target: 0.75, pairs: full}", WIDE)
CASES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "vicreg": (VICREG, None),
    "gated": ((*VICREG, *GATES), None),
    "gated-zero3": ((*VICREG, *GATES), PIECES),
    "gated-simsiam": ((*SIMSIAM, *FULL, "optim.accumulation=2", "optim.name=lars"), None),
    "gated-moco": ((*TINY_MOCO, *GATES, "backbone.gates.settle_images=0"), None),
    "gated-dino-zero3": ((DINO, *FULL), PIECES),
}
PAUSED = ("gated-zero3", "gated-simsiam", "gated-moco")


def train(data: Path, out: Path) -> None:
    """On each rank: 12 steps of every case; then the last nine of some once more, as after a pause."""
    from trainer import distributed
    from trainer.loop import pretrain
    from trainer.recipe_file import load_recipe

    pieces = data / f"gated_pieces_{distributed.rank()}.json"
    pieces.write_text(PIECES)

    def once(name: str, case: str) -> None:
        overrides, config = CASES[case]
        paths = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"run.dir={out / name}"]
        paths += ["run.checkpoint_every_epochs=0.5", "run.keep_checkpoints=9", "evals.knn.every_epochs=2"]
        settings = [*TINY, *LIVELY, "evals.probe.every_epochs=0", *overrides, *paths]
        pretrain(load_recipe(DEMO, settings), DEMO, None if config is None else pieces)

    for case in CASES:
        once(case, case)
    for case in PAUSED:
        go_back_to_step_3(out / case, out / f"{case}-paused")
        once(f"{case}-paused", case)


@pytest.fixture(scope="module")
def runs(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run a case, on two ranks."""
    out = tmp_path_factory.mktemp("gated")
    run_ranks(train, synthetic, out, timeout_s=900)
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_case_trains_twelve_finite_steps(case: str, runs: Path) -> None:
    found = losses(runs / case)
    assert list(found) == list(range(12))
    assert all(abs(value) < 100 for value in found.values())


@pytest.mark.parametrize("case", PAUSED)
def test_a_paused_run_goes_on_to_the_bit(case: str, runs: Path) -> None:
    straight, paused = losses(runs / case), losses(runs / f"{case}-paused")
    assert {step: paused[step] for step in range(3, 12)} == {step: straight[step] for step in range(3, 12)}


def test_zero_3_trains_the_same_gates(runs: Path) -> None:
    for key in ("loss", "gates/ratio", "gates/multiplier"):
        whole, pieces = ([record[key] for record in metrics(runs / case)] for case in ("gated", "gated-zero3"))
        assert whole[:4] == pytest.approx(pieces[:4], rel=2e-3), key


@pytest.mark.parametrize(("case", "prefix"), [("gated", ""), ("gated-moco", ""), ("gated-moco", "local_")])
def test_the_multiplier_follows_the_hard_ratio_of_its_view_size(case: str, prefix: str, runs: Path) -> None:
    for before, after in itertools.pairwise(metrics(runs / case)):
        step = 2.0 * (before[f"gates/{prefix}hard_ratio"] - before[f"gates/{prefix}target"])
        moved = after[f"gates/{prefix}multiplier"] - before[f"gates/{prefix}multiplier"]
        assert moved == pytest.approx(step, abs=1e-4)


def test_dense_and_gated_network_are_evaluated_side_by_side(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "gated/metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if "knn/student_top1" in line]
    assert 0 <= evaluated["knn/gated_top1"] <= 100
    assert evaluated["knn/gated_rank_me"] != evaluated["knn/student_rank_me"]
    assert '"knn/teacher_top1"' in (runs / "gated-moco/metrics.jsonl").read_text(), "and its teacher, where it has one"
    lines = [json.loads(line) for line in (runs / "vicreg/metrics.jsonl").read_text().splitlines()]
    assert not any("knn/gated_top1" in line for line in lines)


@pytest.mark.parametrize("case", ["gated", "gated-zero3", "gated-dino-zero3"])
def test_the_saved_network_costs_on_plain_images_what_its_run_settled_for(
    case: str, runs: Path, synthetic: Path
) -> None:
    lines = [json.loads(line) for line in (runs / case / "metrics.jsonl").read_text().splitlines()]
    (settled,) = [line for line in lines if "gates/plain_after" in line]
    network, _ = weights.load_backbone(runs / case / "weights/gated")
    reader = reader_of(load_recipe(runs / case / "resolved.yaml"), torch.device("cpu"))
    costs = reader.features({"cost": HardCost(network, reader.size)}, synthetic / "train.beton")["cost"].vectors
    assert costs.mean().item() == pytest.approx(settled["gates/plain_after"], abs=1e-6)
    assert settled["gates/plain_shift"] != 0, "or nothing was seen"
    assert abs(settled["gates/plain_after"] - 0.75) < abs(settled["gates/plain_before"] - 0.75)


def test_gates_are_left_as_they_were_trained_where_the_recipe_says_so(runs: Path) -> None:
    assert "gates/hard_ratio" in (runs / "gated-moco/metrics.jsonl").read_text()
    assert "gates/plain" not in (runs / "gated-moco/metrics.jsonl").read_text()


def test_timm_loads_the_dense_network_and_we_the_gated_one(runs: Path) -> None:
    folder = runs / "gated/weights"
    dense = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True, num_classes=0).eval()
    gated, _ = weights.load_backbone(folder / "gated")
    gated.eval()
    images = torch.randn(4, 3, 32, 32)
    hard = gated_pass(gated, images, "hard").features
    assert torch.equal(gated(images), hard), "it runs with hard gates unless told otherwise"
    with in_mode(gated, "dense"):
        assert torch.equal(gated(images), dense(images))
    assert not torch.allclose(hard, dense(images))


def test_the_teacher_of_a_gated_student_is_saved_as_a_dense_network(runs: Path) -> None:
    for network in ("student", "teacher"):
        folder = runs / "gated-moco/weights" / network
        dense = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        assert dense(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_a_sliced_network_comes_back_from_its_folder(runs: Path, tmp_path: Path) -> None:
    gated, config = weights.load_backbone(runs / "gated/weights/gated")
    plain, _ = weights.load_backbone(runs / "gated/weights/student")
    gated.eval()
    images = torch.randn(8, 3, 32, 32)
    masks = at_least(open_rates(gated, [images]), 0.5)
    sliced = slice_network(gated, plain, masks)
    weights.save_sliced(tmp_path / "small", sliced, config, widths(masks))
    again, of_small = weights.load_backbone(tmp_path / "small")
    assert torch.equal(again.eval()(images), sliced(images))
    assert of_small["widths"] == widths(masks)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in plain.parameters())
    assert not gates_of(again)
