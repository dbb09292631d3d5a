"""No op of the triton backend waits for the device after a layout's first call.

The calls run on the meta device, where nothing can be read: what would wait for a GPU either raises
by itself (`item`, `tolist`, `numpy`, `nonzero`) or is listed by `watched`. Launches are recorded
(`launches.py`); the ops run as they do on a GPU, with the routing in PyTorch that serves where the
extension is absent.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("triton")

import test_grouped as grouped  # noqa: E402
from launches import TARGETS, Case, recorded, recording  # noqa: E402
from test_adapter_fusion import (  # noqa: E402
    CASES,
    WEIGHTS,
    norm_tensors_of,
    on,
    run,
    run_norm,
    tensors_of,
)

from fastfusion.kernels.triton import (  # noqa: E402
    backend,
    backward,
    groups,
    one_launch,
    two_launches,
    weight_gradients,
)
from fastfusion.ops import (  # noqa: E402
    GroupedWeights,
    adapter_fusion_grouped,
    adapter_fusion_norm,
    routing,
    stack,
)

SM_90 = TARGETS["sm_90"]
ATEN = torch.ops.aten

# --------------------------------------------------------------------------------------------------
# what waits

FROM_THE_HOST = [
    (torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (torch, "from_numpy"),
    (torch.Tensor, "new_tensor"),
]  # fmt: skip
"""Numbers of the host go to the device; on the meta device these are no ops."""
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
INDEXED = (
    ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
)  # fmt: skip
BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits(function, args: tuple, kwargs: dict) -> bool:
    """Whether the call would read a tensor's numbers, or copy between devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # a number in a tensor on the CPU is an argument of a kernel, unless it is copied
    devices = {tensor.device for tensor in tensors if tensor.dim() > 0 or function in COPIES}
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    if len(devices) > 1 or function is ATEN.lift_fresh.default:
        return True
    if function in INDEXED:
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    return bool(BY_VALUE & set(function.tags))


class _Watch(TorchDispatchMode):
    """Lists calls that wait, inside our ops too, which run as they do on a GPU."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastfusion":
            with self:
                key = torch._C.DispatchKey.CompositeExplicitAutograd
                return function._op_dk(key, *args, **kwargs)
        if waits(function, args, kwargs):
            self.found.append(str(function))
        return function(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The calls within that would wait for the device."""
    found: list[str] = []

    def listed(owner: object, name: str) -> Callable:
        make = getattr(owner, name)

        def made(*args, **kwargs):
            found.append(name)
            return make(*args, **kwargs)

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in FROM_THE_HOST:
            stack.enter_context(mock.patch.object(owner, name, listed(owner, name)))
        stack.enter_context(_Watch(found))
        yield found


WAITING = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "length": lambda x: x[: x.sum()],
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "masked_store": lambda x: x.index_put_((x > 0,), x),
    "unique": lambda x: torch.unique(x),
    "bincount": lambda x: torch.bincount(x),
    "repeat": lambda x: torch.repeat_interleave(x, x),
    "table": lambda x: torch.tensor([1, 2], device=x.device),
    "like": lambda x: x.new_tensor([1, 2]),
    "list": lambda x: torch.tensor([1, 2]).to(x.device),
    "copied": lambda x: x.copy_(torch.zeros(4, dtype=torch.long)),
    "number": lambda x: x[0].copy_(torch.zeros((), dtype=torch.long)),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long)],
}
RUNNING = {
    "cast": lambda x: x.int().to(torch.float32),
    "rows": lambda x: x[x.clamp(0, 3)],
    "choice": lambda x: torch.where(x < 0, 7, x),
    "kept": lambda x: x.masked_fill(x < 0, 0),
    "zeros": lambda x: torch.zeros_like(x) + x.new_full((), 3) + 2,
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_seen(name):
    x = torch.zeros(4, dtype=torch.long, device="meta")
    # what cannot be had of a tensor without numbers
    with watched() as found, contextlib.suppress(RuntimeError):
        WAITING[name](x)
    assert found


@pytest.mark.parametrize("name", RUNNING)
def test_what_does_not_wait_passes(name):
    x = torch.zeros(4, dtype=torch.long, device="meta")
    with watched() as found:
        RUNNING[name](x)
    assert not found


# --------------------------------------------------------------------------------------------------
# the ops


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """The backend takes tensors on the meta device, and has seen no layout."""
    monkeypatch.setattr(backend, "refusal", lambda x, weights: None)
    groups.tables.cache_clear()
    weight_gradients._tiles.cache_clear()


def assert_waits_once(call: Callable[[], list]) -> None:
    """The first call makes a layout's tables; the second launches the same and waits for nothing.

    Args:
        call: returns its launches.
    """
    with watched() as found:
        expected = call()
    assert set(found) == {"tensor"}
    with watched() as found:
        launches = call()
    assert not found
    assert launches
    each = [(launch.kernel, launch.programs) for launch in launches]
    assert each == [(launch.kernel, launch.programs) for launch in expected]


BERT, EIGHT = ((48,) * 3,), ((48,) * 8,)  # in one launch and, of a forward, in two
GROUPS = ((48,) * 3, (48, 24), (48,))
DIRECT = [
    Case("sm_90", op, sizes, rows=rows, flags=frozenset(flags.split()))
    for op, sizes, rows, flags in [
        ("plain", BERT, 16384, "mask temperature offset"),
        ("plain", EIGHT, 16384, "mask temperature offset"),
        ("plain", EIGHT, 8, ""),
        ("plain", EIGHT, 16384, "query bare"),
        ("plain", EIGHT, 1024, "inputs"),
        ("plain", BERT, 16384, "unscored"),
        ("plain", EIGHT, 16384, "backward mask temperature offset"),
        ("plain", EIGHT, 1024, "backward query inputs activations"),
        ("plain", BERT, 8, "backward unscored"),
        ("norm", BERT, 16384, "mask temperature save"),
        ("norm", BERT, 16384, "ln_before"),
        ("norm", EIGHT, 16384, "ln_before save"),
        ("norm", EIGHT, 8, "ln_before"),
        ("norm", EIGHT, 16384, "backward"),
        ("norm", EIGHT, 1024, "backward ln_before mask"),
        ("grouped", GROUPS, 16384, "mask"),
        ("grouped", (*EIGHT, *GROUPS), 16384, "bare"),
        ("grouped", (*EIGHT, *GROUPS), 8, "unscored"),
        ("grouped", GROUPS, 16384, "backward mask"),
        ("grouped", (*EIGHT, *GROUPS), 1024, "backward"),
    ]
]


@pytest.mark.parametrize("case", DIRECT, ids=lambda case: case.name)
def test_backend_function(case):
    def call():
        with torch.device("meta"):
            return recorded(case)

    assert_waits_once(call)


def on_the_meta_device(values):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), values)


