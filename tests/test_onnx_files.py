"""ONNX files say what torch says: of dense, gated and dynamic networks, for batches of any size where there are any."""

import dataclasses
import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from tests.models.test_gating import SETTINGS, images
from trainer import onnx_files, weights
from trainer.__main__ import main as trainer
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.gating import gated_pass

ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16], "stem_width": 8}
TINY = Backbone(name="resnet18", args=ARGS, gates=SETTINGS)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def save(folder: Path, spec: Backbone) -> nn.Module:
    """A weights folder as a run writes it, of a network whose norms have seen images."""
    torch.manual_seed(0)
    network = build_backbone(spec).train()
    network(images(8))
    if spec.gates is not None:
        gated_pass(network, images(8, 2), "sampled")
    weights.save_backbone(folder, network, spec, size=32, mean=MEAN, std=STD)
    if spec.gates is not None:
        config = json.loads((folder / "config.json").read_text()) | {"gates": dataclasses.asdict(spec.gates)}
        (folder / "config.json").write_text(json.dumps(config))
    return network.eval()


def test_the_file_of_a_gated_network_runs_with_hard_gates_at_any_batch_size(tmp_path: Path) -> None:
    network, file = save(tmp_path / "gated", TINY), tmp_path / "gated.onnx"
    assert trainer(["export", str(tmp_path / "gated"), str(file), "--to", "onnx"]) == 0
    session = onnx_files.session_of(file)
    for batch in (1, 5):
        wanted = gated_pass(network, images(batch, 3), "hard").features
        assert torch.allclose(onnx_files.run(session, images(batch, 3)), wanted, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["mean"] == str(list(MEAN))
    assert facts["weights_sha256"] == weights.sha256(tmp_path / "gated/model.safetensors")


def test_the_dynamic_file_decides_image_by_image_and_takes_one(tmp_path: Path) -> None:
    network, file = save(tmp_path / "gated", TINY), tmp_path / "dynamic.onnx"
    assert trainer(["export", str(tmp_path / "gated"), str(file), "--to", "onnx-dynamic"]) == 0
    session = onnx_files.session_of(file)
    opened = set()
    for image in images(6, 3).split(1):
        found = gated_pass(network, image, "hard")
        opened.add(tuple(opening.mask.sum().item() for opening in found.openings))
        assert torch.allclose(onnx_files.run(session, image), found.features, atol=1e-5)
    assert len(opened) > 1, "or a file that always opens the same would pass"
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        onnx_files.run(session, images(2))


def test_a_file_that_says_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "dense", dataclasses.replace(TINY, gates=None))
    monkeypatch.setattr(onnx_files, "TOLERANCE", -1.0)
    with pytest.raises(weights.WeightsError, match="not kept"):
        onnx_files.export_onnx(tmp_path / "dense", tmp_path / "out/dense.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_dynamic_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "dense", dataclasses.replace(TINY, gates=None))
    save(tmp_path / "mobile", dataclasses.replace(TINY, name="mobilenetv2_035", args={}))
    for folder, said in (("dense", "no gates"), ("mobile", "depth-wise")):
        with pytest.raises(weights.WeightsError, match=said):
            onnx_files.export_onnx(tmp_path / folder, tmp_path / "x.onnx", dynamic=True)


@pytest.mark.parametrize("options", [["--to", "sslight", "--size", "64"], ["--to", "onnx", "--size", "0"]])
def test_a_size_is_for_onnx_files_and_at_least_1(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(["export", "run", "file", *options])
    assert "--size is the pixels" in capsys.readouterr().err
