"""The arithmetic of DeepSpeed's FusedAdam kernel for GPUs, run on the CPU: is it torch's AdamW?"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import Tensor

KERNEL = Path(deepspeed.__file__).parent / "ops/csrc/adam/multi_tensor_adam.cu"
STAND_IN = Path(__file__).with_name("cuda_on_cpu.h")
HEADERS = (
    "ATen/ATen.h", "ATen/AccumulateType.h", "ATen/cuda/CUDAContext.h", "ATen/cuda/Exceptions.h",
    "multi_tensor_apply.cuh", "type_shim.h",
)  # fmt: skip
ENTRY = """
#include "kernel.cu"
extern "C" void adam(float* g, float* p, float* m, float* v, int64_t n, int step, float lr, float beta1, float beta2,
                     float epsilon, float decay)
{
    std::vector<std::vector<at::Tensor>> lists{{{g, n}}, {{p, n}}, {{m, n}}, {{v, n}}};
    multi_tensor_adam_cuda(65536, at::Tensor{}, lists, lr, beta1, beta2, epsilon, step, ADAM_MODE_1, 1, decay);
}
"""
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The kernel's own source, with stand-ins for CUDA and ATen in place of their headers."""
    folder = tmp_path_factory.mktemp("kernel")
    for header in HEADERS:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).write_text(f'#include "{STAND_IN}"\n')
    shutil.copyfile(KERNEL, folder / "kernel.cu")
    (folder / "entry.cpp").write_text(ENTRY)
    command = ["c++", "-w", "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{folder}", str(folder / "entry.cpp")]
    subprocess.run([*command, "-o", str(folder / "adam.so")], check=True, timeout=300)
    adam: Callable[..., None] = ctypes.CDLL(str(folder / "adam.so")).adam
    return adam


def steps(kernel: Callable[..., None], start: Tensor, gradients: Tensor) -> Tensor:
    """The parameters after a step of the kernel for each row of the gradients."""
    parameters, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    (beta1, beta2), number = SETTINGS["betas"], ctypes.c_float  # type: ignore[misc]
    scalars = (SETTINGS["lr"], beta1, beta2, SETTINGS["eps"], SETTINGS["weight_decay"])
    for step, gradient in enumerate(gradients, start=1):
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (gradient, parameters, m, v))
        kernel(*pointers, ctypes.c_int64(len(start)), ctypes.c_int(step), *map(number, scalars))
    return parameters


@pytest.mark.parametrize("size", [1, 3, 2049, 70_000])
def test_the_gpu_kernel_of_fused_adam_steps_as_torchs_adamw(kernel: Callable[..., None], size: int) -> None:
    """Sizes below a thread's four numbers, not a multiple of a block's, and of more than one chunk."""
    generator = torch.Generator().manual_seed(size)
    start, gradients = torch.randn(size, generator=generator), torch.randn(10, size, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], **SETTINGS)  # type: ignore[arg-type]
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    ours = steps(kernel, start, gradients)
    assert not torch.equal(ours, start)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
