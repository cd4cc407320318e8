"""A frozen teacher: its outputs are those of the network it came from, and nothing moves it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.launch import DEMO, losses
from tests.spawn import run_ranks
from tests.teachers.runs import DINO, IBOT, MSN, MSN_CNN, SWAV, WHITENED, recipe_of, write_run
from trainer import weights
from trainer.assemble import build_method, check_teacher
from trainer.methods.frozen import FrozenTeacher
from trainer.methods.teacher import EMATeacher
from trainer.recipe import RecipeError
from trainer.scaling_table import step_of
from trainer.teachers.build import build_frozen
from trainer.weights import WeightsError

SWAV_OF_TEACHER = (*SWAV, "method.codes=teacher", "method.prototypes=teacher")
ROB_MSN = ("method.targets=global_views", "method.sinkhorn_iterations=0", "method.me_max_weight=0")
Trained = tuple[Path, dict[str, object]]


def frozen(source: str, *more: str) -> str:
    return f"teacher={{kind: frozen, source: '{source}'{''.join(f', {item}' for item in more)}}}"


def views(batch: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2 * batch, 3, 32, 32, generator=torch.Generator().manual_seed(5))]


@pytest.fixture(scope="module")
def dino_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("dino") / "run"
    write_run(run_dir, *DINO)
    return run_dir


def test_a_dino_run_gives_back_the_logits_of_its_own_teacher(tmp_path: Path) -> None:
    _, teacher = write_run(tmp_path / "run", *DINO)
    assert teacher is not None
    ours = build_frozen(recipe_of(*DINO, frozen(f"run:{tmp_path / 'run'}")))
    torch.testing.assert_close(ours(views()), teacher(views()), rtol=1e-5, atol=1e-6)
    student = build_frozen(recipe_of(*DINO, frozen(f"run:{tmp_path / 'run'}", "branch: student")))
    assert not torch.allclose(student(views()), teacher(views()), atol=1e-3)


def test_a_swav_run_gives_the_scores_of_its_own_prototypes(tmp_path: Path) -> None:
    method, _ = write_run(tmp_path / "run", *SWAV)
    scores = method.get_submodule("prototypes")(method.student(views()))
    dino = recipe_of(*DINO, frozen(f"run:{tmp_path / 'run'}"))  # any method takes scores
    torch.testing.assert_close(build_frozen(dino)(views()), scores, rtol=1e-5, atol=1e-6)


def test_an_ibot_run_gives_back_the_logits_of_class_token_and_patches(tmp_path: Path) -> None:
    _, teacher = write_run(tmp_path / "run", *IBOT)
    assert teacher is not None
    ours = build_frozen(recipe_of(*IBOT, frozen(f"run:{tmp_path / 'run'}")))
    assert ours(views()).shape == (6, 1 + 16, 24)
    torch.testing.assert_close(ours(views()), teacher(views()), rtol=1e-4, atol=1e-5)


def test_an_msn_run_gives_the_cosines_with_its_prototypes(tmp_path: Path) -> None:
    method, teacher = write_run(tmp_path / "run", *MSN)
    assert teacher is not None
    cosines = method.get_submodule("prototypes")(teacher(views()))
    for name in ("run:{}", "file:{}/weights/teacher"):
        ours = build_frozen(recipe_of(*DINO, frozen(name.format(tmp_path / "run"))))
        torch.testing.assert_close(ours(views()), cosines, rtol=1e-4, atol=1e-5)


PLAIN = "method.mlp_head={hidden_dim: 20, num_layers: 3, norm: true, activation: relu}"


@pytest.mark.parametrize("source", ["run:{}", "file:{}/weights/teacher"])
def test_a_run_with_a_plain_mlp_gives_back_the_logits_of_its_own_teacher(source: str, tmp_path: Path) -> None:
    _, teacher = write_run(tmp_path / "run", *DINO, PLAIN)
    assert teacher is not None
    ours = build_frozen(recipe_of(*DINO, frozen(source.format(tmp_path / "run"))))
    torch.testing.assert_close(ours(views()), teacher(views()), rtol=1e-5, atol=1e-6)
    swav = recipe_of(*SWAV_OF_TEACHER, frozen(source.format(tmp_path / "run")))
    with pytest.raises(RecipeError, match=r"plain MLP without any; set method\.prototypes=own"):
        check_teacher(swav)


def test_the_students_of_rob_teach_in_their_turn(dino_run: Path, tmp_path: Path) -> None:
    """A plain MLP says MSN's logits; under SwAV its embedding meets prototypes at the length that it has."""
    under = frozen(f"run:{dino_run}")
    plain = PLAIN.replace("relu", "none").replace("norm: true", "norm: false")
    msn, _ = write_run(tmp_path / "msn", *MSN_CNN, *ROB_MSN, plain, under)
    ours = build_frozen(recipe_of(*DINO, frozen(f"run:{tmp_path / 'msn'}")))
    torch.testing.assert_close(ours(views()), msn.student(views()), rtol=1e-5, atol=1e-6)
    swav, _ = write_run(tmp_path / "swav", *SWAV, "method.codes=teacher", plain, under)
    ours = build_frozen(recipe_of(*DINO, frozen(f"run:{tmp_path / 'swav'}")))
    scores = swav.get_submodule("prototypes")(swav.student(views()))
    torch.testing.assert_close(ours(views()), scores, rtol=1e-5, atol=1e-6)


