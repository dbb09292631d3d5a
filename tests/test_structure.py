"""The rooms of the house: who may import whom, read from the source."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastfusion"

# From the ground up; a module imports from lower levels only. A name covers its sub-modules too.
LEVELS: list[list[str]] = [
    ["ops.activations", "ops.weights", "composition"],
    ["ops.routing"],
    ["ops.torch_backend", "reference", "configuration", "context", "files"],
    [
        "ops.cpp_backend",
        "kernels.triton.interpreter",
        "kernels.triton.schedule_files",
        "kernels.triton.device_timer",
        "kernels.triton.machine",
        "kernels.triton.processes",
        "kernels.triton.once",
    ],
    ["kernels.triton.tiles", "kernels.triton.candidates"],
    ["kernels.triton.groups"],
    ["kernels.triton.norms", "kernels.triton.projections", "kernels.triton.schedules"],
    ["kernels.triton.weight_gradients"],
    ["kernels.triton.mixtures"],
    ["kernels.triton.one_launch"],
    ["kernels.triton.two_launches"],
    ["kernels.triton.adapter_fusion"],
    ["kernels.triton.backward"],
    ["kernels.triton.norm_backward"],
    ["kernels"],
    ["kernels.triton.backend"],
    ["ops.backends"],
    ["ops.adapter_fusion", "ops.grouped"],
    ["ops"],
    ["kernels.triton.tuning_cases"],
    ["kernels.triton.tuning"],
    ["absorb"],
    ["modules", "packing", "lowering"],
    ["rows"],
    ["mixture"],
    ["steps"],
    ["lanes"],
    ["layer"],
    ["explain"],
    ["heads"],
    ["serialization"],
    ["saved_setups"],
    ["patching"],
    ["places"],
    ["model"],
    ["flexible"],
    ["trainer", "plots", "cli"],
    [""],  # fastfusion/__init__.py
]
EXTENSIONS = ("fastfusion._C", "fastfusion._C_cuda")
IMPORTS_TRANSFORMERS = ("patching", "model", "flexible", "trainer", "heads")

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): path
    for path in PACKAGE.rglob("*.py")
}
SOURCES |= {
    ".".join(("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)): path
    for path in (ROOT / "kernels").rglob("*.py")
}


def level(module: str) -> int:
    """The level of the longest name in `LEVELS` that covers the module."""
    covering = [
        (len(name), index)
        for index, names in enumerate(LEVELS)
        for name in names
        if module == name or (name and module.startswith(name + "."))
    ]
    assert covering, f"fastfusion.{module}: not in LEVELS; give it a room"
    return max(covering)[1]


def imports(path: Path, module: str) -> Iterator[str]:
    """Absolute names that a file imports at any depth, imports for type checkers aside."""
    tree = ast.parse(path.read_text())
    type_checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = ["fastfusion", *module.split(".")] if module else ["fastfusion"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_module(name: str) -> str | None:
    """The Python module of ours that an imported name is, or is defined in."""
    if name.split(".")[0] != "fastfusion" or name in EXTENSIONS:
        return None
    inner = name.removeprefix("fastfusion").lstrip(".")
    while inner and inner not in SOURCES:
        inner = inner.rpartition(".")[0]
    return inner


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
    for name in imports(SOURCES[module], module):
        target = own_module(name)
        if target is None or target.split(".")[0] == module.split(".")[0] == "patching":
            continue
        # `from fastfusion import x` of a module that is still loading would be a cycle
        assert target or not module, f"fastfusion.{module} imports {name} from the package itself"
        same_package = level(target) == level(module) and target.startswith(module)
        assert level(target) < level(module) or same_package, (
            f"fastfusion.{module} (level {level(module)}) imports {name} (level {level(target)})"
        )


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_foreign_imports(module):
    for name in imports(SOURCES[module], module):
        top = name.split(".")[0]
        assert top != "adapters", f"fastfusion.{module} imports {name}"
        if top == "transformers":
            assert module.split(".")[0] in IMPORTS_TRANSFORMERS, (
                f"fastfusion.{module} imports {name}"
            )
        if top in ("triton", "matplotlib"):
            assert module.split(".")[0] in ("kernels", "plots"), (
                f"fastfusion.{module} imports {name}"
            )
        assert top != "typer" or module == "cli", f"fastfusion.{module} imports {name}"


def test_kernels_is_not_ours(tmp_path):
    """transformers imports a package `kernels` where it finds one: ours must not be found."""
    if Path.cwd() == ROOT and ROOT in (Path(place).resolve() for place in sys.path):
        # `python -m pytest` puts the folder it starts in on sys.path: look again from elsewhere
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-c", ROOT / "pyproject.toml", f"{__file__}::test_kernels_is_not_ours"]
        subprocess.run(command, cwd=tmp_path, check=True)
        return
    spec = importlib.util.find_spec("kernels")
    if spec is not None:
        places = [spec.origin, *(spec.submodule_search_locations or [])]
        assert not any(place and Path(place).is_relative_to(ROOT) for place in places)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_py_typed_is_there():
    assert (PACKAGE / "py.typed").is_file()
