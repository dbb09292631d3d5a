"""Parity with `adapters` 1.3.0: what it computed and saved, within 1e-5 on every backend."""

import collections
import json
import os
import zlib
from functools import cache

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from golden_cases import GOLDEN, Case
from literal_composition import Place, Walk, leaves
from safetensors.torch import load_file
from test_mixture import make_layer

from fastfusion import AdapterConfig, AdapterFusionConfig, AdapterSetup, reference
from fastfusion.absorb import Bottleneck, Parameters, pack
from fastfusion.ops import adapter_fusion
from fastfusion.ops.activations import activation_code

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter runs in a process of its own, after the one that tests the other backends
BACKENDS = ("triton",) if INTERPRETED else ("reference", "torch", "cpp", None)
TOLERANCE = 1e-5  # the golden files' own: adapters reloads them with difference 0


@cache
def model_of(group: str):
    model = golden_cases.load(group)
    for fusion in model.adapters_config.fusions.values():
        if fusion["temperature"]:
            # golden case c04 has the decay in evaluation that adapters has
            object.__setattr__(fusion, "peer_temperature", True)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(golden_cases.cases()), ids=str)
def test_case(case: Case, backend: str | None):
    model = model_of(case.group)
    model.set_backend(backend)
    for layer in model.model_adapters.layers:
        for fusion in layer.adapter_fusion_layer.values():
            if fusion.temperature is not None:
                fusion.settle_temperature()
                fusion.temperature = torch.tensor(fusion.INITIAL_TEMPERATURE)
    found = golden_cases.run(model, case)
    for name in case.case["outputs"]:
        expected = golden_cases.tensors(case.group)[f"cases/{case.case['id']}/{name}"]
        if name == "requires_grad":
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            names = sorted(zlib.crc32(n.encode()) for n in trained)
            assert names == expected.tolist()
            continue
        torch.testing.assert_close(
            found[name], expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_case_is_left_out():
    """118 cases of the eight groups run without raising there: a filter that hides some shows."""
    counts = collections.Counter(case.group for case in golden_cases.cases())
    assert counts == {
        "bert-seq_bn": 35,
        "bert-double": 9,
        "bert-par": 10,
        "bert-variants": 24,
        "bert-fusion-variants": 5,
        "bert-grad": 4,
        "distilbert-mix": 15,
        "roberta-mix": 16,
    }


# -- where adapters raises -------------------------------------------------------------------------

REFUSED = {
    # decision 8: the lengths must be those of the whole sequence
    "bert-seq_bn-c16": "splits: expected sequences of 7 tokens, their sum; got 6",
    # decision 9: the sizes must be those of the whole batch
    "bert-seq_bn-c22": "batch_sizes: expected a batch of 7 rows, their sum; got 4",
}
COMPUTED = {
    # decision 7: a Parallel of parallel adapters copies the hidden states too
    "bert-par-c08": {"a": slice(0, 2), "b": slice(2, 4)},
    # decision 5: v11 is absent in layer 0, where its rows pass as without adapters. The pre step of
    # the first adapter present is that of all rows (decision 21): v0 keeps another residual than
    # v11, so only the first child's rows are as with it alone
    "bert-variants-c23": {"v11": slice(0, 2)},
    "bert-variants-c24": {"v0": slice(0, 2)},
    "bert-variants-c25": {"v0": slice(0, 2)},
}
"""Cases that we compute, and the rows that come out as with one adapter alone."""
RAISING = {str(case): case for case in golden_cases.cases(peer_raises=True)}


def test_every_raising_case_is_decided():
    assert RAISING.keys() == REFUSED.keys() | COMPUTED.keys()
    assert [op["id"] for op in json.loads((GOLDEN / "ops.json").read_text()) if op not in OPS] == [
        "adapter25"
    ]


@pytest.mark.parametrize("case_id", REFUSED)
@pytest.mark.parametrize("way", ["active", "context", "embeddings", "tuple"])
def test_case_that_is_refused(case_id, way):
    """With a ValueError, before anything is computed."""
    case = RAISING[case_id]
    model, inputs = model_of(case.group), golden_cases.inputs_of(case)
    setup = golden_cases.setup_of(case.case["setup"])
    model.set_active_adapters(None if way == "context" else setup)
    if way == "embeddings":
        embeddings = model.get_input_embeddings()
        inputs["inputs_embeds"] = embeddings(inputs.pop("input_ids"))
    arguments = (inputs.pop("input_ids"),) if way == "tuple" else ()
    started = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: started.append(1))
        for module in model.base_model.modules()
        if module is not model.base_model
    ]
    with pytest.raises(ValueError) as info:
        if way == "context":
            with AdapterSetup(setup):
                model(**inputs)
        else:
            model(*arguments, **inputs)
    for hook in hooks:
        hook.remove()
    assert str(info.value) == REFUSED[case_id] and not started


