"""Whether DeepSpeed's FusedAdam compiles for GPUs with the nvcc that is here; the object is never run."""

import os
import shutil
import subprocess
from pathlib import Path

import deepspeed
import pytest
import torch
from torch.utils import cpp_extension

SOURCES = Path(deepspeed.__file__).parent / "ops/csrc"
MATH_LIBRARIES = Path(torch.__file__).parents[1] / "nvidia/cu13/include"
"""cusparse.h and the like, as pip installs them beside torch; a CUDA toolkit of nvcc alone has none."""
FLAGS = (
    # -O1: whether it compiles does not depend on the level, and how long it takes does.
    "-c", "-O1", "-std=c++20", "--expt-relaxed-constexpr", "-D__CUDA_NO_HALF_OPERATORS__",
    "-DVERSION_GE_1_1", "-DVERSION_GE_1_3", "-DVERSION_GE_1_5",  # as DeepSpeed's CUDAOpBuilder defines them
)  # fmt: skip

pytestmark = pytest.mark.gpu_build


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    """Minutes of compiling are for those who ask for them."""
    if "gpu_build" not in request.config.option.markexpr:
        pytest.skip("compiles for a minute or more: make test-gpu-build")
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on PATH: install the CUDA toolkit of torch's version, see torch.version.cuda")


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_fused_adams_kernel_compiles_for_a100_and_h100(architecture: str, tmp_path: Path) -> None:
    target = tmp_path / "multi_tensor_adam.o"
    includes = [*cpp_extension.include_paths(), str(SOURCES / "includes"), str(SOURCES / "adam")]
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", *FLAGS, "-gencode", code, *(f"-I{folder}" for folder in includes)]
    built = subprocess.run(
        [*command, str(SOURCES / "adam/multi_tensor_adam.cu"), "-o", str(target)],
        env=os.environ | {"CPATH": str(MATH_LIBRARIES)}, capture_output=True, text=True, timeout=1000, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert b"AdamFunctor" in target.read_bytes(), "the object holds the kernel"
