"""`trainer show` prints what a recipe decides: the published numbers come out of the published recipes."""

from pathlib import Path

import pytest
from PIL import Image

from tests.launch import DEMO
from trainer.__main__ import main

RECIPES = Path(__file__).parents[1] / "recipes"


def test_a_published_recipe_shows_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(RECIPES / "dino_resnet18_sslight.yaml")]) == 0
    output = capsys.readouterr().out
    for figure in (
        "global_weight: 0.4",  # the resolved recipe
        "11,176,512", "6,832,384",  # backbone and head, spec of the published code
        "250,200 steps, 1,251 an epoch", "0.1920153489", "1.718080952", "0.9965857864",  # schedules
        "teacher temperature",
        "1 / 0.1", "0.05 to 0.3",  # views
    ):  # fmt: skip
        assert figure in output
    assert "ImageNet-1k's 1281167 images" in output


@pytest.mark.parametrize(
    ("recipe", "at_224", "at_128", "of_head"),
    [("dino_resnet18_sslight", 1.8136, 0.5922, 0.0068), ("dino_mobilenetv2_sslight", 0.2995, 0.0978, 0.0084)],
)
def test_the_cost_is_that_of_the_published_views(
    recipe: str, at_224: float, at_128: float, of_head: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """10^9 multiply-accumulates of a forward pass at 224 and 128 pixels, and of the head."""
    assert main(["show", str(RECIPES / f"{recipe}.yaml")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "one image" in line)
    teacher, forward, backward, step = (float(cell) for cell in row.split("│")[2:6])
    assert teacher == pytest.approx(2 * at_224 + 2 * of_head, abs=0.01)
    assert forward == pytest.approx(2 * at_224 + 6 * at_128 + 8 * of_head, abs=0.011)
    assert backward == pytest.approx(2 * forward, abs=0.011)
    assert step == pytest.approx(teacher + 3 * forward, abs=0.021)


def test_the_contact_sheet_is_drawn_where_there_are_data(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    data = f"data.train={synthetic / 'train.beton'}"
    assert main(["show", str(DEMO), data, "--out", str(out), "--images", "2"]) == 0
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
    assert "1 an epoch" in capsys.readouterr().out, "96 images are one batch of 64"


def test_a_faulty_recipe_is_refused_as_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["show", str(DEMO), "optim.epochs=-1"]) == 2
    assert "optim.epochs must be above 0" in caplog.text
