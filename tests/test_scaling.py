"""The model of more nodes: its bytes against what two ranks really say, its formulae against numbers made by hand."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import hjson
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.launch import DEMO, TINY, TINY_MOCO
from tests.spawn import run_ranks
from tests.test_equivalence import CONFIGS, DINO, LIVELY, SWAV, VIT
from tests.test_rob_training import OWN
from trainer.__main__ import main
from trainer.assemble import build_method, build_teacher
from trainer.engine import zero_stage
from trainer.recipe import Recipe, RecipeError
from trainer.recipe_file import load_recipe
from trainer.scaling import (
    Cluster,
    Collective,
    Kind,
    Measured,
    Network,
    doubled,
    image_s,
    memory,
    seconds,
    sent_bytes,
    zero_collectives,
)
from trainer.scaling_table import Step, of_run, step_of

KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
MB = 1e6


# --- formulae ---


def ring_by_hand(kind: Kind, num_bytes: int, ranks: int) -> list[int]:
    """Bytes that each rank sends when pieces go round, one to the right neighbour at a time."""
    piece = num_bytes if kind == "all_gather" else num_bytes // ranks
    sent = [0] * ranks
    for _ in range(2 if kind == "all_reduce" else 1):
        for _ in range(ranks - 1):
            for rank in range(ranks):
                sent[rank] += piece
    return sent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_rank_sends_what_a_ring_makes_it_send(kind: Kind, ranks: int) -> None:
    sent = sent_bytes(Collective(kind=kind, num_bytes=240), ranks)
    assert ring_by_hand(kind, 240, ranks) == [sent] * ranks


def test_a_call_takes_its_own_time_its_rounds_and_its_bytes_over_the_slowest_link() -> None:
    """4 ranks on 2 nodes: an all-reduce has 6 rounds, 2 of them between nodes, and sends 1.5 times its bytes."""
    network = Network(gpu_gbps=800, link_gbps=80, gpu_latency_us=1, link_latency_us=10, call_us=100)
    two_nodes, one_node = Cluster(nodes=2, gpus_per_node=2), Cluster(nodes=1, gpus_per_node=4)
    reduced = Collective(kind="all_reduce", num_bytes=100 * MB)
    assert seconds(reduced, two_nodes, network) == pytest.approx(100e-6 + 4e-6 + 20e-6 + 150 * MB / 10e9)
    assert seconds(reduced, one_node, network) == pytest.approx(100e-6 + 6e-6 + 150 * MB / 100e9)
    gathered = Collective(kind="all_gather", num_bytes=10 * MB, times=2)
    assert seconds(gathered, two_nodes, network) == pytest.approx(2 * (100e-6 + 2e-6 + 10e-6 + 30 * MB / 10e9))
    assert seconds(reduced, Cluster(nodes=1, gpus_per_node=1), network) == 0


def test_every_zero_stage_keeps_what_its_paper_says_and_deepspeeds_copy() -> None:
    """10^6 parameters on 4 ranks, AdamW, fp32: 4 MB whole, 1 MB a share."""
    kept = [memory(10**6, num_teacher=9 * 10**5, optimizer="adamw", stage=stage, ranks=4) for stage in range(4)]
    assert [m.parameters / MB for m in kept] == [4, 4, 4, 1]
    assert [m.gradients / MB for m in kept] == [4, 4, 1, 1]
    assert [m.optimizer / MB for m in kept] == [8, 3, 3, 3], "two moments; from stage 1 on a copy too"
    assert {m.teacher / MB for m in kept} == {3.6}, "ZeRO never sees the teacher"
    assert [m.total / MB for m in kept] == pytest.approx([19.6, 14.6, 11.6, 8.6])
    assert memory(10**6, num_teacher=0, optimizer="lars", stage=0, ranks=4).optimizer == 4 * MB
    with pytest.raises(ValueError, match="wanted an optimizer of adamw, lars, got muon"):
        memory(1, num_teacher=0, optimizer="muon", stage=0, ranks=1)


def test_stages_1_and_2_move_half_as_much_again_as_stages_0_and_3() -> None:
    def moved(stage: int, accumulation: int = 1, num_teacher: int = 0) -> float:
        every = zero_collectives(1000, 10, num_teacher=num_teacher, stage=stage, ranks=4, accumulation=accumulation)
        return sum(sent_bytes(one, 4) for one in every)

    assert [moved(stage) for stage in range(4)] == [6000, 9000, 9000, 6000]
    assert [moved(stage, accumulation=2) for stage in range(4)] == [6000, 9000, 15000, 12000]
    assert [moved(stage, num_teacher=1000) for stage in range(4)] == [6000, 9000, 9000, 9000], "stage 3 gathers for it"


def test_time_for_an_image_is_what_a_step_leaves_beside_its_communication() -> None:
    measured = Measured(step_s=0.5, cluster=Cluster(nodes=1, gpus_per_node=8), images=1024, stage=0)
    assert image_s(measured, 0.1) == pytest.approx(0.4 / 128)
    with pytest.raises(ValueError, match="give the links of the machine that it was measured on"):
        image_s(measured, 0.5)


def test_nodes_double_up_to_the_last() -> None:
    assert [doubled(nodes) for nodes in (1, 2, 6, 128)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64, 128]]


# --- against what two ranks really say ---

CASES: dict[str, tuple[tuple[str, ...], Path]] = {
    "moco-zero0": (TINY_MOCO, CONFIGS / "zero0.json"),
    "moco-zero1": (TINY_MOCO, CONFIGS / "zero1.json"),
    "moco-zero2": (TINY_MOCO, CONFIGS / "zero2.json"),
    "moco-accumulated": ((*TINY_MOCO, "optim.accumulation=2"), CONFIGS / "zero1.json"),
    "dino-probe": ((*TINY, DINO, "probe=true"), CONFIGS / "zero0.json"),
    "swav": ((*TINY, *SWAV), CONFIGS / "zero0.json"),
    "ibot": ((*TINY, *VIT, *OWN["ibot"][0]), CONFIGS / "zero0.json"),
    "msn": ((*TINY, *VIT, *OWN["msn"][0]), CONFIGS / "zero0.json"),
}


class Heard(TorchDispatchMode):
    """Counts collectives by operator and by the bytes that this rank brings."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and not name.startswith(("c10d.broadcast", "c10d.barrier")):
            kind = next(kind for kind in KINDS if kind.replace("_", "") in name.replace("_", ""))
            brought = args[0] if kind == "all_reduce" else args[1]
            flat = [brought] if isinstance(brought, torch.Tensor) else brought
            self.calls[kind, sum(t.numel() * t.element_size() for t in flat)] += 1
        return func(*args, **(kwargs or {}))


