"""Both rewritings against the literal formulas in fp64: values, attention and every gradient.

The layer's whole way is taken, from a place's modules to its output, once with the `reference`
backend (the literal formulas) and once with each form on the `torch` backend.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from literal_composition import Place, Walk, leaves
from torch import nn

from fastfusion import absorb
from fastfusion.composition import Fuse, Stack
from fastfusion.configuration import AdapterConfig, AdapterFusionConfig, ModelAdaptersConfig
from fastfusion.context import ForwardContext
from fastfusion.layer import AdapterLayer
from fastfusion.modules import Adapter, AdapterFusion

HIDDEN = 12
# fp64 sums of a few hundred products: 1e-10 is far above their rounding and far below any mistake
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def make_layer(adapter_overrides, fusion=None, setup=None, dtype=torch.float64, dropout=0.0):
    """A place with randomised adapters "a", "b", ... and, with a config, a fusion over them."""
    config = ModelAdaptersConfig()
    settings = SimpleNamespace(config=config, backend="torch")
    layer = AdapterLayer(settings, 0, "output_adapter")
    names = "abcdefgh"[: len(adapter_overrides)]
    for name, overrides in zip(names, adapter_overrides, strict=True):
        adapter_config = AdapterConfig.load("seq_bn", **{"reduction_factor": 3, **overrides})
        size = adapter_config.bottleneck_size(HIDDEN, 0)
        layer.adapters[name] = Adapter(adapter_config, HIDDEN, size)
    if fusion is not None:
        fusion_config = AdapterFusionConfig.load(fusion)
        layer.adapter_fusion_layer[",".join(names)] = AdapterFusion(fusion_config, HIDDEN, dropout)
    for module in (layer.adapters, layer.adapter_fusion_layer):
        module.to(dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        module.eval()
    config.active_setup = setup or (Fuse(*names) if fusion is not None else Stack(*names))
    activate(layer, config.active_setup)
    return layer


def activate(layer, setup):
    plans = {layer: layer.lower(setup)}
    layer.settings.current_plans = lambda: plans


def run(layer, backend, hidden, input, norm, grad):
    """Output, attention, and the gradients of everything, with a seed of its own."""
    layer.settings.backend = backend
    hidden, input = (t.detach().clone().requires_grad_() for t in (hidden, input))
    parameters = {
        f"{kind}.{name}": p
        for kind in ("adapters", "adapter_fusion_layer")
        for name, p in getattr(layer, kind).named_parameters()
    }
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(3)
    plans = layer.settings.current_plans()
    with ForwardContext(output_adapter_fusion_attentions=True, plans=plans) as context:
        out = layer.forward(hidden, input, norm)
    out.backward(grad)
    grads = {name: p.grad for name, p in parameters.items()}
    grads |= {"hidden": hidden.grad, "input": input.grad}
    attention = context.outputs()["adapter_fusion_attentions"]
    return out.detach(), attention, grads


def check(layer, shape=(2, 3), norm=True, used=lambda name: True):
    hidden, input, grad = (torch.randn(*shape, HIDDEN, dtype=torch.float64) for _ in range(3))
    layer_norm = nn.LayerNorm(HIDDEN).double().requires_grad_(False) if norm else None
    if norm:
        nn.init.normal_(layer_norm.weight)
        nn.init.normal_(layer_norm.bias)
    expected = run(layer, "reference", hidden, input, layer_norm, grad)
    actual = run(layer, "torch", hidden, input, layer_norm, grad)
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    assert actual[1].keys() == expected[1].keys()
    for fusion in expected[1]:
        torch.testing.assert_close(
            actual[1][fusion][0]["output_adapter"],
            expected[1][fusion][0]["output_adapter"],
            **TOLERANCE,
        )
    for name, grad in expected[2].items():
        if grad is None:  # what the literal formulas do not touch
            assert actual[2][name] is None or not actual[2][name].any(), name
            continue
        assert actual[2][name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            actual[2][name], grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(params=["absorbed", "factored"])
def form(request, monkeypatch):
    wanted = request.param == "absorbed"
    monkeypatch.setattr(absorb, "prefers_absorbed", lambda *_: wanted)
    return request.param


FUSIONS = [
    {"key": key, "query": query, "value": value}
    for key, query, value in itertools.product((True, False), repeat=3)
] + [
    {"query_before_ln": True},
    {"residual_before": True},
    {"residual_before": True, "value": False, "key": False},
    {"temperature": True},
    {"value_before_softmax": False},
    {"residual_before": True, "temperature": True, "value_before_softmax": False},
]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_fusion_settings(form, fusion, dropout):
    layer = make_layer([{}, {}, {}], fusion, dropout=dropout)
    layer.adapter_fusion_layer.train(dropout > 0)
    check(layer)


TWICE = [Fuse("a", "a", name="a,b"), Fuse("a", "b", "a", name="a,b")]
TWICE += [Fuse(Stack("b", "a"), "a", name="a,b"), Stack("b", TWICE[0])]


@pytest.mark.parametrize("setup", TWICE, ids=repr)
def test_an_adapter_twice_in_a_fuse(form, setup):
    """As in `adapters`: it is fused with itself, and its gradient is the sum of both."""
    layer = make_layer([{}, {"reduction_factor": 5}], {}, setup)
    check(layer)
    hidden, input = (torch.randn(2, 3, HIDDEN, dtype=torch.float64) for _ in "hi")
    norm = nn.LayerNorm(HIDDEN).double()
    parts = (
        leaves(dict(m), torch.float64)[0] for m in (layer.adapters, layer.adapter_fusion_layer)
    )
    expected = Walk(Place(*parts, norm)).run(setup, hidden, input)
    torch.testing.assert_close(layer.forward(hidden, input, norm), expected, **TOLERANCE)
    if setup is TWICE[0]:
        # equal scores: half of each, which is the adapter
        activate(layer, Fuse("a", name="a,b"))
        torch.testing.assert_close(layer.forward(hidden, input, norm), expected, **TOLERANCE)


ADAPTERS = {
    "sizes": [{"reduction_factor": 12}, {"reduction_factor": 0.9}, {"reduction_factor": 4}],
    "activations": [{"non_linearity": n} for n in ("relu", "gelu_new", "swish", None)],
    "rare activations": [{"non_linearity": n} for n in ("mish", "quick_gelu", "gelu_10")],
    "scalings": [{"scaling": 2.5}, {"scaling": "learned"}, {"scaling": "channel"}, {}],
    "norms inside": [{"ln_before": True}, {"ln_before": True, "scaling": "channel"}],
    "norm in one": [{"ln_before": True}, {}, {"ln_before": True}],
    "no norm before": [{"original_ln_before": False}, {"original_ln_before": False}],
    "no norm after": [{"original_ln_after": False}, {"original_ln_after": False}],
    "residual behind the norm": [{"residual_before_ln": False}] * 2,
    "residual of the sum": [{"residual_before_ln": "post_add"}] * 2,
    "parallel": [{"is_parallel": True, "scaling": 4.0}] * 2,
    "ignored inside a Fuse": [{"use_gating": True, "ln_after": True}, {"dropout": 0.5}],
    "one": [{}],
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("overrides", ADAPTERS.values(), ids=ADAPTERS)
def test_fused_adapters(form, overrides, norm):
    check(make_layer(overrides, "dynamic"), norm=norm)


SINGLE = [
    *itertools.chain.from_iterable(ADAPTERS.values()),
    {"ln_after": True, "adapter_residual_before_ln": True},
    {"use_gating": True, "is_parallel": True},
    {"ln_before": True, "ln_after": True, "use_gating": True, "scaling": "learned"},
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("overrides", SINGLE, ids=str)
def test_single_adapter(overrides, norm):
    check(make_layer([overrides]), norm=norm)


@pytest.mark.parametrize("overrides", [{"dropout": 0.4}, {"stochastic_depth": 0.5}])
@pytest.mark.parametrize("kind", ["single", "fused"])
def test_noise_in_training(overrides, kind):
    """Dropout and stochastic depth draw what the literal formulas draw under the same seed."""
    layer = make_layer([overrides, overrides], "dynamic" if kind == "fused" else None)
    layer.adapters.train()
    check(layer, shape=(5, 3))


SETUPS = [
    Stack("a", "b", "c"),
    Stack("a", Fuse("a", "b", "c")),
    Stack(Fuse("a", "b", "c"), "b"),
    Fuse(Stack("b", "a"), "b", Stack("c"), name="a,b,c"),
    Fuse(Stack("c", "a"), Stack("a", "c", "b"), "c"),
    Stack("b", Fuse(Stack("c", "a"), "b", "c")),
]


@pytest.mark.parametrize("setup", SETUPS, ids=repr)
@pytest.mark.parametrize("overrides", [{}, {"original_ln_before": False}, {"ln_before": True}])
def test_nesting(form, setup, overrides):
    check(
        make_layer([overrides, {**overrides, "reduction_factor": 5}, overrides], "dynamic", setup)
    )


def test_absent_adapters_are_left_out(form):
    layer = make_layer([{}, {}, {}], "dynamic")
    del layer.adapters["b"]
    activate(layer, layer.settings.config.active_setup)
    assert len(layer.current_plan().lanes[0].steps[0].mixture.adapters) == 2
    check(layer)


def test_packs_hold_products_of_the_parameters():
    """The absorbed weights, written out for one adapter without any stacking."""
    layer = make_layer([{"scaling": 2.0}], "dynamic")
    (adapter,), fusion = layer.adapters.values(), layer.adapter_fusion_layer["a"]
    weights = absorb.pack(absorb.Parameters([adapter.bottleneck()], fusion.attention()), True)
    up, bias = 2.0 * adapter.adapter_up.weight, 2.0 * adapter.adapter_up.bias
    wq, bq = fusion.query.weight, fusion.query.bias
    wk, bk, wv = fusion.key.weight, fusion.key.bias, fusion.value.weight
    size = adapter.bottleneck_size
    key = wk @ bias + bk
    for actual, expected in (
        (weights.w_score[:size], up.T @ wk.T @ wq),
        (weights.b_score[:size], up.T @ wk.T @ bq),
        (weights.w_score[size], wq.T @ key),
        (weights.b_score[size], key @ bq),
        (weights.w_out[:size], (wv @ up).T),
        (weights.w_out[size], wv @ bias),
    ):
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert weights.w_out.shape[0] % 8 == 0 and not weights.w_out[size + 1 :].any()


def test_gradients_of_the_input_alone(form):
    """Frozen adapters and fusion inside a trained model: cached packs, gradients for the input."""
    layer = make_layer([{}, {}], "dynamic")
    for module in (layer.adapters, layer.adapter_fusion_layer):
        module.requires_grad_(False)
    check(layer)


def test_which_form():
    """The borders of docs/design.md: recorded at T = Nd, cached only far beyond Nd = 2H."""
    assert absorb.prefers_absorbed(rows=384, hidden_size=768, columns=384, recorded=True)
    assert not absorb.prefers_absorbed(rows=383, hidden_size=768, columns=384, recorded=True)
    assert absorb.prefers_absorbed(rows=1, hidden_size=768, columns=1536, recorded=False)
    assert not absorb.prefers_absorbed(rows=32, hidden_size=768, columns=1537, recorded=False)
    assert absorb.prefers_absorbed(rows=33, hidden_size=768, columns=6144, recorded=False)
