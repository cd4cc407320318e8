"""Run directories as training leaves them, as far as a teacher is read from them, without the training."""

from pathlib import Path

import torch
import yaml

from tests.launch import DEMO, TINY
from trainer import weights
from trainer.assemble import build_method
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run_state import RunState

DINO = (
    *TINY,
    "method={name: dino, hidden_dim: 32, bottleneck_dim: 16, num_prototypes: 24, head_norm: true, "
    "warmup_teacher_temp_epochs: 1, global_weight: 0.4, local_weight: 0.6}",
)
SWAV = (
    *TINY,
    "method={name: swav, hidden_dim: 32, out_dim: 16, num_prototypes: 24, queue_size: 0, "
    "global_weight: 0.4, local_weight: 0.6}",
    "teacher={kind: none}",
)
VIT = (
    "backbone.name=vit_tiny_patch16_224", "backbone.sync_batchnorm=false",
    "backbone.args={img_size: 32, patch_size: 8, dynamic_img_size: true, embed_dim: 64, depth: 2, num_heads: 2}",
)  # fmt: skip
OF_IBOT = (
    "method={name: ibot, hidden_dim: 32, bottleneck_dim: 16, num_prototypes: 24, head_norm: false, "
    "warmup_teacher_temp_epochs: 1, global_weight: 0.4, local_weight: 0.6}"
)
OF_MSN = "method={name: msn, hidden_dim: 32, out_dim: 16, num_prototypes: 24, global_weight: 0.4, local_weight: 0.6}"
IBOT, MSN = (*TINY, *VIT, OF_IBOT), (*TINY, *VIT, OF_MSN)
IBOT_CNN = (*TINY, OF_IBOT, "method.patch_weight=0", "method.mask=none", "method.head_norm=true")
MSN_CNN = (*TINY, OF_MSN, "method.patch_drop=0")
WHITENED = ("views.mean=[0.5, 0.4, 0.3]", "views.std=[0.2, 0.3, 0.1]")


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(DEMO, ["data.train=nowhere.beton", *overrides])


def stir(module: torch.nn.Module, seed: int = 0) -> None:
    """Other values in every tensor, running statistics too, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.05)


def write_run(run_dir: Path, *overrides: str) -> tuple[Method, EMATeacher | None]:
    """A run directory with the weights of stirred networks, and the networks themselves in eval mode."""
    recipe = recipe_of(*overrides)
    method = build_method(recipe)
    teacher = EMATeacher(method.student) if recipe.teacher.kind == "ema" else None
    stir(method)
    if teacher is not None:
        stir(teacher, seed=1)
    state = {
        "names": list(method.state_dict()),
        "method": method.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "pieces": {},
    }
    run_dir.mkdir()
    (run_dir / "resolved.yaml").write_text(yaml.safe_dump(recipe.plain()))
    weights.save(run_dir, recipe, RunState(0, [state]), num_features=32)
    return method.eval(), None if teacher is None else teacher.eval()