def overrides(case: str, data: Path, run_dir: Path) -> list[str]:
    """Nothing but steps may differ between a run of one epoch and a run of two."""
    quiet = ("run.checkpoint_every_epochs=9", "run.log_every_steps=99")
    return [*CASES[case][0], *LIVELY, *quiet, f"data.train={data / 'train.beton'}", f"run.dir={run_dir}"]


def hear_every_case(data: Path, out: Path) -> dict[str, Counter[tuple[str, int]]]:
    """On one rank: what the second epoch says, which is what a run of two epochs says more than a run of one."""
    from trainer.loop import pretrain

    def hear(case: str, epochs: int) -> Counter[tuple[str, int]]:
        settings = [*overrides(case, data, out / f"{case}-{epochs}"), f"optim.epochs={epochs}"]
        with Heard() as heard:
            pretrain(load_recipe(DEMO, settings), DEMO, CASES[case][1])
        return heard.calls

    return {case: hear(case, 2) - hear(case, 1) for case in CASES}


@pytest.fixture(scope="module")
def heard(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[tuple[str, int]]]:
    """Collectives of each case's second epoch, of 6 steps."""
    of_first, of_second = run_ranks(hear_every_case, synthetic, tmp_path_factory.mktemp("heard"), timeout_s=600)
    assert of_first == of_second, "ranks call the same collectives"
    found: dict[str, Counter[tuple[str, int]]] = of_first
    return found


