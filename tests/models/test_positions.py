"""Vision transformers on several view sizes: equal to the published forward pass, written out in plain float64."""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.backbones import Backbone, build_backbone
from trainer.models.positions import resample

VIT = "vit_tiny_patch16_224"
SIZES = {"dynamic_img_size": True}


def bicubic_weights(old: int, new: int) -> Tensor:
    """(new, old): each new place's weights of the old ones; factor (new + 0.1) / old, a = -0.75, borders repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(j, 0), old - 1)] += kernel(place - j)
    return weights


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def vit_by_the_paper(state: dict[str, Tensor], image: Tensor, *, heads: int = 3) -> Tensor:
    """The published forward pass for one image (3, S, S): (D,) the class token after the last norm."""
    w = {key: value.double() for key, value in state.items()}
    side = image.shape[-1] // 16
    patches = F.unfold(image.double()[None], 16, stride=16)[0].T
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    grid = w["pos_embed"][0, 1:].view(14, 14, -1)
    if side != 14:
        grid = torch.einsum("ia,jb,abd->ijd", bicubic_weights(14, side), bicubic_weights(14, side), grid)
    x = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], x + grid.flatten(0, 1)])
    for i in range(12):
        p = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        qkv = norm(x, p["norm1.weight"], p["norm1.bias"]) @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        q, k, v = qkv.view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + attention.transpose(0, 1).flatten(1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        hidden = norm(x, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return norm(x, w["norm.weight"], w["norm.bias"])[0]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(Backbone(name=VIT, args=SIZES)).eval()


@pytest.mark.parametrize("size", [96, 128, 224])
def test_a_vit_equals_the_published_forward_at_every_view_size(vit: nn.Module, size: int) -> None:
    image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size))
    expected = vit_by_the_paper(vit.state_dict(), image)
    with torch.no_grad():
        assert torch.allclose(vit(image[None])[0].double(), expected, atol=2e-5)


def test_timms_own_resampling_differs_where_the_published_one_matters(vit: nn.Module) -> None:
    """The trap: with exact sizes and antialiasing a published ViT sees its locals with other positions."""
    plain = build_backbone(Backbone(name=VIT, pos_embed="timm", args=SIZES)).eval()
    plain.load_state_dict(vit.state_dict())
    for size, differs in ((96, True), (128, True), (224, False)):
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            assert torch.allclose(plain(image), vit(image), atol=1e-4) is not differs


def test_the_class_tokens_position_and_a_grid_of_the_same_size_stay_untouched() -> None:
    positions = torch.randn(1, 197, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample(positions, (14, 14), (6, 6))[:, 0], positions[:, 0])
    assert resample(positions, (14, 14), (14, 14)) is positions


def test_positions_learn_from_small_views_too() -> None:
    positions = torch.randn(1, 197, 5, requires_grad=True)
    resample(positions, (14, 14), (8, 8)).square().sum().backward()
    assert positions.grad is not None
    assert bool((positions.grad[0, 1:].abs().sum(-1) > 0).all())


def test_names_and_shapes_stay_timms_and_a_copy_resamples_too(vit: nn.Module) -> None:
    theirs = timm.create_model(VIT, num_classes=0)
    theirs.load_state_dict(vit.state_dict())
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(vit)(image), vit(image))


def test_a_network_whose_positions_the_published_code_does_not_know_is_refused() -> None:
    spec = Backbone(name="deit_tiny_distilled_patch16_224", args=SIZES)
    with pytest.raises(ValueError, match=r"VisionTransformerDistilled; set backbone\.pos_embed=timm"):
        build_backbone(spec)
