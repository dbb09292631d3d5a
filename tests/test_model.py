"""Patched models: what `init` changes and `restore` undoes, the methods, and bad input."""

import copy
import io
import itertools
import threading

import pytest
import tiny
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

import fastfusion
from fastfusion import AdapterSetup, AutoAdapterModel, Fuse, Stack
from fastfusion.modules import AdapterFusion

FUSE = Fuse("a", "b", "c")


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs)[0]


@pytest.fixture
def model():
    return tiny.bert()


@pytest.fixture
def ids():
    return tiny.ids()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_init_and_restore(architecture, kind, ids):
    model = kind.from_config(tiny.CONFIGS[architecture]).eval()
    tiny.randomize_norms(model)
    model.base_model.get_input_embeddings().weight.requires_grad = False
    untouched = copy.deepcopy(model)
    before, original = run(model, ids), type(model)
    fastfusion.init(model)
    fastfusion.init(model)
    assert torch.equal(run(model, ids), before)
    assert type(model).__name__ == original.__name__ and isinstance(model, original)
    tiny.add_fusion(model)
    active = run(model, ids)
    assert not torch.allclose(active, before, atol=1e-3)
    model.set_backend("reference")
    torch.testing.assert_close(run(model, ids), active, rtol=1e-5, atol=1e-5)
    model.train_adapter_fusion(FUSE)
    fastfusion.restore(model)
    model.eval()
    assert type(model) is original
    assert torch.equal(run(model, ids), before)
    restored, expected = model.state_dict(), untouched.state_dict()
    assert list(restored) == list(expected)
    assert all(torch.equal(restored[k], expected[k]) for k in expected)
    flags = [p.requires_grad for p in untouched.parameters()]
    assert [p.requires_grad for p in model.parameters()] == flags
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__ and "adapter_layers" not in module.__dict__, name
    fastfusion.init(model)  # and again