def modelled(case: str, data: Path) -> tuple[Recipe, Step]:
    """The recipe of a case, and the model's idea of its step."""
    recipe = load_recipe(DEMO, [*overrides(case, data, data / case), "optim.epochs=2"])
    classes = 12 if recipe.probe else None
    method = build_method(recipe, num_classes=classes)
    return recipe, step_of(recipe, method, build_teacher(recipe, method), num_classes=classes)


@pytest.mark.parametrize("case", CASES)
def test_the_model_counts_the_bytes_that_two_ranks_move(
    case: str, heard: dict[str, Counter[tuple[str, int]]], synthetic: Path
) -> None:
    """BatchNorm's and the objective's call by call; DeepSpeed's in sum, as it pads groups and asks for overflows."""
    _, step = modelled(case, synthetic)
    stage = zero_stage(hjson.loads(CASES[case][1].read_text()))
    of_zero, norm, objective = step.collectives(stage, ranks=2, images=8)
    said: Counter[tuple[str, int]] = Counter()
    for one in (*norm, *objective):
        assert one.num_bytes == int(one.num_bytes)
        said[one.kind, int(one.num_bytes)] += 6 * int(one.times)
    assert not said - heard[case], "the model counts nothing that was not there"
    left = heard[case] - said
    moved = sum(sent_bytes(Collective(kind=kind, num_bytes=n, times=t), 2) for (kind, n), t in left.items())  # type: ignore[arg-type]
    assert moved == pytest.approx(6 * sum(sent_bytes(one, 2) for one in of_zero), rel=1e-3)
    assert sum(one.num_bytes for one in objective) > 0, "every method says something"


# --- the command ---


def table(output: str) -> list[list[str]]:
    """The cells of the scaling table's rows."""
    lines = output[output.index("On more nodes") :].splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_show_prints_every_stage_on_every_number_of_nodes(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["show", str(DEMO), *TINY_MOCO, f"data.train={synthetic / 'train.beton'}", "--images", "1"]
    command += ["--out", str(tmp_path / "sheet.png"), "--nodes", "8", "--gpus-per-node", "4"]
    assert main([*command, "--link-gbps", "10", "--step-time-s", "0.5"]) == 0
    output = capsys.readouterr().out
    rows = table(output)
    assert [row[:4] for row in rows[:4]] == [["1", "4", "4", str(stage)] for stage in range(4)]
    assert [row[1] for row in rows] == [*"4444", *"8888", *["16"] * 4, "32"]
    assert rows[-1][2:4] == ["uneven", ""], "16 images are none for each of 32"
    efficiencies = [float(row[-1].rstrip("%")) for row in rows[:12:4]]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert 0 < efficiencies[-1] < efficiencies[0] < 100

    assert main(command) == 0
    output = capsys.readouterr().out
    assert "efficiency needs a measured step" in " ".join(output.split())
    assert all(row[-1] == "" for row in table(output)[:12])


def test_a_measured_run_gives_its_own_time_and_only_for_its_own_networks(synthetic: Path, tmp_path: Path) -> None:
    recipe, _ = modelled("moco-zero0", synthetic)
    times = [9.0, 0.3, 0.1, 0.2]
    (tmp_path / "resolved.yaml").write_text(json.dumps(recipe.plain()))
    (tmp_path / "environment.json").write_text('{"world": 2}')
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "step_time_s": time}) + "\n" for step, time in enumerate(times))
    )
    measured = of_run(tmp_path, recipe)
    assert measured == Measured(step_s=0.2, cluster=Cluster(nodes=1, gpus_per_node=2), images=16, stage=1)
    other, _ = modelled("swav", synthetic)
    with pytest.raises(RecipeError, match="its method, teacher differ from the recipe's"):
        of_run(tmp_path, other)
    with pytest.raises(RecipeError, match="wanted a run directory"):
        of_run(tmp_path / "nothing", recipe)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--nodes", "0"), "--nodes and --gpus-per-node must be at least 1, got 0 and 8"),
        (("--nodes", "2", "--step-time-s", "1", "--measured", "run"), "give one of them"),
        (("--nodes", "2", "--link-gbps", "0"), "must be above 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(DEMO), *flags])
    assert complaint in capsys.readouterr().err
