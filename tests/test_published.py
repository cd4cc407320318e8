"""Checkpoints of the published code: every tensor checked when read, written so that its own loaders read them."""

import copy
import json
import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from torch import Tensor, nn

from tests.launch import DEMO, TINY_MOCO
from trainer import weights
from trainer.__main__ import main as trainer
from trainer.assemble import build_method
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import num_features
from trainer.models.heads import DINOHead, MoCoHead
from trainer.published import import_weights, read
from trainer.recipe_file import load_recipe
from trainer.run_state import RunState
from trainer.weights import WeightsError


def encoder_of(name: str) -> nn.Module:
    """The published encoders have torchvision's layers and names."""
    if name == "mobilenetv2_100":
        return torchvision.models.mobilenet_v2().features
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])


def randomised(module: nn.Module) -> nn.Module:
    """Other values in every tensor, running statistics too, as after training."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator), alpha=0.05)
        else:
            value.add_(7)
    return module


class Published(nn.Module):
    """What the published trainer saves: the branches with backbone and head, and the joint probe."""

    def __init__(self, names: Sequence[str], backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        for shift, name in enumerate(names):
            branch = nn.Module()
            branch.backbone, branch.head = copy.deepcopy(backbone), copy.deepcopy(head)
            with torch.no_grad():
                for parameter in branch.parameters():
                    parameter.add_(0.01 * shift)
            self.add_module(name, branch)
        self.classifier = nn.Linear(8, 10)


def cnn(name: str) -> nn.Module:
    backbone = nn.Module()
    backbone.encoder = randomised(encoder_of(name))
    return backbone


def dino_head(embed_dim: int, *, norm: bool = True) -> nn.Module:
    return DINOHead(embed_dim, hidden_dim=16, bottleneck_dim=8, num_prototypes=12, norm=norm, train_gain=False)


def dino_mobilenet() -> Published:
    return Published(("student", "teacher"), cnn("mobilenetv2_100"), randomised(dino_head(1280)))


def moco_resnet() -> Published:
    method = Published(("encoder_q", "encoder_k"), cnn("resnet18"), MoCoHead(512, hidden_dim=16, out_dim=8))
    method.register_buffer("queue", torch.randn(8, 32))
    method.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return method


def swav_mobilenet() -> Published:
    head = nn.Module()
    head.projection, head.prototypes = MoCoHead(1280, hidden_dim=16, out_dim=8), nn.Linear(8, 20, bias=False)
    return Published(("network",), cnn("mobilenetv2_100"), head)


def dino_vit() -> Published:
    vit = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    return Published(("student", "teacher"), vit, dino_head(192, norm=False))


@pytest.fixture
def config_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class derived from dict in a module that whoever reads the file does not have."""
    module = ModuleType("fvcore.common.config")
    kind = type("CfgNode", (dict,), {"__module__": module.__name__})
    module.CfgNode = kind  # type: ignore[attr-defined]
    for name in ("fvcore", "fvcore.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return kind


def save(path: Path, method: nn.Module, config: Any, **extra: Any) -> dict[str, Tensor]:
    state = OrderedDict((f"module.{key}", value) for key, value in method.state_dict().items())
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(
        {"config": config, "epoch": 200, "steps": 250_200, "state_dict": state, "optimizer": optimizer} | extra, path
    )
    return state


@pytest.mark.parametrize(
    ("make", "method", "architecture", "branches"),
    [
        (dino_mobilenet, "dino", "mobilenetv2_100", {"student": "student", "teacher": "teacher"}),
        (moco_resnet, "moco", "resnet18", {"student": "encoder_q", "teacher": "encoder_k"}),
        (swav_mobilenet, "swav", "mobilenetv2_100", {"student": "network"}),
        (dino_vit, "dino", "vit_tiny_patch16_224", {"student": "student", "teacher": "teacher"}),
    ],
    ids=["dino", "moco", "swav", "vit"],
)
def test_a_published_checkpoint_goes_into_timm_bit_for_bit_and_back(
    make: Callable[[], Published],
    method: str,
    architecture: str,
    branches: dict[str, str],
    tmp_path: Path,
    config_class: type,
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    state = save(
        tmp_path / "a.pth.tar",
        model,
        config_class(MODEL=config_class(BACKBONE_ARCH="x")),
        loss={"center": torch.zeros(1, 12)},
    )
    assert trainer(["import-weights", str(tmp_path / "a.pth.tar"), str(tmp_path / "out")]) == 0
    assert {path.parent.name for path in (tmp_path / "out").glob("*/model.safetensors")} == set(branches)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for ours, theirs in branches.items():
        backbone = model.get_submodule(f"{theirs}.backbone")
        network, config = weights.load_backbone(tmp_path / "out" / ours)
        assert config["architecture"] == architecture
        with torch.no_grad():
            expected = backbone.encoder(image).mean((2, 3)) if hasattr(backbone, "encoder") else backbone(image)
            assert torch.allclose(network.eval()(image), expected, atol=1e-6)
        plain = timm.create_model(f"local-dir:{tmp_path / 'out' / ours}", pretrained=True)
        assert all(
            torch.equal(a, b) for a, b in zip(plain.state_dict().values(), network.state_dict().values(), strict=True)
        )

    assert trainer(["export", str(tmp_path / "out"), str(tmp_path / "b.pth.tar"), "--to", "sslight"]) == 0
    back = torch.load(tmp_path / "b.pth.tar", weights_only=True)
    assert (back["epoch"], back["steps"]) == (200, 250_200)
    kept = {key: value for key, value in state.items() if ".backbone." in key or ".head." in key}
    assert list(back["state_dict"]) == list(kept)
    assert all(torch.equal(back["state_dict"][key], value) for key, value in kept.items())


def published_loader(path: Path, prefix: str, model_keys: list[str], head: Sequence[str] = ()) -> dict[str, Tensor]:
    """As the published code reads: keys that contain a prefix, in the file's order, mapped by position."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    chosen = [value for key, value in state.items() if prefix in key or any(part in key for part in head)]
    return dict(zip(model_keys, chosen, strict=True))


def state_of(method: Method) -> RunState:
    """What a checkpoint holds of a method before its first step."""
    whole = method.state_dict()
    teacher = EMATeacher(method.student).state_dict()
    return RunState(0, [{"names": list(whole), "method": whole, "teacher": teacher, "pieces": {}}])


def test_the_published_loaders_read_a_run_of_ours(tmp_path: Path) -> None:
    """The encoder for linear evaluation; encoder and the head's first two layers for fine-tuning."""
    dino = ["backbone.name=resnet18", "method.hidden_dim=16", "method.num_prototypes=12", "data.train=none"]
    recipe = load_recipe(DEMO.parent / "dino_sslight.yaml", [*dino, "backbone.args={}", f"run.dir={tmp_path}"])
    method = build_method(recipe)
    weights.save(tmp_path, recipe, state_of(method), num_features=num_features(method.student.backbone))
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.plain()))
    assert trainer(["export", str(tmp_path), str(tmp_path / "ours.pth.tar"), "--to", "sslight"]) == 0

    theirs = encoder_of("resnet18")
    loaded = published_loader(tmp_path / "ours.pth.tar", "module.student.backbone.encoder", list(theirs.state_dict()))
    theirs.load_state_dict(loaded)
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(image).mean((2, 3)), method.student.backbone.eval()(image))

    layers = nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    wanted = [f"module.student.head.mlp.{i}" for i in (0, 1, 3, 4)]
    layers.load_state_dict(published_loader(tmp_path / "ours.pth.tar", "nothing", list(layers.state_dict()), wanted))
    mine = method.student.head.get_submodule("mlp").state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in layers.state_dict().items())


