"""`trainer slice`: from a gated run to a folder that is evaluated as any other, and clear refusals."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from tests.launch import DEMO, TINY
from tests.test_onnx_files import save
from trainer import weights
from trainer.__main__ import main as trainer
from trainer.models.gating import cost_at
from trainer.recipe_file import load_recipe
from trainer.slimming import agreement, parse_rule, slice_run
from trainer.weights import WeightsError

ARGS = "backbone.args={layers: [1, 1, 1, 1], channels: [32, 32, 32, 32]}"
GATED = ("method={name: vicreg, hidden_dim: 32, out_dim: 32}", "teacher={kind: none}", "views.local_views.count=0")
GATES = "backbone.gates={target: 0.75, initial_bias: 0.0}"


@pytest.fixture(scope="module")
def run(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished gated run leaves, with the weights of the first step."""
    folder = tmp_path_factory.mktemp("slice") / "run"
    paths = [f"data.train={synthetic / 'train.beton'}", f"data.val={synthetic / 'val.beton'}", f"run.dir={folder}"]
    recipe = load_recipe(DEMO, [*TINY, *GATED, GATES, ARGS, *paths])
    save(folder / "weights/gated", recipe.backbone)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/latest").write_text("step_0000001")
    (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe.plain()))
    return folder


def cut(run: Path, *options: str) -> int:
    return trainer(["slice", str(run), "--images", "48", *options])


def test_a_sliced_network_meets_its_budget_says_so_and_is_evaluated_beside_the_gated_one(run: Path) -> None:
    assert cut(run, "--keep", "budget=0.7", "--multiple", "4") == 0
    folder = run / "weights/sliced_budget_0.7"
    report = json.loads((folder / "slice.json").read_text())
    network, config = weights.load_backbone(folder)
    gated, _ = weights.load_backbone(run / "weights/gated")
    cost = cost_at(gated, load_recipe(run / "resolved.yaml").evals.knn.size)
    assert all(width % 4 == 0 for width in config["widths"].values())
    assert report["macs"]["sliced"] == cost.open_macs(torch.tensor(list(config["widths"].values()))).item()
    assert 0.6 < report["macs"]["sliced_share"] <= 0.7
    assert report["parameters"]["sliced"] == sum(each.numel() for each in network.parameters())
    assert report["data"]["images"] == 48
    assert trainer(["evaluate", str(run), "--protocol", "knn", "evals.knn.k=3"]) == 0
    (evaluated,) = (run / "evals").glob("knn-*.json")
    assert {"gated", "sliced_budget_0.7"} <= set(json.loads(evaluated.read_text())["results"])


def test_a_sliced_folder_is_evaluated_alone_beside_an_untrained_network_as_narrow(
    run: Path, synthetic: Path, tmp_path: Path
) -> None:
    from trainer.evals.sources import open_source

    assert cut(run, "--keep", "threshold=0.5", "--out", str(tmp_path / "small")) == 0
    networks = open_source(tmp_path / "small", "knn", [f"data.train={synthetic / 'train.beton'}"]).networks
    shapes = [[each.shape for each in networks[name].parameters()] for name in ("untrained", "small")]
    assert shapes[0] == shapes[1]


def test_repair_is_done_where_features_come_nearer_to_hard_gates(run: Path, tmp_path: Path) -> None:
    """With all channels that ever open, for all images, the statistics of gated passes fit no norm behind them."""
    for repair in ("auto", "never", "always"):
        out = slice_run(run, tmp_path / repair, parse_rule("safe"), [], num_images=48, repair=repair)  # type: ignore[arg-type]
        found = json.loads((out / "slice.json").read_text())["repair"]
        better = found["agreement"]["repaired"] > found["agreement"]["as_cut"]
        assert found["done"] == {"auto": better, "never": False, "always": True}[repair]
    never, always = (weights.load_backbone(tmp_path / repair)[0].state_dict() for repair in ("never", "always"))
    changed = {name for name, value in never.items() if not torch.equal(value, always[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    assert not any(name.startswith("bn1.") for name in changed), "the stem's norm stands before all gates"


def test_agreement_is_1_whatever_the_mean_and_scale() -> None:
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert agreement(3 * features + 2, features) == pytest.approx(1)
    assert agreement(-features, features) == pytest.approx(-1)


def test_a_safe_cut_keeps_whatever_opened_once(run: Path, tmp_path: Path) -> None:
    out = slice_run(run, tmp_path / "safe", parse_rule("safe"), [], num_images=48)
    report = json.loads((out / "slice.json").read_text())
    assert report["channels"]["kept"] == report["channels"]["gated"] - report["channels"]["never_open"]
    assert report["channels"]["never_open"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "budget=0.01"], "one channel in each gate costs"),
        (["--keep", "budget=30"], "wanted safe, threshold=SHARE or budget=SHARE"),
        (["--keep", "most"], "wanted safe, threshold=SHARE or budget=SHARE"),
        (["--keep", "safe", "data.trian=x"], "did you mean train?"),
    ],
)
def test_faults_are_told(
    options: Sequence[str], said: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cut(run, "--out", str(tmp_path / "out"), *options) == 2
    assert said in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "something").write_text("of value")
    with pytest.raises(WeightsError, match="new or empty folder"):
        slice_run(run, tmp_path, parse_rule("safe"), [], num_images=8)


def test_a_run_without_gates_and_what_is_no_run_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"wanted the run\.dir of a"):
        slice_run(tmp_path, None, parse_rule("safe"), [], num_images=8)
    plain = yaml.safe_load((run / "resolved.yaml").read_text())
    plain["backbone"]["gates"] = None
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(WeightsError, match="trained without gates"):
        slice_run(tmp_path, None, parse_rule("safe"), [], num_images=8)
    shutil.copy(run / "resolved.yaml", tmp_path / "resolved.yaml")
    with pytest.raises(WeightsError, match="no weights yet"):
        slice_run(tmp_path, None, parse_rule("safe"), [], num_images=8)
