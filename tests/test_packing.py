"""The cache of packed weights is never stale: one test for each way that parameters change."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrize import register_parametrization

import fastfusion
from fastfusion import absorb, packing


@pytest.fixture
def model():
    return tiny.bert()


def parameters(model) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "adapter" in n]


def output(model, ids, backend=None):
    model.set_backend(backend)
    with torch.no_grad():
        return model(ids).last_hidden_state


@torch.no_grad()
def cached(mixture):
    return mixture.packed_weights(True, torch.zeros(1), mixture.tensors())


def check_fresh(model, ids, before):
    """The cached packs give what the literal formulas give, and something else than before."""
    after = output(model, ids)
    torch.testing.assert_close(after, output(model, ids, "reference"), rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)


def add_in_place(model):
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(0.1)


def new_parameters(model):
    for name, module in model.named_modules():
        if "adapter" in name and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach() + 0.1)


def new_modules(model):
    for adapters in model.get_adapter("a").values():
        for adapter in adapters.values():
            adapter.adapter_up = copy.deepcopy(adapter.adapter_up)
            nn.init.normal_(adapter.adapter_up.weight)


def data_swapped(model):
    for parameter in parameters(model):
        parameter.data = parameter.data + 0.1


def fused_adamw(model):
    step(model, torch.optim.AdamW(parameters(model), lr=0.1, fused=True))


def sgd(model):
    step(model, torch.optim.SGD(parameters(model), lr=10.0, foreach=True))


def step(model, optimizer):
    model(tiny.ids()).last_hidden_state.square().sum().backward()
    optimizer.step()


def fused_adamw_on_ready_gradients(model):
    """No recorded forward in between: the optimizer's step alone must be seen."""
    for parameter in parameters(model):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters(model), lr=0.1, fused=True).step()


def vector(model):
    vector_to_parameters(parameters_to_vector(parameters(model)).detach() + 0.1, parameters(model))


def load_state(model):
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})


def train_and_eval_after_data(model):
    for parameter in parameters(model):
        parameter.data.add_(0.1)
    model.train()
    model.eval()


def there_and_back(model):
    for parameter in parameters(model):
        parameter.data.mul_(1.01)
    model.half()
    model.float()


def refresh_after_data(model):
    for parameter in parameters(model):
        parameter.data.add_(0.1)
    fastfusion.refresh(model)


def recorded_forward_after_data(model):
    for parameter in parameters(model):
        parameter.data.add_(0.1)
    model(tiny.ids())


def other_scaling(model):
    for adapters in model.get_adapter("a").values():
        for adapter in adapters.values():
            adapter.scaling = 3


def another_adapter_of_the_name(model):
    model.add_adapter("a", "double_seq_bn[reduction_factor=2]", overwrite_ok=True)
    tiny.randomize(model)


CHANGES = [
    add_in_place,
    new_parameters,
    new_modules,
    data_swapped,
    fused_adamw,
    fused_adamw_on_ready_gradients,
    sgd,
    vector,
    load_state,
    train_and_eval_after_data,
    there_and_back,
    refresh_after_data,
    recorded_forward_after_data,
    other_scaling,
    another_adapter_of_the_name,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_seen(model, change):
    ids = tiny.ids()
    before = output(model, ids)
    change(model)
    check_fresh(model, ids, before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_under_inference_mode(model, change):
    ids = tiny.ids()
    with torch.inference_mode():
        before = model(ids).last_hidden_state.clone()
    change(model)
    with torch.inference_mode():
        after = model(ids).last_hidden_state.clone()
    torch.testing.assert_close(after, output(model, ids, "reference"), rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)


def test_parameters_made_in_inference_mode():
    """They have no version: identity and address have to do."""
    with torch.inference_mode():
        model = tiny.bert()
        ids = tiny.ids()
        before = output(model, ids)
        new_parameters(model)
        check_fresh(model, ids, before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_projections(model):
    """Computed at every access: gradients flow to what they are computed from."""
    ids = tiny.ids()
    before = output(model, ids)
    adapter = model.get_adapter("a")[0]["output_adapter"]
    fusion = model.model_adapters.layers[0].adapter_fusion_layer["a,b,c"]
    register_parametrization(adapter.adapter_up, "weight", Doubled())
    register_parametrization(fusion.key, "weight", Doubled())
    check_fresh(model, ids, before)
    originals = [m.parametrizations.weight.original for m in (adapter.adapter_up, fusion.key)]
    gradients = {}
    for backend in (None, "reference"):
        model.set_backend(backend)
        loss = model(ids).last_hidden_state.square().sum()
        gradients[backend] = torch.autograd.grad(loss, originals)
    torch.testing.assert_close(gradients[None], gradients["reference"], rtol=1e-4, atol=1e-4)


def test_parametrized_norm_and_scaling(model):
    model.add_adapter("a", "double_seq_bn[ln_before=True, scaling='learned']", overwrite_ok=True)
    tiny.randomize(model)
    model.set_active_adapters("a")
    ids = tiny.ids()
    before = output(model, ids)
    adapter = model.get_adapter("a")[0]["output_adapter"]
    register_parametrization(adapter.adapter_norm_before, "weight", Doubled())
    register_parametrization(adapter, "scaling", Doubled())
    check_fresh(model, ids, before)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor(2.0), TypeError),
        (nn.Parameter(torch.ones(1)), TypeError),
        ("learned", TypeError),
        (True, TypeError),
        (None, TypeError),
        (float("nan"), ValueError),
    ],
    ids=repr,
)
def test_wrong_scaling(model, value, error):
    adapter = model.get_adapter("a")[0]["output_adapter"]
    with pytest.raises(error, match="^scaling: expected .*; got "):
        adapter.scaling = value
    assert adapter.scaling == 1.0
    output(model, tiny.ids())


