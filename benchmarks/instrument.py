"""Triton's interpreter as an instrument: which bytes a launch moves, and what it must not touch.

    with instrumented() as launches:
        adapter_fusion(...)

A pointer carries the argument that it was made from, so every access is held against that tensor
alone, though another may lie where it points. Within a launch, these are faults:

- an access outside its tensor, between the rows of a strided one too;
- a load of an element that a program of the launch has stored: on a GPU its other threads may not
  see it yet, and other programs run at any time (`READ_BACK` has the kernels whose programs read
  back their own, behind a barrier);
- a store to what another program loads or stores, and two lanes of one store at one element;
- an atomic operation: the order of its sums differs from run to run.

Works with Triton 3.6 to 3.9, in a process that has TRITON_INTERPRET=1.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

READ_BACK = {
    "adapter_fusion_kernel": "rows before the LayerNorm: docstring of one_launch.py",
    "adapter_output_kernel": "rows before the LayerNorm: docstring of two_launches.py",
}
"""Kernels that may load what the same program has stored, behind a barrier, and what argues it."""

NOBODY, SEVERAL = 0, -1  # beside the number of a program, from 1 on

Order = Callable[[int], Sequence[int]]
"""In which order so many programs run."""


class Fault(AssertionError):
    """An access that a kernel must not make."""


class Traffic(NamedTuple):
    """Bytes of one tensor in one launch, all programs' together, and with each address once."""

    loaded: int
    loaded_once: int
    stored: int
    stored_once: int
    size: int
    """Of the tensor itself."""


class Launch(NamedTuple):
    kernel: str
    programs: int
    traffic: dict[str, Traffic]
    """By the name of the kernel's argument, of tensors that are there."""


def reversed_order(programs: int) -> Sequence[int]:
    return range(programs)[::-1]


def shuffled(seed: int) -> Order:
    return lambda programs: np.random.default_rng(seed).permutation(programs).tolist()


class _Touched:
    """Which programs of a launch loaded and stored each element of a storage."""

    def __init__(self, size: int):
        self.loaded, self.stored = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.is_fresh = np.zeros(size, bool)  # stored since the program's last barrier


