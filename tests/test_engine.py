"""DeepSpeed's configuration: what it would silently do otherwise is refused here, with what to do instead."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.spawn import run_ranks
from trainer import distributed
from trainer.engine import KNOWN_KEYS, DSConfigError, advice, build_engine, load_ds_config, saved_bytes
from trainer.optim import Optim, build_optimizer, param_groups

CONFIGS = Path(__file__).parents[1] / "ds_configs"


def optim(name: str = "adamw", accumulation: int = 2) -> Optim:
    return Optim(
        name=name, epochs=1, global_batch=32, accumulation=accumulation, base_lr=1, final_lr=0, warmup_epochs=0,
        weight_decay=0, final_weight_decay=0,
    )  # fmt: skip


def fault_of(tmp_path: Path, config: object, *, name: str = "adamw") -> str:
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(DSConfigError) as caught:
        load_ds_config(path, optim(name), micro_batch=8)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_gets_the_recipes_batches(path: Path) -> None:
    config = load_ds_config(path, optim(), micro_batch=8)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 2)
    assert path.read_text().startswith("//"), "each says when to use it"


def test_clipping_is_always_written_since_deepspeeds_default_would_clip_at_one() -> None:
    assert load_ds_config(None, optim(), micro_batch=8)["gradient_clipping"] == 0.0


def test_a_misspelt_key_is_an_error(tmp_path: Path) -> None:
    assert "zero_optimisation: unknown key; did you mean zero_optimization?" in fault_of(
        tmp_path, {"zero_optimisation": {"stage": 1}}
    )


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_accumulation_steps", "optimizer", "gradient_clipping"])
def test_what_the_recipe_decides_is_refused_here(tmp_path: Path, key: str) -> None:
    assert f"{key} belongs to the recipe" in fault_of(tmp_path, {key: 1})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"bf16": {"enabled": True}}, "torch_autocast"),
        ({"fp16": {"enabled": True}}, "torch_autocast"),
        ({"torch_autocast": {"enabled": True, "dtype": "float8"}}, "must be bfloat16 or float16, got float8"),
        (
            {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            "one overflow skips all later steps",
        ),
        ("{not json", "not valid JSON"),
        ([1, 2], "wanted a mapping"),
    ],
)
def test_what_would_train_something_else_is_refused(tmp_path: Path, config: object, said: str) -> None:
    assert said in fault_of(tmp_path, config)


def test_norms_over_offloaded_gradients_are_refused(tmp_path: Path) -> None:
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert "use optim.name=adamw" in fault_of(tmp_path, offload, name="lars")


def zero(stage: int, **further: object) -> dict[str, object]:
    return {"zero_optimization": {"stage": stage, **further}}


def test_what_a_stage_saves_counts_the_copy_of_the_parameters_that_it_updates() -> None:
    adamw = [saved_bytes(zero(stage), "adamw", world=4) for stage in (0, 1, 2, 3)]
    assert adamw == [0, 8 - 12 / 4, 8 - 12 / 4 + 3, 8 - 12 / 4 + 6]
    assert saved_bytes(zero(1), "lars", world=2) == 0
    assert saved_bytes(zero(1, offload_optimizer={"device": "cpu"}), "adamw", world=2) == 8


def test_a_stage_that_costs_more_than_it_saves_is_said_in_numbers() -> None:
    said = advice(zero(1), "adamw", num_parameters=11_000_000, world=2)
    assert said is not None
    assert "saves 22.0 MB a rank for 11.00 M parameters on 2 ranks" in said
    assert "1.31 times stage 0's" in said
    assert "costs 44.0 MB" in str(advice(zero(1), "adamw", num_parameters=11_000_000, world=1))
    assert advice(zero(0), "adamw", num_parameters=11_000_000, world=2) is None
    assert advice(zero(3), "adamw", num_parameters=1_000_000_000, world=8) is None


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DSConfigError, match="no such file"):
        load_ds_config(Path("ds_configs/zero9.json"), optim(), micro_batch=8)


def test_every_known_key_is_one_that_deepspeed_reads() -> None:
    """The list is ours; this keeps it honest against the installed DeepSpeed's source."""
    import deepspeed

    source = "\n".join(path.read_text() for path in Path(deepspeed.__path__[0]).rglob("*.py"))
    assert {key for key in KNOWN_KEYS if f'"{key}"' not in source and f"'{key}'" not in source} == set()


class Halves(nn.Module):
    """A loss that uses one of its two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.used * x).sum()


def test_alone_no_gradient_is_summed_and_an_unused_weight_still_decays_as_on_many_ranks() -> None:
    """DeepSpeed gives weights without a gradient one of zeros, on any number of ranks; so the decay reaches them."""
    distributed.start(torch.device("cpu"))
    module, recipe = Halves(), optim(accumulation=1)
    optimizer = build_optimizer(recipe, param_groups(module))
    engine = build_engine(module, optimizer, load_ds_config(None, recipe, micro_batch=32))
    optimizer.param_groups[0] |= {"lr": 0.1, "weight_decay": 0.5}
    engine.backward(engine(torch.full((2, 2), 3.0)))
    assert torch.equal(module.used.grad, torch.full((2, 2), 3.0))  # type: ignore[arg-type]
    engine.step()
    assert torch.allclose(module.unused, torch.full((2, 2), 2.0 * (1 - 0.1 * 0.5)))
    assert bool((module.used < module.unused).all())


def names_left_in_shared_memory() -> tuple[list[str], float]:
    module, recipe = Halves(), optim(accumulation=1)
    optimizer = build_optimizer(recipe, param_groups(module))
    engine = build_engine(module, optimizer, load_ds_config(None, recipe, micro_batch=16))
    optimizer.param_groups[0] |= {"lr": 0.1}
    engine.backward(engine(torch.full((2, 2), 1.0 + distributed.rank())))
    engine.step()
    distributed.barrier()
    buffers = f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*"
    return [path.name for path in Path("/dev/shm").glob(buffers)], float(module.used.mean())


def test_a_launch_leaves_nothing_in_shared_memory() -> None:
    (left, first), (_, second) = run_ranks(names_left_in_shared_memory)
    assert left == []
    assert first == second != 2.0, "and the ranks still sum"


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_in_float16_an_overflow_skips_the_step_lowers_the_scale_and_says_so(name: str) -> None:
    distributed.start(torch.device("cpu"))
    module, recipe = Halves(), optim(name, accumulation=1)
    optimizer = build_optimizer(recipe, param_groups(module))
    engine = build_engine(module, optimizer, load_ds_config(CONFIGS / "zero0_fp16.json", recipe, micro_batch=32))
    optimizer.param_groups[0] |= {"lr": 0.1}
    scaler = engine.torch_autocast_z0_gradscaler
    applied, scales = [], []
    for factor in (1.0, float("inf"), 1.0):
        before = module.used.detach().clone()
        engine.backward(engine(torch.full((2, 2), 3.0)) * factor)
        engine.step()
        applied.append(engine.was_step_applied())
        scales.append(scaler.get_scale())
        assert torch.equal(before, module.used) != applied[-1]
    assert applied == [True, False, True]
    assert scales == [65536, 32768, 32768]
