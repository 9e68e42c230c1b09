"""Build step of the package: the C++ kernels. Its metadata is in pyproject.toml.

The library has a plain C interface (see megatron_adam_mini/kernels/cpu.cpp), so it needs neither
torch nor Python headers to compile, and one build serves every version of both. Without a C++
compiler the package installs all the same, as pure Python, and says what that costs.
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.errors import CompileError, DistutilsError, LinkError
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    # All instruction sets give the same bits, and those of the plain-torch kernels.
    "-ffp-contract=off",
    "-Wno-psabi",
]
THREADS = ["-fopenmp"]
SKIP = "MEGATRON_ADAM_MINI_NO_COMPILER"


def compiles(flags: list[str]) -> bool:
    """Return whether the C++ compiler makes a shared library with these flags."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text('extern "C" int probe() { return 0; }\n')
        try:
            objects = compiler.compile(
                [str(source)], output_dir=folder, extra_postargs=[*flags, "-fPIC"]
            )
            compiler.link_shared_object(
                objects, str(Path(folder, "probe.so")), extra_postargs=flags, target_lang="c++"
            )
        except (CompileError, LinkError, DistutilsError, OSError):
            return False
    return True


def extensions() -> list[Extension]:
    """Return what to compile: nothing without a compiler, and then say what that means."""
    if os.environ.get(SKIP) or not compiles(FLAGS):
        sys.stderr.write(
            "megatron-adam-mini: no working C++ compiler found, so the CPU kernels are left out. "
            "On CPUs the optimizer will run on plain torch, several times slower; on GPUs nothing "
            "changes. Remedy: install g++ and install again.\n"
        )
        return []
    flags = FLAGS + (THREADS if compiles(FLAGS + THREADS) else [])
    return [
        Extension(
            "megatron_adam_mini.kernels._cpu",
            sources=["megatron_adam_mini/kernels/cpu.cpp"],
            depends=sorted(map(str, Path("megatron_adam_mini/kernels").glob("*.inc"))),
            extra_compile_args=flags,
            extra_link_args=flags,
            language="c++",
            py_limited_api=True,
        )
    ]


class PlainLibrary(build_ext):
    """The library has no module initialiser to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export what the source marks."""
        return []


class AnyPython(bdist_wheel):
    """One wheel per platform for every Python, because the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag."""
        python, abi, platform = super().get_tag()
        if self.distribution.ext_modules:
            return "py3", "none", platform
        return python, abi, platform


setup(ext_modules=extensions(), cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython})
