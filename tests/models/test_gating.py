"""Gates and gated networks: what a gate gives and learns, modes that keep apart, the dense network inside."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from trainer.models.gates import Gate, Gates, Switch, logistic_noise, opened
from trainer.models.gating import add_gates, check_target, cost_at, counts, dense_state, gated_pass, gates_of, in_mode

SETTINGS = Gates(target=0.5, initial_bias=0.0)
NETWORKS = {
    "basic": ("resnet18", {"layers": [1, 2, 1, 1], "channels": [8, 16, 16, 16], "stem_width": 8}),
    "bottleneck": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8], "stem_width": 8}),
    "inverted": ("mobilenetv2_035", {}),
}
SIZE = 32


def plain(kind: str) -> nn.Module:
    """A small timm network whose norms have seen some images, so that none of them is an identity."""
    torch.manual_seed(0)
    name, arguments = NETWORKS[kind]
    network: nn.Module = timm.create_model(name, num_classes=0, **arguments)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    network(images())
    return network


def gated(kind: str) -> nn.Module:
    network = plain(kind)
    add_gates(network, SETTINGS)
    return network


def images(batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def norms(network: nn.Module, kind: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if f".{kind}." in name}


@pytest.mark.parametrize(
    ("logit", "uniform", "noise", "soft", "hard", "slope"),
    [
        (0.0, 0.5, 0.0, 0.5, 1, 0.375),
        (1.0, 0.5, 0.0, 0.81757448, 1, 0.22371968),
        (-1.0, 0.9, 2.19722458, 0.85764140, 1, 0.18313894),
        (2.0, 0.1, -2.19722458, 0.42657551, 0, 0.36691327),
    ],
)
def test_a_gates_value_and_gradient_are_the_published_ones(
    logit: float, uniform: float, noise: float, soft: float, hard: int, slope: float
) -> None:
    """Beside a channel that is open anyway, so that the one at hand need not be."""
    drawn = logistic_noise(torch.tensor([[uniform, 0.5]], dtype=torch.float64))
    assert drawn[0, 0].item() == pytest.approx(noise, abs=1e-7)
    logits = torch.tensor([[logit, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = opened(logits, drawn, 2 / 3).mask
    mask[0, 0].backward()
    assert mask[0, 0].item() == hard
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(slope, abs=1e-7)
    assert torch.sigmoid((logits + drawn) / (2 / 3))[0, 0].item() == pytest.approx(soft, abs=1e-7)


def test_sampled_gates_open_with_the_probability_of_their_logit_whatever_tau() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, -1, 0, 1, 2, 9]).expand(20_000, 6)
    for tau in (0.1, 2 / 3):
        rates = opened(logits, logistic_noise(torch.rand_like(logits)), tau).mask.mean(0)
        assert rates[:5].tolist() == pytest.approx([0.1192, 0.2689, 0.5, 0.7311, 0.8808], abs=0.012)


def test_an_image_whose_logits_are_all_low_keeps_its_best_channel() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0], [1.0, -1.0, 2.0]])
    assert opened(logits, None, 2 / 3).mask.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert opened(logits, torch.tensor([[0.0, -9, 0], [-9, -9, -9]]), 2 / 3).mask.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_the_noise_is_float32_under_autocast_and_finite_at_both_ends() -> None:
    ends = logistic_noise(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == pytest.approx([-18.42, 16.5], abs=0.2)
    switch = Switch()
    switch.mode, switch.openings = "sampled", []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Gate("g", 8, 16, SETTINGS, switch)(torch.randn(4, 8, 2, 2, dtype=torch.bfloat16))
    assert switch.openings[0].mask.dtype == torch.float32


def test_the_bias_opens_as_many_channels_as_it_says() -> None:
    switch = Switch()
    switch.mode = "sampled"
    torch.manual_seed(0)
    gate = Gate("g", 32, 512, Gates(target=0.5, initial_bias=1.5), switch)
    nn.init.zeros_(gate.expand.weight)
    assert gate(torch.randn(64, 32, 1, 1)).mean().item() == pytest.approx(0.8176, abs=0.01)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_dense_mode_is_timms_network_to_the_bit_and_exports_its_weights(kind: str) -> None:
    reference, network = plain(kind), gated(kind)
    assert torch.equal(network(images()), reference(images())), "in training mode"
    assert torch.equal(network.eval()(images()), reference.eval()(images()))
    fresh: nn.Module = timm.create_model(NETWORKS[kind][0], num_classes=0, **NETWORKS[kind][1])
    fresh.load_state_dict(dense_state(network.state_dict()))
    assert torch.equal(fresh.eval()(images()), network(images()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_static_masks_of_ones_are_the_dense_network_to_the_bit(kind: str) -> None:
    """The two sets of norms are equal at the start."""
    network = gated(kind).eval()
    with in_mode(network, "static", {gate.name: torch.ones(gate.num_channels) for gate in gates_of(network)}):
        assert torch.equal(network(images()), gated(kind).eval()(images()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_closed_channels_do_not_reach_the_output(kind: str) -> None:
    """Whatever the weights of a closed channel, it changes nothing behind its gate."""
    network = gated(kind).eval()
    masks = {gate.name: (torch.arange(gate.num_channels) % 2 == 0).float() for gate in gates_of(network)}
    with in_mode(network, "static", masks):
        before = network(images())
        for gate in gates_of(network):
            convolution = network.get_submodule(gate.name)
            assert isinstance(convolution, nn.Conv2d)
            with torch.no_grad():
                convolution.weight[masks[gate.name] == 0] += 1
        assert torch.allclose(network(images()), before, atol=1e-6)
        open_ones = network.get_submodule(gates_of(network)[0].name)
        with torch.no_grad():
            open_ones.weight[0] += 1  # type: ignore[union-attr, operator]
        assert not torch.allclose(network(images()), before, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_modes_pass_leaves_the_others_statistics_alone(kind: str) -> None:
    network = gated(kind).train()
    dense, of_gated = norms(network, "dense_norm"), norms(network, "gated_norm")
    assert len(dense) == len(of_gated) > 0
    gated_pass(network, images(), "sampled")
    assert all(torch.equal(value, dense[name]) for name, value in norms(network, "dense_norm").items())
    moved = norms(network, "gated_norm")
    assert not any(torch.equal(value, of_gated[name]) for name, value in moved.items())
    network(images())
    assert all(torch.equal(value, moved[name]) for name, value in norms(network, "gated_norm").items())


def test_every_norm_behind_the_first_gate_has_two_sets_and_the_stem_one() -> None:
    names = [name for name, _ in gated("basic").named_buffers() if name.endswith("running_mean")]
    shared = [name for name in names if "_norm." not in name and ".gates." not in name]
    assert shared == ["bn1.running_mean"]
    assert "layer2.0.downsample.1.gated_norm.running_mean" in names


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_dense_step_has_no_gradient_for_gates_and_a_sampled_one_for_all_of_them(kind: str) -> None:
    network = gated(kind).train()
    network(images()).sum().backward()
    gates = {name: p for name, p in network.named_parameters() if ".gates." in name}
    assert all(p.grad is None for p in gates.values())
    (gated_pass(network, images(), "sampled").features ** 2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gates.values())


def test_hard_gates_look_at_each_image_alone_and_draw_nothing() -> None:
    network = gated("basic").eval()
    together, state = gated_pass(network, images(), "hard"), torch.get_rng_state()
    alone = torch.cat([gated_pass(network, image[None], "hard").features for image in images()])
    assert torch.allclose(together.features, alone, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(opening.mask, opening.hard) for opening in together.openings)


def test_counts_are_the_open_channels_of_each_image_and_gate() -> None:
    network = gated("basic").train()
    openings = gated_pass(network, images(), "sampled").openings
    found = counts(openings, hard=False)
    assert found.tolist() == [[opening.mask[i].sum().item() for opening in openings] for i in range(4)]
    assert found.shape == (4, 5)
    assert bool((found >= 1).all())
    cost = cost_at(network, SIZE)
    assert cost.floor < cost.ratio(found).mean().item() < 1


def test_a_copy_of_a_gated_network_has_a_switch_of_its_own() -> None:
    network = gated("basic").eval()
    copied = copy.deepcopy(network)
    dense = copied(images())
    with in_mode(network, "hard"):
        assert torch.equal(copied(images()), dense)
        assert not torch.equal(network(images()), dense)
    with in_mode(copied, "hard"):
        assert not torch.equal(copied(images()), dense)


def test_a_mode_ends_with_its_block_even_after_an_error() -> None:
    network = gated("basic").eval()
    dense = network(images())
    with pytest.raises(RuntimeError), in_mode(network, "hard"):
        network(torch.zeros(1, 2, 8, 8))
    assert torch.equal(network(images()), dense)


def test_networks_and_targets_that_cannot_be_are_refused_with_the_reason() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    with pytest.raises(ValueError, match="no block that gates fit, which are timm's BasicBlock"):
        add_gates(vit, SETTINGS)
    squeezed = timm.create_model("seresnet18", num_classes=0) if timm.is_model("seresnet18") else None
    if squeezed is not None:
        with pytest.raises(ValueError, match="has a layer se"):
            add_gates(squeezed, SETTINGS)
    network = plain("basic")
    add_gates(network, Gates(target=0.05))
    with pytest.raises(ValueError, match=r"target is 0\.05, and views of 32 px cost at least 0\.\d+"):
        check_target(network, [SIZE])
    check_target(plain("basic"), [SIZE])
