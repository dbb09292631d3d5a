"""The package map and the extensions `fastfusion._C` and `fastfusion._C_cuda` (abi3, stable ABI).

Without torch >= 2.13 or a C++ compiler the installation is pure Python and the `torch` backend
serves; FASTFUSION_REQUIRE_EXT=1 turns that into an error. FASTFUSION_SANITIZE=address,undefined
builds with gcc's sanitizers.

FASTFUSION_CUDA=auto builds the CUDA extension where torch has CUDA and there is an nvcc of the same
major version, 0 never, and 1 always, a missing nvcc being an error then; neither a GPU nor a torch
with CUDA is needed. TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("FASTFUSION_REQUIRE_EXT") == "1"
CUDA = os.environ.get("FASTFUSION_CUDA", "auto")
MINIMUM_TORCH = (2, 13)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020d000000000000"
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/adapter_fusion.cpp",
    "csrc/cpu/grouped.cpp",
    "csrc/cpu/routing.cpp",
    "csrc/cpu/row_passes.cpp",
]
CUDA_SOURCES = ["csrc/cuda/module.cpp", "csrc/cuda/routing.cu"]


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
    flags = [STABLE_ABI, "-fvisibility=hidden", "-fopenmp-simd"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
    flags += [f"-fmacro-prefix-map={ROOT}/="]
    if sanitize := os.environ.get("FASTFUSION_SANITIZE"):
        option = f"-fsanitize={sanitize}"
        flags += [option, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
        return flags, [option]
    return [*flags, "-O3", "-g0"], []


def nvcc_major(home: Path) -> str:
    """The major version of an nvcc."""
    command = [home / "bin" / "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+)", text)[1]


def cuda_home(torch) -> Path | None:
    """The folder of the nvcc that builds the CUDA extension; None where it is not to be built."""
    if CUDA not in ("auto", "0", "1"):
        sys.exit(f"fastfusion: FASTFUSION_CUDA: expected auto, 0 or 1; got {CUDA!r}")
    if CUDA == "0" or (CUDA == "auto" and torch.version.cuda is None):
        return None
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    home = next((Path(p) for p in places if p and (Path(p) / "bin" / "nvcc").exists()), None)
    if home is None:
        reason = "there is no nvcc in CUDA_HOME, CUDA_PATH or /usr/local/cuda"
    elif torch.version.cuda and (major := nvcc_major(home)) != torch.version.cuda.split(".")[0]:
        # torch's build would stop at that
        reason = f"torch has CUDA {torch.version.cuda} and nvcc is of CUDA {major}"
    else:
        return home
    if CUDA == "1":
        sys.exit(f"fastfusion: FASTFUSION_CUDA=1, but {reason}")
    print(f"fastfusion: installing without the CUDA extension: {reason}", file=sys.stderr)
    return None


def cuda_module(home: Path):
    """The CUDA extension. It links its own CUDA runtime and nothing of torch's CUDA libraries."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)  # None in a torch without CUDA
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    nvcc_args = [STABLE_ABI, "-std=c++20", "-O3", "-Xptxas=-warn-spills"]
    nvcc_args += ["-Xcompiler", f"-fvisibility=hidden,-fmacro-prefix-map={ROOT}/="]
    return cpp_extension.CppExtension(
        "fastfusion._C_cuda",
        CUDA_SOURCES,
        include_dirs=[str(home / "include")],
        library_dirs=[str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={"cxx": [STABLE_ABI, "-O3", "-g0"], "nvcc": nvcc_args},
        py_limited_api=True,
        optional=CUDA == "auto" and not REQUIRED,
    )


def extensions(torch) -> dict:
    """The arguments of `setup` that build the extensions."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever stops the compiler: the package works without it
                pure(f"the compiler failed: {error}")
                self.forget("_C*.so")
                self.extensions = []

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                print(f"fastfusion: installing without {ext.name}: {error}", file=sys.stderr)
                self.forget("_C_cuda*.so")

        def forget(self, pattern: str) -> None:
            # an earlier build's library would be installed as if it were this one
            for folder in (ROOT, ROOT / self.build_lib):
                for library in (folder / "fastfusion").glob(pattern):
                    library.unlink()

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
    modules = [module]
    if home := cuda_home(torch):
        modules.append(cuda_module(home))
    return {
        "ext_modules": modules,
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
    return extensions(torch)


setup(
    packages=[
        *find_packages(include=["fastfusion", "fastfusion.*"]),
        "fastfusion.kernels.triton",
    ],
    package_dir={"fastfusion": "fastfusion", "fastfusion.kernels.triton": "kernels/triton"},
    **build_arguments(),
)
