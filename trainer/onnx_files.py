"""`trainer export --to onnx`: a weights folder as one ONNX file, which is kept only if it says what torch says."""

import logging
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from trainer import weights
from trainer.models.dynamic import OpenConvolution, dynamic_network
from trainer.models.gating import is_gated
from trainer.weights import WeightsError

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Of the largest feature."""


def export_onnx(source: Path, file: Path, *, dynamic: bool = False, size: int | None = None) -> None:
    """Write images (B, 3, S, S), normalised, -> features (B, num_features) as an ONNX file with a free batch size.

    source: a weights folder, or a run, of which it takes the student; a gated network masks by hard gates
    dynamic: of a gated network the form that computes open channels only; its batch size is 1
    size: S; by default the one that the folder's config names
    raises: WeightsError if there are no such weights, or the file's features differ from torch's
    """
    folder = source / "weights" / "student" if (source / "resolved.yaml").is_file() else source
    network, config = weights.load_backbone(folder)
    mean, std = weights.normalisation(folder, config)
    side = size or int(config["pretrained_cfg"]["input_size"][-1])
    if dynamic and not is_gated(network):
        raise WeightsError(f"{folder}: no gates to decide image by image; wanted a run's weights/gated, or --to onnx")
    network = dynamic_network(network) if dynamic else network.eval()
    if any(isinstance(layer, OpenConvolution) and layer.depth_wise for layer in network.modules()):
        raise WeightsError(f"{folder}: ONNX fixes the groups of depth-wise convolutions; wanted a ResNet, or --to onnx")
    facts = {"architecture": config["architecture"], "mean": str(list(mean)), "std": str(list(std))}
    facts["weights_sha256"] = weights.sha256(folder / weights.MODEL)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write(network, temporary, size=side, free_batch=not dynamic, facts=facts)
        difference = largest_difference(network, temporary, size=side, batches=(1,) if dynamic else (1, 3))
        if not difference <= TOLERANCE:
            raise WeightsError(
                f"{file}: not kept, as ONNX Runtime's features are off by {difference:.1e} of the largest"
            )
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    form = "batch size 1" if dynamic else "any batch size"
    log.info("written to %s: %s, %s, %d px, within %.0e of torch", file, folder, form, side, difference)


def write(network: nn.Module, path: Path, *, size: int, free_batch: bool, facts: dict[str, str]) -> None:
    """Export a network in eval mode; `facts` become the file's metadata."""
    batch = {0: torch.export.Dim("batch")} if free_batch else None
    # Of an example with one image, a free batch size would be taken for always 1.
    example = torch.zeros(2 if free_batch else 1, 3, size, size)
    program = torch.onnx.export(
        network, (example,), dynamo=True, dynamic_shapes=(batch,), input_names=["images"], output_names=["features"],
        verbose=False,
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


@torch.no_grad()
def largest_difference(network: nn.Module, path: Path, *, size: int, batches: tuple[int, ...]) -> float:
    """Between a network and its file in ONNX Runtime, over random images, as a share of the largest feature."""
    session = session_of(path)
    generator = torch.Generator().manual_seed(0)
    each = [torch.randn(batch, 3, size, size, generator=generator) for batch in batches]
    return max(_off(run(session, images), network(images)) for images in each)


def _off(features: Tensor, wanted: Tensor) -> float:
    return float((features - wanted).abs().max() / wanted.abs().max())


def session_of(path: Path, *, num_threads: int | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU; with its own number of threads by default."""
    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    """Features of images (B, 3, S, S)."""
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
