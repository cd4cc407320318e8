"""The same training however it is sharded, and the same after a pause; all on one pair of gloo ranks."""

import json
from pathlib import Path

import pytest
import torch

from tests.launch import DEMO, TINY, TINY_MOCO, losses, metrics
from tests.spawn import run_ranks

CONFIGS = Path(__file__).parents[1] / "ds_configs"
DINO = (
    "method={name: dino, hidden_dim: 32, bottleneck_dim: 16, num_prototypes: 32, head_norm: true, "
    "warmup_teacher_temp_epochs: 1, global_weight: 0.4, local_weight: 0.6}"
)
SWAV = (
    "method={name: swav, hidden_dim: 32, out_dim: 16, num_prototypes: 24, queue_size: 32, queue_start_epoch: 1, "
    "global_weight: 0.4, local_weight: 0.6}",
    "teacher={kind: none}",
)
"""Its queue is full, and its prototypes are thawed, in the second of the two epochs."""
PIECES = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
"""ZeRO 3 that cuts every parameter, however small; by default it leaves those of a tiny network whole."""
EVALUATED = ("probe=true", "evals.knn.every_epochs=1")
LIVELY = ("optim.base_lr=0.02", "optim.warmup_epochs=0", "evals.knn.every_epochs=0")
VIT = ("backbone.name=vit_tiny_patch16_224", "backbone.args={img_size: 32, patch_size: 8, dynamic_img_size: true, "
       "embed_dim: 24, depth: 2, num_heads: 2}", "backbone.sync_batchnorm=false")  # fmt: skip

CASES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "moco-zero0": ((*TINY_MOCO, *LIVELY), None),
    "moco-zero1": ((*TINY_MOCO, *LIVELY), "zero1.json"),
    "moco-zero3": ((*TINY_MOCO, *LIVELY), PIECES),
    "dino-zero0": ((*TINY, DINO, *LIVELY), "zero0.json"),
    "dino-probe": ((*TINY, DINO, *LIVELY, *EVALUATED), "zero0.json"),
    "dino-zero1": ((*TINY, DINO, *LIVELY), "zero1.json"),
    "dino-bf16": ((*TINY, DINO, *LIVELY), "zero0_bf16.json"),
    "dino-device": ((*TINY, DINO, *LIVELY, "views.photometric=device"), None),
    "dino-zero3": ((*TINY, DINO, *LIVELY, *EVALUATED), PIECES),
    "dino-offload": ((*TINY, DINO, *LIVELY), "zero1_offload.json"),
    "dino-lars": ((*TINY, DINO, *LIVELY, "optim.name=lars"), None),
    "swav-zero0": ((*TINY, *SWAV, *LIVELY), None),
    "swav-zero1": ((*TINY, *SWAV, *LIVELY), "zero1.json"),
    "swav-zero3": ((*TINY, *SWAV, *LIVELY), PIECES),
    "vit": ((*TINY_MOCO, *LIVELY, *VIT), None),
    "vit-checkpointed": ((*TINY_MOCO, *LIVELY, *VIT, "backbone.activation_checkpointing=true"), None),
    "vit-checkpointed-zero3": ((*TINY_MOCO, *LIVELY, *VIT, "backbone.activation_checkpointing=true"), PIECES),
    "vit-compiled": ((*TINY_MOCO, *LIVELY, *VIT, "run.compile=true"), None),
    "vit-accumulated": ((*TINY_MOCO, *LIVELY, *VIT, "optim.accumulation=2"), None),
    "vit-accumulated-zero1": ((*TINY_MOCO, *LIVELY, *VIT, "optim.accumulation=2"), "zero1.json"),
    "vit-accumulated-zero2": ((*TINY_MOCO, *LIVELY, *VIT, "optim.accumulation=2"), "zero2.json"),
    "vit-accumulated-zero3": ((*TINY_MOCO, *LIVELY, *VIT, "optim.accumulation=2"), PIECES),
}
PAUSED = (
    "moco-zero0", "moco-zero3", "dino-probe", "dino-zero1", "dino-zero3", "dino-offload", "dino-lars", "swav-zero0",
    "swav-zero1", "swav-zero3", "vit-accumulated-zero2",
)  # fmt: skip


def train_every_case(data: Path, out: Path) -> dict[str, float]:
    """On one rank: each case's 12 steps; then the last nine of some once more, as after a pause."""
    from trainer import distributed
    from trainer.loop import pretrain
    from trainer.recipe_file import load_recipe

    def train(name: str, overrides: tuple[str, ...], config: str | None) -> None:
        paths = [f"data.train={data / 'train.beton'}", f"run.dir={out / name}"]
        paths += ["run.checkpoint_every_epochs=0.5", "run.keep_checkpoints=9"]
        paths += [f"data.val={data / 'val.beton'}"] if EVALUATED[0] in overrides else []
        pretrain(load_recipe(DEMO, [*overrides, *paths]), DEMO, None if config is None else write(config))

    def write(config: str) -> Path:
        if config != PIECES:
            return CONFIGS / config
        (data / f"pieces_{distributed.rank()}.json").write_text(config)
        return data / f"pieces_{distributed.rank()}.json"

    for name, (overrides, config) in CASES.items():
        train(name, overrides, config)
    for method in PAUSED:
        overrides, config = CASES[method]
        go_back_to_step_3(out / method, out / f"{method}-paused")
        train(f"{method}-paused", overrides, config)
    return {}


