"""One setup for each row of a batch, on whole models: `adapter_names`, `adapter_ids`, `task_ids`.

Each row is compared with a forward of that row alone under an `AdapterSetup`.
"""

import contextlib
import copy
import gc
import inspect
import io
import weakref

import pytest
import tiny
import torch
from row_models import BASE, ENTRIES, GROUPED, LENGTH, add_adapters, alone, close, make, setup_of
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import fastfusion
from fastfusion import AdapterSetup, AutoAdapterModel
from fastfusion.composition import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    parse_composition,
)
from fastfusion.lanes import LoneCall


def close_in_low_precision(actual, plain, truth):
    """As far from the truth in fp64 as the literal formulas in the same dtype, row by row.

    Root mean squares, since rounding has outliers; three times, since it differs from one order of
    the sums to another (the literal attention's own error by a factor of 1.7, with the kernel that
    PyTorch takes for a product); and one unit of rounding where a row happens to be exact.
    """
    errors = [(t.double() - truth).square().mean((1, 2)).sqrt() for t in (actual, plain)]
    assert (errors[0] <= 3 * errors[1] + 2e-3).all(), errors


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The models are so small that threads cost more than they bring."""
    set_threads(1)


@pytest.fixture
def model():
    return make()


# -- results --------------------------------------------------------------------------------------

BACKENDS = [
    ("torch", torch.float64),
    ("reference", torch.float64),
    ("cpp", torch.float32),
    (None, torch.float32),
]


@pytest.mark.parametrize("entries", [ENTRIES, ENTRIES[::-1], GROUPED, GROUPED * 2], ids=len)
@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_each_row_as_if_alone(architecture, backend, dtype, entries):
    model = make(architecture, dtype, backend)
    ids = tiny.ids(len(entries), LENGTH)
    with torch.no_grad():
        expected = alone(model, entries, ids)
        close(model(ids, adapter_names=entries)[0], expected)
        numbers = model.routing(entries)
        assert numbers.tolist() == [entries.index(entry) for entry in entries]
        assert torch.equal(
            model(ids, adapter_ids=numbers)[0], model(input_ids=ids, adapter_ids=numbers)[0]
        )
        close(model(ids, adapter_ids=numbers)[0], expected)
        shuffled = torch.randperm(len(entries))
        close(
            model(ids[shuffled], adapter_names=[entries[i] for i in shuffled])[0],
            expected[shuffled],
        )
    assert model.active_adapters is None


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_one_entry_is_for_all_rows(model, entry):
    ids = tiny.ids(3, LENGTH)
    with torch.no_grad():
        close(model(ids, adapter_names=[entry])[0], alone(model, [entry] * 3, ids))


@pytest.mark.parametrize("entries", [ENTRIES, GROUPED], ids=len)
def test_padding(entries):
    model = make(dtype=torch.float64)
    ids = tiny.ids(len(entries), LENGTH)
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (len(ids), 1))).long()
    with torch.no_grad():
        expected = alone(model, entries, ids, attention_mask=mask)
        close(model(ids, attention_mask=mask, adapter_names=entries)[0], expected)


def test_rows_stand_above_the_context_and_the_active_setup(model):
    ids = tiny.ids(3, LENGTH)
    entries = ["a", BASE, Fuse("a", "b")]
    with torch.no_grad():
        expected = alone(model, entries, ids)
        model.set_active_adapters("d")
        before = model(ids)[0]
        with AdapterSetup("c"):
            close(model(ids, adapter_names=entries)[0], expected)
        assert torch.equal(model(ids)[0], before)


def test_embeddings_as_inputs(model):
    ids = tiny.ids(3, LENGTH)
    embedded = model.embeddings.word_embeddings(ids)
    entries = ["a", BASE, Split("a", "b", splits=[3, 4])]
    with torch.no_grad():
        close(
            model(inputs_embeds=embedded, adapter_names=entries)[0],
            model(ids, adapter_names=entries)[0],
        )


@pytest.mark.parametrize("kind", ["adapter_names", "adapter_ids", "task_ids"])
@pytest.mark.parametrize("entries", [ENTRIES, GROUPED], ids=len)
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointed"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_gradients(architecture, mode, entries, kind):
    """Of every adapter and fusion: the sum of what the rows alone give."""
    model = make(architecture, torch.float64)
    if kind == "task_ids":
        entries = ["a", Stack("b", "a"), Fuse("a", "b"), "a", Average("a", "d")]
    ids = tiny.ids(len(entries), LENGTH)
    model.train(mode != "eval")
    weights = torch.randn(len(entries), LENGTH, 32, dtype=torch.float64)
    if kind == "task_ids":
        tasks = MultiTask(*dict.fromkeys(entries))
        # all children of a MultiTask have the pre step of the first one, here and there none
        numbers = [list(tasks).index(entry) for entry in entries]
        with AdapterSetup(tasks):
            rows = [model(ids[i : i + 1], task_ids=[n])[0] for i, n in enumerate(numbers)]
            expected = torch.cat(rows)
    else:
        expected = alone(model, entries, ids)
    (expected * weights).sum().backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    arguments = {kind: model.routing(entries) if kind == "adapter_ids" else entries}
    if kind == "task_ids":
        model.set_active_adapters(tasks)
        arguments = {kind: torch.tensor(numbers)}
    actual = model(ids, **arguments)[0]
    close(actual, expected)
    (actual * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if truth[name] is None or parameter.grad is None:
            assert all(g is None or not g.any() for g in (truth[name], parameter.grad)), name
        else:
            # sums over the rows
            torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-8, atol=1e-8, msg=name)


UNUSED = {
    "a gate": "g",
    "dropout": "dropout",
    "a few rows' fusion": Fuse("a", "b"),
    "a part of the tokens": Split("b", Stack("d", "g"), split_index=LENGTH),
    "an Average over blocks": Average("d", Stack("a", "g")),
}


@pytest.mark.parametrize("case", UNUSED)
def test_what_a_routing_does_not_use_has_gradients_of_zeros(model, case):
    """Also where it has a call of its own."""
    model.add_adapter("dropout", "double_seq_bn[reduction_factor=8, dropout=0.5]")
    model.routing(["c", UNUSED[case]])
    model.train()
    output = model(tiny.ids(2, 3), adapter_ids=torch.tensor([0, 0]))[0]
    output.square().sum().backward()
    places = [f".adapters.{name}." for name in parse_composition(UNUSED[case]).flatten()]
    places += [".adapter_fusion_layer."] * isinstance(UNUSED[case], Fuse)
    for name, parameter in model.named_parameters():
        if any(place in name for place in places):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_training_step_moves_only_what_rows_use(model):
    model.train_adapter("a")
    entries = ["a", BASE, "a"]
    model(tiny.ids(3, LENGTH), adapter_names=entries)[0].square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all(".adapters.a." in name for name in trained)


@pytest.mark.parametrize("kind", ["adapter_names", "adapter_ids"])
def test_temperatures_fall_where_rows_are(model, kind):
    """Not those of setups that no row of the batch has."""
    config = {"temperature": True}
    model.add_adapter_fusion(["a", "b"], config, overwrite_ok=True)
    model.add_adapter_fusion(["a", "d"], config)
    model.train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

    def forward(entries):
        value = model.routing(entries) if kind == "adapter_ids" else entries
        model(tiny.ids(len(entries), LENGTH), **{kind: value})
        optimizer.step()

    def temperatures():
        found = []
        for name in ("a,b", "a,d"):
            _, fusion = next(model.model_adapters.fusion_modules(name))
            fusion.settle_temperature()
            found.append(fusion.temperature.item())
        return found

    forward([Fuse("a", "b"), Fuse("a", "d")])
    forward([Fuse("a", "b"), "a"])
    forward([BASE])
    assert temperatures() == pytest.approx([49.9, 49.95])


def test_temperatures_fall_where_tasks_are(model):
    """Not those of a MultiTask's children that no row of the batch has."""
    config = {"temperature": True}
    fusions = [["a", "b"], ["a", "d"], ["b", "d"]]
    for names in fusions:
        model.add_adapter_fusion(names, config, overwrite_ok=names == ["a", "b"])
    model.set_active_adapters(MultiTask(*map(Fuse, *zip(*fusions, strict=True)), "d"))
    model.train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for tasks in ([0, 1], torch.tensor([0, 0])):
        model(tiny.ids(2, LENGTH), task_ids=tasks)
        optimizer.step()
    found = []
    for names in fusions:
        _, fusion = next(model.model_adapters.fusion_modules(",".join(names)))
        fusion.settle_temperature()
        found.append(fusion.temperature.item())
    assert found == pytest.approx([49.9, 49.95, 50.0])


