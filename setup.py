"""Builds the C++ optimizer with the package. Without a compiler the package installs all the same.

HORIZON_REQUIRE_KERNEL=1 turns a failure to compile into an error, for wheels that are to be published.
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -ffp-contract=off: no fused multiply-add, so that every instruction set gives the same bits. The other two
# let sqrt and selections become vector code and change no value: nobody reads errno or the exception flags.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
FLAGS += ["-Wno-psabi"]  # vectors are passed between functions that are always inlined
OPENMP = "-fopenmp"


class BuildOptimizer(build_ext):
    """With OpenMP where the compiler has it, else with one thread, else not at all."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            print("The C++ optimizer does not compile with OpenMP; trying without", file=sys.stderr)
            ext.extra_compile_args.remove(OPENMP)
            ext.extra_link_args.remove(OPENMP)
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "horizon_lm._optimizer",
            sources=["csrc/optimizer.cpp", "csrc/gradients.cpp"],
            depends=["csrc/dispatch.h", "csrc/element.h"],
            language="c++",
            extra_compile_args=[*FLAGS, OPENMP],
            extra_link_args=[OPENMP],
            # A failure is a warning; the torch reference serves.
            optional=os.environ.get("HORIZON_REQUIRE_KERNEL") != "1",
        )
    ],
    cmdclass={"build_ext": BuildOptimizer},
)
