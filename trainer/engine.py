"""The only importer of DeepSpeed: its configuration, checked, and the engine around a method.

What ZeRO changes for the rest of the code ends here: how to read parameters (`whole`), and how to write them
(`rewriting`).
"""

import difflib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hjson
import torch
from torch import nn

from trainer import distributed, toolchain
from trainer.lars import LARS, Layers
from trainer.optim import AdamW, Optim
from trainer.partitions import check_partitions, pieces

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


STATE_BYTES = {"adamw": 8, "lars": 4}
"""What an optimizer remembers of each parameter."""
STEP_TIME = {1: 1.31, 2: 1.33, 3: 2.18}
"""Against stage 0's: 4.8 M parameters, AdamW, two CPU ranks, median of 12 steps (LOG.md); unknown for GPUs."""
WORTH_BYTES = 2**30

log = logging.getLogger(__name__)


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
    accumulation, clipping = optim.accumulation, optim.gradient_clipping
    batches = {"gradient_accumulation_steps": accumulation, "gradient_clipping": clipping}
    return plain_config(micro_batch) | config | batches


def plain_config(micro_batch: int) -> dict[str, Any]:
    """Stage 0 in full precision, an update for every batch: what evaluations train with."""
    return DEFAULT_DS_CONFIG | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # always written: DeepSpeed's own default is 1.0
        "zero_allow_untested_optimizer": True,  # DeepSpeed knows optimizers by exact type; ours are subclasses
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps offloaded states too, and compiles nothing
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
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    if stage not in (0, 1, 2, 3):
        raise DSConfigError(f"{source}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage}")
    if zero.get("round_robin_gradients"):
        raise DSConfigError(f"{source}: round_robin_gradients scrambles DeepSpeed's map of parameters; set it to false")
    if zero.get("offload_optimizer") and (optim.name == "lars" or optim.parameter_clipping):
        raise DSConfigError(
            f"{source}: offload_optimizer keeps gradients on the host, and LARS and parameter_clipping sum norms over "
            "the devices; remove it, or use optim.name=adamw and optim.parameter_clipping=0"
        )
    _check_precision(config, stage, source)


def _check_precision(config: dict[str, Any], stage: int, source: str) -> None:
    for precision in ("bf16", "fp16"):
        if config.get(precision, {}).get("enabled"):
            raise DSConfigError(
                f"{source}: {precision}.enabled casts BatchNorm's weights but not its statistics, and stalls averages; "
                f'use "torch_autocast": {{"enabled": true, "dtype": "bfloat16"}}, which keeps parameters in fp32'
            )
    settings = config.get("torch_autocast", {})
    dtype = settings.get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "float16"):
        raise DSConfigError(f"{source}: torch_autocast.dtype must be bfloat16 or float16, got {dtype}")
    if settings.get("enabled") and dtype == "float16" and stage > 0:
        raise DSConfigError(
            f"{source}: with float16, DeepSpeed 0.19.8 never lowers the loss scale again under ZeRO stage {stage}, so "
            "that one overflow skips all later steps; use ds_configs/zero0_fp16.json, or bfloat16"
        )


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def saved_bytes(config: dict[str, Any], optimizer: str, *, world: int) -> float:
    """Memory a parameter and rank that a configuration saves against stage 0, between steps; below 0 if it costs some.

    ZeRO's optimizer updates a copy of its share of the parameters, 4 bytes each, which stage 0 does not have.
    """
    stage, state = zero_stage(config), STATE_BYTES[optimizer]
    kept = 0.0 if config.get("zero_optimization", {}).get("offload_optimizer") else 1 / world
    of_states = state - (state + 4) * kept if stage >= 1 else 0.0
    return of_states + sum(4 * (1 - 1 / world) for level in (2, 3) if stage >= level)  # gradients, parameters


def advice(config: dict[str, Any], optimizer: str, *, num_parameters: int, world: int) -> str | None:
    """What to consider about a ZeRO stage that saves less than a GiB a rank; None if there is nothing to say."""
    stage, saved = zero_stage(config), saved_bytes(config, optimizer, world=world) * num_parameters
    if stage == 0 or saved >= WORTH_BYTES:
        return None
    memory = f"{'saves' if saved > 0 else 'costs'} {abs(saved) / 1e6:.1f} MB a rank"
    return (
        f"ZeRO stage {stage} {memory} for {num_parameters / 1e6:.2f} M parameters on {world} ranks, and a step took "
        f"{STEP_TIME[stage]} times stage 0's where it was measured; ds_configs/zero0.json is the usual choice here"
    )