def test_a_network_that_the_published_code_does_not_know_is_not_exported(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, [*TINY_MOCO, "data.train=none", f"run.dir={tmp_path}"])
    method = build_method(recipe)
    weights.save(tmp_path, recipe, state_of(method), num_features=num_features(method.student.backbone))
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.plain()))
    assert trainer(["export", str(tmp_path), str(tmp_path / "ours.pth.tar"), "--to", "sslight"]) == 2
    assert not (tmp_path / "ours.pth.tar").exists()


@pytest.fixture(scope="module")
def sound() -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in dino_mobilenet().state_dict().items()}


def swap(state: dict[str, Tensor], a: str, b: str) -> None:
    """The two entries change places, as another order of the modules would have it."""
    items = [(b if key == a else a if key == b else key, value) for key, value in state.items()]
    positions = {key: state[key] for key, _ in items}
    state.clear()
    state.update(positions)


def change(state: dict[str, Tensor], damage: str) -> None:
    """Damage a checkpoint's student in one way."""
    first = "module.student.backbone.encoder."
    if damage == "a tensor is missing":
        del state[first + "18.1.running_var"]
    elif damage == "a tensor too many":
        state[first + "19.weight"] = torch.zeros(3)
    elif damage == "another shape":
        state[first + "0.0.weight"] = torch.zeros(16, 3, 3, 3)
    elif damage == "two tensors of a norm have changed places":
        swap(state, first + "0.1.running_mean", first + "0.1.running_var")
    elif damage == "negative variances":
        state[first + "0.1.running_var"] = -torch.ones(32)
    elif damage == "not finite":
        state[first + "0.0.weight"] = torch.full((32, 3, 3, 3), float("nan"))
    elif damage == "a tensor that has no place":
        state["module.predictor.weight"] = torch.zeros(3)
    elif damage == "another branch":
        for key in [key for key in state if key.startswith("module.teacher.")]:
            state["module.momentum_teacher." + key.removeprefix("module.teacher.")] = state.pop(key)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("a tensor is missing", "wanted 312 tensors, got 311"),
        ("a tensor too many", "wanted 312 tensors, got 313; the first without a partner is 19.weight"),
        ("another shape", r"tensor 0: wanted conv_stem.weight \(32, 3, 3, 3\).*got 0.0.weight \(16, 3, 3, 3\)"),
        ("two tensors of a norm have changed places", "wanted bn1.running_mean, got 0.1.running_var"),
        ("negative variances", "variances below 0"),
        ("not finite", "0.0.weight holds values that are not finite"),
        ("a tensor that has no place", "predictor.weight has no place"),
        ("another branch", r"wanted student \+ teacher \(dino\) or .*; the file has momentum_teacher, student"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    damage: str, said: str, sound: dict[str, Tensor], tmp_path: Path
) -> None:
    state = OrderedDict(sound)
    change(state, damage)
    torch.save({"state_dict": state, "epoch": 1, "steps": 1}, tmp_path / "a.pth.tar")
    with pytest.raises(WeightsError, match=said):
        import_weights(tmp_path / "a.pth.tar", tmp_path / "out", "mobilenetv2_100")
    assert not (tmp_path / "out").exists()