KEYS = {
    "bert": "encoder.layer.0.attention.output.adapters.a.adapter_down.0.weight",
    "roberta": "encoder.layer.1.output.adapters.a.adapter_up.bias",
    "xlm-roberta": "encoder.layer.1.output.adapter_fusion_layer.a,b,c.key.weight",
    "electra": "encoder.layer.0.output.adapter_fusion_layer.a,b,c.value.weight",
    "distilbert": "transformer.layer.0.attention_adapters.adapters.a.adapter_down.0.weight",
}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_flexible_models(architecture, ids):
    """One class per architecture; keys as `adapters` names them; nothing else than in its base."""
    model = AutoAdapterModel.from_config(tiny.CONFIGS[architecture])
    names = {"xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    prefix = names.get(architecture, architecture.capitalize())
    assert type(model) is getattr(fastfusion, f"{prefix}AdapterModel")
    base_keys = [f"{model.base_model_prefix}.{k}" for k in model.base_model.state_dict()]
    assert list(model.state_dict()) == base_keys
    tiny.add_fusion(model)
    assert f"{model.base_model_prefix}.{KEYS[architecture]}" in model.state_dict()
    model.add_classification_head("task", num_labels=3)
    labels = torch.tensor([0, 2])
    output = model(ids, labels=labels)
    output.loss.backward()
    assert output.logits.shape == (2, 3)
    assert isinstance(model(ids, labels=labels, return_dict=False), tuple)
    with pytest.raises(ValueError, match="restore|class"):
        fastfusion.restore(model)


def test_saved_and_loaded_by_transformers(tmp_path, ids):
    """save_pretrained writes the whole model; what it carries comes back from config.json."""
    model = AutoAdapterModel.from_config(tiny.CONFIGS["bert"])
    model.add_adapter("n", "seq_bn[ln_before=True]")
    fuse = tiny.add_fusion(model)
    model.add_classification_head("task", num_labels=3)
    model.eval().save_pretrained(tmp_path)
    other = AutoAdapterModel.from_pretrained(tmp_path, output_hidden_states=True).eval()
    assert other.config.output_hidden_states
    other.set_active_adapters(fuse)
    other.active_head = "task"
    assert torch.equal(run(other, ids), run(model, ids))
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_patched_model_is_saved_with_what_it_carries(architecture, kind, tmp_path, ids):
    model = kind.from_config(copy.deepcopy(tiny.CONFIGS[architecture])).eval()
    config = copy.deepcopy(model.config.to_dict())
    fastfusion.init(model)
    fuse = tiny.add_fusion(model)
    model.save_pretrained(tmp_path)
    other = AutoAdapterModel.from_pretrained(tmp_path).eval()
    assert other.adapters_config.adapters == model.adapters_config.adapters
    other.set_active_adapters(fuse)
    expected = model(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(
        other(ids, output_hidden_states=True).hidden_states, expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    fastfusion.restore(model)
    assert not hasattr(model.config, "adapters")
    # transformers writes down where and how a model was saved
    kept = config.keys() - {"architectures", "dtype", "torch_dtype", "_name_or_path"}
    assert {key: model.config.to_dict()[key] for key in kept} == {k: config[k] for k in kept}
    kind.from_pretrained(tmp_path)  # and transformers reads it without us


@pytest.mark.parametrize("patched", [False, True])
def test_temperature_is_saved_with_the_model(tmp_path, ids, patched):
    config = copy.deepcopy(tiny.CONFIGS["bert"])
    model = BertModel(config) if patched else AutoAdapterModel.from_config(config)
    fastfusion.init(model)
    for name in "ab":
        model.add_adapter(name)
    model.add_adapter_fusion(["a", "b"], {"temperature": True}, name="warm")
    model.add_adapter_fusion(["b", "a"], {"temperature": True})
    model.train_adapter_fusion(Fuse("a", "b", name="warm"))
    for _ in range(2):
        model(ids)
        tiny.optimizer_step()
    model.save_pretrained(tmp_path)
    other = AutoAdapterModel.from_pretrained(tmp_path)
    for name, expected in (("warm", 49.9), ("b,a", 50.0)):
        modules = [fusion for _, fusion in other.model_adapters.fusion_modules(name)]
        assert [m.temperature.item() for m in modules] == pytest.approx([expected] * 2)


def test_fresh_weights_keep_their_own_start():
    """transformers' initialisation of a new model does not touch what adapters start with."""
    config = copy.deepcopy(tiny.CONFIGS["bert"])
    first = AutoAdapterModel.from_config(config)
    first.add_adapter("p", "par_bn")
    config.adapters = first.adapters_config.to_dict()
    second = AutoAdapterModel.from_config(config)
    for _, adapter in second.model_adapters.modules("p"):
        assert not adapter.adapter_up.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(model, ids, dtype):
    """Error against the fp64 truth: no larger than that of the literal formulas in this dtype."""
    truth = copy.deepcopy(model).double()
    truth.set_backend("reference")
    truth = run(truth, ids)
    model.to(dtype)
    actual = run(model, ids).double()
    model.set_backend("reference")
    literal = run(model, ids).double()
    # where the literal error is a few roundings, ours is a few others
    few = 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (actual - truth).abs().max() <= 1.2 * (literal - truth).abs().max() + few
    assert (actual - truth).abs().mean() <= 1.1 * (literal - truth).abs().mean() + few / 4


def test_autocast(model, ids):
    """Error against fp32: at most twice that of the literal formulas under the same autocast."""
    truth, errors = run(model, ids), {}
    for backend in (None, "reference"):
        model.set_backend(backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors[backend] = (run(model, ids).float() - truth).norm()
    # packs in bf16 round at other places than the literal products
    assert 0 < errors[None] <= 2 * errors["reference"]
    model.set_backend(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train_adapter_fusion(FUSE)
        model(ids).last_hidden_state.sum().backward()
    for _, fusion in model.model_adapters.fusion_modules("a,b,c"):
        assert fusion.query.weight.grad.dtype == torch.float32


def test_deepcopy_and_state(model, ids):
    other = copy.deepcopy(model)
    assert torch.equal(run(other, ids), run(model, ids))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(run(other, ids), run(model, ids))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(run(other, ids), run(model, ids))


def test_device():
    """`to(device)` takes adapters, fusions and packs along (the meta device: shapes alone)."""
    # eager attention: the others look at the values of a mask
    model = tiny.bert(attn_implementation="eager").to("meta")
    model.set_backend("torch")
    with torch.no_grad():
        output = model(inputs_embeds=torch.empty(2, 7, 32, device="meta"))
    assert output.last_hidden_state.device.type == "meta"


@pytest.mark.parametrize("trained", ["fusion", "adapters", "all"])
def test_gradient_checkpointing(model, ids, trained):
    """Dropout on, temperature on: the same gradients and the same temperature as without."""
    model.add_adapter_fusion(FUSE, {"temperature": True, "dropout_prob": 0.3}, overwrite_ok=True)
    tiny.randomize(model)
    if trained == "all":
        model.train()
    elif trained == "adapters":
        model.train_adapter_fusion(FUSE, unfreeze_adapters=True)
    else:
        model.train_adapter_fusion(FUSE)
    model.double()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    results = []
    for m in (model, other):
        torch.manual_seed(1)
        m(ids).last_hidden_state.square().sum().backward()
        _, fusion = next(m.model_adapters.fusion_modules("a,b,c"))
        tiny.optimizer_step()
        fusion.settle_temperature()
        results.append((fusion.temperature, {n: p.grad for n, p in m.named_parameters()}))
    assert results[0][0] == results[1][0] == pytest.approx(49.95)
    for name, grad in results[0][1].items():
        assert (grad is None) == (results[1][1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(results[1][1][name], grad)


def test_reentrant_checkpointing_is_refused(model):
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_gradients_of_gradients_are_refused():
    """They would be wrong without a word; the literal formulas have them."""
    model = tiny.bert(attn_implementation="eager")
    embeddings = torch.randn(1, 3, 32, requires_grad=True)
    for backend in (None, "torch"):
        model.set_backend(backend)
        out = model(inputs_embeds=embeddings).last_hidden_state.square().sum()
        (grad,) = torch.autograd.grad(out, embeddings, create_graph=True)
        with pytest.raises(RuntimeError, match="reference"):
            grad.square().sum().backward()
    model.set_backend("reference")
    out = model(inputs_embeds=embeddings).last_hidden_state.square().sum()
    (grad,) = torch.autograd.grad(out, embeddings, create_graph=True)
    grad.square().sum().backward()


def test_half_precision_training(model, ids):
    """fp16 with gradients: products of three matrices are rescaled there too."""
    with torch.no_grad():
        for _, fusion in model.model_adapters.fusion_modules("a,b,c"):
            for layer in (fusion.query, fusion.key):
                layer.weight.mul_(200)
    model.half().train_adapter_fusion(FUSE)
    model.eval()
    ids = tiny.ids(4, 30)
    out = model(ids).last_hidden_state
    out.float().sum().backward()
    assert out.isfinite().all()
    for _, fusion in model.model_adapters.fusion_modules("a,b,c"):
        assert fusion.value.weight.grad.isfinite().all()


def test_refresh_leaves_a_pending_backward_alone(model):
    """A pack that a recorded forward holds is not written over."""
    model.requires_grad_(False)
    embeddings = torch.randn(2, 7, 32, requires_grad=True)
    first = model(inputs_embeds=embeddings).last_hidden_state.sum()
    tiny.optimizer_step()
    second = model(inputs_embeds=embeddings).last_hidden_state.sum()
    (first + second).backward()
    both, embeddings.grad = embeddings.grad, None
    model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    torch.testing.assert_close(both, 2 * embeddings.grad)


def test_inference_mode_then_training(model):
    model.requires_grad_(False)
    embeddings = torch.randn(2, 7, 32)
    with torch.inference_mode():
        model(inputs_embeds=embeddings)
    model(inputs_embeds=embeddings.requires_grad_()).last_hidden_state.sum().backward()
    assert embeddings.grad.any()


def test_unused_parameters_get_zeros(model, ids):
    """bk cancels in the softmax; its gradient is zeros, not None, in both forms."""
    model.train_adapter_fusion(FUSE)
    model.eval()
    for shape in ((1, 2), (8, 30)):  # factored, absorbed
        model.zero_grad()
        model(tiny.ids(*shape)).last_hidden_state.square().sum().backward()
        for _, fusion in model.model_adapters.fusion_modules("a,b,c"):
            assert fusion.key.bias.grad is not None
            # rounding of sums that are zero
            assert fusion.key.bias.grad.abs().max() < 1e-3 * fusion.key.weight.grad.abs().max()


def test_temperature(model, ids):
    """One step down for each training step, however many forwards it has; with `peer_temperature`
    for each forward."""
    for config, expected in (
        ({"temperature": True}, 49.9),
        ({"temperature": True, "peer_temperature": True}, 49.65),
    ):
        model.add_adapter_fusion(FUSE, config, overwrite_ok=True)
        model.set_active_adapters(FUSE)
        _, fusion = next(model.model_adapters.fusion_modules("a,b,c"))
        model.eval()
        for _ in range(3):
            run(model, ids)
        tiny.optimizer_step()
        model.train()
        for _ in range(2):
            model(ids)
            model(ids)
            # a copy goes on where the model is
            model = copy.deepcopy(model)
            tiny.optimizer_step()
            tiny.optimizer_step()
        _, fusion = next(model.model_adapters.fusion_modules("a,b,c"))
        fusion.settle_temperature()
        assert fusion.temperature.item() == pytest.approx(expected)
    assert fusion.temperature.dtype == torch.float32
    model.bfloat16()
    assert fusion.temperature.dtype == torch.float32  # bf16 cannot hold 50 - 0.05


@pytest.mark.parametrize("as_tuple", [False, True])
def test_attentions(model, ids, as_tuple):
    output = model(ids, output_adapter_fusion_attentions=True, return_dict=not as_tuple)
    attentions = output[-1] if as_tuple else output.adapter_fusion_attentions
    assert list(attentions) == ["a,b,c"] and list(attentions["a,b,c"]) == [0, 1]
    for places in attentions["a,b,c"].values():
        assert list(places) == ["mh_adapter", "output_adapter"]
        for p in places.values():
            assert p.shape == (2, 7, 3) and not p.requires_grad
            torch.testing.assert_close(p.sum(-1), torch.ones(2, 7))
    assert not hasattr(model(ids), "adapter_fusion_attentions")
    assert model.bfloat16()(ids, output_adapter_fusion_attentions=True).adapter_fusion_attentions


def test_skip_layers_and_leave_out(model, ids):
    model.add_adapter("d", "seq_bn[leave_out=[0], reduction_factor=4]")
    tiny.randomize(model)
    model.set_active_adapters("d")
    left_out = run(model, ids)
    model.set_active_adapters(Stack("d"), skip_layers=[0])
    assert torch.equal(run(model, ids), left_out)
    model.set_active_adapters("d", skip_layers=[0, 1])
    skipped = run(model, ids)
    model.set_active_adapters(None)
    assert torch.equal(run(model, ids), skipped)
    model.active_adapters = "d"
    assert torch.equal(run(model, ids), left_out)


def test_context(model, ids):
    model.set_active_adapters("a")
    only_a = run(model, ids)
    model.set_active_adapters(FUSE)
    fused = run(model, ids)
    with AdapterSetup("a"):
        assert torch.equal(run(model, ids), only_a)
        with AdapterSetup(None):
            nothing = run(model, ids)
        assert torch.equal(run(model, ids), only_a)
    assert torch.equal(run(model, ids), fused)
    model.set_active_adapters(None)
    assert torch.equal(run(model, ids), nothing)
    with AdapterSetup("zzz"), pytest.raises(ValueError, match="'zzz'"):
        model(ids)


def test_what_a_context_asks_for():
    ask = AdapterSetup.get_context_adapter_setup, AdapterSetup.get_context_head_setup
    assert [get() for get in ask] == [None, None]
    with AdapterSetup("a", head_setup="x"):
        assert [get() for get in ask] == [Stack("a"), "x"]
        with AdapterSetup("b", head_setup=["x", "y"]):
            assert [get() for get in ask] == [Stack("b"), ["x", "y"]]
        with AdapterSetup(None):
            assert [get() for get in ask] == [None, None]
    assert [get() for get in ask] == [None, None]


def test_contexts_keep_their_packs_and_are_few(model, ids):
    layer, plans = model.model_adapters.layers[0], model.model_adapters._kept
    for _ in range(3):
        with AdapterSetup("a"):
            run(model, ids)
    assert len(plans) == 1 and len(layer.packs._packs) == 1
    setups = list(itertools.product("abc", repeat=3))
    for names in setups:
        with AdapterSetup(Stack(*names)):
            run(model, ids)
    # an adapter that a Stack names twice is packed once
    packs = sum(len(set(names)) for names in setups[-8:])
    assert len(plans) == 8 and len(layer.packs._packs) == packs


def test_context_in_two_threads(model, ids):
    """One object entered in both at once: each thread has a stack of its own."""
    shared, entered, left = AdapterSetup("a"), threading.Event(), threading.Event()
    seen = []

    def other():
        with shared:
            entered.set()
            left.wait()
        seen.append(AdapterSetup.get_context())

    thread = threading.Thread(target=other)
    with AdapterSetup("b") as outer:
        thread.start()
        entered.wait()
        with shared:
            left.set()
            thread.join()
        assert AdapterSetup.get_context() is outer
    assert AdapterSetup.get_context() is None and seen == [None]


def test_context_brings_the_head(ids):
    model = AutoAdapterModel.from_config(tiny.CONFIGS["bert"]).eval()
    for name, labels in (("a", 2), ("b", 5)):
        model.add_adapter(name)
        model.add_classification_head(name, num_labels=labels)
    model.set_active_adapters("a")
    assert run(model, ids).shape[-1] == 2
    with AdapterSetup("b"):
        assert run(model, ids).shape[-1] == 5
    with AdapterSetup("b", head_setup="a"):
        assert run(model, ids).shape[-1] == 2


def test_context_per_thread(model, ids):
    """8 threads with different setups on one model at once give what each alone gives."""
    setups = ["a", "b", "c", FUSE, Stack("a", "b"), Stack("c", FUSE), None, Fuse("c", name="c")]
    model.add_adapter_fusion(["c"])
    tiny.randomize(model)
    alone = []
    for setup in setups:
        with AdapterSetup(setup):
            alone.append(run(model, ids))
    results = [[] for _ in setups]

    def work(i):
        with AdapterSetup(setups[i]):
            results[i] += [run(model, ids) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(setups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, results, strict=True):
        assert len(found) == 5 and all(torch.equal(r, expected) for r in found)


def test_training_modes(model):
    model.train_adapter("a")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.a." in n for n in trained)
    assert model.model_frozen and model.active_adapters == Stack("a") and model.training
    model.train_adapter_fusion(FUSE)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapter_fusion_layer.a,b,c." in n for n in trained)
    values = [f.value.weight for _, f in model.model_adapters.fusion_modules("a,b,c")]
    loss = sum(((torch.eye(32) - v) ** 2).sum() for v in values) * 0.01
    torch.testing.assert_close(model.get_fusion_regularization_loss(), loss)
    model.train_adapter_fusion(Stack("b", FUSE), unfreeze_adapters=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(any(f".adapters.{x}." in n for n in trained) for x in "abc")
    model.freeze_model(False)
    assert not model.model_frozen and all(p.requires_grad for p in model.parameters())


def test_summary(model):
    rows = model.adapter_summary(as_dict=True)
    assert [row["name"] for row in rows] == ["a", "b", "c", "Full model"]
    per_adapter = sum(
        p.numel() for _, m in model.model_adapters.modules("a") for p in m.parameters()
    )
    assert rows[0]["#param"] == per_adapter and rows[0]["active"]
    table = model.adapter_summary()
    assert "Full model" in table and f"{per_adapter:,}" in table


def test_deleting_what_a_fusion_needs(model):
    model.set_active_adapters(None)
    with pytest.raises(ValueError, match="a,b,c"):
        model.delete_adapter("a")
    model.delete_adapter("a", force=True)
    assert not model.adapters_config.fusions
    assert not [n for n in model.state_dict() if "fusion" in n or ".a." in n]


def test_replacing_keeps_the_locations_of_a_fusion(model, ids):
    before = run(model, ids)
    with pytest.raises(ValueError, match="mh_adapter"):
        model.add_adapter("a", "seq_bn", overwrite_ok=True)
    assert torch.equal(run(model, ids), before)


def test_restore_with_parameters_of_others(model):
    model.encoder.layer[0].probe = torch.nn.Linear(2, 2)
    fastfusion.restore(model)
    assert type(model) is BertModel
    with pytest.raises(ValueError, match="init"):
        fastfusion.refresh(model)


def test_norm_hooks_run(model, ids):
    """A hook on the model's LayerNorm sees its calls: the op does not swallow them."""
    calls = []
    expected = run(model, ids)
    norm = model.encoder.layer[0].output.LayerNorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert calls


def test_deleting(model, ids):
    with pytest.raises(ValueError, match="active setup"):
        model.delete_adapter("a")
    with pytest.raises(ValueError, match="active setup"):
        model.delete_adapter_fusion("a,b,c")
    model.set_active_adapters(None)
    nothing = run(model, ids)
    model.delete_adapter_fusion(FUSE)
    for name in "abc":
        model.delete_adapter(name)
    assert not [n for n in model.state_dict() if "adapter" in n] and not model.has_adapters()
    assert torch.equal(run(model, ids), nothing)


def test_aliases(model):
    model.add_fusion(Fuse("a", "b"))
    model.train_fusion(Fuse("a", "b"))
    assert model.active_adapters == Fuse("a", "b")


BAD_CALLS = {
    "unknown adapter": (lambda m: m.set_active_adapters("zzz"), ValueError, "'zzz'"),
    "unknown in a block": (lambda m: m.train_adapter(Stack("a", "zzz")), ValueError, "'zzz'"),
    "no fusion for a Fuse": (
        lambda m: m.set_active_adapters(Fuse("b", "a")),
        ValueError,
        "add_adapter_fusion",
    ),
    "fusion of other adapters": (
        lambda m: m.set_active_adapters(Fuse("b", "a", name="a,b,c")),
        ValueError,
        r"is over \['a', 'b', 'c'\]",
    ),
    "no Fuse to train": (lambda m: m.train_adapter_fusion("a"), ValueError, "expected a Fuse"),
    "nothing to train": (lambda m: m.train_adapter(None), ValueError, "got none"),
    "duplicate adapter": (lambda m: m.add_adapter("a"), ValueError, "overwrite_ok"),
    "duplicate fusion": (lambda m: m.add_adapter_fusion(FUSE), ValueError, "overwrite_ok"),
    "dotted name": (lambda m: m.add_adapter("a.b"), ValueError, "adapter_name"),
    "name of an attribute": (lambda m: m.add_adapter("keys"), ValueError, "adapter_name"),
    "unknown config": (lambda m: m.add_adapter("d", "nonsense"), ValueError, "nonsense"),
    "unknown activation": (
        lambda m: m.add_adapter("d", "seq_bn[non_linearity='nonsense']"),
        ValueError,
        "non_linearity",
    ),
    "compacter": (lambda m: m.add_adapter("d", "compacter"), NotImplementedError, "phm_layer"),
    "invertible": (lambda m: m.add_adapter("d", "seq_bn_inv"), NotImplementedError, "inv_adapter"),
    "fusion over an unknown": (
        lambda m: m.add_adapter_fusion(["a", "zzz"]),
        ValueError,
        "'zzz'",
    ),
    "a Stack to fuse": (
        lambda m: m.add_adapter_fusion(Stack("a", "b")),
        ValueError,
        r"adapter_names: expected a Fuse.*got Stack\('a', 'b'\)",
    ),
    "a list with a block to fuse": (
        lambda m: m.add_adapter_fusion(["a", Stack("b", "c")]),
        ValueError,
        "adapter_names: expected a Fuse",
    ),
    "a number to fuse": (lambda m: m.add_adapter_fusion(3), ValueError, "expected a Fuse.*got 3"),
    "nothing to fuse": (lambda m: m.add_adapter_fusion([]), ValueError, r"a Fuse.*got \[\]"),
    "fusion to activate over an unknown": (
        lambda m: m.add_adapter_fusion(Fuse(Stack("zzz", "a"), "b"), set_active=True),
        ValueError,
        "'zzz'",
    ),
    "fusion to activate too deep": (
        lambda m: m.add_adapter_fusion(Fuse("b", Stack("c", FUSE)), set_active=True),
        ValueError,
        "Fuse",
    ),
    "active fusion, other adapters": (
        lambda m: m.add_adapter_fusion(["a", "b"], name="a,b,c", overwrite_ok=True),
        ValueError,
        "name: 'a,b,c' is part of the active setup",
    ),
    "delete an unknown adapter": (lambda m: m.delete_adapter("zzz"), ValueError, "'zzz'"),
    "delete an unknown fusion": (lambda m: m.delete_adapter_fusion("zzz"), ValueError, "'zzz'"),
    "unknown backend": (lambda m: m.set_backend("cuda"), ValueError, "backend"),
    "layers that are no list": (
        lambda m: m.set_active_adapters("a", skip_layers=1),
        ValueError,
        "skip_layers",
    ),
    "too deep": (
        lambda m: m.set_active_adapters(Stack("a", Fuse("b", Stack("c", FUSE)))),
        ValueError,
        "Stack inside another block",
    ),
    "not a setup": (lambda m: m.set_active_adapters(3), ValueError, "setup"),
}


@pytest.mark.parametrize("call, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_change_nothing(model, ids, call, error, message):
    before, state = run(model, ids), model.state_dict()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        call(model)
    assert model.active_adapters == FUSE and not model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.state_dict()) == list(state)
    assert list(model.adapters_config.adapters) == ["a", "b", "c"]
    assert list(model.adapters_config.fusions) == ["a,b,c"]
    assert torch.equal(run(model, ids), before)


def test_fusion_that_fails_on_the_way_changes_nothing(model, ids, monkeypatch):
    """The old modules go when all new ones are there."""
    modules = [fusion for _, fusion in model.model_adapters.fusion_modules("a,b,c")]
    before, made = run(model, ids), itertools.count()
    original = AdapterFusion.__init__

    def init(self, *args):
        if next(made) == 2:
            raise MemoryError
        original(self, *args)

    monkeypatch.setattr(AdapterFusion, "__init__", init)
    with pytest.raises(MemoryError):
        model.add_adapter_fusion(FUSE, overwrite_ok=True)
    assert modules == [fusion for _, fusion in model.model_adapters.fusion_modules("a,b,c")]
    assert torch.equal(run(model, ids), before)


def test_added_fusion_is_active_under_its_name(model, ids):
    model.add_adapter_fusion(Fuse("a", "b"), name="f", set_active=True)
    assert model.active_adapters == Fuse("a", "b", name="f")
    model.add_adapter_fusion(["b", "c"], set_active=True)
    assert model.active_adapters == Fuse("b", "c")
    # other adapters, at other places, under the name of the active fusion
    for name in "de":
        model.add_adapter(name, "seq_bn")
    model.add_adapter_fusion(["d", "e"], name="b,c", overwrite_ok=True, set_active=True)
    assert model.active_adapters == Fuse("d", "e", name="b,c")
    assert [p.location for p, _ in model.model_adapters.fusion_modules("b,c")] == [
        "output_adapter"
    ] * 2
    run(model, ids)


def test_fusion_over_different_locations(model):
    model.add_adapter("d", "seq_bn")
    with pytest.raises(ValueError, match="mh_adapter"):
        model.add_adapter_fusion(["a", "d"])


def test_other_dtype_and_device(model, ids):
    model.adapter_to("a", dtype=torch.float64)
    with pytest.raises(ValueError, match="torch.float64"):
        run(model, ids)
    model.adapter_to("a", dtype=torch.float32)
    model.adapter_fusion_to(FUSE, device="meta")
    with pytest.raises(ValueError, match="meta"):
        run(model, ids)


def test_backend_by_name(model, ids):
    model.set_backend("cpp")
    run(model, ids)
    model.double()
    with pytest.raises(ValueError, match="cpp.*float32"):
        run(model, ids)
    model.set_backend(None)
    run(model, ids)
    model.float().add_adapter("d", "seq_bn[non_linearity='mish']", set_active=True)
    model.set_backend("cpp")
    with pytest.raises(ValueError, match="mish"):
        run(model, ids)


def test_bad_models():
    with pytest.raises(TypeError, match="transformers"):
        fastfusion.init(torch.nn.Linear(2, 2))
    gpt2 = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="gpt2"):
        fastfusion.init(gpt2)
    with pytest.raises(ValueError, match="gpt2"):
        AutoAdapterModel.from_config(gpt2.config)
    bert = BertModel(tiny.CONFIGS["bert"])
    with pytest.raises(ValueError, match="init"):
        fastfusion.restore(bert)
    bert.encoder.layer[1].output.adapters = torch.nn.ModuleDict()
    with pytest.raises(ValueError, match="'adapters'"):
        fastfusion.init(bert)
    assert "forward" not in bert.encoder.layer[0].output.__dict__
    assert type(bert) is BertModel


def test_compiled_models(ids):
    """`init` comes before `torch.compile`; afterwards the wrapper serves as well as the model."""
    torch._dynamo.reset()
    bert = BertModel(tiny.CONFIGS["bert"]).eval()
    with pytest.raises(TypeError, match=r"init\(model\) before torch.compile\(model\)"):
        fastfusion.init(torch.compile(bert, backend="eager"))
    assert type(bert) is BertModel and "model_adapters" not in bert.__dict__
    before = run(bert, ids)
    fastfusion.init(bert)
    compiled = torch.compile(bert, backend="eager")
    fastfusion.init(compiled, backend="reference")
    assert bert.model_adapters.backend == "reference"
    tiny.add_fusion(bert, "ab")
    torch.testing.assert_close(run(compiled, ids), run(bert, ids))
    assert not torch.allclose(run(compiled, ids), before, atol=1e-3)
    fastfusion.refresh(compiled)
    fastfusion.restore(compiled)
    assert type(bert) is BertModel
    assert torch.equal(run(bert, ids), before)
    torch.testing.assert_close(run(compiled, ids), before)


@pytest.mark.parametrize("mode", ["inference", "eval", "train"])
def test_compile(mode, ids):
    """One graph, no break; without gradients it follows changed weights."""
    torch._dynamo.reset()
    config = copy.deepcopy(tiny.CONFIGS["bert"])
    # dropout draws other numbers in a compiled graph
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config).eval()
    fastfusion.init(model)
    fuse = tiny.add_fusion(model)
    model.add_adapter_fusion(fuse, {"temperature": True}, overwrite_ok=True)
    model.set_active_adapters(Stack("a", fuse))
    tiny.randomize(model)
    if mode == "train":
        model.train_adapter_fusion(Stack("a", fuse))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    if mode == "inference":
        for _ in range(2):
            torch.testing.assert_close(run(compiled, ids), run(model, ids), rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                for m in (model, other):
                    for _, fusion in m.model_adapters.fusion_modules(fuse.name):
                        fusion.query.weight.mul_(1.5)
        return
    labels = torch.tensor([0, 1])
    for m in (model, compiled):
        output = m(ids, labels=labels, output_adapter_fusion_attentions=True)
        assert output.adapter_fusion_attentions["a,b,c"][1]["mh_adapter"].shape == (2, 7, 3)
        output.loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            # the compiled graph sums in another order: rounding, measured by the whole gradient
            scale = expected[name].grad.abs().max().item()
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * scale + 1e-6
            )
    for m in (model, other):
        _, fusion = next(m.model_adapters.fusion_modules(fuse.name))
        tiny.optimizer_step()
        fusion.settle_temperature()
        assert fusion.temperature.item() == pytest.approx(49.95 if mode == "train" else 50.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bytes_kept_for_the_backward(dropout):
    """Per token and place they grow by N floats, by 2N with dropout on the scores, and no more."""

    def kept(count: int) -> int:
        model = BertModel(tiny.CONFIGS["bert"])
        fastfusion.init(model)
        names = [f"a{i}" for i in range(count)]
        for name in names:
            model.add_adapter(name, "seq_bn[reduction_factor=16]")
        model.add_adapter_fusion(names, {"dropout_prob": dropout})
        model.train_adapter_fusion(Fuse(*names))
        ids = tiny.ids(5, 19)  # no weight has 95 rows
        sizes: dict[int, int] = {}

        def pack(tensor):
            # what depends on the tokens: the rebuilt packs are weights
            if ids.numel() in tensor.shape or tuple(tensor.shape[:2]) == (5, 19):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(ids).last_hidden_state
        assert output.requires_grad
        return sum(sizes.values())

    layers, tokens, floats = 2, 5 * 19, 2 if dropout else 1
    for few, many in ((2, 3), (2, 16)):
        grown = kept(many) - kept(few)
        assert grown == layers * tokens * (many - few) * floats * 4
