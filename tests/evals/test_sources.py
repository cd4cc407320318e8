"""Evaluating ready weights: their own settings, beside pixels and the untrained network, and clear refusals."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trainer import weights
from trainer.__main__ import main as trainer
from trainer.evals import knn
from trainer.evals.features import reader_of
from trainer.evals.sources import open_source
from trainer.models.backbones import Backbone, build_backbone
from trainer.recipe import RecipeError
from trainer.weights import WeightsError

TINY = Backbone(name="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8})
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def save(folder: Path, *branches: str, spec: Backbone = TINY) -> Path:
    for seed, branch in enumerate(branches):
        torch.manual_seed(100 + seed)
        weights.save_backbone(folder / branch, build_backbone(spec), spec, size=32, mean=MEAN, std=STD)
    return folder


def data(synthetic: Path) -> list[str]:
    paths = [f"data.{split}={synthetic / f'{split}.beton'}" for split in ("train", "val")]
    return [*paths, "evals.knn.size=32", "evals.knn.resize=32", "evals.knn.k=3"]


@pytest.mark.parametrize("named", ["", "student"], ids=["a folder of both", "one of them"])
def test_weights_are_evaluated_beside_pixels_and_the_untrained_network(
    named: str, synthetic: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "out", "student", "teacher") / named
    assert trainer(["evaluate", str(folder), "--protocol", "knn", *data(synthetic)]) == 0
    (path,) = (folder / "evals").glob("knn*.json")
    report = json.loads(path.read_text())
    assert list(report["results"]) == ["pixels", "untrained", "student", *([] if named else ["teacher"])]
    assert report["settings"]["k"] == 3
    assert report["step"] is None
    digest = weights.sha256(tmp_path / "out/student/model.safetensors")
    assert report["results"]["student"]["origin"] == f"sha256:{digest}"


def test_the_weights_own_normalisation_is_used(synthetic: Path, tmp_path: Path) -> None:
    views = open_source(save(tmp_path, "student"), "knn", data(synthetic)).recipe.views
    assert (views.mean, views.std) == (MEAN, STD)


def test_the_untrained_network_is_the_same_at_every_evaluation_and_not_the_trained_one(
    synthetic: Path, tmp_path: Path
) -> None:
    save(tmp_path, "student")
    first, second = (open_source(tmp_path, "knn", data(synthetic)).networks for _ in range(2))
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    untrained = [networks["untrained"].eval()(images) for networks in (first, second)]
    assert torch.equal(untrained[0], untrained[1])
    assert not torch.equal(untrained[0], first["student"].eval()(images))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "data.train: "),
        (["data.train=a", "evals.knn.temprature=1"], "evals.knn.temprature: unknown key; did you mean temperature?"),
        (["data.train=a", "optim.epochs=1"], "optim: unknown key"),
        (["data.train=a", "evals.knn.k=0"], "evals.knn.k must be at least 1"),
    ],
)
def test_settings_are_checked_as_a_recipes_are(overrides: Sequence[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said.replace(".", r"\.").replace("?", r"\?")):
        open_source(save(tmp_path, "student"), "knn", list(overrides))


def test_weights_that_do_not_take_the_evaluations_size_are_refused(synthetic: Path, tmp_path: Path) -> None:
    vit = Backbone(name="vit_tiny_patch16_224", args={"img_size": 48, "embed_dim": 12, "depth": 1})
    with pytest.raises(RecipeError, match=r"does not take views of 32 px .*evals\.knn\.size"):
        open_source(save(tmp_path, "student", spec=vit), "knn", data(synthetic))


def test_folders_of_different_networks_are_not_evaluated_together(synthetic: Path, tmp_path: Path) -> None:
    save(tmp_path, "student")
    save(tmp_path, "other", spec=Backbone(name="mobilenetv3_small_050"))
    with pytest.raises(RecipeError, match="name one folder of it"):
        open_source(tmp_path, "knn", data(synthetic))


def test_what_is_neither_run_nor_weights_nor_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"wanted the run\.dir of a .*, a weights folder, or a timm name"):
        open_source(tmp_path / "nothing", "knn", [])


def test_a_network_without_weights_at_timm_is_refused() -> None:
    with pytest.raises(RecipeError, match="timm has no weights for it"):
        open_source(Path("vit_giant_patch14_224"), "knn", ["data.train=a"])


def test_results_on_one_data_set_do_not_replace_those_on_another(synthetic: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "out", "student")
    for train in ("train", "val"):
        images = [f"data.train={synthetic / train}.beton", *data(synthetic)[1:]]
        assert trainer(["evaluate", str(folder), "--protocol", "knn", *images]) == 0
    reports = [json.loads(path.read_text()) for path in sorted((folder / "evals").glob("knn-*.json"))]
    assert [Path(each["data"]["train"]["path"]).name for each in reports] == ["train.beton", "val.beton"]


def test_a_second_evaluation_loses_nothing_of_the_first(synthetic: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "out", "student")
    command = ["evaluate", str(folder), "--protocol", "knn", *data(synthetic)]
    assert trainer([*command, "--networks", "student"]) == 0
    (path,) = (folder / "evals").glob("knn-*")
    student = json.loads(path.read_text())["results"]["student"]
    assert trainer([*command, "--networks", "untrained"]) == 0
    both = json.loads(path.read_text())["results"]
    assert set(both) == {"student", "untrained"}, "all else is equal, so they stand side by side"
    assert both["student"] == student
    assert trainer([*command, "--networks", "untrained", "evals.knn.k=4"]) == 0
    assert set(json.loads(path.read_text())["results"]) == {"untrained"}
    assert json.loads(path.with_suffix(".1.old").read_text())["results"] == both
    save(folder, "student", "student")
    assert trainer([*command, "--networks", "student", "evals.knn.k=4"]) == 0
    of_then = json.loads(path.read_text())["results"]
    assert set(of_then) == {"untrained", "student"}
    save(folder, "student")
    assert trainer([*command, "--networks", "untrained", "evals.knn.k=4"]) == 0
    assert set(json.loads(path.read_text())["results"]) == {"untrained"}, "the student of then had other weights"
    assert json.loads(path.with_suffix(".2.old").read_text())["results"] == of_then


def test_by_default_the_student_is_trained_whatever_lies_beside_it(synthetic: Path, tmp_path: Path) -> None:
    source = open_source(save(tmp_path, "gated", "sliced_50", "student", "teacher"), "finetune", data(synthetic))
    assert source.default == "student"
    assert open_source(tmp_path / "teacher", "finetune", data(synthetic)).default == "teacher"


@pytest.mark.parametrize(
    ("protocol", "options", "said"),
    [
        ("linear", ["--networks", "untrained,pixels"], "linear trains networks, and pixels are none"),
        ("linear", ["evals.linear.global_batch=97"], "96 train images make no batch of 97; lower global_batch"),
        ("linear_online", ["--networks", "untrained"], "linear_online is of the student alone"),
        ("knn", ["evals.knn.k=97"], "evals.knn.k is 97, and there are 96 train images; lower it"),
    ],
)
def test_what_a_protocol_cannot_do_is_said(
    protocol: str, options: list[str], said: str, synthetic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, "student")
    assert trainer(["evaluate", str(folder), "--protocol", protocol, *data(synthetic), *options]) == 2
    assert said in caplog.text


def test_a_damaged_head_is_named(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    for read in (weights.load_head, weights.spec_of_head):
        with pytest.raises(WeightsError, match=r"head\.safetensors: wanted safetensors, got a damaged file"):
            read(tmp_path)


def test_a_run_copied_without_its_checkpoints_says_what_is_missing(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "recipes/smoke/moco_demo.yaml"
    (tmp_path / "resolved.yaml").write_text(demo.read_text())
    save(tmp_path / "weights", "student")
    with pytest.raises(RecipeError, match=r"no checkpoints/latest, .* or evaluate .*weights alone"):
        open_source(tmp_path, "knn", ["data.train=a", f"run.dir={tmp_path}"])


@pytest.mark.parametrize(
    ("name", "said"), [("model.safetensors", "wanted safetensors"), ("config.json", "wanted JSON")]
)
def test_a_damaged_file_is_named(name: str, said: str, synthetic: Path, tmp_path: Path) -> None:
    path = save(tmp_path, "student") / "student" / name
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(WeightsError, match=f"{name}: {said}, got a damaged file"):
        open_source(tmp_path, "knn", data(synthetic))


def test_another_protocols_settings_do_not_start_a_stopped_training_anew(synthetic: Path, tmp_path: Path) -> None:
    folder = save(tmp_path, "student")
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def resumed(settings: dict[str, object], *overrides: str) -> int:
        source = open_source(folder, "finetune", [*data(synthetic), *overrides])
        kept = source.resumable("student", 0, settings)
        step, _ = kept.restore(module, optimizer)
        kept.save(7, [])
        return step

    assert resumed({"epochs": 9}) == 0, "there is nothing yet"
    others = ("evals.knn.every_epochs=3", "evals.lowshot.splits=2", "evals.linear.epochs=3", "views.mean=[0.4,0.5,0.6]")
    assert resumed({"epochs": 9}, *others) == 7
    assert resumed({"epochs": 8}) == 0
    assert resumed({"epochs": 8}, "views.mean=[0.1,0.5,0.6]") == 0, "other pixels make another training"


def test_bfloat16_is_stated_and_changes_features_by_its_rounding(synthetic: Path, tmp_path: Path) -> None:
    folder, settings, results = save(tmp_path, "student"), [], []
    for precision in ((), ("evals.bf16=true",)):
        source = open_source(folder, "knn", [*data(synthetic), *precision])
        stated, _ = knn.run(source)
        settings.append(stated)
        reader = reader_of(source.recipe, torch.device("cpu"))
        results.append(reader.features(source.networks, source.recipe.data.train)["student"].vectors)
    assert "bf16" not in settings[0], "reports of before say as much"
    assert settings[1] == settings[0] | {"bf16": True}
    assert results[1].dtype == torch.float32
    assert not torch.equal(*results)
    assert torch.cosine_similarity(*results).min() > 0.999
