"""BatchNorm over ranks: two ranks with half the batch each must equal one rank with all of it."""

import timm
import torch
from torch import Tensor, nn

from tests.spawn import run_ranks
from trainer import distributed
from trainer.models.norm import SyncBatchNorm

SHAPES = [(6, 5, 4, 3), (6, 5)]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows with a large mean, where a variance by differences of squares would lose its digits; and a gradient."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) + 100, torch.randn(shape, generator=generator)


def layer(features: int) -> nn.BatchNorm2d | nn.BatchNorm1d:
    norm = nn.BatchNorm2d(features)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, features))
        norm.bias.copy_(torch.linspace(-1, 1, features))
    return norm


def forward_and_backward(norm: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, input gradient, parameter gradients, running statistics."""
    x = x.clone().requires_grad_()
    output = norm(x)
    output.backward(gradient)
    grads = [x.grad, norm.weight.grad, norm.bias.grad]
    return [t.detach() for t in (output, *grads, norm.running_mean, norm.running_var) if t is not None]


def on_uneven_share(shape: tuple[int, ...]) -> list[list[float]]:
    """Rank 0 gets two rows, rank 1 four."""
    x, gradient = inputs(shape)
    mine = slice(0, 2) if distributed.rank() == 0 else slice(2, 6)
    norm = SyncBatchNorm.convert(layer(shape[1]))
    assert isinstance(norm, SyncBatchNorm)
    return [t.flatten().tolist() for t in forward_and_backward(norm, x[mine], gradient[mine])]


def test_two_ranks_equal_one_with_the_whole_batch_forward_and_backward() -> None:
    shape = SHAPES[0]
    first, second = run_ranks(on_uneven_share, shape)
    whole = forward_and_backward(layer(shape[1]), *inputs(shape))
    rows = [torch.tensor(first[i] + second[i]) for i in (0, 1)]  # output and input gradient: rows of both ranks
    sums = [torch.tensor(first[i]) + torch.tensor(second[i]) for i in (2, 3)]  # parameter gradients: their sum
    stats = [torch.tensor(first[i]) for i in (4, 5)]
    for ours, theirs in zip(rows + sums + stats, whole, strict=True):
        assert torch.allclose(ours, theirs.flatten(), rtol=1e-4, atol=1e-4), (ours - theirs.flatten()).abs().max()
    assert first[4:] == second[4:], "running statistics must be equal to the bit on all ranks"


def test_alone_it_is_batchnorm_for_vectors_and_maps() -> None:
    for shape in SHAPES:
        x, gradient = inputs(shape)
        reference = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
        converted = SyncBatchNorm.convert(type(reference)(shape[1]))
        for ours, theirs in zip(
            forward_and_backward(converted, x, gradient), forward_and_backward(reference, x, gradient), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_conversion_keeps_a_fused_activation_and_every_state_dict_key() -> None:
    network = timm.create_model("mobilenetv2_100", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    keys, before = list(network.state_dict()), network(images)
    converted = SyncBatchNorm.convert(network)
    assert list(converted.state_dict()) == keys
    assert torch.equal(converted(images), before)
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