def plain_op(name: str) -> Callable[[], object]:
    given = on_the_meta_device(tensors_of(CASES[name], torch.bfloat16, "cpu"))
    return lambda: run(on("triton"), CASES[name], given)


def norm_op(ln_before: bool) -> Callable[[], object]:
    case = CASES["mask"]
    given = on_the_meta_device(norm_tensors_of(case, torch.bfloat16, "cpu"))

    def op(*args, **kwargs):
        return adapter_fusion_norm(*args, **kwargs, backend="triton")

    return lambda: run_norm(op, case, given, ln_before, ["x0", "residual", *WEIGHTS])


def grouped_op() -> Callable[[], object]:
    rows = grouped.ROWS["shuffled"]
    x, residual, grad, mask = on_the_meta_device(grouped.inputs(len(rows), torch.bfloat16))
    weights = on_the_meta_device(stack(grouped.packs(torch.bfloat16)))
    numbers = on_the_meta_device(grouped.ids(rows))

    def call():
        leaves = [t.detach().requires_grad_() for t in (x, residual, *weights[:3])]
        given = GroupedWeights(*leaves[2:], *weights[3:])
        out, _ = adapter_fusion_grouped(*leaves[:2], numbers, given, mask=mask, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    return call


OPS = {
    "plain": lambda: plain_op("two-column-blocks"),
    "query": lambda: plain_op("query"),
    "inputs": lambda: plain_op("inputs"),
    "single": lambda: plain_op("single"),
    "norm-after": lambda: norm_op(False),
    "norm-before-and-after": lambda: norm_op(True),
    "grouped": grouped_op,
}


def launched(call: Callable[[], object]) -> Callable[[], list]:
    def recorded_call():
        with recording(SM_90) as launches:
            call()
        return launches

    return recorded_call


@pytest.mark.parametrize("name", OPS)
def test_op_and_its_gradients(name):
    assert_waits_once(launched(OPS[name]()))


def test_routing():
    """Its three ops, and the gradients of two."""
    numbers = torch.zeros(131, dtype=torch.int32, device="meta")
    x = torch.zeros(131, 8, device="meta", requires_grad=True)
    with watched() as found:
        tables = routing.routing_tables(numbers, 5, 16)
        rows = routing.gather_rows(x, tables.order)
        (grad,) = torch.autograd.grad(routing.scatter_rows(rows, tables.order), x, x)
    assert grad.shape == x.shape
    assert not found


# --------------------------------------------------------------------------------------------------
# planted


def reads_the_count(numbers, *args):
    found = groups.row_blocks(numbers, *args)
    return found._replace(count=int(found.blocks[:, 0].ge(0).sum()))


PLANTED = {
    "tables made anew": [
        (module, "tables", groups.tables.__wrapped__)
        for module in (one_launch, two_launches, backward)
    ],
    "tiles made anew": [(weight_gradients, "_tiles", weight_gradients._tiles.__wrapped__)],
    "the count of blocks read": [
        (module, "row_blocks", reads_the_count) for module in (one_launch, two_launches, backward)
    ],
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name, monkeypatch):
    for place in PLANTED[name]:
        monkeypatch.setattr(*place)
    with pytest.raises((AssertionError, RuntimeError), match=r"assert not|meta tensors"):
        assert_waits_once(launched(grouped_op()))