def go_back_to_step_3(run_dir: Path, copy: Path) -> None:
    """A copy of the run as if it had died before the second checkpoint was complete."""
    import shutil

    from trainer import distributed

    if distributed.is_main():
        shutil.copytree(run_dir, copy)
        for step in (6, 9, 12):
            shutil.rmtree(copy / f"checkpoints/step_{step:07d}")
        (copy / "finished").unlink()
    distributed.barrier()


@pytest.fixture(scope="module")
def runs(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """Losses of every step of every case."""
    out = tmp_path_factory.mktemp("equivalence")
    run_ranks(train_every_case, synthetic, out, timeout_s=1000)
    found = {path.name: losses(path) for path in out.iterdir()}
    for case in ("dino-probe", "dino-zero3"):
        for part in ("loss/ssl", "probe/loss"):
            found[f"{case}/{part}"] = {m["step"]: m[part] for m in metrics(out / case)}
        found[f"{case}/evals"] = evaluations(out / case)
    return found


def evaluations(run_dir: Path) -> dict[str, float]:
    """The accuracies of the last evaluation."""
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in last.items() if name.startswith(("knn/", "probe/"))}


@pytest.mark.parametrize("method", ["moco", "dino", "swav"])
def test_zero_stages_train_the_same_to_the_bit(runs: dict[str, dict[int, float]], method: str) -> None:
    assert len(runs[f"{method}-zero0"]) == 12
    assert runs[f"{method}-zero1"] == runs[f"{method}-zero0"]


@pytest.mark.parametrize("method", ["moco", "dino", "swav"])
def test_zero_3_trains_the_same(runs: dict[str, dict[int, float]], method: str) -> None:
    """Teachers that follow pieces, prototypes of length 1 in pieces; its sums come in another order."""
    case = "dino-zero3/loss/ssl" if method == "dino" else f"{method}-zero3"
    assert list(runs[case].values()) == pytest.approx(list(runs[f"{method}-zero0"].values()), abs=1e-5)


def test_zero_3_evaluates_whole_networks(runs: dict[str, dict[int, float]]) -> None:
    ours, theirs = runs["dino-zero3/evals"], runs["dino-probe/evals"]
    assert {"knn/student_top1", "knn/teacher_top1", "probe/val_accuracy"} <= set(theirs)
    assert ours == pytest.approx(theirs, abs=3, rel=1e-3), "one image of 36 is 2.8 %"


def test_states_on_the_host_train_the_same_to_the_bit(runs: dict[str, dict[int, float]]) -> None:
    assert runs["dino-offload"] == runs["dino-zero0"]


@pytest.mark.parametrize("stage", ["", "-zero1", "-zero2", "-zero3"])
def test_accumulating_two_half_batches_is_training_on_the_whole(runs: dict[str, dict[int, float]], stage: str) -> None:
    """Without BatchNorm, whose statistics are those of a micro-batch."""
    assert list(runs[f"vit-accumulated{stage}"].values()) == pytest.approx(list(runs["vit"].values()), rel=1e-4)


@pytest.mark.parametrize("case", ["vit-checkpointed", "vit-checkpointed-zero3", "vit-compiled"])
def test_computing_activations_again_or_compiling_is_the_same_training(
    runs: dict[str, dict[int, float]], case: str
) -> None:
    assert list(runs[case].values()) == pytest.approx(list(runs["vit"].values()), rel=1e-4)


def test_bfloat16_stays_near_full_precision(runs: dict[str, dict[int, float]]) -> None:
    ours, theirs = list(runs["dino-bf16"].values()), list(runs["dino-zero0"].values())
    assert ours != theirs, "autocast must have had an effect"
    assert ours[0] == pytest.approx(theirs[0], rel=0.01), "the same weights and views, before any step"
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.05), "afterwards rounding grows, without a drift"


def test_photometric_changes_on_the_device_train_nearly_the_same(runs: dict[str, dict[int, float]]) -> None:
    ours, theirs = list(runs["dino-device"].values()), list(runs["dino-zero0"].values())
    assert ours != theirs, "the two round differently"
    assert ours[0] == pytest.approx(theirs[0], rel=0.01), "the same weights and draws, before any step"
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.05)


def test_a_probe_changes_no_step_of_the_student(runs: dict[str, dict[int, float]]) -> None:
    assert runs["dino-probe/loss/ssl"] == runs["dino-zero0"]
    of_probe = list(runs["dino-probe/probe/loss"].values())
    assert runs["dino-probe"][0] == pytest.approx(runs["dino-zero0"][0] + of_probe[0], rel=1e-6)


@pytest.mark.parametrize("case", PAUSED)
def test_a_paused_run_continues_to_the_bit(runs: dict[str, dict[int, float]], case: str) -> None:
    assert runs[f"{case}-paused"] == runs[case]


def test_every_case_moved_its_weights_and_stayed_finite(runs: dict[str, dict[int, float]]) -> None:
    for name, values in runs.items():
        if name.endswith("/evals"):
            continue
        series = torch.tensor(list(values.values()))
        assert series.isfinite().all(), name
        assert series.unique().numel() == 12, name
