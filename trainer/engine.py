"""The only importer of DeepSpeed: its configuration, checked, and the engine around a method."""

import difflib
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hjson
import torch
from torch import nn

from trainer import distributed, toolchain
from trainer.optim import Optim

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DEFAULT_DS_CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 0}}
"""Without --deepspeed_config: as ds_configs/zero0.json, the fastest for 3 to 25 M parameters."""

KNOWN_KEYS = frozenset(
    """
    zero_optimization torch_autocast bf16 fp16 data_types communication_data_type prescale_gradients
    gradient_predivide_factor sparse_gradients activation_checkpointing aio checkpoint compile seed
    wall_clock_breakdown memory_breakdown dump_state comms_logger flops_profiler tensorboard wandb csv_monitor
    """.split()  # noqa: SIM905
)
"""DeepSpeed ignores a misspelt top-level key without a word, so we keep the list."""

OURS = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "optim.global_batch and optim.accumulation",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.gradient_clipping",
    "optimizer": "optim.name",
    "scheduler": "optim.base_lr, optim.warmup_epochs ...",
}


class DSConfigError(ValueError):
    """A DeepSpeed configuration that would not do what it says."""


def load_ds_config(path: Path | None, optim: Optim, *, micro_batch: int) -> dict[str, Any]:
    """Read a DeepSpeed JSON (comments allowed), check it, and put in what the recipe decides.

    raises: DSConfigError if a key is unknown, belongs to the recipe, or asks for what would train something else
    """
    config = DEFAULT_DS_CONFIG if path is None else _read(path)
    source = "the default DeepSpeed configuration" if path is None else str(path)
    for key in config:
        if key in OURS:
            raise DSConfigError(f"{source}: {key} belongs to the recipe; remove it here and set {OURS[key]} there")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            raise DSConfigError(f"{source}: {key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
    _check_stage_and_precision(config, optim, source)
    return config | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.gradient_clipping,  # always written: DeepSpeed's own default is 1.0
        "zero_allow_untested_optimizer": True,  # DeepSpeed knows optimizers by exact type; ours are subclasses
        "steps_per_print": 2**31,  # progress is ours to print
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DSConfigError(f"{path}: no such file; wanted a DeepSpeed JSON such as ds_configs/zero1.json")
    try:
        config = hjson.loads(path.read_text(encoding="utf-8"))
    except hjson.HjsonDecodeError as error:
        raise DSConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise DSConfigError(f"{path}: wanted a mapping of DeepSpeed keys, got {type(config).__name__}")
    return dict(config)


def _check_stage_and_precision(config: dict[str, Any], optim: Optim, source: str) -> None:
    stage = zero_stage(config)
    if stage not in (0, 1):
        raise DSConfigError(f"{source}: zero_optimization.stage {stage} is not supported yet; use 0 or 1")
    if stage > 0 and optim.name == "lars":
        raise DSConfigError(
            f"{source}: LARS needs whole parameters for its trust ratios, and ZeRO stage {stage} gives it slices; "
            "use ds_configs/zero0.json or optim.name=adamw"
        )
    if config.get("zero_optimization", {}).get("round_robin_gradients"):
        raise DSConfigError(f"{source}: round_robin_gradients scrambles DeepSpeed's map of parameters; set it to false")
    for precision in ("bf16", "fp16"):
        if config.get(precision, {}).get("enabled"):
            raise DSConfigError(
                f"{source}: {precision}.enabled casts BatchNorm's weights but not its statistics, and stalls averages; "
                f'use "torch_autocast": {{"enabled": true, "dtype": "bfloat16"}}, which keeps parameters in fp32'
            )


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def autocast(config: dict[str, Any], device: torch.device) -> torch.autocast:
    """The precision in which the engine runs its module, for the networks that run beside it."""
    settings = config.get("torch_autocast", {})
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    return torch.autocast(device.type, dtype=dtype, enabled=bool(settings.get("enabled", False)))


def build_engine(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> "DeepSpeedEngine":
    """Wrap the module; every rank must hold the same weights and the process group must exist."""
    deepspeed = _import_deepspeed()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that it is there, even in a process without a launcher
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if distributed.world() == 1 and zero_stage(config) == 0:
        # There is nothing to sum, and DeepSpeed would copy every gradient into a buffer and back (LOG.md).
        engine.allreduce_no_retain = lambda *_, **__: None
    return engine


def keep_rewritten(parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizer's own copies follow parameters that a method has changed; ZeRO 1 would undo the change."""
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in parameters:
        safe_set_full_fp32_param(parameter, parameter.detach().float())  # stage 0 has no copies and does nothing


def _import_deepspeed() -> Any:
    toolchain.use_own()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of deprecated torch names is not for our users to read
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