class _Argument(tl.pointer_type):
    """A tensor argument of a launch, as the type of its pointers: arithmetic hands it on."""

    def __init__(self, name: str, tensor: torch.Tensor, element: tl.dtype, touched: _Touched):
        super().__init__(element)
        self.argument, self.tensor, self.touched = name, tensor, touched
        self.itemsize = tensor.element_size()
        storage = tensor.untyped_storage().data_ptr()
        self.first = (tensor.data_ptr() - storage) // self.itemsize  # its place in `touched`
        each = zip(tensor.stride(), tensor.shape, strict=True)
        self.layout = sorted(((s, n) for s, n in each if n != 1 and s != 0), reverse=True)
        self.span = 0 if tensor.numel() == 0 else 1 + sum(s * (n - 1) for s, n in self.layout)
        self.is_dense = tensor.numel() == self.span
        self.loaded = self.stored = 0
        self.is_loaded, self.is_stored = np.zeros(self.span, bool), np.zeros(self.span, bool)

    def elements(self, pointers: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far from the first element the active lanes point, and which of them leave it."""
        found = (pointers - np.uint64(self.tensor.data_ptr()))[mask].view(np.int64) // self.itemsize
        outside = (found < 0) | (found >= self.span)
        if not self.is_dense:
            rest = found
            for stride, size in self.layout:
                outside |= rest // stride >= size
                rest = rest % stride
            outside |= rest != 0
        return found, outside

    def traffic(self) -> Traffic:
        once = (int(seen.sum()) * self.itemsize for seen in (self.is_loaded, self.is_stored))
        loaded_once, stored_once = once
        size = self.tensor.numel() * self.itemsize
        return Traffic(self.loaded, loaded_once, self.stored, stored_once, size)


class _Run:
    """One launch while it runs."""

    def __init__(self, kernel: str):
        self.kernel, self.programs, self.program = kernel, 0, 0
        self.arguments: dict[str, _Argument] = {}
        self.touched: dict[tuple[int, int], _Touched] = {}
        self.fresh: list[tuple[_Touched, np.ndarray]] = []

    def pointer(self, name: str, tensor: torch.Tensor, value: tl.tensor) -> tl.tensor:
        """The argument, its pointers marked as its own."""
        if name not in self.arguments:
            storage, itemsize = tensor.untyped_storage(), tensor.element_size()
            key = (storage.data_ptr(), itemsize)
            touched = self.touched.setdefault(key, _Touched(storage.nbytes() // itemsize))
            element = value.type.element_ty
            self.arguments[name] = _Argument(name, tensor, element, touched)
        return tl.tensor(TensorHandle(value.handle.data, self.arguments[name]), value.type)

    def fault(self, argument: _Argument, what: str, elements: np.ndarray) -> Fault:
        return Fault(
            f"{self.kernel}, program {self.program - 1}: {what} {argument.argument} "
            f"{list(argument.tensor.shape)}; {elements.size} elements, the first "
            f"{elements[0]} behind its start"
        )

    def _accessed(self, pointers: TensorHandle, mask: TensorHandle, what: str):
        argument = pointers.dtype
        if not isinstance(argument, _Argument):
            raise Fault(f"{self.kernel}: {what} a pointer that is no argument's")
        active = np.broadcast_to(mask.data, pointers.data.shape)
        elements, outside = argument.elements(pointers.data, active)
        if outside.any():
            raise self.fault(argument, f"{what} outside", elements[outside])
        return argument, elements

    def load(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        argument, elements = self._accessed(pointers, mask, "loads")
        touched, places = argument.touched, elements + argument.first
        stored = touched.stored[places]
        wrong = stored != NOBODY
        if self.kernel in READ_BACK:
            wrong &= (stored != self.program) | touched.is_fresh[places]
        if wrong.any():
            raise self.fault(argument, "loads what this launch stored in", elements[wrong])
        before = touched.loaded[places]
        alone = (before == NOBODY) | (before == self.program)
        touched.loaded[places] = np.where(alone, self.program, SEVERAL)
        argument.loaded += elements.size * argument.itemsize
        argument.is_loaded[elements] = True

    def store(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        argument, elements = self._accessed(pointers, mask, "stores")
        touched, places = argument.touched, elements + argument.first
        for before, action in ((touched.loaded, "loads"), (touched.stored, "stores")):
            others = (before[places] != NOBODY) & (before[places] != self.program)
            if others.any():
                what = f"stores what another program {action} in"
                raise self.fault(argument, what, elements[others])
        if np.unique(places).size != places.size:
            raise self.fault(argument, "stores twice at one element of", elements)
        touched.stored[places] = self.program
        touched.is_fresh[places] = True
        self.fresh.append((touched, places))
        argument.stored += elements.size * argument.itemsize
        argument.is_stored[elements] = True

    def barrier(self) -> None:
        """The program's threads see what all of them have stored."""
        for touched, places in self.fresh:
            touched.is_fresh[places] = False
        self.fresh.clear()


_execute = GridExecutor.__call__
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_set_dim, _set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx


def _fault_of(error: BaseException | None) -> Fault | None:
    """The fault that an error of the interpreter was raised from."""
    while error is not None and not isinstance(error, Fault):
        error = error.__cause__
    return error


@contextlib.contextmanager
def instrumented(order: Order = range) -> Iterator[list[Launch]]:
    """Check and record every launch within; the list grows by one as each of them ends.

    Args:
        order: in which the programs of a launch run.

    Raises:
        Fault: by the launch that makes it.
    """
    launches: list[Launch] = []
    run = _Run("")
    numbers: Sequence[int] = ()

    def execute(executor: GridExecutor, *args, **kwargs) -> None:
        nonlocal run
        kernel = executor.fn
        signature = inspect.signature(kernel)
        given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        tensors = {name: v for name, v in given.items() if isinstance(v, torch.Tensor)}
        run = _Run(kernel.__name__)

        @functools.wraps(kernel)
        def marked(**arguments):
            for name in tensors.keys() & arguments.keys():
                arguments[name] = run.pointer(name, tensors[name], arguments[name])
            kernel(**arguments)

        marked.__signature__ = signature  # what the executor binds arguments by
        executor.fn = marked
        try:
            _execute(executor, *args, **kwargs)
        except InterpreterError as error:
            if fault := _fault_of(error):
                raise fault from None
            raise
        traffic = {name: argument.traffic() for name, argument in run.arguments.items()}
        launches.append(Launch(run.kernel, run.programs, traffic))

    def set_dim(builder, *dim):
        nonlocal numbers
        _set_dim(builder, *dim)
        run.programs = int(np.prod(dim))
        numbers = order(run.programs)

    def set_index(builder, *index):
        _, ny, nz = builder.grid_dim
        number = numbers[(index[0] * ny + index[1]) * nz + index[2]]
        run.program = number + 1
        run.fresh.clear()  # no other program's business: those must not load it at all
        _set_index(builder, number // (ny * nz), number // nz % ny, number % nz)

    def load(builder, pointers, mask, *rest):
        run.load(pointers, mask)
        return _load(builder, pointers, mask, *rest)

    def store(builder, pointers, value, mask, *rest):
        run.store(pointers, mask)
        return _store(builder, pointers, value, mask, *rest)

    def barrier(builder):
        run.barrier()

    def atomic(builder, *_):
        raise Fault(f"{run.kernel}: an atomic operation")

    hooks = {
        "set_grid_dim": set_dim, "set_grid_idx": set_index, "create_masked_load": load,
        "create_masked_store": store, "create_barrier": barrier, "create_atomic_rmw": atomic,
        "create_atomic_cas": atomic,
    }  # fmt: skip
    with (
        mock.patch.multiple(InterpreterBuilder, **hooks),
        mock.patch.object(GridExecutor, "__call__", execute),
    ):
        yield launches
