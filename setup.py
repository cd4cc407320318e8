"""The compiled part only: the view kernel, a plain shared library that `trainer.data.kernel` loads by ctypes."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "trainer.data._views",
            sources=["trainer/data/csrc/views.c"],
            libraries=["jpeg", "m"],
            extra_compile_args=["-O3", "-std=gnu11", "-Wall", "-Wextra"],
        )
    ]
)
