"""A place against the literal recursion over the composition tree, for random trees.

Trees come from the nesting table, with the depth that is allowed; adapters have random sizes,
activations and configs, and some are absent. Values, attentions, gates and the gradients of the
input, the hidden states and every parameter are compared, 1000 cases in all, always the same ones.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal_composition import Place, Walk, leaves, spread
from test_mixture import make_layer
from test_rows import make
from torch import nn

from fastfusion import absorb
from fastfusion.composition import (
    _ALLOWED_CHILDREN,
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    parse_composition,
)
from fastfusion.configuration import AdapterConfig, AdapterFusionConfig
from fastfusion.context import ForwardContext
from fastfusion.layer import AdapterLayer
from fastfusion.modules import Adapter, AdapterFusion

HIDDEN = 8
NAMES = "abcde"
# Random cases in a fixed order: a failure stays until it is fixed. No deadline: the machine may be
# busy with something else.
PROFILE = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}

# Configs whose lanes can go through one call of the op per stage, and what keeps them from it.
GROUPABLE = {
    "original_ln_before": st.booleans(),
    "original_ln_after": st.sampled_from([True, True, False]),
    "residual_before_ln": st.sampled_from([True, True, False, "post_add"]),
    "scaling": st.sampled_from([1.0, 2.5, "learned", "channel"]),
}
FREE = GROUPABLE | {
    "is_parallel": st.sampled_from([False, False, True]),
    "ln_before": st.sampled_from([False, False, True]),
    "ln_after": st.sampled_from([False, False, True]),
    "use_gating": st.sampled_from([False, False, True]),
    "adapter_residual_before_ln": st.booleans(),
}
# a kink of relu may lie between a value in fp32 and the same in fp64
SMOOTH = ("gelu", "swish", "tanh", None)
KINKED = ("relu", "leakyrelu", "mish", *SMOOTH)
FUSION = {
    "key": st.sampled_from([True, True, False]),
    "query": st.sampled_from([True, True, False]),
    "value": st.sampled_from([True, True, False]),
    "value_before_softmax": st.booleans(),
}
FREE_FUSION = FUSION | {
    "query_before_ln": st.booleans(),
    "residual_before": st.sampled_from([False, False, True]),
    "temperature": st.sampled_from([False, False, True]),
}
CUTS_ROWS = (BatchSplit, MultiTask, Parallel)


class Case:
    """A place with its adapters, a setup (or one for each row), and what a batch looks like.

    Args:
        draw: hypothesis' own.
        by_row: one setup for each row in place of one for all.
    """

    def __init__(self, draw, by_row: bool):
        self.draw = draw
        self.backend = draw(st.sampled_from(["torch", "torch", "reference", "cpp"]))
        self.dtype = torch.float32 if self.backend == "cpp" else torch.float64
        self.rows, self.tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6))
        self.with_norm = draw(st.sampled_from([True, True, True, False]))
        self.recorded = draw(st.sampled_from(["all", "all", "inputs", "none"]))
        self.fusions: dict[str, dict] = {}
        self.tasks = draw(st.integers(2, 3))
        self.channels = draw(st.integers(2, 3))
        self.is_free = draw(st.booleans())
        # of batches as small as these the factored form is cheaper, without groups
        self.is_absorbed = draw(st.booleans())
        self.setup, self.setups, self.numbers = None, None, None
        if by_row:
            made = [self.tree(0, True) for _ in range(draw(st.integers(1, 3)))]
            self.setups = tuple(dict.fromkeys([None, *map(parse_composition, made)]))
            numbers = st.integers(0, len(self.setups) - 1)
            self.numbers = torch.tensor([draw(numbers) for _ in range(self.rows)])
        else:
            self.setup = parse_composition(self.tree(0, False))
            kinds = _kinds(self.setup)
            if MultiTask in kinds:
                numbers = st.integers(0, self.tasks - 1)
                self.numbers = torch.tensor([draw(numbers) for _ in range(self.rows)])
        self.is_copied = Parallel in _kinds(self.setup) and draw(st.booleans())
        self.seed = draw(st.integers(0, 2**16))
        setups = [setup for setup in self.setups or (self.setup,) if setup is not None]
        used = set().union(*(setup.flatten() for setup in setups))
        self.configs = {name: self.config() for name in sorted(used)}
        self.absent = draw(st.sets(st.sampled_from(sorted(used)), max_size=2)) if used else set()
        if draw(st.booleans()):
            self.absent = set()

    def __repr__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if k != "draw"}
        return f"Case({shown})"

    def tree(self, level: int, by_row: bool):
        kinds = [kind for kind in _ALLOWED_CHILDREN if not (by_row and kind in CUTS_ROWS)]
        # every other tree is a Stack: it alone may have further blocks of all kinds
        kind = self.draw(st.sampled_from([*kinds, *[Stack] * (len(kinds) - 2)]))
        return self.block(kind, level, self.rows, self.tokens, by_row)

    def block(self, kind, level, rows, tokens, by_row):
        if kind is MultiTask:
            return MultiTask(*self.children(kind, level, [(None, tokens)] * self.tasks, by_row))
        if kind is Parallel:
            return Parallel(*self.children(kind, level, [(rows, tokens)] * self.channels, by_row))
        count = self.draw(st.sampled_from([1, 2, 2, 3, 3]))
        if kind is BatchSplit:
            sizes = self.sizes(rows, count)
            parts = [(size, tokens) for size in sizes]
            return BatchSplit(*self.children(kind, level, parts, by_row), batch_sizes=sizes)
        if kind is Split:
            if count == 2 and self.draw(st.booleans()):
                index = self.draw(st.integers(0, tokens))
                parts = [(rows, index), (rows, tokens - index)]
                return Split(*self.children(kind, level, parts, by_row), split_index=index)
            sizes = self.sizes(tokens, count)
            parts = [(rows, size) for size in sizes]
            return Split(*self.children(kind, level, parts, by_row), splits=sizes)
        children = self.children(kind, level, [(rows, tokens)] * count, by_row)
        if kind is Average:
            weights = [self.draw(st.sampled_from([1.0, 0.5, 2.0])) for _ in children]
            return Average(
                *children,
                weights=weights,
                normalize_weights=self.draw(st.sampled_from([True, True, False])),
                peer_scaling=self.draw(st.sampled_from([False, False, True])),
            )
        if kind is Fuse:
            last = [c if isinstance(c, str) else c.last() for c in children]
            keep = [i for i, name in enumerate(last) if name not in last[:i]]
            fuse = Fuse(*(children[i] for i in keep))
            fields = FREE_FUSION if self.is_free else FUSION
            self.fusions.setdefault(fuse.name, self.drawn(fields))
            return fuse
        return Stack(*children)

    def children(self, kind, level, parts, by_row):
        """Level rules: a Stack inside a block holds names, below two blocks there are no others."""
        allowed = [k for k in _ALLOWED_CHILDREN[kind] if not (by_row and k in CUTS_ROWS)]
        if kind is Stack and level > 0:
            allowed = []
        elif level > 0:
            allowed = [k for k in allowed if k is Stack]
        made = []
        for rows, tokens in parts:
            child = self.draw(
                st.sampled_from([None, *allowed, *allowed] if level == 0 else [None, *allowed])
            )
            if child is None:
                made.append(self.draw(st.sampled_from(NAMES)))
            else:
                made.append(self.block(child, level + 1, rows, tokens, by_row))
        return made

    def sizes(self, total: int, count: int) -> list[int]:
        cuts = sorted(self.draw(st.integers(0, total)) for _ in range(count - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    def drawn(self, fields: dict) -> dict:
        return {name: self.draw(values) for name, values in fields.items()}

    def config(self) -> dict:
        config = self.drawn(FREE if self.is_free else GROUPABLE)
        activations = SMOOTH if self.backend == "cpp" else KINKED
        config["non_linearity"] = self.draw(st.sampled_from(activations))
        config["reduction_factor"] = self.draw(st.sampled_from([0.5, 2, 8]))
        return config

    # -- from here on nothing is drawn -----------------------------------------------------------

    def place(self) -> AdapterLayer:
        torch.manual_seed(self.seed)
        shared = SimpleNamespace(
            backend=self.backend,
            has_copies=lambda _: self.is_copied,
        )
        layer = AdapterLayer(shared, 0, "output_adapter")
        for name, overrides in self.configs.items():
            if name not in self.absent:
                config = AdapterConfig.load("seq_bn").replace(**overrides)
                size = config.bottleneck_size(HIDDEN, 0)
                layer.adapters[name] = Adapter(config, HIDDEN, size)
        for name, overrides in self.fusions.items():
            config = AdapterFusionConfig.load("dynamic", **overrides)
            layer.adapter_fusion_layer[name] = AdapterFusion(config, HIDDEN, 0.0)
        for modules in (layer.adapters, layer.adapter_fusion_layer):
            modules.to(self.dtype).eval().requires_grad_(self.recorded == "all")
            for parameter in modules.parameters():
                nn.init.normal_(parameter, std=0.4)
        return layer

    def check(self) -> None:
        layer = self.place()
        count = self.rows * (self.channels if self.is_copied else 1)
        hidden, input = (torch.randn(count, self.tokens, HIDDEN).to(self.dtype) for _ in "hi")
        norm = None
        if self.with_norm:
            norm = nn.LayerNorm(HIDDEN).requires_grad_(False)
            nn.init.normal_(norm.weight, mean=1.0, std=0.3)
            nn.init.normal_(norm.bias, std=0.3)
        truth = self.literal(layer, hidden, input, norm, torch.float64)
        plain = truth
        if self.dtype != torch.float64:
            plain = self.literal(layer, hidden, input, norm, self.dtype)
        with pytest.MonkeyPatch.context() as patch:
            if self.is_absorbed:
                patch.setattr(absorb, "prefers_absorbed", lambda *_: True)
            actual = self.library(layer, hidden, input, norm)
        assert actual.keys() >= truth.keys(), truth.keys() - actual.keys()
        sizes = [t.abs().max().item() for t in truth.values() if t is not None and t.numel()]
        # some gradients are sums of such numbers that cancel
        floor = 1000 * torch.finfo(self.dtype).eps * max(1.0, *sizes)
        for name, expected in truth.items():
            found = actual.pop(name)
            if found is None or expected is None:
                # nothing depends on it, whether that is said by None or by zeros
                assert all(t is None or not t.any() for t in (found, expected)), name
                continue
            assert found.shape == expected.shape, name
            if expected.numel() == 0:
                continue
            error = (found.double() - expected).abs().max().item()
            # what the formulas themselves lose in this dtype, and a little for another order
            bound = 8 * (plain[name].double() - expected).abs().max().item() + floor
            assert error <= bound, f"{name}: {error} > {bound}"
        assert all(t is None or not t.any() for t in actual.values()), actual.keys()

    def literal(self, layer, hidden, input, norm, dtype) -> dict:
        adapters, leaf = leaves(dict(layer.adapters), dtype)
        fusions, fusion_leaf = leaves(dict(layer.adapter_fusion_layer), dtype)
        norm = None if norm is None else norm.to(dtype)
        hidden, input = (t.detach().to(dtype).requires_grad_() for t in (hidden, input))
        place = Place(adapters, fusions, norm)
        if self.setups is None:
            walk = Walk(place, self.is_copied)
            out = walk.run(self.setup, hidden, input, self.numbers)
            records = walk.records
        else:
            outs, records = [], []
            for i, number in enumerate(self.numbers.tolist()):
                walk = Walk(place)
                outs.append(walk.run(self.setups[number], hidden[i : i + 1], input[i : i + 1]))
                records += [r._replace(rows=r.rows + i) for r in walk.records]
            out = torch.cat(outs)
        found = {"out": out.detach(), **spread(records, *out.shape[:2])}
        leaf |= {f"fusion {name}": t for name, t in fusion_leaf.items()}
        return found | self.gradients(out, {"hidden": hidden, "input": input} | leaf)

    def library(self, layer, hidden, input, norm) -> dict:
        norm = None if norm is None else norm.to(self.dtype)
        takes_grad = self.recorded != "none"
        hidden, input = (t.detach().clone().requires_grad_(takes_grad) for t in (hidden, input))
        plans = {layer: layer.lower(self.setup if self.setups is None else self.setups)}
        context = ForwardContext(True, True, plans, row_numbers=self.numbers)
        with context, torch.set_grad_enabled(takes_grad):
            out = layer.forward(hidden, input, norm)
        found = {"out": out.detach()}
        for kind, names in context.outputs().items():
            for name, layers in names.items():
                found[kind, name] = layers[0]["output_adapter"]
        leaf = {"hidden": hidden, "input": input}
        leaf |= dict(layer.adapters.named_parameters())
        fusions = layer.adapter_fusion_layer.named_parameters()
        leaf |= {f"fusion {name}": parameter for name, parameter in fusions}
        return found | self.gradients(out, leaf)

    def gradients(self, out, leaf: dict) -> dict:
        """Of a fixed random weighing of the output, by what is recorded."""
        if self.recorded == "none":
            return {}
        if self.recorded == "inputs":
            leaf = {name: leaf[name] for name in ("hidden", "input")}
        generator = torch.Generator().manual_seed(self.seed)
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaf.values()), grad, allow_unused=True)
        return {f"gradient of {name}": g for name, g in zip(leaf, grads, strict=True)}


def _kinds(setup) -> set[type]:
    if setup is None or isinstance(setup, str):
        return set()
    return {type(setup)}.union(*map(_kinds, setup))


@st.composite
def cases(draw, by_row: bool) -> Case:
    return Case(draw, by_row)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Starting threads for 8 numbers takes most of the time."""
    set_threads(1)


