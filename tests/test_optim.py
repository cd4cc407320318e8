"""Optimizers: LARS against the published steps and the formula, groups, and what frozen means."""

import pytest
import timm
import torch
from torch import nn

from tests.oracles import lars_by_the_paper
from trainer.methods.dino import DINOConfig
from trainer.methods.joint_embedding import ViewCounts
from trainer.models.backbones import Backbone, build_backbone
from trainer.optim import LARS, AdamW, Optim, build_optimizer, param_groups, set_progress
from trainer.schedules import Progress


def progress(lr: float = 1.0, weight_decay: float = 0.1) -> Progress:
    return Progress(step=0, epoch=0, lr=lr, weight_decay=weight_decay, momentum=0.99)


def lars(parameter: nn.Parameter, *, adapts: bool, decay: float) -> LARS:
    group = {"params": [parameter], "adapts": adapts, "frozen": False, "weight_decay": decay}
    return LARS([group], lr=1.0, momentum=0.9)


def test_lars_takes_the_published_steps() -> None:
    matrix = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    vector = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizers = lars(matrix, adapts=True, decay=0.1), lars(vector, adapts=False, decay=0.0)
    expected = [
        ([[0.998267949, 2], [2.994803905, 4]], [0.5, -1.25]),
        ([[0.994978070, 2], [2.984934330, 4]], [-0.45, -1.725]),
    ]
    for of_matrix, of_vector in expected:
        matrix.grad, vector.grad = torch.tensor([[0.1, -0.2], [0.3, -0.4]]), torch.tensor([0.5, 0.25])
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(matrix.detach(), torch.tensor(of_matrix), atol=1e-6)
        assert torch.allclose(vector.detach(), torch.tensor(of_vector), atol=1e-6)


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("zero", ["none", "weight", "gradient"])
def test_lars_equals_the_formula_over_ten_steps(adapts: bool, zero: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(3, 4) if zero == "weight" else torch.randn(3, 4, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = lars(parameter, adapts=adapts, decay=0.05)
    weight, buffer = start.double(), torch.zeros(3, 4).double()
    for _ in range(10):
        gradient = torch.zeros(3, 4) if zero == "gradient" else torch.randn(3, 4, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        weight, buffer = lars_by_the_paper(
            weight, gradient.double(), buffer, lr=1.0, decay=0.05, momentum=0.9, adapts=adapts
        )
    assert torch.allclose(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_groups_have_the_published_numbers_of_tensors_and_scalars() -> None:
    """All seven published networks, probes included, are in tests/methods/test_probe.py; here without one."""
    backbone = build_backbone(Backbone(name="mobilenetv2_100"))
    method = DINOConfig(
        name="dino", num_prototypes=4096, head_norm=True, warmup_teacher_temp_epochs=50, global_weight=0.4,
        local_weight=0.6,
    ).build(backbone, ViewCounts(2, 6))  # fmt: skip
    groups = {group["name"]: group for group in param_groups(method, method.frozen_parameters())}
    sizes = {name: (len(g["params"]), sum(p.numel() for p in g["params"])) for name, g in groups.items()}
    decayed = [sizes["decay"][i] + sizes["frozen"][i] for i in (0, 1)]
    assert decayed == [40 - 1, 11_794_144 - 1280 * 1000]
    assert sizes["depthwise"] == (17, 64_224)
    assert sizes["vectors"] == (112 - 1, 47_656 - 1000)
    assert {name: (g["decays"], g["adapts"]) for name, g in groups.items()} == {
        "decay": (True, True), "depthwise": (False, True), "vectors": (False, False), "frozen": (True, True),
    }  # fmt: skip


def test_a_network_without_depthwise_convolutions_has_no_such_group() -> None:
    network = timm.create_model("resnet18", num_classes=0)
    assert [group["name"] for group in param_groups(network)] == ["decay", "vectors"]


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_frozen_group_keeps_weights_and_state_while_others_move(name: str) -> None:
    network = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    optim = Optim(
        name=name, epochs=1, global_batch=256, base_lr=1.0, final_lr=0, warmup_epochs=0, weight_decay=0.1,
        final_weight_decay=0.1,
    )  # fmt: skip
    optimizer = build_optimizer(optim, param_groups(network, network[1].parameters()))
    before = [p.detach().clone() for p in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_progress(optimizer, progress(), frozen=True)
    optimizer.step()
    assert not torch.equal(network[0].weight, before[0])
    assert torch.equal(network[1].weight, before[1])
    assert network[1].weight not in optimizer.state
    set_progress(optimizer, progress(), frozen=False)
    optimizer.step()
    assert not torch.equal(network[1].weight, before[1])


def test_our_adamw_equals_torchs_when_nothing_is_frozen() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW([{"params": [ours], "frozen": False}], lr=0.01, weight_decay=0.1, fused=True)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(5, 7, generator=generator)
        mine.step()
        reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_vectors_never_decay() -> None:
    network = nn.Linear(3, 3)
    optimizer = AdamW([{**group, "frozen": False} for group in param_groups(network)], lr=0.0)
    set_progress(optimizer, progress(weight_decay=0.3), frozen=False)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"decay": 0.3, "vectors": 0.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("global_batch", -1), ("base_lr", 0), ("warmup_epochs", 5), ("weight_decay", -1)],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    good = {"name": "adamw", "epochs": 5, "global_batch": 8, "base_lr": 1, "final_lr": 0, "warmup_epochs": 0,
            "weight_decay": 0, "final_weight_decay": 0}  # fmt: skip
    with pytest.raises(ValueError, match=field):
        Optim(**{**good, field: value})
