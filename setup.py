"""The compiled part only: the view kernel, a plain shared library that `trainer.data.kernel` loads by ctypes."""

from setuptools import Extension, setup

# Not -ffast-math: linked into a library it changes how the whole process rounds. None of these flags lets a result
# depend on the width of a vector register, so that the same image gives the same bytes on every machine.
FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"]

setup(
    ext_modules=[
        Extension(
            "trainer.data._views",
            sources=["trainer/data/csrc/views.c"],
            depends=[
                f"trainer/data/csrc/{name}.h"
                for name in (
                    *("views", "params", "huffman", "decode", "axis", "transpose", "resize"),
                    *("colour", "linear", "blur", "write"),
                )
            ],
            libraries=["jpeg", "m"],
            extra_compile_args=["-O3", "-std=gnu11", "-Wall", "-Wextra", "-pthread", *FLAGS],
        )
    ]
)