def test_patches_of_a_network_without_any_are_refused(dino_run: Path) -> None:
    with pytest.raises(RecipeError, match=r"method.ibot compares patches, and .* has none; choose a vision"):
        build_frozen(recipe_of(*IBOT, frozen(f"run:{dino_run}")))


def test_nothing_is_gathered_for_a_teacher_that_does_not_follow(dino_run: Path) -> None:
    recipe = recipe_of(*DINO, frozen(f"run:{dino_run}"))
    method, teacher = build_method(recipe), build_frozen(recipe)
    step = step_of(recipe, method, teacher, num_classes=None)
    assert step.num_teacher == sum(p.numel() for p in teacher.parameters()), "it is kept all the same"
    followed = step_of(recipe, method, EMATeacher(method.student), num_classes=None)
    sent = [[c.num_bytes * c.times for c in each.collectives(3, 2, 4)[0]] for each in (step, followed)]
    assert sent[0][1] == 0 < sent[1][1]
    assert sent[0][0] == sent[1][0]


def test_a_weights_folder_is_a_teacher_with_the_head_that_it_holds(dino_run: Path) -> None:
    of_run = build_frozen(recipe_of(*DINO, frozen(f"run:{dino_run}")))
    of_folder = build_frozen(recipe_of(*DINO, frozen(f"file:{dino_run / 'weights/teacher'}")))
    assert torch.equal(of_run(views()), of_folder(views()))
    assert of_run.digest == of_folder.digest


def test_a_head_that_another_program_wrote_again_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", *DINO)
    head = tmp_path / "run/weights/teacher/head.safetensors"
    save_file(load_file(head), head)
    with pytest.raises(WeightsError, match=r"head\.safetensors: wanted a projection head as a run writes it"):
        weights.load_head(head.parent)