def literal_states(case: Case) -> torch.Tensor:
    """The last hidden states in fp64, with the literal recursion at every place."""
    model, inputs = golden_cases.load(case.group).double(), golden_cases.inputs_of(case)
    setup = golden_cases.setup_of(case.case["setup"])
    rows = len(inputs["input_ids"])
    for layer in model.model_adapters.layers:
        adapters, _ = leaves(dict(layer.adapters), torch.float64)
        fusions, _ = leaves(dict(layer.adapter_fusion_layer), torch.float64)

        def forward(hidden, input, layer_norm, adapters=adapters, fusions=fusions):
            walk = Walk(Place(adapters, fusions, layer_norm), is_copied=len(hidden) > rows)
            return walk.run(setup, hidden, input)

        layer.forward = forward
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case_id", COMPUTED)
def test_case_that_only_we_compute(case_id, backend):
    case = RAISING[case_id]
    model, inputs = model_of(case.group), golden_cases.inputs_of(case)
    model.set_backend(backend)
    found = golden_cases.run(model, case)["last_hidden_state"]
    expected = literal_states(case).float()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    model.set_backend("reference")
    size = len(inputs["input_ids"])
    for name, rows in COMPUTED[case_id].items():
        model.set_active_adapters(name)
        own = {key: t.repeat(len(found) // size, 1)[rows] for key, t in inputs.items()}
        with torch.no_grad():
            alone = model(**own).last_hidden_state
        torch.testing.assert_close(found[rows], alone, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(INTERPRETED, reason="fp64")
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_post_add_without_a_layer_norm(backend):
    """Operation adapter25. Decision 20: the residual is the sum, as where there is a LayerNorm."""
    config = {"residual_before_ln": "post_add", "non_linearity": "leakyrelu"}
    layer = make_layer([config])
    layer.settings.backend = backend
    hidden, input = (torch.randn(2, 5, 12, dtype=torch.float64) for _ in "hi")
    adapter = dict(layer.adapters["a"].named_parameters())
    with torch.no_grad():
        summed = hidden + input
        down = F.linear(summed, adapter["adapter_down.0.weight"], adapter["adapter_down.0.bias"])
        up = F.linear(F.leaky_relu(down), adapter["adapter_up.weight"], adapter["adapter_up.bias"])
        torch.testing.assert_close(layer.forward(hidden, input, None), up + summed + input)


# -- isolated operations ---------------------------------------------------------------------------

OPS = [op for op in json.loads((GOLDEN / "ops.json").read_text()) if "peer_raises" not in op]


@cache
def op_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ops.safetensors")


def parts(op_id: str, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{op_id}/{kind}/"
    return {
        k.removeprefix(prefix): v.clone() for k, v in op_tensors().items() if k.startswith(prefix)
    }


def check_grads(op_id: str, outputs: list, leaves: dict[str, torch.Tensor]) -> None:
    grads = parts(op_id, "grad_out")
    for index, output in enumerate(outputs):
        expected = op_tensors()[f"{op_id}/out/{index}"]
        torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.autograd.backward(outputs, [grads[str(i)] for i in range(len(outputs))])
    for name, expected in parts(op_id, "grad").items():
        actual = leaves[name].grad
        if actual is None:  # a parameter that the result does not depend on
            actual = torch.zeros_like(expected)
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.skipif(INTERPRETED, reason="starts from ready up-projections: the reference alone")
@pytest.mark.parametrize("op", [o for o in OPS if o["op"] == "fusion"], ids=lambda o: o["id"])
def test_isolated_fusion(op):
    config = AdapterFusionConfig.load(op["fusion_config"])
    leaves = {k: v.requires_grad_() for k, v in parts(op["id"], "in").items()}
    parameters = {k: v.requires_grad_() for k, v in parts(op["id"], "param").items()}
    temperature = 50.0 if config["temperature"] else 1.0
    out, p = reference.adapter_fusion(
        leaves["query"], leaves["up"], leaves["residual"], parameters, config, temperature
    )
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))
    check_grads(op["id"], [out], leaves | {f"param/{k}": v for k, v in parameters.items()})


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b is not None])
@pytest.mark.parametrize("op", [o for o in OPS if o["op"] == "adapter"], ids=lambda o: o["id"])
def test_isolated_adapter(op, backend):
    """Pre step, adapter and post step; the second output is the scaled up-projection."""
    config = AdapterConfig.load(op["full_config"])
    leaves = {k: v.requires_grad_() for k, v in parts(op["id"], "in").items()}
    parameters = {k: v.requires_grad_() for k, v in parts(op["id"], "param").items()}
    layer_norm = None
    if op["layer_norm"]:
        norm = leaves["ln_weight"].detach(), leaves["ln_bias"].detach()

        def layer_norm(x):
            return F.layer_norm(x, x.shape[-1:], *norm)

    hidden, input = leaves["hidden"], leaves["input_tensor"]
    x, _, residual = reference.adapter_pre(hidden, input, layer_norm, config)
    scaling = config["scaling"] if isinstance(config["scaling"], float) else 1.0
    if backend == "reference":
        up = reference.adapter_up(x, parameters, config, scaling)
    else:
        up = packed_up(x, parameters, config, scaling, backend)
    out, _ = reference.adapter_output(up, x, residual, parameters, config)
    out = reference.adapter_post(out, hidden, input, layer_norm, config)
    check_grads(op["id"], [out, up], leaves | {f"param/{k}": v for k, v in parameters.items()})


def packed_up(x, parameters, config, scaling, backend):
    """The same up-projection through the op."""
    linear = "adapter_down.1" if config["ln_before"] else "adapter_down.0"
    adapter = Bottleneck(
        parameters[f"{linear}.weight"],
        parameters[f"{linear}.bias"],
        parameters["adapter_up.weight"],
        parameters["adapter_up.bias"],
        parameters.get("scaling", scaling),
        parameters.get("adapter_norm_before.weight"),
        parameters.get("adapter_norm_before.bias"),
        activation_code(config["non_linearity"]),
    )
    rows = F.layer_norm(x, x.shape[-1:]) if config["ln_before"] else x
    weights = pack(Parameters([adapter], None), absorbed=True)
    up, _ = adapter_fusion([rows.reshape(-1, x.shape[-1])], None, None, weights, backend=backend)
    return up.view(x.shape)
