"""The joint probe: what it sees, that it leaves the student alone, and the published sizes of networks with one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.test_methods import COUNTS, dino, moco, progress, some_views
from tests.methods.test_swav import swav
from trainer.methods import AnyMethod
from trainer.methods.dino import DINOConfig
from trainer.methods.joint_embedding import Method
from trainer.methods.moco import MoCoConfig
from trainer.methods.probe import LinearProbe, percent_right
from trainer.methods.swav import SwAVConfig
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, build_backbone
from trainer.optim import param_groups

WEIGHTS = {"global_weight": 0.4, "local_weight": 0.6}
LABELS = torch.tensor([0, 2, 1, 2])


def forward(method: Method, labels: Tensor | None = None) -> dict[str, Tensor]:
    """One backward pass; the total, the parts, and the gradients of all but the probe."""
    views = some_views()
    of_views = method.teacher_views(views)
    loss = method(views, EMATeacher(method.student)(of_views) if of_views else None, progress(), labels)
    loss.total.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"total": loss.total.detach(), **loss.parts, **gradients}


@pytest.mark.parametrize("make", [dino, moco, swav])
def test_a_probe_changes_no_bit_of_the_students_gradients(make: type[Method]) -> None:
    plain, probed = make(), make()
    probed.add_probe(num_classes=3)
    without, beside = forward(plain), forward(probed, LABELS)
    assert torch.equal(beside["loss/ssl"], without["total"])
    assert torch.equal(beside["total"], without["total"] + beside["probe/loss"])
    assert beside["probe.classifier.weight"].abs().sum() > 0
    names = [name for name, _ in plain.named_parameters() if name in without]
    assert names
    assert all(torch.equal(beside[name], without[name]) for name in names)


@pytest.mark.parametrize(("make", "view"), [(dino, 0), (swav, 0), (moco, 1)])
def test_the_probe_sees_the_students_first_view(make: type[Method], view: int) -> None:
    """Global view 0, or for MoCo, whose view 0 is the key, the first query."""
    method = make()
    method.add_probe(num_classes=3)
    assert method.probe is not None
    images = some_views()[0].unflatten(0, (2, 4))[view]
    expected = F.cross_entropy(method.probe(method.student.backbone(images)), LABELS)
    assert forward(method, LABELS)["probe/loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_untrained_probe_is_at_chance_and_a_fitted_one_is_right() -> None:
    probe = LinearProbe(4, 1000)
    with torch.no_grad():
        probe.classifier.weight.zero_()
        probe.classifier.bias.zero_()
    loss, _ = probe.loss(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    assert loss.item() == pytest.approx(6.907755, abs=1e-6)
    logits = torch.eye(4)
    assert percent_right(logits, torch.tensor([0, 1, 2, 0])).item() == 75.0


def test_swavs_probe_starts_as_all_its_linear_layers_do() -> None:
    method = swav()
    method.add_probe(num_classes=20_000)
    assert method.probe is not None
    assert method.probe.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not method.probe.classifier.bias.any()


def published(backbone: str, config: AnyMethod, **args: object) -> Method:
    """A published network with its probe of 1000 classes."""
    method = config.build(build_backbone(Backbone(name=backbone, args=args)), COUNTS)
    method.add_probe(num_classes=1000)
    return method


CNN = DINOConfig(name="dino", num_prototypes=4096, head_norm=True, warmup_teacher_temp_epochs=50, **WEIGHTS)
VIT = DINOConfig(
    name="dino", num_prototypes=65_536, head_norm=False, norm_last_layer=False, warmup_teacher_temp_epochs=30, **WEIGHTS
)
SWAV = SwAVConfig(name="swav", num_prototypes=3000, queue_size=3072, **WEIGHTS)
MOCO = MoCoConfig(name="moco", queue_size=65_536, **WEIGHTS)


@pytest.mark.parametrize(
    ("backbone", "config", "trained", "with_teacher", "groups"),
    [
        ("mobilenetv2_100", CNN, 11_906_024, 22_539_240, [(40, 11_794_144), (17, 64_224), (112, 47_656)]),
        ("resnet18", CNN, 18_517_800, 36_530_792, [(25, 18_494_656), (48, 23_144)]),
        ("resnet34", CNN, 28_625_960, 56_747_112, None),
        ("resnet50", CNN, 35_531_048, 69_021_288, None),
        ("vit_tiny_patch16_224", VIT, 27_676_328, 55_159_656, [(57, 27_640_448), (103, 35_880)]),
        ("mobilenetv2_100", SWAV, 9_668_456, 9_668_456, [(39, 9_556_704), (17, 64_224), (109, 47_528)]),
        ("mobilenetv2_100", MOCO, 6_390_632, 11_500_264, [(38, 6_289_120), (17, 64_224), (107, 37_288)]),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_networks_and_groups_have_the_published_sizes(
    backbone: str, config: AnyMethod, trained: int, with_teacher: int, groups: list[tuple[int, int]] | None
) -> None:
    method = published(backbone, config)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == trained
    teacher = 0 if config.name == "swav" else sum(p.numel() for p in method.student.parameters())
    assert sum(p.numel() for p in method.parameters()) + teacher == with_teacher
    if groups is not None:
        kinds = ("decay", "depthwise", "vectors")  # without the frozen group the prototypes count as decayed
        sizes = {g["name"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in param_groups(method)}
        assert [sizes[kind] for kind in kinds if kind in sizes] == groups