def test_the_teacher_sees_its_own_normalisation_of_the_students_views(dino_run: Path) -> None:
    same = build_frozen(recipe_of(*DINO, frozen(f"run:{dino_run}")))
    other = build_frozen(recipe_of(*DINO, *WHITENED, frozen(f"run:{dino_run}")))
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def normalised(mean: list[float], std: list[float]) -> list[torch.Tensor]:
        return [(pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)]

    theirs = normalised([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert same.is_same_input
    torch.testing.assert_close(other(normalised([0.5, 0.4, 0.3], [0.2, 0.3, 0.1])), same(theirs), rtol=1e-4, atol=1e-5)
    told = build_frozen(recipe_of(*DINO, *WHITENED, frozen(f"run:{dino_run}", "mean: [0.5, 0.4, 0.3]")))
    assert not told.is_same_input


def test_it_stays_in_eval_mode_and_without_gradient(dino_run: Path) -> None:
    teacher = build_frozen(recipe_of(*DINO, frozen(f"run:{dino_run}")))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    output = torch.nn.ModuleList([teacher]).train()[0](views())
    assert not any(module.training for module in teacher.modules())
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    torch.testing.assert_close(teacher([views()[0][:1]]), teacher(views())[:1], msg="statistics of the batch")


def test_scores_stay_exact_where_networks_run_in_bfloat16(dino_run: Path) -> None:
    teacher = build_frozen(recipe_of(*DINO, frozen(f"run:{dino_run}")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = teacher.embed(views())
        scores = teacher.score(embeddings)
    assert embeddings.dtype == scores.dtype == torch.float32
    assert torch.equal(scores, F.linear(embeddings, teacher.head.prototypes))


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (["method.num_prototypes=25"], RecipeError, "method.num_prototypes is 25, and .* has 24 .*; set .*=24"),
        (["teacher.source=run:/nowhere"], WeightsError, "no resolved.yaml"),
        (["teacher.source=file:/nowhere"], WeightsError, "no such file or folder"),
        (["teacher.source=timm:resnet18.imaginary"], WeightsError, "timm has no weights of that name"),
        (["teacher.prototypes={count: 24}"], RecipeError, "has a head of its own; take teacher.prototypes out"),
        (["teacher.source=run"], RecipeError, "teacher.source must be file:PATH, timm:NAME or run:DIR, got 'run'"),
        (["teacher.prototypes={cuont: 24}"], RecipeError, "teacher.prototypes.cuont: unknown key; did you mean count"),
        (["run.keep_best=teacher"], RecipeError, "teacher.kind frozen has none that learns"),
    ],
)
def test_a_faulty_recipe_is_refused_with_what_to_change(
    dino_run: Path, fault: list[str], error: type[Exception], message: str
) -> None:
    overrides = [*DINO, frozen(f"run:{dino_run}"), *fault]
    with pytest.raises(error, match=message):
        build_frozen(recipe_of(*overrides))


def test_a_branch_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", *SWAV)
    with pytest.raises(WeightsError, match=r"wanted the branch teacher, and .* has student; set teacher.branch"):
        build_frozen(recipe_of(*DINO, frozen(f"run:{tmp_path / 'run'}", "branch: teacher")))


def test_a_backbone_alone_is_refused_under_a_method_that_needs_a_head(tmp_path: Path) -> None:
    write_run(tmp_path / "run", *DINO)
    folder = tmp_path / "run/weights/student"
    (folder / "head.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"method.dino needs a teacher with a head, and .* without a head; give a"):
        build_frozen(recipe_of(*DINO, frozen(f"file:{folder}")))


def train_under_a_frozen_teacher(data: Path, source: Path, out: Path) -> dict[str, object]:
    """On one rank of two: 12 steps; what became of the teacher, and whether another one may go on."""
    from trainer import checkpoint, distributed, loop, run_dir
    from trainer.engine import load_ds_config
    from trainer.run_state import StateError

    paths = [f"data.train={data / 'train.beton'}", f"run.dir={out / 'run'}", f"data.val={data / 'val.beton'}"]
    recipe = recipe_of(*DINO, frozen(f"run:{source}"), *paths, "evals.knn.every_epochs=2")
    config = load_ds_config(None, recipe.optim, micro_batch=8)
    device = distributed.local_device()
    folder = run_dir.claim(recipe, DEMO, config)
    checked = check_teacher(recipe)
    run = loop.assemble(recipe, config, device, None, checked)
    assert isinstance(run.teacher, FrozenTeacher)
    assert run.teacher is checked, "its file is read once"
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    with loop.stop_requests() as request:
        loop.train(recipe, run, folder, torch.autocast("cpu", enabled=False), request)
    after = run.teacher.state_dict()
    saved = checkpoint.newest(folder)
    assert saved is not None
    other = recipe_of(*DINO, frozen(f"run:{source}", "branch: student"), *paths)
    try:
        loop.assemble(other, config, device, saved)
        refused = ""
    except StateError as error:
        refused = str(error)
    return {
        "same": all(torch.equal(before[name], value) for name, value in after.items()),
        "in checkpoint": saved.teacher(),
        "digest": saved.frozen_teacher() == run.teacher.digest,
        "refused": refused,
    }


@pytest.fixture(scope="module")
def trained(
    dino_run: Path, synthetic: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("rob")
    results = run_ranks(train_under_a_frozen_teacher, synthetic, dino_run, out, world=2)
    return out / "run", results[0]


def test_training_changes_no_bit_of_the_teacher(trained: Trained) -> None:
    run_dir, facts = trained
    assert facts["same"]
    assert list(losses(run_dir)) == list(range(12))


def test_checkpoints_hold_the_teachers_hash_instead_of_the_teacher(trained: Trained) -> None:
    run_dir, facts = trained
    assert facts["in checkpoint"] is None
    assert facts["digest"]
    assert {path.name for path in (run_dir / "weights").iterdir()} == {"student"}


def test_another_teacher_does_not_continue_the_run(trained: Trained) -> None:
    assert "trained with a frozen teacher of hash" in str(trained[1]["refused"])


def test_evaluation_during_training_is_of_the_student_alone(trained: Trained) -> None:
    records = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record if name.startswith("knn/")}
    assert "knn/student_top1" in names
    assert not any("teacher" in name for name in names)