def test_names_of_tasks(model):
    ids = tiny.ids(4, LENGTH)
    model.set_active_adapters(MultiTask("a", "d"))
    with torch.no_grad():
        expected = alone(model, ["d", "a", "a", "d"], ids)
        close(model(ids, task_ids=["d", "a", "a", "d"])[0], expected)
        close(model(ids, task_ids=torch.tensor([1, 0, 0, 1]))[0], expected)
        close(model(ids, task_ids=[1, 0, 0, 1])[0], expected)


def test_blocks_over_the_batch(model):
    """Sizes may be 0; the first adapter's pre and the last one's post step are those of all."""
    ids = tiny.ids(5, LENGTH)
    with torch.no_grad(), AdapterSetup(BatchSplit("a", "d", "a", batch_sizes=[2, 3, 0])):
        actual = model(ids)[0]
    close(actual, alone(model, ["a", "a", "d", "d", "d"], ids))


@pytest.mark.parametrize("skipped", [[0], [1], [0, 1]])
def test_skipped_layers(model, skipped):
    ids = tiny.ids(len(ENTRIES), LENGTH)
    with torch.no_grad():
        model(ids, adapter_names=ENTRIES)  # plans of a time before
        model.set_active_adapters(None, skip_layers=skipped)
        actual = model(ids, adapter_names=ENTRIES)[0]
        close(actual, alone(model, ENTRIES, ids))
        if len(skipped) == 2:
            close(actual, alone(model, [BASE] * len(ENTRIES), ids))


