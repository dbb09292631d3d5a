"""The op over groups of rows: each row as if its group's mixture ran on it alone.

pytest tests/test_grouped.py                          # torch, cpp
TRITON_INTERPRET=1 pytest tests/test_grouped.py       # triton on CPU tensors
pytest -m gpu tests/test_grouped.py                   # triton on a GPU
"""

import pytest
import torch
from test_adapter_fusion import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    DEVICE,
    INTERPRETED,
    backend_free,
    literal,
)

from fastfusion.ops import GroupedWeights, PackedWeights, adapter_fusion_grouped, stack
from fastfusion.ops.activations import activation_code
from fastfusion.ops.weights import group_weights, layouts, max_scored

HIDDEN = 37
# (sizes, activations, whether attention weighs them) of each group
GROUPS = [
    ((5,), ("relu",), False),
    ((4, 7), ("gelu", "tanh"), False),
    ((3, 1, 6), ("silu", "relu", "relu"), True),
    ((8,), ("gelu_new",), True),
    ((2,), ("sigmoid",), False),
    # more adapters than any group with attention has: the mask is narrower
    ((2, 1, 2, 1), ("relu", "relu", "silu", "relu"), False),
]
# groups of more columns than one block of the triton backend has, beside narrow ones
WIDE = [
    ((30, 7, 33), ("relu", "leaky_relu", "linear"), True),
    ((70,), ("gelu",), False),
    ((3, 2), ("tanh", "gelu"), True),
    ((1,) * 20, ("relu",) * 20, False),
]
# rounding of the dtype, through three products and a softmax
TOLERANCE = {
    torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 2.5e-3,
}  # fmt: skip
# The mode that the fixture uses refuses cuBLAS's products.
ON_GPU = torch.cuda.is_available() and not INTERPRETED
pytestmark = [] if ON_GPU else [pytest.mark.usefixtures("poisoned_empty")]
pytestmark += [pytest.mark.usefixtures("launches")] * INTERPRETED
ROWS = {
    "none": [],
    "one": [2],
    "all-base": [-1] * 9,
    "in-order": [5] * 6 + [0] * 40 + [1] * 3 + [2] * 70 + [-1] * 5 + [3] * 33,
    "one-group": [2] * 300,
    "long": [g for g in (2, 0, 2, -1, 1) for _ in range(130)],
}


def generator():
    return torch.Generator().manual_seed(0)


def random_groups(rows: int, count: int = len(GROUPS)) -> list[int]:
    return torch.randint(-1, count, (rows,), generator=generator()).tolist()


ROWS["shuffled"] = random_groups(131)


def packs(dtype=torch.float64, device="cpu", groups=GROUPS, std=0.3) -> list[PackedWeights]:
    made, g = [], generator()

    def random(*shape):
        return (std * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).to(device)

    for sizes, activations, scored in groups:
        columns, rows = sum(sizes), sum(sizes) + len(sizes)
        score = (random(rows, HIDDEN), random(rows)) if scored else (None, None)
        down, out = (random(columns, HIDDEN), random(columns)), random(rows, HIDDEN)
        codes = [activation_code(name) for name in activations]
        made.append(PackedWeights(*down, *score, out, None, list(sizes), codes))
    return made


def inputs(rows: int, dtype=torch.float64, device="cpu"):
    g = generator()
    x, residual, grad = (
        torch.randn(rows, HIDDEN, generator=g, dtype=torch.float64).to(dtype).to(device)
        for _ in range(3)
    )
    mask = torch.randint(0, 2, (rows, 3), generator=g).to(dtype).to(device) / 0.5
    return x, residual, grad, mask


def ids(groups: list[int], device="cpu") -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.int32, device=device)


def definition(x, residual, groups, weights: GroupedWeights, mask=None):
    out = torch.zeros_like(x) if residual is None else residual.clone()
    p = x.new_zeros(len(x), max_scored(weights.counts, weights.scored))
    parts = layouts(weights.sizes, weights.counts, weights.scored)
    for row, group in enumerate(groups):
        if group < 0:
            continue
        own = group_weights(parts[group], *weights[:5])
        at = slice(row, row + 1)
        count = len(own.sizes)
        own_mask = None if mask is None or own.w_score is None else mask[at, :count]
        own_residual = None if residual is None else residual[at]
        out[at], own_p = literal([x[at]], None, own_residual, own, own_mask)
        if own_p is not None:
            p[at, :count] = own_p
    return out, p


