"""Tokens of vision transformers: timm's own where nothing is hidden, and exactly what is meant where something is."""

import pytest
import torch

from tests.methods.vits import vit
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.tokens import TokenBranch, grid_of, pooled, tokens_of


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pos_embed", ["reference", "timm"])
@pytest.mark.parametrize("size", [16, 32, 40])
def test_nothing_hidden_gives_timms_own_tokens_and_feature(pos_embed: str, size: int) -> None:
    network = vit(pos_embed=pos_embed)
    tokens = tokens_of(network, images(size))
    assert torch.equal(tokens, network.forward_features(images(size)))
    assert torch.equal(pooled(network, tokens), network(images(size)))
    assert grid_of(network, images(size)) == (size // 8, size // 8)


def test_a_masked_patch_is_the_mask_token_at_its_own_position() -> None:
    """What lies under the mask changes nothing; what lies beside it does."""
    network, token = vit().eval(), torch.randn(24, generator=torch.Generator().manual_seed(2))
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, 5] = True  # row 1, column 1: pixels 8 to 15, both ways
    under, beside = images(), images()
    under[:, :, 8:16, 8:16] = 9.0
    beside[:, :, 0:8, 8:16] = 9.0
    original = tokens_of(network, images(), masked=masked, mask_token=token)
    assert torch.equal(tokens_of(network, under, masked=masked, mask_token=token), original)
    assert not torch.equal(tokens_of(network, beside, masked=masked, mask_token=token), original)
    elsewhere = tokens_of(network, images(), masked=masked.roll(1, 1), mask_token=token)
    assert not torch.allclose(elsewhere[:, 6], original[:, 6]), "positions are added to the mask token too"
    assert torch.equal(
        tokens_of(network, images(), masked=masked & False, mask_token=token), tokens_of(network, images())
    )


def test_dropped_patches_leave_the_class_token_and_the_positions_of_the_others() -> None:
    network = vit().eval()
    kept = torch.tensor([3, 0, 9, 15])
    tokens = tokens_of(network, images(), kept=kept)
    assert tokens.shape == (3, 5, 24)
    changed = images()
    changed[:, :, 0:8, 8:16] = 9.0  # patch 1, which is dropped
    assert torch.equal(tokens_of(network, changed, kept=kept), tokens)
    turned = tokens_of(network, images(), kept=kept.flip(0))
    assert torch.allclose(turned[:, 0], tokens[:, 0], atol=1e-5), "attention does not care in which order they come"
    assert torch.allclose(turned[:, 1:].flip(1), tokens[:, 1:], atol=1e-5)
    every = tokens_of(network, images(), kept=torch.arange(16))
    assert torch.allclose(every, tokens_of(network, images()), atol=1e-6)


def test_checkpointed_activations_give_the_same_tokens() -> None:
    plain, checkpointed = vit(), vit()
    checkpointed.set_grad_checkpointing(True)
    results = []
    for network in (plain, checkpointed):
        tokens = tokens_of(network, images(), kept=torch.arange(4))
        tokens.square().sum().backward()
        results.append((tokens.detach(), network.patch_embed.proj.weight.grad))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_a_branch_projects_the_class_token_and_each_patch_and_no_register() -> None:
    network = vit(reg_tokens=2, pos_embed="timm")
    branch = TokenBranch(network, torch.nn.Linear(24, 5))
    output, tokens = branch([images()]), network.forward_features(images())
    assert output.shape == (3, 17, 5)
    assert torch.allclose(output[:, 0], branch.head(tokens[:, 0]))
    assert torch.allclose(output[:, 1:], branch.head(tokens[:, 3:]))
    assert torch.equal(branch.features([images()]), network(images()))


def test_what_has_no_patches_or_no_class_token_as_feature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is a ResNet; set method.patch_weight=0"):
        TokenBranch(build_backbone(Backbone(name="resnet18")), torch.nn.Identity())
    with pytest.raises(ValueError, match=r"'avg' of its tokens; take global_pool out of backbone.args"):
        TokenBranch(vit(global_pool="avg"), torch.nn.Identity())