def test_attentions(model):
    """A fusion's attention at its rows and tokens, zeros beside them."""
    entries = ["a", Fuse("a", "b"), BASE, Stack("b", Fuse("a", "b")), Fuse("a", "b")]
    ids = tiny.ids(len(entries), LENGTH)
    with torch.no_grad():
        actual = model(ids, adapter_names=entries, output_adapter_fusion_attentions=True)
    for layer, location in [
        (i, place) for i in (0, 1) for place in ("mh_adapter", "output_adapter")
    ]:
        found = actual.adapter_fusion_attentions["a,b"][layer][location]
        assert found.shape == (len(entries), LENGTH, 2) and not found.requires_grad
        for i, entry in enumerate(entries):
            if "Fuse" not in repr(entry):
                assert not found[i].any()
                continue
            with torch.no_grad(), AdapterSetup(entry):
                own = model(ids[i : i + 1], output_adapter_fusion_attentions=True)
            close(found[i], own.adapter_fusion_attentions["a,b"][layer][location][0])


def test_gating_scores(model):
    entries = ["g", "a", BASE, Stack("a", "g")]
    ids = tiny.ids(len(entries), LENGTH)
    with torch.no_grad():
        actual = model(ids, adapter_names=entries, output_adapter_gating_scores=True)
        with AdapterSetup("g"):
            own = model(ids[:1], output_adapter_gating_scores=True)
    found = actual.adapter_gating_scores["g"][0]["mh_adapter"]
    assert found.shape == (4,) and not found[1:3].any() and found[3] != 0
    close(found[:1], own.adapter_gating_scores["g"][0]["mh_adapter"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entries", [ENTRIES, GROUPED], ids=len)
def test_half_precision(dtype, entries):
    model = make(dtype=dtype)
    ids = tiny.ids(len(entries), LENGTH)
    with torch.no_grad():
        actual = model(ids, adapter_names=entries)[0]
        model.set_backend("reference")
        plain = alone(model, entries, ids)
        assert actual.dtype == plain.dtype == dtype
        truth = alone(copy.deepcopy(model).double(), entries, ids)
    close_in_low_precision(actual, plain, truth)


@pytest.mark.parametrize("entries", [ENTRIES, GROUPED], ids=len)
@pytest.mark.parametrize("recorded", [False, True])
def test_autocast(model, entries, recorded):
    ids = tiny.ids(len(entries), LENGTH)
    with torch.no_grad():
        truth = alone(copy.deepcopy(model).double(), entries, ids)
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16):
        actual = model(ids, adapter_names=entries)[0]
        model.set_backend("reference")
        plain = alone(model, entries, ids)
    assert actual.dtype == plain.dtype
    close_in_low_precision(actual, plain, truth)
    if recorded:
        actual.float().sum().backward()
        assert model.get_adapter("a")[0]["mh_adapter"].adapter_up.weight.grad.any()


# -- Parallel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mode", ["inference", "eval", "train", "checkpointed"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
@pytest.mark.parametrize(
    "setup",
    [
        Parallel("a", "d"),
        Parallel("missing in layer 0", "missing in layer 0"),
        Parallel("missing in layer 0", "a"),
        Parallel("a", "missing in layer 1"),
        Parallel("a", "d", Average("a", "d")),
        Parallel("c", "c"),
    ],
    ids=repr,
)
def test_parallel(architecture, mode, padded, setup):
    """Copies of the batch, each as its child alone: none of these has a pre step of its own."""
    model = make(architecture, torch.float64)
    ids = tiny.ids(3, LENGTH)
    arguments = {}
    if padded:
        arguments["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[7], [3], [5]])).long()
    model.train(mode in ("train", "checkpointed"))
    with torch.set_grad_enabled(mode != "inference"):
        rows = []
        for child in setup:
            with AdapterSetup(child):
                rows.append(model(ids, **arguments)[0])
        expected = torch.cat(rows)
        if mode == "checkpointed":
            model.gradient_checkpointing_enable()
        model.set_active_adapters(setup)
        actual = model(ids, **arguments)[0]
    close(actual, expected)
    if mode == "inference":
        return
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    (actual * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if truth[name] is None or parameter.grad is None:
            assert all(g is None or not g.any() for g in (truth[name], parameter.grad)), name
        else:
            torch.testing.assert_close(parameter.grad, truth[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", ["missing in layer 0", "missing in layer 1"])
def test_a_split_of_the_batch_beside_a_parallel_that_a_layer_leaves_out(model, name):
    """The batch is copied at the first place that has the Parallel, and stays copied."""
    setup = Stack(BatchSplit("a", "d", batch_sizes=[1, 2]), Parallel(name, name))
    ids = tiny.ids(3, LENGTH)
    with torch.no_grad(), AdapterSetup(setup):
        actual = model(ids)[0]
    with torch.no_grad():
        entries = [Stack(child, name) for child in ("a", "d", "d")]
        close(actual, alone(model, entries, ids).repeat(2, 1, 1))


def test_what_is_random_in_training():
    """Adapter dropout, and stochastic depth of every row, which are random in their place alone."""
    model = make()
    model.add_adapter("p", "double_seq_bn[reduction_factor=4, dropout=1.0]")
    model.add_adapter("s", "double_seq_bn[reduction_factor=4, stochastic_depth=1.0]")
    tiny.randomize(model)
    fastfusion.refresh(model)
    entries = ["a", "p", "s", Stack("a", "p"), Stack("s", "b"), Fuse("a", "b"), BASE]
    ids = tiny.ids(len(entries), LENGTH)
    model.eval()
    resting = model(ids, adapter_names=entries)[0]
    model.train()
    for arguments in ({"adapter_names": entries}, {"adapter_ids": model.routing(entries)}):
        actual = model(ids, **arguments)[0]
        close(actual, alone(model, entries, ids))
        for row, entry in enumerate(entries):
            is_random = entry != BASE and {"p", "s"} & set(parse_composition(entry).flatten())
            assert torch.allclose(actual[row], resting[row], atol=1e-4) != bool(is_random)


# -- bad input ------------------------------------------------------------------------------------


def state_of(model):
    config = model.adapters_config
    return (
        model.model_adapters.active,
        model.model_adapters.routed,
        config.active_setup,
        list(config.skip_layers),
        dict(config.adapters),
        dict(config.fusions),
        {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()},
        model.training,
    )


@contextlib.contextmanager
def refused(model, monkeypatch, message):
    """A ValueError before the forward starts, and nothing changed."""

    def fail(*_, **__):
        raise AssertionError("the forward started")

    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.embeddings, "forward", fail)
        with pytest.raises(ValueError, match=message):
            yield
    assert state_of(model) == before
    assert AdapterSetup.get_context() is None
    assert fastfusion.context.ForwardContext.get_context() is None
    with torch.no_grad():
        assert model(tiny.ids(1, 3))[0].isfinite().all()


ARGUMENTS = [
    # adapter_names, of three rows
    (dict(adapter_names=["a", "b"]), "adapter_names: expected 3.*got 2"),
    (dict(adapter_names=["a"] * 4), "adapter_names: expected 3.*got 4"),
    (dict(adapter_names=[]), "adapter_names: expected 3.*got 0"),
    (dict(adapter_names="a"), "adapter_names: expected a list.*'a'"),
    (dict(adapter_names=7), "adapter_names: expected a list.*7"),
    (dict(adapter_names=["a", None, "b"]), "adapter_names: .*None"),
    (dict(adapter_names=["a", 3, "b"]), "adapter_names: .*3"),
    (dict(adapter_names=["a", ["b"], "b"]), "adapter_names: .*'b'"),
    (dict(adapter_names=["a", "x", "b"]), "(adapter_names|setup): .*'x'"),
    (dict(adapter_names=["a", "__Base__", "b"]), "(adapter_names|setup): .*'__Base__'"),
    (dict(adapter_names=["a", "", "b"]), "(adapter_names|setup): "),
    (dict(adapter_names=["x"]), "(adapter_names|setup): .*'x'"),
    (dict(adapter_names=["a", Fuse("a", "d"), "b"]), "(adapter_names|setup): .*'a,d'"),
    (dict(adapter_names=["a", Fuse("b", "a", name="a,b"), "b"]), "(adapter_names|setup): .*'a,b'"),
    (dict(adapter_names=["a", Parallel("a", "b"), "b"]), "adapter_names: .*Parallel"),
    (dict(adapter_names=["a", BatchSplit("a", batch_sizes=3), "b"]), "adapter_names: .*BatchSplit"),
    (dict(adapter_names=["a", MultiTask("a", "b"), "b"]), "adapter_names: .*MultiTask"),
    (
        dict(adapter_names=["a", Stack("a", BatchSplit("a", batch_sizes=3)), "b"]),
        "adapter_names: .*BatchSplit",
    ),
    (dict(adapter_names=["a", Split("a", "b", splits=[3, 3]), "b"]), "splits: expected .*6.*got 7"),
    (dict(adapter_names=[Split("a", "b", splits=[3, 3])]), "splits: expected .*6.*got 7"),
    (
        dict(adapter_names=["a", Split("a", Split("b", "d", splits=[1, 1]), splits=[4, 3]), "b"]),
        "splits: expected a sum of 3",
    ),
    (
        dict(adapter_names=["a", Fuse(Stack("a", Fuse("a", "b")), "b"), "b"]),
        "(adapter_names|setup): ",
    ),
    # adapter_ids
    (dict(adapter_ids=[0, 1]), r"adapter_ids: expected integers \[3\]"),
    (dict(adapter_ids=[0, 1, 2, 0]), r"adapter_ids: expected integers \[3\]"),
    (dict(adapter_ids=[0.0, 1.0, 0.0]), "adapter_ids: expected integers"),
    (dict(adapter_ids=torch.zeros(3, 1, dtype=torch.long)), "adapter_ids: expected integers"),
    (dict(adapter_ids=torch.tensor(1)), "adapter_ids: expected integers"),
    (dict(adapter_ids=[True, False, True]), "adapter_ids: expected integers"),
    (dict(adapter_ids=[0, 1, 2]), "adapter_ids: expected numbers from 0 to 1; got 2"),
    (dict(adapter_ids=["a", "d", "a"]), r"adapter_ids: expected integers \[3\]; got \['a'"),
    (dict(adapter_ids=[None, 1, 1]), r"adapter_ids: expected integers \[3\]; got \[None"),
    (dict(adapter_ids=[0, -1, 1]), "adapter_ids: expected numbers from 0 to 1; got -1"),
    # task_ids
    (dict(task_ids=[0, 0, 0]), "task_ids: expected together with a MultiTask"),
    (dict(task_ids=["a", "b", "a"]), "task_ids: expected together with a MultiTask"),
    # two of them
    (dict(adapter_names=["a"], adapter_ids=[0, 1, 0]), "adapter_ids: expected only one"),
    (dict(adapter_names=["a"], task_ids=[0, 1, 0]), "adapter_names: expected only one"),
]


@pytest.mark.parametrize("arguments, message", ARGUMENTS, ids=lambda v: str(v)[:70])
def test_bad_arguments(model, monkeypatch, arguments, message):
    model.set_active_adapters("d")
    model.routing(["a", "b"])
    with refused(model, monkeypatch, message):
        model(tiny.ids(3, LENGTH), **arguments)


@pytest.mark.parametrize(
    "setup, arguments, message",
    [
        (BatchSplit("a", "b", batch_sizes=[1, 1]), {}, "batch_sizes: expected .*2 rows.*got 3"),
        (BatchSplit("a", "b", batch_sizes=2), {}, "batch_sizes: expected .*4 rows.*got 3"),
        (Stack("a", BatchSplit("b", batch_sizes=[4])), {}, "batch_sizes: .*4 rows.*got 3"),
        (Parallel("a", Stack("b", "a")), {"task_ids": [0, 1, 0]}, "task_ids: expected together"),
        (Split("a", "b", splits=[3, 3]), {}, "splits: expected .*6 tokens.*got 7"),
        (Split("a", "b", splits=3), {}, "splits: expected .*6 tokens.*got 7"),
        (Stack("a", Split("b", "c", splits=[8, 0])), {}, "splits: expected .*8 tokens.*got 7"),
        (Average("a", Split("a", "b", splits=[1, 2])), {}, "splits: expected .*3 tokens.*got 7"),
        (MultiTask("a", "b"), {}, "task_ids: expected together with a MultiTask"),
        (MultiTask("a", "b"), {"task_ids": [0, 1]}, r"task_ids: expected integers \[3\]"),
        (MultiTask("a", "b"), {"task_ids": [0, 1, 2]}, "task_ids: expected numbers from 0 to 1"),
        (MultiTask("a", "b"), {"task_ids": ["a", "b"]}, r"task_ids: expected integers \[3\]"),
        (MultiTask("a", "b"), {"task_ids": ["a", "b", "c"]}, "task_ids: .*'c'"),
        (MultiTask("a", "b"), {"task_ids": ["a", "b", 1]}, "task_ids: .*1"),
        (MultiTask("a", "b"), {"task_ids": [0.0, 1.0, 0.0]}, "task_ids: expected integers"),
    ],
    ids=lambda v: str(v)[:60],
)
@pytest.mark.parametrize("by", ["active", "context"])
def test_batches_that_do_not_fit(model, monkeypatch, setup, arguments, message, by):
    if by == "context":
        with refused(model, monkeypatch, message), AdapterSetup(setup):
            model(tiny.ids(3, LENGTH), **arguments)
        return
    model.set_active_adapters(setup)
    calls = []
    monkeypatch.setattr(model.embeddings, "forward", lambda *_, **__: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model(tiny.ids(3, LENGTH), **arguments)
    assert not calls and model.active_adapters == setup


@pytest.mark.parametrize(
    "make_setup, message",
    [
        (lambda: "x", "setup: .*'x'"),
        (lambda: Stack("a", "x"), "setup: .*'x'"),
        (lambda: BatchSplit("a", "x", batch_sizes=1), "setup: .*'x'"),
        (lambda: Fuse("a", "d"), "setup: .*'a,d'"),
        (lambda: Parallel("a", Parallel("b", "c")), "Parallel: expected children"),
        (lambda: Split("a", Fuse("a", "b"), splits=2), "Split: expected children"),
        (lambda: MultiTask("a", Split("a", splits=2)), "MultiTask: expected children"),
        (lambda: Average("a", Average("a", "b")), "Average: expected children"),
        (lambda: Average("a", Fuse("a", "b")), "Average: expected children"),
        (lambda: BatchSplit("a", Parallel("a"), batch_sizes=2), "BatchSplit: expected children"),
        (lambda: Stack("a", Split(Split("a", splits=2), splits=2)), "setup: .*below two blocks"),
        (lambda: Parallel("a", Stack("a", Average("a", "b"))), "setup: .*names only"),
        (lambda: Stack("a", Parallel(Stack("a"), Average(Stack("a"), "b"))), "setup: .*below two"),
        (lambda: Split("a", Split("b", "c", splits=2), splits=[3, 5]), "splits: .*sum of 5"),
        (
            lambda: BatchSplit("a", BatchSplit("b", batch_sizes=[1]), batch_sizes=2),
            "batch_sizes: .*sum of 2",
        ),
        (
            lambda: Stack(Split("a", "b", splits=2), Split("a", "b", splits=3)),
            "splits: expected the same sum",
        ),
        (
            lambda: Stack(BatchSplit("a", batch_sizes=2), BatchSplit("a", batch_sizes=3)),
            "batch_sizes: expected the same sum",
        ),
        (lambda: Stack(Parallel("a", "b"), Parallel("a", "b", "c")), "same number of children"),
        (lambda: Stack(MultiTask("a", "b"), MultiTask("a")), "same number of children"),
    ],
)
@pytest.mark.parametrize("by", ["active", "context", "train"])
def test_bad_setups(model, monkeypatch, make_setup, message, by):
    with refused(model, monkeypatch, message):
        if by == "context":
            with AdapterSetup(make_setup()):
                model(tiny.ids(3, LENGTH))
        else:
            (model.train_adapter if by == "train" else model.set_active_adapters)(make_setup())


@pytest.mark.parametrize(
    "setups, message",
    [
        (["a", "x"], "(setups|setup): .*'x'"),
        ([Fuse("b", "a")], "(setups|setup): .*'b,a'"),
        ([Parallel("a", "b")], "setups: .*Parallel"),
        ([None], "setups: .*None"),
        ([["a"]], "setups: "),
        ("ab", "setups: expected a list"),
    ],
    ids=str,
)
def test_bad_routing(model, monkeypatch, setups, message):
    model.routing(["d"])
    with refused(model, monkeypatch, message):
        model.routing(setups)


def test_duplicate_names(model, monkeypatch):
    with refused(model, monkeypatch, "adapter_name: an adapter 'a' exists"):
        model.add_adapter("a")
    with refused(model, monkeypatch, "name: a fusion 'a,b' exists"):
        model.add_adapter_fusion(["a", "b"])


def test_a_routed_setup_whose_adapter_has_gone(model, monkeypatch):
    """Both ways in say what helps."""
    model.routing(["a", "c"])
    model.delete_adapter("c")
    message = "got 'c'; a routed setup needs it .see reset_routing"
    with refused(model, monkeypatch, f"adapter_ids: .*{message}"):
        model(tiny.ids(1, LENGTH), adapter_ids=[0])
    with refused(model, monkeypatch, message):
        model.routing(["b"])
    model.reset_routing()
    assert model.routing(["b"]).tolist() == [0]


@pytest.mark.parametrize("as_keyword", [True, False])
def test_the_size_of_embeddings(model, monkeypatch, as_keyword):
    """By their name or by their place among the arguments."""
    embeddings = torch.randn(3, LENGTH, 32)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    before = [None] * names.index("inputs_embeds")
    args, kwargs = (before, {"inputs_embeds": embeddings})
    if not as_keyword:
        args, kwargs = [*before, embeddings], {}
    with refused(model, monkeypatch, "adapter_names: expected 3, one for each row, or 1; got 2"):
        model(*args, **kwargs, adapter_names=["a", "b"])
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, adapter_names=["a", "b", "d"])[0]
        assert torch.equal(model(*args, **kwargs, adapter_names=["a", "b", "d"])[0], expected)


def test_ids_without_a_routing(model, monkeypatch):
    with refused(model, monkeypatch, "adapter_ids: expected"):
        model(tiny.ids(2, LENGTH), adapter_ids=[0, 0])


def test_splits_that_differ_between_rows(model, monkeypatch):
    """Rows of one batch have one length; ids may name setups that no row of the batch has."""
    entries = ["a", Split("a", "b", splits=[3, 4]), Split("a", "b", splits=[3, 3])]
    with refused(model, monkeypatch, "splits"):
        model(tiny.ids(3, LENGTH), adapter_names=entries)


# -- what stays and what goes ---------------------------------------------------------------------


def test_numbers_stay(model):
    first = model.routing(["b", BASE, Stack("a", "b"), "b"])
    assert first.dtype == torch.int64 and first.tolist() == [0, 1, 2, 0]
    assert model.routing([Stack("a", "b"), "d", BASE, "b"]).tolist() == [2, 3, 1, 0]
    assert model.routing([Stack("b")]).tolist() == [0]
    assert model.routing([]).dtype == torch.int64
    ids = tiny.ids(4, LENGTH)
    with torch.no_grad():
        expected = alone(model, ["b", BASE, Stack("a", "b"), "b"], ids)
        close(model(ids, adapter_ids=first)[0], expected)
        close(model(ids, adapter_ids=first.int())[0], expected)


def test_a_model_inside_another_ones_forward(model):
    """Rows are those of the model that was given them."""
    other, ids = make(), tiny.ids(2, LENGTH)
    other.set_active_adapters("b")
    found = []
    with torch.no_grad():
        expected = other(ids)[0]
        hook = model.encoder.layer[0].register_forward_hook(lambda *_: found.append(other(ids)[0]))
        model(ids, adapter_names=["a", "d"])
        hook.remove()
    close(found[0], expected)


def test_layers_inside_another_ones_forward(model):
    """Places whose model is not running see nothing of a forward that is another model's."""
    other, ids, hidden = make(), tiny.ids(2, LENGTH), torch.randn(2, LENGTH, 32)
    found, call = [], {"output_adapter_fusion_attentions": True, "adapter_names": [Fuse("a", "b")]}

    def within(setup, **arguments):
        other.set_active_adapters(setup)
        hook = model.encoder.layer[1].register_forward_hook(
            lambda *_: found.append(other.encoder(hidden)[0])
        )
        try:
            return model(ids, **arguments)
        finally:
            hook.remove()

    with torch.no_grad():
        other.set_active_adapters(Parallel("a", "d"))
        expected = other.encoder(hidden)[0]
        model.set_active_adapters(Parallel("a", "d"))
        within(Parallel("a", "d"), adapter_input_parallelized=True)
        close(found[0], expected)
        with pytest.raises(ValueError, match="task_ids: needed by a MultiTask"):
            within(MultiTask("a", "d"), adapter_names=["a", "d"])
        attentions = model(ids, **call).adapter_fusion_attentions
        assert attentions.keys() == {"a,b"}
        others = within(Fuse("a", "b"), **call).adapter_fusion_attentions
        for layer, places in attentions["a,b"].items():
            for location, attention in places.items():
                close(others["a,b"][layer][location], attention)


def test_what_changes_after_a_routing(model):
    """Numbers see new modules and layers that are left out, compiled models after a routing."""
    ids = tiny.ids(2, LENGTH)
    numbers = model.routing(["a", "d"])
    table = model.model_adapters.routed
    with torch.no_grad():
        model.set_active_adapters("b")
        assert model.model_adapters.routed is table
        close(model(ids, adapter_ids=numbers)[0], alone(model, ["a", "d"], ids))
        model.set_active_adapters(None, skip_layers=[1])
        close(model(ids, adapter_ids=numbers)[0], alone(model, ["a", "d"], ids))
        model.add_adapter("d", "seq_bn", overwrite_ok=True)
        tiny.randomize(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"call model.routing\(\[\]\)"):
            compiled(ids, adapter_ids=numbers)
        model.routing([])
        torch._dynamo.reset()
        close(compiled(ids, adapter_ids=numbers)[0], alone(model, ["a", "d"], ids))


def test_checkpointing_from_before_init():
    """Layers that are computed again find the setup of their forward."""
    grads = {}
    ids = tiny.ids(2, LENGTH)
    for early in (False, True):
        torch.manual_seed(1)
        model = AutoModel.from_config(tiny.CONFIGS["bert"])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if early:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fastfusion.init(model)
        add_adapters(model)
        model.set_active_adapters("a")
        model.train()
        with AdapterSetup("d"):
            loss = model(ids)[0].square().sum()
        loss.backward()
        grads[early] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads[True].keys() == grads[False].keys()
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_fp16_shares_calls(monkeypatch):
    """All but fusions, whose scores need a temperature."""
    model = make(num_hidden_layers=1).half()
    calls = []
    run = LoneCall.run
    monkeypatch.setattr(LoneCall, "run", lambda call, *args: calls.append(1) or run(call, *args))
    with torch.no_grad():
        model(tiny.ids(4, LENGTH), adapter_names=["a", "b", BASE, Stack("a", "d")])
        assert not calls
        model(tiny.ids(4, LENGTH), adapter_names=["a", "b", Fuse("a", "b"), Stack("a", "d")])
        assert len(calls) == 2


def test_routing_that_starts_again(model, monkeypatch):
    ids = tiny.ids(2, LENGTH)
    # no batch has the length of both
    model.routing([Split("a", "b", splits=[3, 4])])
    with pytest.raises(ValueError, match="splits: expected the same sum"):
        model.routing([Split("a", "b", splits=[3, 5])])
    model.reset_routing()
    with refused(model, monkeypatch, "adapter_ids: expected"):
        model(ids, adapter_ids=[0, 0])
    numbers = model.routing(["d", "a"])
    assert numbers.tolist() == [0, 1]
    with torch.no_grad():
        close(model(ids, adapter_ids=numbers)[0], alone(model, ["d", "a"], ids))


def test_deleting_what_a_routing_names(model, monkeypatch):
    """Numbers raise before the forward until the adapter is there again; names go on."""
    ids = tiny.ids(2, LENGTH)
    numbers = model.routing(["a", "d", BASE])
    with torch.no_grad():
        expected = alone(model, ["a", BASE], ids)
        model(ids, adapter_ids=numbers[:2])
        model.delete_adapter("d")
        with refused(model, monkeypatch, "adapter_ids: .*'d'"):
            model(ids, adapter_ids=numbers[:2])
        with refused(model, monkeypatch, "setup: .*'d'"):
            model(ids, adapter_names=["a", "d"])
        with refused(model, monkeypatch, "setups?: .*'d'"):
            model.routing(["d"])
        close(model(ids, adapter_names=["a", BASE])[0], expected)
        model.add_adapter("d", "seq_bn")
        close(model(ids, adapter_ids=numbers[[0, 2]])[0], expected)
        close(model(ids, adapter_ids=numbers[1:])[0], alone(model, ["d", BASE], ids))


def test_an_adapter_that_comes_again(model):
    """A plan that was kept sees the new modules."""
    ids = tiny.ids(2, LENGTH)
    with torch.no_grad():
        before = model(ids, adapter_names=["a", "d"])[0]
        model.add_adapter("d", "seq_bn", overwrite_ok=True)
        tiny.randomize(model)
        after = model(ids, adapter_names=["a", "d"])[0]
        assert not torch.allclose(before, after)
        close(after, alone(model, ["a", "d"], ids))


def test_written_parameters_are_seen(model):
    ids = tiny.ids(len(GROUPED), LENGTH)
    with torch.no_grad():
        model(ids, adapter_names=GROUPED)
        for module in model.get_adapter("a")[0].values():
            module.adapter_up.weight.mul_(-2.0)
        close(model(ids, adapter_names=GROUPED)[0], alone(model, GROUPED, ids))


def test_plans_are_kept_and_forgotten(model):
    """A model keeps the plans that were used last, and no more."""
    ids = tiny.ids(2, LENGTH)
    names = ["a", "b", "c", "d", "g"]
    batches = [[x, y] for x in names for y in names if x < y]
    plans = model.model_adapters._kept
    with torch.no_grad():
        expected = [alone(model, batch, ids) for batch in batches]
        model.set_active_adapters(None)
        first = None
        for _ in range(2):
            for batch, wanted in zip(batches, expected, strict=True):
                close(model(ids, adapter_names=batch)[0], wanted)
                assert len(plans) <= 8
                if first is None:
                    (lowered,) = plans.values()
                    first = weakref.ref(lowered.plans[model.model_adapters.layers[0]])
                    del lowered
                # the other order of the rows is the same plan
                kept = dict(plans)
                model(ids, adapter_names=batch[::-1])
                assert plans == kept
    gc.collect()
    assert first() is None


def test_copies(model):
    ids = tiny.ids(len(ENTRIES), LENGTH)
    with torch.no_grad():
        numbers = model.routing(ENTRIES)
        expected = model(ids, adapter_ids=numbers)[0]
        other = copy.deepcopy(model)
        close(other(ids, adapter_ids=numbers)[0], expected)
        for module in model.get_adapter("a")[0].values():
            module.adapter_up.weight.zero_()
        close(other(ids, adapter_ids=numbers)[0], expected)
        assert not torch.allclose(model(ids, adapter_ids=numbers)[0], expected)


def test_pickled_weights(model):
    ids = tiny.ids(len(ENTRIES), LENGTH)
    with torch.no_grad():
        expected = model(ids, adapter_names=ENTRIES)[0]
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = make()
        tiny.randomize(other)
        other(ids, adapter_names=ENTRIES)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(ids, adapter_names=ENTRIES)[0], expected)


# -- models with heads ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "flexible"])
def test_with_a_head(kind):
    torch.manual_seed(1)
    if kind == "static":
        model = AutoModelForSequenceClassification.from_config(tiny.CONFIGS["bert"]).eval()
        fastfusion.init(model)
    else:
        model = AutoAdapterModel.from_config(tiny.CONFIGS["bert"]).eval()
        model.add_classification_head("h", num_labels=3)
    add_adapters(model)
    entries = ["a", BASE, Fuse("a", "b"), Split("a", "b", splits=[3, 4])]
    ids = tiny.ids(len(entries), LENGTH)
    if kind == "flexible":
        model.active_head = "h"
    model.eval()
    with torch.no_grad():
        expected = alone_logits(model, entries, ids)
        for arguments in ({"adapter_names": entries}, {"adapter_ids": model.routing(entries)}):
            close(model(ids, **arguments).logits, expected)
            close(model(input_ids=ids, **arguments).logits, expected)
        close(model(ids, adapter_names=["a"]).logits, alone_logits(model, ["a"] * 4, ids))
        with pytest.raises(ValueError, match="adapter_names: expected 4"):
            model(ids, adapter_names=["a", "b"])
        with pytest.raises(ValueError, match="adapter_names: expected 4"):
            model(input_ids=ids, adapter_names=["a", "b"])


def alone_logits(model, entries, ids):
    outputs = []
    for i, entry in enumerate(entries):
        with AdapterSetup(setup_of(entry)):
            outputs.append(model(ids[i : i + 1]).logits)
    return torch.cat(outputs)