def check(actual, expected, dtype, name):
    # of the whole: in bf16 single entries of a sum over many rows lose more
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


def compare(backend, dtype, groups, weights, x, residual, grad, mask):
    """Values and every gradient against the definition in fp64."""
    given = [x, residual, *weights[:3]]
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    exact_mask = None if mask is None else mask.double()
    layout = weights[3:]
    expected = definition(
        exact[0], exact[1], groups, GroupedWeights(*exact[2:], *layout), exact_mask
    )
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    actual = adapter_fusion_grouped(
        leaves[0],
        leaves[1],
        ids(groups, x.device),
        GroupedWeights(*leaves[2:], *layout),
        mask=mask,
        backend=backend,
    )
    check(actual[0], expected[0], dtype, "out")
    check(actual[1], expected[1], dtype, "p")
    assert not actual[1].requires_grad
    assert (actual[1][expected[1] == 0] == 0).all()
    if not groups:
        return
    if expected[0].requires_grad:
        torch.autograd.backward(expected[0], grad.double())
    torch.autograd.backward(actual[0], grad)
    for name, ours, truth in zip(
        ("x", "residual", "w_in", "b_in", "w_out"), leaves, exact, strict=True
    ):
        if ours is not None:
            truth_grad = torch.zeros_like(truth) if truth.grad is None else truth.grad
            check(ours.grad, truth_grad, dtype, name)


IN_DOUBLE = [] if INTERPRETED else [("torch", torch.float64)]


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend, dtype", IN_DOUBLE + BACKENDS_AND_DTYPES)
def test_values_and_gradients(backend, dtype, rows, with_residual, with_mask):
    groups = ROWS[rows]
    x, residual, grad, mask = inputs(len(groups), dtype, DEVICE[backend])
    residual, mask = residual if with_residual else None, mask if with_mask else None
    weights = stack(packs(dtype, DEVICE[backend]))
    compare(backend, dtype, groups, weights, x, residual, grad, mask)