def autocast(config: dict[str, Any], device: torch.device) -> torch.autocast:
    """The precision in which the engine runs its module, for the networks that run beside it."""
    settings = config.get("torch_autocast", {})
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    return torch.autocast(device.type, dtype=dtype, enabled=bool(settings.get("enabled", False)))


def build_engine(
    module: nn.Module, optimizer: AdamW | LARS | torch.optim.SGD, config: dict[str, Any]
) -> "DeepSpeedEngine":
    """Wrap the module; every rank must hold the same weights and the process group must exist.

    raises: PartitionError if ZeRO does not cut the parameters as `partitions` reads it
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    originals = {name: parameter.detach().clone() for name, parameter in trained.items()} if zero_stage(config) else {}
    deepspeed = import_deepspeed()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that it is there, even in a process without a launcher
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    _unname_shared_memory()
    if distributed.world() == 1 and zero_stage(config) == 0:
        # There is nothing to sum, and DeepSpeed would copy every gradient into a buffer and back (LOG.md).
        engine.allreduce_no_retain = lambda *_, **__: None
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None and not isinstance(optimizer, torch.optim.SGD):
        engine.torch_autocast_z0_gradscaler = _TellingScaler(optimizer, distributed.local_device().type)
    if originals and isinstance(optimizer, AdamW | LARS):
        check_partitions(engine, originals)
        _advise(config, optimizer, originals)
        optimizer.layers = Layers(pieces(engine), list(originals))
    return engine


def _unname_shared_memory() -> None:
    """Let the system free what DeepSpeed's sums on a CPU share, once no rank uses it, even if ranks are killed.

    DeepSpeed 0.19.8 names 69 MB a rank in /dev/shm and never removes the name, so that every launch would keep them
    until the machine starts again. All ranks have opened the others' when they are here.
    """
    distributed.barrier()
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place, str(distributed.rank())])
    Path("/dev/shm", name).unlink(missing_ok=True)


def _advise(config: dict[str, Any], optimizer: AdamW | LARS, trained: dict[str, torch.Tensor]) -> None:
    name = "lars" if isinstance(optimizer, LARS) else "adamw"
    num_parameters = sum(parameter.numel() for parameter in trained.values())
    text = advice(config, name, num_parameters=num_parameters, world=distributed.world())
    if text is not None and distributed.is_main():
        log.info(text)


class _TellingScaler(torch.amp.GradScaler):
    """A loss scaler that says whether it skipped a step; DeepSpeed asks its ZeRO optimizers only, and `overflow` so."""

    def __init__(self, optimizer: AdamW | LARS, device: str) -> None:
        super().__init__(device)
        self._optimizer = optimizer

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale; it falls exactly when a gradient was not finite and the step was therefore left out."""
        before = self.get_scale()
        super().update(new_scale)
        self._optimizer.overflow = self.get_scale() < before


@contextmanager
def whole(engine: "DeepSpeedEngine", parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters to be read whole on every rank; only ZeRO 3 does not always keep them so. All ranks must enter."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(list(parameters)):
        yield


@contextmanager
def rewriting(engine: "DeepSpeedEngine", parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters to be changed, by every rank in the same way; the optimizer's own copies follow.

    Without it, ZeRO would undo the change with its next step.
    """
    changed = {id(parameter) for parameter in parameters}
    named = {name: parameter for name, parameter in engine.module.named_parameters() if id(parameter) in changed}
    if not named or engine.zero_optimization_stage() == 0:
        yield
        return
    from deepspeed import zero

    with torch.no_grad(), zero.GatheredParameters(list(named.values()), modifier_rank=0):
        yield
        for piece in pieces(engine):
            if piece.name in named:
                piece.of(piece.owner).copy_(piece.of_whole(named[piece.name]))


def import_deepspeed() -> Any:
    """DeepSpeed with this project's compilers, for the CPU where there is no GPU, and without its warnings."""
    toolchain.use_own()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of deprecated torch names is not for our users to read
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
