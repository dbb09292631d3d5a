"""The package map and the C++ extension `fastfusion._C` (one abi3 file, PyTorch's stable ABI).

Without torch >= 2.13 or a C++ compiler the installation is pure Python and the `torch` backend
serves; FASTFUSION_REQUIRE_EXT=1 turns that into an error. FASTFUSION_SANITIZE=address,undefined
builds with gcc's sanitizers.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FASTFUSION_REQUIRE_EXT") == "1"
MINIMUM_TORCH = (2, 13)
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/adapter_fusion.cpp",
    "csrc/cpu/routing.cpp",
    "csrc/cpu/row_passes.cpp",
]


def import_torch():
    """torch, from the interpreter's own site-packages when pip builds in isolation.

    An isolated build runs the same interpreter with site-packages taken off `sys.path`; the torch
    there is the one that the extension will be used with.
    """
    try:
        import torch
    except ImportError:
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        try:
            import torch
        except ImportError:
            return None
    return torch


def pure(reason: str) -> None:
    """Go on without the extension and say so, or stop where it is required."""
    if REQUIRED:
        sys.exit(f"fastfusion: FASTFUSION_REQUIRE_EXT=1, but {reason}")
    print(f"fastfusion: installing without the C++ extension: {reason}", file=sys.stderr)


def compile_flags() -> tuple[list[str], list[str]]:
    """The compiler's and the linker's flags."""
    flags = ["-DTORCH_TARGET_VERSION=0x020d000000000000", "-fvisibility=hidden", "-fopenmp-simd"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
    flags += [f"-fmacro-prefix-map={ROOT}/="]
    if sanitize := os.environ.get("FASTFUSION_SANITIZE"):
        option = f"-fsanitize={sanitize}"
        flags += [option, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
        return flags, [option]
    return [*flags, "-O3", "-g0"], []


def extension(torch) -> dict:
    """The arguments of `setup` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever stops the compiler: the package works without it
                pure(f"the compiler failed: {error}")
                # an earlier build's library would be installed as if it were this one
                for folder in (ROOT, ROOT / self.build_lib):
                    for library in (folder / "fastfusion").glob("_C*.so"):
                        library.unlink()
                self.extensions = []

    # torch looks for ninja on PATH; an interpreter called by its path does not put its own there
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    compile_args, link_args = compile_flags()
    module = CppExtension(
        "fastfusion._C",
        SOURCES,
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def build_arguments() -> dict:
    """What `setup` needs beside the package map."""
    torch = import_torch()
    if torch is None:
        pure("torch is not installed")
        return {}
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        pure(f"it needs torch >= 2.13; found {torch.__version__}")
        return {}
    return extension(torch)


setup(
    packages=[
        *find_packages(include=["fastfusion", "fastfusion.*"]),
        "fastfusion.kernels.triton",
    ],
    package_dir={"fastfusion": "fastfusion", "fastfusion.kernels.triton": "kernels/triton"},
    **build_arguments(),
)