def test_an_unknown_network_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    method = Published(("student", "teacher"), nn.Linear(3, 3), nn.Linear(3, 3))
    save(tmp_path / "a.pth.tar", method, {})
    with pytest.raises(WeightsError, match=r"its 2 backbone tensors fit none of mobilenetv2_100 \(312\), .*--backbone"):
        import_weights(tmp_path / "a.pth.tar", tmp_path / "out")


class Hostile:
    """Calls a function when it is unpickled in the usual way."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("where", ["config", "state_dict", "loss"])
@pytest.mark.parametrize("function", [os.mkdir, eval, exec])
def test_no_code_of_a_hostile_file_runs(where: str, function: Callable[..., Any], tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    call = Hostile(function, str(trap) if function is os.mkdir else f"__import__('os').mkdir({str(trap)!r})")
    tree: dict[str, Any] = {"config": {}, "epoch": 1, "steps": 1, "state_dict": {}, "loss": {}}
    tree[where] = call if where == "config" else {"center": call}
    torch.save(tree, tmp_path / "a.pth.tar")
    with pytest.raises(WeightsError, match="wanted"):
        read(tmp_path / "a.pth.tar")
    assert not trap.exists()
    torch.load(tmp_path / "a.pth.tar", weights_only=False)
    assert trap.exists(), "the trap is real"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no_zip.pth.tar"
    path.write_text("no zip")
    with pytest.raises(WeightsError, match=r"no_zip\.pth\.tar: wanted a checkpoint"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(WeightsError, match="TorchScript"):
        read(path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="a dict with a `state_dict`"):
        read(path)


def test_weights_are_never_written_over_others(tmp_path: Path) -> None:
    (tmp_path / "out/student").mkdir(parents=True)
    with pytest.raises(WeightsError, match="wanted a new or empty folder"):
        import_weights(tmp_path / "a.pth.tar", tmp_path / "out")


def test_a_published_file_is_evaluated_as_the_folder_that_it_is_imported_into_once(
    tmp_path: Path, synthetic: Path, config_class: type
) -> None:
    torch.manual_seed(0)
    save(tmp_path / "moco.pth.tar", moco_resnet(), config_class())
    images = [f"data.{split}={synthetic / split}.beton" for split in ("train", "val")]
    command = ["evaluate", str(tmp_path / "moco.pth.tar"), "--protocol", "knn", *images]
    for _ in range(2):
        assert trainer([*command, "evals.knn.size=32", "evals.knn.resize=32", "evals.knn.k=3"]) == 0
    results = json.loads((tmp_path / "moco.weights/evals/knn.json").read_text())["results"]
    assert list(results) == ["pixels", "untrained", "student", "teacher"]
