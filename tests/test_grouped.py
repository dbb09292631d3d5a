"""The op over groups of rows: each row as if its group's mixture ran on it alone."""

import pytest
import torch
from test_adapter_fusion import literal

from fastfusion.ops import GroupedWeights, PackedWeights, adapter_fusion_grouped, stack
from fastfusion.ops.activations import activation_code
from fastfusion.ops.weights import group_weights, layouts

HIDDEN = 37
BACKENDS = ("torch", "cpp")
# (sizes, activations, whether attention weighs them) of each group
GROUPS = [
    ((5,), ("relu",), False),
    ((4, 7), ("gelu", "tanh"), False),
    ((3, 1, 6), ("silu", "relu", "relu"), True),
    ((8,), ("gelu_new",), True),
    ((2,), ("sigmoid",), False),
]
# rounding of the dtype, through three products and a softmax
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
ROWS = {
    "none": [],
    "one": [2],
    "all-base": [-1] * 9,
    "in-order": [0] * 40 + [1] * 3 + [2] * 70 + [-1] * 5 + [4] * 33,
    "one-group": [2] * 300,
    "long": [g for g in (2, 0, 2, -1, 1) for _ in range(130)],
}


def generator():
    return torch.Generator().manual_seed(0)


def random_groups(rows: int) -> list[int]:
    return torch.randint(-1, len(GROUPS), (rows,), generator=generator()).tolist()


ROWS["shuffled"] = random_groups(131)


def packs(dtype=torch.float64) -> list[PackedWeights]:
    made, g = [], generator()

    def random(*shape):
        return (0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    for sizes, activations, scored in GROUPS:
        columns, rows = sum(sizes), sum(sizes) + len(sizes)
        score = (random(rows, HIDDEN), random(rows)) if scored else (None, None)
        down, out = (random(columns, HIDDEN), random(columns)), random(rows, HIDDEN)
        codes = [activation_code(name) for name in activations]
        made.append(PackedWeights(*down, *score, out, None, list(sizes), codes))
    return made


def inputs(rows: int, dtype=torch.float64):
    g = generator()
    x, residual, grad = (
        torch.randn(rows, HIDDEN, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    mask = torch.randint(0, 2, (rows, 3), generator=g).to(dtype) / 0.5
    return x, residual, grad, mask


def definition(x, residual, groups, weights: GroupedWeights, mask=None):
    out = torch.zeros_like(x) if residual is None else residual.clone()
    p = x.new_zeros(len(x), 3)
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


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "backend, dtype",
    [("torch", torch.float64), ("torch", torch.float32), ("cpp", torch.float32)]
    + [("cpp", torch.bfloat16)],
)
def test_values_and_gradients(backend, dtype, rows, with_residual, with_mask):
    groups = ROWS[rows]
    x, residual, grad, mask = inputs(len(groups), dtype)
    residual, mask = residual if with_residual else None, mask if with_mask else None
    weights = stack(packs(dtype))
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
        torch.tensor(groups, dtype=torch.int32),
        GroupedWeights(*leaves[2:], *layout),
        mask=mask,
        backend=backend,
    )
    check(actual[0], expected[0], dtype, "out")
    check(actual[1], expected[1], dtype, "p")
    assert not actual[1].requires_grad
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_needed_gradients(backend):
    """Each gradient alone is what it is among all."""
    groups = torch.tensor(ROWS["shuffled"], dtype=torch.int32)
    x, residual, grad, mask = inputs(len(groups), torch.float32)
    weights = stack(packs(torch.float32))

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
    groups = torch.tensor(ROWS["shuffled"], dtype=torch.int32)
    x, residual, _, mask = inputs(len(groups), torch.float32)
    w_in, b_in, w_out, *layout = stack(packs(torch.float32))
    tensors = [t.requires_grad_() for t in (x, residual)]
    args = (*tensors, groups, w_in.requires_grad_(), b_in, w_out, mask, *layout, backend)
    torch.library.opcheck(torch.ops.fastfusion.adapter_fusion_grouped, args)


def test_gradients_of_gradients_are_refused():
    groups = torch.tensor([0, 1], dtype=torch.int32)
    x, residual, grad, _ = inputs(2)
    out, _ = adapter_fusion_grouped(x.requires_grad_(), residual, groups, stack(packs()))
    (dx,) = torch.autograd.grad(out, [x], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend):
    groups = torch.tensor(ROWS["shuffled"], dtype=torch.int32)
    x, residual, _, _ = inputs(len(groups), torch.float32)
    weights = stack(packs(torch.float32))
    first, _ = adapter_fusion_grouped(x, residual, groups, weights, backend=backend)
    again, _ = adapter_fusion_grouped(x, residual, groups, weights, backend=backend)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(groups=torch.zeros(3, dtype=torch.int32)), r"groups: expected \[2\]; got \[3\]"),
        (dict(groups=torch.zeros(2)), r"groups: expected torch.int32; got torch.float32"),
        (dict(residual=torch.zeros(2, 5)), r"residual: expected \[2, 37\]; got \[2, 5\]"),
        (dict(mask=torch.zeros(2, 4)), r"mask: expected \[2, 3\]; got \[2, 4\]"),
        (dict(w_in=torch.zeros(5, 37)), r"w_in: expected \[68, 37\]; got \[5, 37\]"),
        (dict(w_out=torch.zeros(5, 37)), r"w_out: expected \[64, 37\]; got \[5, 37\]"),
    ],
)
def test_wrong_arguments(change, message):
    x, residual, _, _ = inputs(2, torch.float32)
    weights = stack(packs(torch.float32))
    given = {"residual": residual, "groups": torch.tensor([0, 1], dtype=torch.int32), "mask": None}
    given |= {key: value for key, value in change.items() if key in given}
    weights = weights._replace(**{k: v for k, v in change.items() if k not in given})
    with pytest.raises(ValueError, match=message):
        adapter_fusion_grouped(x, given["residual"], given["groups"], weights, mask=given["mask"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-2, len(GROUPS)])
def test_groups_out_of_range(backend, wrong):
    x, residual, _, _ = inputs(2, torch.float32)
    groups = torch.tensor([0, wrong], dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="ids: expected groups from -1 to 4"):
        adapter_fusion_grouped(x, residual, groups, stack(packs(torch.float32)), backend=backend)
