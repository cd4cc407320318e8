"""Schedules against the published values of SSLight's runs."""

import pytest

from trainer.schedules import Schedules, cosine, ramp, warmup_cosine

SPE = 1251  # ImageNet at a global batch of 1024
DINO_CNN = {"warmup_lr": 0.0, "peak_lr": 1.92, "final_lr": 0.0048}
DINO_VIT = {"warmup_lr": 0.0, "peak_lr": 0.002, "final_lr": 1e-5}
SWAV = {"warmup_lr": 0.075, "peak_lr": 1.2, "final_lr": 0.0048}


def imagenet_run(**lrs: float) -> Schedules:
    return Schedules(
        steps_per_epoch=SPE,
        num_steps=200 * SPE,
        warmup_steps=10 * SPE,
        weight_decay=0.04,
        final_weight_decay=0.4,
        momentum=0.996,
        final_momentum=1.0,
        **lrs,
    )


@pytest.mark.parametrize(
    ("step", "cnn", "vit", "swav"),
    [
        (0, 0, 0, 0.075),
        (1, 1.5348948757e-4, 1.5988488e-7, 0.0750899352),
        (100, 0.0153489488, 1.59884883e-5, 0.0839935247),
        (6255, 0.9600767447, 0.00100007994, 0.6375449676),
        (12509, 1.92, 0.002, 1.2),
        (12510, 1.92, 0.002, 1.2),
        (62550, 1.7180809518, 0.00179019481, 1.0739903684),
        (125100, 1.0414779812, 0.00108716645, 0.6517494169),
        (131355, 0.9624, 0.001005, 0.6024),
        (187650, 0.3138351670, 0.00033110483, 0.1976565328),
        (248949, 0.0049308991, 1.01360115e-5, 0.0048816889),
        (250199, 0.0048000000836, 1.0000000087e-5, 0.0048000000522),
    ],
)
def test_learning_rates_are_the_published_ones(step: int, cnn: float, vit: float, swav: float) -> None:
    lrs = [imagenet_run(**method).at(step).lr for method in (DINO_CNN, DINO_VIT, SWAV)]
    assert lrs == pytest.approx([cnn, vit, swav], rel=3e-8)


@pytest.mark.parametrize(
    ("step", "momentum"),
    [(0, 0.996), (1, 0.9960000000001576), (1251, 0.9960002467), (62550, 0.9965857864), (125100, 0.998),
     (187650, 0.9994142136), (250199, 0.9999999999998423)],
)  # fmt: skip
def test_teacher_momentum_is_the_published_one(step: int, momentum: float) -> None:
    assert imagenet_run(**DINO_VIT).at(step).momentum == pytest.approx(momentum, abs=5e-11)


@pytest.mark.parametrize(
    ("step", "decay"),
    [(0, 0.04), (1, 0.04000000001419), (1251, 0.0400222062), (62550, 0.0927207794), (125100, 0.22),
     (187650, 0.3472792206), (250199, 0.3999999999858)],
)  # fmt: skip
def test_weight_decay_is_the_published_one(step: int, decay: float) -> None:
    assert imagenet_run(**DINO_VIT).at(step).weight_decay == pytest.approx(decay, abs=5e-11)


def test_the_tiny_momentum_schedule_is_the_published_one() -> None:
    expected = [.996, .9960978870, .9963819660, .9968244295, .9973819660, .998, .9986180340, .9991755706,
                .9996180340, .9999021130]  # fmt: skip
    assert [cosine(0.996, 1.0, step, 10) for step in range(10)] == pytest.approx(expected, abs=1e-10)


def test_the_tiny_learning_rate_schedule_is_the_published_one() -> None:
    expected = [0, .48, .96, 1.44, 1.92, 1.92, 1.8990741425, 1.8372111302, 1.7371146738, 1.6031594686, 1.4412,
                1.2583146738, 1.0624964564, .8623035435, .6664853262, .4836, .3216405314, .1876853262, .0875888698,
                .0257258575]  # fmt: skip
    ours = [warmup_cosine(0, 1.92, 0.0048, step, num_steps=20, warmup_steps=5) for step in range(20)]
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("epochs", "epoch", "temp"),
    [(50, 0, 0.04), (50, 1, 0.0406122449), (50, 10, 0.0461224490), (50, 25, 0.0553061224), (50, 48, 0.0693877551),
     (50, 49, 0.07), (50, 120, 0.07), (30, 1, 0.0410344828), (30, 10, 0.0503448276), (30, 25, 0.0658620690),
     (30, 29, 0.07)],
)  # fmt: skip
def test_teacher_temperature_is_the_published_one(epochs: int, epoch: int, temp: float) -> None:
    assert ramp(0.04, 0.07, epoch, epochs) == pytest.approx(temp, abs=1e-10)


def test_an_epoch_changes_exactly_at_its_first_step() -> None:
    run = imagenet_run(**DINO_CNN)
    assert [run.at(step).epoch for step in (0, SPE - 1, SPE, 200 * SPE - 1)] == [0, 0, 1, 199]


def test_no_warmup_starts_at_the_peak() -> None:
    assert warmup_cosine(0.1, 1.0, 0.0, 0, num_steps=10, warmup_steps=0) == 1.0