@pytest.mark.parametrize(
    "replace",
    [
        lambda up: nn.Sequential(up),
        lambda up: prune.l1_unstructured(up, "weight", 0.5),
    ],
    ids=["wrapper", "pruned"],
)
def test_projections_that_compute_in_their_forward_are_refused(model, replace):
    adapter = model.get_adapter("a")[0]["output_adapter"]
    adapter.adapter_up = replace(adapter.adapter_up)
    with pytest.raises(TypeError, match="adapters: expected every projection to be a torch.nn.L"):
        output(model, tiny.ids())


def test_packs_are_used_again_and_refreshed_in_place(model, monkeypatch):
    calls = []
    original = absorb.pack
    monkeypatch.setattr(absorb, "pack", lambda *a: calls.append(1) or original(*a))
    ids = tiny.ids()
    output(model, ids)
    assert len(calls) == len(model.model_adapters.layers)
    output(model, ids)
    assert len(calls) == len(model.model_adapters.layers)
    mixture = model.model_adapters.layers[0].current_plan().lanes[0].steps[0].mixture
    first = [t.data_ptr() for t in cached(mixture)[:5]]
    add_in_place(model)
    output(model, ids)
    assert len(calls) == 2 * len(model.model_adapters.layers)
    assert [t.data_ptr() for t in cached(mixture)[:5]] == first


def test_copies_have_packs_of_their_own(model):
    ids = tiny.ids()
    before = output(model, ids)
    other = copy.deepcopy(model)
    add_in_place(other)
    check_fresh(other, ids, before)
    assert torch.equal(output(model, ids), before)


def test_temperature_is_not_part_of_a_pack():
    model = tiny.bert()
    model.add_adapter_fusion(["a", "b"], {"temperature": True}, set_active=True)
    tiny.randomize(model)
    ids = tiny.ids()
    before = output(model, ids)
    model.train()
    model(ids)
    tiny.optimizer_step()
    model.eval()
    for _, fusion in model.model_adapters.fusion_modules("a,b"):
        fusion.settle_temperature()
        assert fusion.temperature.item() == pytest.approx(49.95)
        fusion.temperature = torch.tensor(2.0)
    check_fresh(model, ids, before)


def test_half_precision_packs_stay_in_range():
    """Products of three matrices leave fp16's range; the scores are rescaled and stay right."""
    model = tiny.bert()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".query." in name or ".key." in name:
                if "adapter_fusion_layer" in name:
                    parameter.mul_(200)
    ids = tiny.ids()
    mixture = model.model_adapters.layers[0].current_plan().lanes[0].steps[0].mixture
    exact = absorb.pack(mixture._parameters(), True)
    assert exact.w_score.abs().max() > torch.finfo(torch.float16).max
    expected = output(copy.deepcopy(model).double(), ids, "reference").float()
    actual = output(model.half(), ids).float()
    assert actual.isfinite().all()
    # attention is saturated, so half precision decides close calls another way: most rows agree
    assert ((actual - expected).abs().amax(-1) < 0.05).float().mean() > 0.8


def test_half_precision_refuses_what_it_cannot_hold():
    model = tiny.bert()
    with torch.no_grad():
        for _, fusion in model.model_adapters.fusion_modules("a,b,c"):
            fusion.value.weight.mul_(5e4)
    model.half()
    with pytest.raises(OverflowError, match="w_out"):
        output(model, tiny.ids())


def test_half_precision_refuses_what_a_group_cannot_hold():
    model = tiny.bert()
    model.add_adapter("large", "seq_bn[reduction_factor=4, scaling=1e6]")
    model.half()
    with pytest.raises(OverflowError, match="w_out"), torch.no_grad():
        model(tiny.ids(2), adapter_names=["a", "large"])


def test_a_group_looks_at_what_its_rows_use(model, monkeypatch):
    calls = []
    original = absorb.pack
    monkeypatch.setattr(absorb, "pack", lambda *a: calls.append(1) or original(*a))
    ids, numbers = tiny.ids(2), model.routing(["a", "b", "c", "__base__"])
    layers = len(model.model_adapters.layers)

    def rows(*own, backend=None):
        model.set_backend(backend)
        with torch.no_grad():
            return model(ids, adapter_ids=numbers[list(own)]).last_hidden_state

    rows(0, 3)
    assert len(calls) == 3 * layers
    before = rows(1, 2)
    with torch.no_grad():
        for _, adapter in model.model_adapters.modules("b"):
            adapter.adapter_up.weight.add_(0.1)
    rows(0, 2)
    assert len(calls) == 3 * layers
    after = rows(2, 1)
    assert len(calls) == 6 * layers
    expected = rows(2, 1, backend="reference")
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after[1], before[0])


def test_packs_are_built_in_twice_the_precision():
    """fp32 parameters, products of three matrices: the pack is the fp64 product, rounded once."""
    model = tiny.bert()
    mixture = model.model_adapters.layers[0].current_plan().lanes[0].steps[0].mixture
    weights = cached(mixture)
    tensors = [t.detach().double() for t in mixture.tensors()]
    exact = absorb.pack(mixture._parameters().with_tensors(tensors), True)
    for name in ("w_down", "w_score", "b_score", "w_out"):
        assert torch.equal(getattr(weights, name), getattr(exact, name).float()), name


def test_the_optimizer_hook_counts_every_optimizer():
    before = packing._optimizer_steps
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.Adam([parameter]).step()
    assert packing._optimizer_steps == before + 1