# blocks of the cpp backend of up to 32 rows, and of up to 37
@pytest.mark.parametrize("rows", [150, 600])
@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
def test_wide_groups(backend, dtype, rows):
    groups = random_groups(rows, len(WIDE))
    weights = stack(packs(dtype, DEVICE[backend], WIDE, std=0.1))
    compare(backend, dtype, groups, weights, *inputs(len(groups), dtype, DEVICE[backend]))


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_one_kind(backend, scored):
    """No group with attention, or only such."""
    kind = [group for group in GROUPS if group[2] == scored]
    groups = random_groups(90, len(kind))
    device = DEVICE[backend]
    x, residual, grad, mask = inputs(len(groups), torch.float32, device)
    weights = stack(packs(torch.float32, device, kind))
    mask = mask if scored else None
    compare(backend, torch.float32, groups, weights, x, residual, grad, mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend):
    groups, device = ROWS["shuffled"], DEVICE[backend]
    x, residual, grad, mask = inputs(len(groups), torch.float32, device)
    weights = stack(packs(torch.float32, device))

    def turned(tensor):
        return tensor.t().contiguous().t()

    turned_weights = weights._replace(w_in=turned(weights.w_in), w_out=turned(weights.w_out))
    wide = torch.full([len(x), HIDDEN + 3], float("nan"), device=device)
    wide[:, 1:-2] = x
    given = (turned_weights, wide[:, 1:-2], turned(residual), grad, turned(mask))
    compare(backend, torch.float32, groups, *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_touch_each_other(backend):
    groups, device = ids(ROWS["shuffled"], DEVICE[backend]), DEVICE[backend]
    x, residual, _, mask = inputs(len(groups), torch.float32, device)
    weights = stack(packs(torch.float32, device))
    expected, _ = adapter_fusion_grouped(x, residual, groups, weights, mask=mask, backend=backend)
    row = ROWS["shuffled"].index(2)
    x[row] = float("nan")
    out, _ = adapter_fusion_grouped(x, residual, groups, weights, mask=mask, backend=backend)
    assert out[row].isnan().all()
    others = torch.arange(len(x), device=device) != row
    assert torch.equal(out[others], expected[others])


@pytest.mark.skipif(not INTERPRETED, reason="the triton backend's limits")
def test_triton_refusals():
    x, residual, _, _ = inputs(2, torch.float32)
    groups = [((4,), ("relu",), True), ((5,), ("mish",), False)]
    weights = stack(packs(torch.float32, groups=groups))
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this: .*it has no mish"):
        adapter_fusion_grouped(x, residual, ids([0, 1]), weights, backend="triton")


@pytest.mark.gpu
def test_one_capture_serves_every_mixture():
    x, residual, _, mask = inputs(131, torch.float32, "cuda")
    weights = stack(packs(torch.float32, "cuda"))
    groups = ids(ROWS["shuffled"], "cuda")

    def run():
        return adapter_fusion_grouped(x, residual, groups, weights, mask=mask, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for mixture in (ROWS["shuffled"][::-1], [-1] * 131, [2] * 131):
        groups.copy_(ids(mixture))
        graph.replay()
        for ours, truth in zip(captured, run(), strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_needed_gradients(backend):
    """Each gradient alone is what it is among all."""
    groups = ids(ROWS["shuffled"], DEVICE[backend])
    x, residual, grad, mask = inputs(len(groups), torch.float32, DEVICE[backend])
    weights = stack(packs(torch.float32, DEVICE[backend]))

    def gradients(indices):
        leaves = [t.detach().requires_grad_(i in indices) for i, t in enumerate([x, *weights[:3]])]
        grouped = GroupedWeights(*leaves[1:], *weights[3:])
        out, _ = adapter_fusion_grouped(leaves[0], residual, groups, grouped, backend=backend)
        return torch.autograd.grad(out, [leaves[i] for i in indices], grad)

    every = gradients([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(gradients([i])[0], every[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    groups = ids(ROWS["shuffled"], DEVICE[backend])
    x, residual, _, mask = inputs(len(groups), torch.float32, DEVICE[backend])
    w_in, b_in, w_out, *layout = stack(packs(torch.float32, DEVICE[backend]))
    tensors = [t.requires_grad_() for t in (x, residual)]
    args = (*tensors, groups, w_in.requires_grad_(), b_in, w_out, mask, *layout, backend)
    torch.library.opcheck(torch.ops.fastfusion.adapter_fusion_grouped, args)


@backend_free
def test_gradients_of_gradients_are_refused():
    groups = ids([0, 1])
    x, residual, grad, _ = inputs(2)
    out, _ = adapter_fusion_grouped(x.requires_grad_(), residual, groups, stack(packs()))
    (dx,) = torch.autograd.grad(out, [x], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend):
    groups = ids(ROWS["shuffled"], DEVICE[backend])
    x, residual, _, _ = inputs(len(groups), torch.float32, DEVICE[backend])
    weights = stack(packs(torch.float32, DEVICE[backend]))
    first, _ = adapter_fusion_grouped(x, residual, groups, weights, backend=backend)
    again, _ = adapter_fusion_grouped(x, residual, groups, weights, backend=backend)
    assert torch.equal(first, again)


@backend_free
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(groups=torch.zeros(3, dtype=torch.int32)), r"groups: expected \[2\]; got \[3\]"),
        (dict(groups=torch.zeros(2)), r"groups: expected torch.int32; got torch.float32"),
        (dict(residual=torch.zeros(2, 5)), r"residual: expected \[2, 37\]; got \[2, 5\]"),
        (dict(mask=torch.zeros(2, 4)), r"mask: expected \[2, 3\]; got \[2, 4\]"),
        (dict(w_in=torch.zeros(5, 37)), r"w_in: expected \[74, 37\]; got \[5, 37\]"),
        (dict(w_out=torch.zeros(5, 37)), r"w_out: expected \[80, 37\]; got \[5, 37\]"),
    ],
)
def test_wrong_arguments(change, message):
    x, residual, _, _ = inputs(2, torch.float32)
    weights = stack(packs(torch.float32))
    given = {"residual": residual, "groups": ids([0, 1]), "mask": None}
    given |= {key: value for key, value in change.items() if key in given}
    weights = weights._replace(**{k: v for k, v in change.items() if k not in given})
    with pytest.raises(ValueError, match=message):
        adapter_fusion_grouped(x, given["residual"], given["groups"], weights, mask=given["mask"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-2, len(GROUPS)])
def test_groups_out_of_range(backend, wrong):
    if DEVICE[backend] != "cpu":
        pytest.skip("a GPU's ids are not checked")
    x, residual, _, _ = inputs(2, torch.float32)
    groups = ids([0, wrong])
    with pytest.raises((ValueError, RuntimeError), match="ids: expected groups from -1 to 5"):
        adapter_fusion_grouped(x, residual, groups, stack(packs(torch.float32)), backend=backend)