@settings(max_examples=600, **PROFILE)
@given(cases(by_row=False))
def test_blocks(case):
    case.check()


GATED = [
    Split(Stack("a", "b"), Stack("b", "a"), splits=[2, 3]),
    Stack("a", Split("b", "c", splits=[2, 3])),
    Stack(Split("b", "c", split_index=2), "a"),
    Stack(Split("b", "c", splits=[2, 3]), Average("b", "a")),
]


@pytest.mark.parametrize("setup", GATED, ids=repr)
def test_gates_and_splits(setup):
    """A gate is the mean over all tokens that its adapter gets, however a Split cuts them."""
    layer = make_layer([{"use_gating": True}, {}, {}], None, setup)
    hidden, input = (torch.randn(2, 5, 12, dtype=torch.float64) for _ in "hi")
    norm = nn.LayerNorm(12).double()
    place = Place(leaves(dict(layer.adapters), torch.float64)[0], {}, norm)
    expected = Walk(place).run(setup, hidden, input)
    torch.testing.assert_close(layer.forward(hidden, input, norm), expected)


@settings(max_examples=400, **PROFILE)
@given(cases(by_row=True))
def test_a_setup_for_each_row(case):
    """Each row is as if it were alone with its setup."""
    case.check()


@pytest.mark.parametrize(
    "setup",
    [
        BatchSplit("a", "b", batch_sizes=[0, 2]),
        BatchSplit("a", "b", batch_sizes=[2, 0]),
        Split("a", "b", splits=[0, 5]),
        Split("a", "b", splits=[5, 0]),
        Split("a", "b", split_index=0),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "configs", [({"original_ln_before": False}, {}), ({}, {"original_ln_after": False})]
)
def test_parts_that_are_empty(setup, configs):
    """A block's first adapter has the pre step, its last one the post step, with rows or none."""
    layer = make_layer(list(configs), None, setup)
    hidden, input = (torch.randn(2, 5, 12, dtype=torch.float64) for _ in "hi")
    norm = nn.LayerNorm(12).double().requires_grad_(False)
    place = Place(leaves(dict(layer.adapters), torch.float64)[0], {}, norm)
    with torch.no_grad():
        expected = Walk(place).run(setup, hidden, input)
        torch.testing.assert_close(layer.forward(hidden, input, norm), expected)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_an_average_of_one_gate(backend):
    """Where a layer leaves the other child out, the weight of the one with a gate is not 1."""
    setup = Average("g", "missing in layer 0", weights=[1.5, 0.5], normalize_weights=False)
    model = make(backend="reference")
    model.set_active_adapters(setup)
    ids = tiny.ids(2, 5)
    with torch.no_grad():
        expected = model(ids)[0]
        model.set_backend(backend)
        torch.testing.assert_close(model(ids)[0], expected, rtol=1e-4, atol=2e-5)
