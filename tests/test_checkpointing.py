"""Gradient checkpointing: layers that are computed again run what their forward ran."""

import contextlib
import copy
import functools

import pytest
import tiny
import torch
from row_models import add_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

import fastfusion
from fastfusion import AdapterSetup, AutoAdapterModel
from fastfusion.composition import Fuse, Parallel

IDS = tiny.ids(2, 7)
KINDS = ["plain", "enabled", "base model", "before init", "all layers' own function"]


def make(kind: str, auto_class=AutoModelForSequenceClassification) -> nn.Module:
    torch.manual_seed(1)
    config = copy.deepcopy(tiny.CONFIGS["bert"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = auto_class.from_config(config)
    if kind == "before init":
        # transformers 4 makes it reentrant
        model.gradient_checkpointing_enable()
    elif kind == "all layers' own function":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.encoder.layer:
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    fastfusion.init(model)
    add_adapters(model)
    model.double().train()
    if kind == "enabled":
        model.gradient_checkpointing_enable()
    elif kind == "base model":
        model.base_model.gradient_checkpointing_enable()
    return model


def grads_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-9, atol=1e-9, msg=name)


def forward_then_change(model: nn.Module, case: str) -> torch.Tensor:
    """A loss, with another setup active by the time of the backward."""

    def loss_of(output):
        return output[0].square().sum()

    model.set_active_adapters("a")
    if case == "active":
        loss = loss_of(model(IDS))
        model.set_active_adapters("b")
    elif case == "skip_layers":
        loss = loss_of(model(IDS))
        model.set_active_adapters("a", skip_layers=[1])
    elif case == "context":
        with AdapterSetup(Fuse("a", "b"), skip_layers=[0]):
            loss = loss_of(model(IDS))
    elif case == "Parallel":
        with AdapterSetup(Parallel("a", "b")):
            loss = loss_of(model.base_model(IDS))
    elif case == "adapter_names":
        loss = loss_of(model(IDS, adapter_names=["a", "b"]))
        model.set_active_adapters("d", skip_layers=[0])
    elif case == "adapter_ids":
        loss = loss_of(model(IDS, adapter_ids=model.routing(["b", "d"])))
        model.reset_routing()
        model.routing(["g"])
    elif case == "base model alone":
        loss = loss_of(model.base_model(IDS))
        model.set_active_adapters("b")
    else:
        loss = loss_of(model(IDS))
        model.delete_adapter("a", force=True)
    return loss


CASES = ["active", "skip_layers", "context", "Parallel", "adapter_names", "adapter_ids"]
CASES += ["base model alone", "deleted"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_setup_changes_before_the_backward(kind, case):
    grads = []
    for k in ("plain", kind):
        model = make(k)
        grads.append(grads_of(model, forward_then_change(model, case)))
    assert_same_grads(grads[1], grads[0])


def test_layers_are_computed_again():
    """Otherwise all else here says nothing."""
    for kind in KINDS:
        model, runs = make(kind), []
        model.set_active_adapters("a")
        dense = model.base_model.encoder.layer[1].intermediate.dense
        dense.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(IDS)[0].sum().backward()
        assert len(runs) == (1 if kind == "plain" else 2), kind


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_layers_of_every_architecture_are_computed_again(name):
    grads = []
    for is_enabled in (False, True):
        torch.manual_seed(1)
        model, runs = AutoModelForSequenceClassification.from_config(tiny.CONFIGS[name]), []
        fastfusion.init(model)
        add_adapters(model)
        model.set_active_adapters("a")
        model.double().train()
        if is_enabled:
            model.gradient_checkpointing_enable()
        _, adapter = list(model.model_adapters.modules("a"))[-1]
        layer = model.model_adapters.layers[-1]
        forward = layer.forward
        layer.forward = lambda *a, runs=runs, forward=forward: runs.append(1) or forward(*a)
        torch.manual_seed(2)
        grads.append(grads_of(model, model(IDS)[0].square().sum()))
        assert len(runs) == 1 + is_enabled
        assert adapter.adapter_up.weight.grad.abs().max() > 0
    assert_same_grads(grads[1], grads[0])


def test_a_backward_that_runs_again():
    model = make("enabled")
    model.set_active_adapters("a")
    loss = model(IDS)[0].square().sum()
    model.set_active_adapters("b")
    loss.backward(retain_graph=True)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for once, both in zip(grads, twice, strict=True):
        torch.testing.assert_close(both, 2 * once, rtol=1e-9, atol=1e-9)


def test_flexible_heads():
    grads = []
    for kind in ("plain", "base model"):
        torch.manual_seed(1)
        config = copy.deepcopy(tiny.CONFIGS["bert"])
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = AutoAdapterModel.from_config(config)
        add_adapters(model)
        model.add_classification_head("x", num_labels=2)
        model.double().train()
        if kind == "base model":
            model.base_model.gradient_checkpointing_enable()
        grads.append(grads_of(model, forward_then_change(model, "active")))
    assert_same_grads(grads[1], grads[0])


@pytest.mark.parametrize("kind", ["enabled", "base model", "before init"])
def test_a_context_fn_of_ones_own(kind):
    """It holds beside ours."""
    entered = []

    def context_fn():
        @contextlib.contextmanager
        def enter(name):
            entered.append(name)
            yield

        return enter("first"), enter("again")

    plain = make("plain")
    expected = grads_of(plain, forward_then_change(plain, "active"))
    arguments = {"use_reentrant": False, "context_fn": context_fn}
    if kind == "before init":
        model = make("plain")
        fastfusion.restore(model)
        model.gradient_checkpointing_enable(arguments)
        torch.manual_seed(1)
        fastfusion.init(model)
        add_adapters(model)
        model.load_state_dict(plain.state_dict())
        model.double().train()
    else:
        model = make("plain")
        enabling = model if kind == "enabled" else model.base_model
        enabling.gradient_checkpointing_enable(arguments)
    assert_same_grads(grads_of(model, forward_then_change(model, "active")), expected)
    assert entered.count("first") == entered.count("again") == 2


def test_a_copy():
    """It finds its own plans."""
    other, plain = copy.deepcopy(make("enabled")), make("plain")
    assert other.base_model.gradient_checkpointing_enable.__self__ is other
    expected = grads_of(plain, forward_then_change(plain, "base model alone"))
    assert_same_grads(grads_of(other, forward_then_change(other, "base model alone")), expected)


def test_reentrant_is_refused_at_the_base_model_too():
    with pytest.raises(ValueError, match="use_reentrant"):
        make("plain").base_model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("before", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("after", ["nothing", "enable", "disable"])
def test_restore_puts_it_back(before, after):
    model = AutoModelForSequenceClassification.from_config(tiny.CONFIGS["bert"])
    if before is not None:
        model.gradient_checkpointing_enable(before)

    def state():
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        found = {
            path: {name: vars(module)[name] for name in names if name in vars(module)}
            for path, module in model.named_modules()
        }
        return found, set(vars(model.base_model))

    expected = state()
    fastfusion.init(model)
    if after != "nothing":
        getattr(model, f"gradient_checkpointing_{after}")()
    fastfusion.restore(model)
    assert state() == expected
