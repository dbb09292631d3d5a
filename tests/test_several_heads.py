"""Several heads in one forward: held against one forward for each head."""

import copy

import pytest
import tiny
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from fastfusion import AdapterSetup, AutoAdapterModel, Fuse, Stack
from fastfusion.composition import Average, BatchSplit, MultiTask, Parallel, Split
from fastfusion.heads import MultiHeadOutput

FUSE = Fuse("a", "b")


@pytest.fixture(params=["bert", "distilbert"])
def model(request):
    """Adapters a to d, a fusion over a and b; heads a, b, c and "spare", none for d."""
    model = AutoAdapterModel.from_config(tiny.CONFIGS[request.param])
    tiny.randomize_norms(model)
    for name in "abcd":
        model.add_adapter(name, "double_seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(FUSE)
    tiny.randomize(model)
    model.add_classification_head("a", num_labels=3)
    model.add_classification_head("b", num_labels=3, layers=1)
    model.add_classification_head("c", num_labels=2)
    model.add_classification_head("spare", num_labels=3)
    model.active_head = None
    return model.eval()


@pytest.fixture
def batch():
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1, 4:] = mask[3, 2:] = 0
    return {
        "input_ids": tiny.ids(5, 7),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 1, 0, 1]),
    }


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def alone(model, setup, head, batch):
    """One forward with one setup and one head, on a copy of the model."""
    model = copy.deepcopy(model)
    model.set_active_adapters(setup)
    return model(**batch, head=head)


def check_parts(output, expected, atol=2e-6):
    """The heads' outputs, and their sum as the loss."""
    assert isinstance(output, MultiHeadOutput) and len(output) == len(expected)
    for own, one in zip(output, expected, strict=True):
        assert isinstance(own, SequenceClassifierOutput)
        torch.testing.assert_close(own.logits, one.logits, rtol=1e-5, atol=atol)
        torch.testing.assert_close(own.loss, one.loss, rtol=1e-5, atol=atol)
    torch.testing.assert_close(output.loss, sum(one.loss for one in expected))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("setup", "heads", "children"),
    [
        (Parallel("a", "b"), ["a", "b"], ["a", "b"]),
        (Parallel("c", "a", "b"), ["c", "a", "b"], ["c", "a", "b"]),
        (Stack("d", Parallel("a", "b")), ["a", "b"], [Stack("d", "a"), Stack("d", "b")]),
        (Parallel(Stack("d", "a"), Average("d", "b")), ["a", "b"], [Stack("d", "a"), None]),
    ],
    ids=repr,
)
def test_parallel(model, batch, setup, heads, children):
    model.set_active_adapters(setup)
    assert model.active_head == heads
    output = model(**batch)
    children = [Average("d", "b") if child is None else child for child in children]
    check_parts(output, [alone(model, *pair, batch) for pair in zip(children, heads, strict=True)])
    assert model(input_ids=batch["input_ids"]).loss is None


def test_what_an_output_offers(model, batch):
    model.set_active_adapters(Parallel("a", "b"))
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_adapter_fusion_attentions=True)
    first, second = output
    assert output[0] is first and output[1] is second and output[-1] is second
    assert output[:1] == [first] and output["loss"] is output.loss
    assert output.head_outputs == [first, second]
    torch.testing.assert_close(output.logits, torch.cat([first.logits, second.logits]))
    # as in adapters: the base model's states of all channels, once
    assert output.hidden_states[-1].shape == (10, 7, 32) and first.hidden_states is None
    assert output.adapter_fusion_attentions == {}
    output[1] = first
    assert output.head_outputs == [first, first]
    again = copy.deepcopy(output)
    assert again[0].logits.equal(first.logits) and again.loss.equal(output.loss)


def test_parallel_gradients(model, batch):
    model.train_adapter(Parallel("a", "b"))
    model.eval()
    found = gradients(model, model(**batch).loss)
    model.train_adapter(Stack("a"))
    model.eval()
    expected = gradients(model, model(**batch).loss)
    model.train_adapter(Stack("b"))
    model.eval()
    expected |= gradients(model, model(**batch).loss)
    assert found.keys() == expected.keys() and any(".adapters.b." in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_head_of_all_channels(model, batch):
    """`head=` and a context's head_setup serve every channel, with all labels for each."""
    model.set_active_adapters(Parallel("a", "d"))
    expected = [alone(model, name, "spare", batch) for name in "ad"]
    check_parts(model(**batch, head="spare"), expected)
    check_parts(model(**batch, head=["spare", "spare"]), expected)
    with AdapterSetup(Parallel("a", "d"), head_setup="spare"):
        check_parts(model(**batch), expected)
    model.active_head = ["spare", "spare"]
    check_parts(model(**batch), expected)
    # what was chosen stays, even where it is what a setup brought before
    model.set_active_adapters(Parallel("a", "b"))
    model.active_head = model.active_head
    model.set_active_adapters(Parallel("a", "d"))
    pairs = zip("ad", "ab", strict=True)
    check_parts(model(**batch), [alone(model, *pair, batch) for pair in pairs])


def test_parallel_without_heads(model, batch):
    """No head is active: the base model's states, of all channels."""
    for name in list(model.heads):
        model.delete_head(name)
    model.set_active_adapters(Parallel("a", "b"))
    assert model.active_head is None
    del batch["labels"]
    assert model(**batch).last_hidden_state.shape == (10, 7, 32)
    with AdapterSetup(Parallel("a", "b")):
        assert model(**batch).last_hidden_state.shape == (10, 7, 32)


@pytest.mark.parametrize(
    "setup",
    [
        Parallel("a", "b"),
        Stack(Parallel("a", "d"), BatchSplit("b", "c", batch_sizes=[1, 4])),
        Stack(Parallel("a", "d"), MultiTask("b", "c")),
    ],
    ids=repr,
)
def test_copies_that_the_rows_hold_already(model, batch, setup):
    model.set_active_adapters(setup)
    tasks = {"task_ids": [1, 0, 0, 1, 1]} if isinstance(setup[-1], MultiTask) else {}
    copies = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    copies |= tasks | {"adapter_input_parallelized": True}
    check_parts(model(**copies), model(**batch, **tasks))
    check_parts(model(**copies, head="spare"), model(**batch, **tasks, head="spare"))
    model.active_head = None
    model.set_active_adapters("d")
    own = model(**batch, head="spare", adapter_input_parallelized=True)
    assert own.logits.equal(model(**batch, head="spare").logits)


def test_setup_that_changes_behind_the_plans(model, batch, monkeypatch):
    """As another thread may: a forward's heads are those of the setup whose plans it has."""
    model.set_active_adapters(Parallel("a", "b"))
    expected = model(**batch)

    def switch(*arguments):
        monkeypatch.undo()
        model.set_active_adapters(Parallel("c", "b", "a"))
        return model.check_heads(*arguments)

    monkeypatch.setattr(model, "check_heads", switch)
    check_parts(model(**batch), expected)
    assert model.active_head == ["c", "b", "a"]


def test_channels_that_no_layer_copies(model, batch):
    model.set_active_adapters(Parallel("a", "b"), skip_layers=[0, 1])
    expected = [alone(model, None, name, batch) for name in "ab"]
    check_parts(model(**batch), expected)


def test_pooler(batch):
    model = AutoAdapterModel.from_config(tiny.CONFIGS["bert"]).eval()
    for name in "ab":
        model.add_adapter(name)
        model.add_classification_head(name, num_labels=3, use_pooler=True)
    tiny.randomize(model)
    model.set_active_adapters(Parallel("a", "b"))
    check_parts(model(**batch), [alone(model, name, name, batch) for name in "ab"])
    expected = [alone(model, n, n, rows_of(batch, r)) for n, r in (("b", [0, 2]), ("a", [1, 3, 4]))]
    check_parts(model(**batch, adapter_names=list("babaa")), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_split(model, batch, wrapped):
    setup = BatchSplit("a", Stack("d", "c"), "a", batch_sizes=[1, 3, 1])
    heads = BatchSplit("a", "c", "a", batch_sizes=[1, 3, 1])
    model.set_active_adapters(Stack(setup) if wrapped else setup)
    assert model.active_head == heads
    parts = [("a", [0]), (Stack("d", "c"), [1, 2, 3]), ("a", [4])]
    expected = [
        alone(model, child, name, rows_of(batch, rows))
        for (child, rows), name in zip(parts, "aca", strict=True)
    ]
    check_parts(model(**batch), expected)
    del batch["labels"]
    assert model(**batch).loss is None
    with pytest.raises(ValueError, match="batch_sizes: expected a batch of 5 rows"):
        model(input_ids=tiny.ids(4))
    # a BatchSplit of heads needs none of adapters
    model.set_active_adapters("d")
    assert model.active_head == heads
    with pytest.raises(ValueError, match="active_head: expected a batch of 5 rows.*got 4"):
        model(input_ids=tiny.ids(4))
    output = model(input_ids=tiny.ids(5), head=BatchSplit("b", "c", batch_sizes=[5, 0]))
    assert [list(own.logits.shape) for own in output] == [[5, 3], [0, 2]]


def test_batch_split_behind_a_parallel(model, batch):
    """The parts are those of each copy of the batch, channel after channel."""
    setup = Stack(Parallel("a", "d"), BatchSplit("b", "c", batch_sizes=[1, 4]))
    model.set_active_adapters(setup)
    parts = [("b", [0]), ("c", [1, 2, 3, 4])]
    expected = [
        alone(model, Stack(channel, child), child, rows_of(batch, rows))
        for channel in "ad"
        for child, rows in parts
    ]
    check_parts(model(**batch), expected)
    with AdapterSetup(setup, head_setup=BatchSplit("b", "c", batch_sizes=[1, 4])):
        check_parts(model(**batch), expected)
    with pytest.raises(ValueError, match="head: expected a batch of 10 rows.*got 5"):
        model(**batch, head=BatchSplit("b", "c", batch_sizes=[2, 8]))


def test_one_head_for_a_batch_split(model, batch):
    """One that was chosen, or the active one where no child has a head of its own."""
    setup = BatchSplit("a", "d", batch_sizes=[2, 3])
    parts = [("a", [0, 1]), ("d", [2, 3, 4])]

    def logits(parts):
        ones = [alone(model, name, "spare", rows_of(batch, rows)).logits for name, rows in parts]
        return torch.cat(ones)

    expected = logits(parts)
    model.set_active_adapters(setup)
    torch.testing.assert_close(model(**batch, head="spare").logits, expected)
    with AdapterSetup(setup, head_setup="spare"):
        torch.testing.assert_close(model(**batch).logits, expected)
    model.active_head = BatchSplit("spare", "spare", batch_sizes=[2, 3])
    torch.testing.assert_close(model(**batch).logits, expected)

    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[2, 3]))
    model.active_head = "spare"
    torch.testing.assert_close(model(**batch).logits, logits([("a", [0, 1]), ("b", [2, 3, 4])]))

    model.delete_head("a")
    model.active_head = "spare"
    with AdapterSetup(setup):
        torch.testing.assert_close(model(**batch).logits, expected)
    model.set_active_adapters(setup)
    torch.testing.assert_close(model(**batch).logits, expected)


def test_head_without_rows_has_no_loss(model, batch):
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[5, 0]))
    output = model(**batch)
    assert output[1].loss is None and output[1].logits.shape == (0, 3)
    torch.testing.assert_close(output.loss, alone(model, "a", "a", batch).loss)


def test_list_of_heads_on_all_rows(model, batch):
    model.set_active_adapters("d")
    model.active_head = ["a", "c"]
    output = model(**batch, output_hidden_states=True)
    assert output.loss is None
    for own, name in zip(output, "ac", strict=True):
        one = alone(model, "d", name, batch)
        torch.testing.assert_close(own.logits, one.logits)
        torch.testing.assert_close(own.loss, one.loss)
        assert len(own.hidden_states) == 3
    assert model(**batch, head="a").logits.shape == (5, 3)
    with pytest.raises(ValueError, match=r"head_name: .*\['a', 'c'\] are active"):
        model.get_labels()
    assert model.get_labels("c") == ["LABEL_0", "LABEL_1"]
    model.delete_head("c")
    assert model.active_head is None


NAMES = {
    "names": (["b", "a", "b", "c", "a"], [("b", "b", [0, 2]), ("a", "a", [1, 4]), ("c", "c", [3])]),
    "stacks": (
        [Stack("d", "c"), "c", Stack("c", "a"), "a", "c"],
        [("c", "c", [0, 1, 4]), ("a", "a", [2, 3])],
    ),
    "one": (["a"], [("a", "a", [0, 1, 2, 3, 4])]),
    "active": (
        ["__base__", FUSE, "a", "d", Split("a", "b", splits=[3, 4])],
        [("spare", "spare", [0, 1, 3, 4]), ("a", "a", [2])],
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NAMES)
def test_rows_by_name(model, batch, case, training):
    """Each row's logits are those of its own setup and head; a head's loss is its rows' mean."""
    names, parts = NAMES[case]
    model.active_head = "spare"
    with torch.set_grad_enabled(training):
        output = model(**batch, adapter_names=names)
    assert isinstance(output, MultiHeadOutput) and len(output) == len(parts)
    losses = []
    for own, (_, head, rows) in zip(output, parts, strict=True):
        assert own.rows.tolist() == rows and own.rows.dtype == torch.int64
        each = []
        for i, row in enumerate(rows):
            name = names[row if len(names) > 1 else 0]
            setup = None if name == "__base__" else name
            one = alone(model, setup, head, rows_of(batch, [row]))
            torch.testing.assert_close(own.logits[i : i + 1], one.logits, rtol=1e-5, atol=2e-6)
            each.append(one.loss)
        torch.testing.assert_close(own.loss, torch.stack(each).mean(), rtol=1e-5, atol=2e-6)
        losses.append(own.loss)
    torch.testing.assert_close(output.loss, sum(losses))


def test_gradients_of_rows(model, batch):
    """One step on a mixed batch: what two steps on its parts would add up to."""
    model.train_adapter(Parallel("a", "b"))
    model.eval()
    found = gradients(model, model(**batch, adapter_names=list("abbab")).loss)
    with AdapterSetup("a"):
        loss = model(**rows_of(batch, [0, 3])).loss
    with AdapterSetup("b"):
        loss = loss + model(**rows_of(batch, [1, 2, 4])).loss
    expected = gradients(model, loss)
    assert found.keys() == expected.keys()
    assert {n.split(".adapters.")[1][0] for n in found if ".adapters." in n} == {"a", "b"}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_by_number(model, batch):
    """The heads are those of the whole table, in its order: they do not depend on the numbers."""
    model.active_head = "spare"
    model.routing(["c", "__base__", "a", "b", Stack("d", "a")])
    ids = model.routing(["b", Stack("d", "a"), "b", "__base__", "a"])
    output = model(**batch, adapter_ids=ids)
    rows = [[], [3], [1, 4], [0, 2]]
    assert [own.rows.tolist() for own in output] == rows
    assert [list(own.logits.shape) for own in output] == [[0, 2], [1, 3], [2, 3], [2, 3]]
    assert output[0].loss is None
    same = model(**batch, adapter_names=["b", Stack("d", "a"), "b", "__base__", "a"])
    assert [own.rows.tolist() for own in same] == [[0, 2], [1, 4], [3]]
    for i, j in ((3, 0), (2, 1), (1, 2)):
        torch.testing.assert_close(output[i].logits, same[j].logits)
    torch.testing.assert_close(output.loss, same.loss)
    # a setup without a head troubles the rows that have it alone
    model.active_head = None
    assert len(model(**batch, adapter_ids=model.routing(list("abcab")))) == 3
    with pytest.raises(
        ValueError, match="active_head: expected one head, for rows with '__base__'"
    ):
        model(**batch, adapter_ids=ids)


def test_rows_of_a_multi_task(model, batch):
    model.active_head = "spare"
    model.set_active_adapters(MultiTask("a", Stack("d", "b"), FUSE))
    assert model.active_head == "spare"
    tasks = torch.tensor([1, 0, 2, 1, 0])
    output = model(**batch, task_ids=tasks)
    assert [own.rows.tolist() for own in output] == [[0, 3], [1, 4], [2]]
    expected = [
        alone(model, Stack("d", "b"), "b", rows_of(batch, [0, 3])),
        alone(model, "a", "a", rows_of(batch, [1, 4])),
        alone(model, FUSE, "spare", rows_of(batch, [2])),
    ]
    check_parts(output, expected)
    model.set_active_adapters(Stack("d", MultiTask("a", "b")))
    named = model(**batch, task_ids=["b", "a", "b", "b", "a"])
    assert [own.rows.tolist() for own in named] == [[0, 2, 3], [1, 4]]
    with AdapterSetup(Stack("d", MultiTask("b", "a"))):
        other = model(**batch, task_ids=[0, 1, 0, 0, 1])
    torch.testing.assert_close(other.logits, named.logits)


def test_multi_task_whose_children_have_no_heads(model, batch):
    """As in adapters: the active head, on all rows."""
    model.delete_head("a")
    model.active_head = "spare"
    model.set_active_adapters(MultiTask("a", "d"))
    output = model(**batch, task_ids=[0, 1, 0, 0, 1])
    assert isinstance(output, SequenceClassifierOutput) and output.logits.shape == (5, 3)
    model.active_head = None
    del batch["labels"]
    assert model(**batch, task_ids=[0, 1, 0, 0, 1]).last_hidden_state.shape == (5, 7, 32)


def test_multi_task_behind_a_parallel(model, batch):
    model.set_active_adapters(Stack(Parallel("c", "d"), MultiTask("a", "b")))
    output = model(**batch, task_ids=torch.tensor([1, 0, 0, 1, 1]))
    assert [own.rows.tolist() for own in output] == [[0, 3, 4, 5, 8, 9], [1, 2, 6, 7]]
    first = alone(model, Stack("c", "b"), "b", rows_of(batch, [0, 3, 4])).logits
    second = alone(model, Stack("d", "b"), "b", rows_of(batch, [0, 3, 4])).logits
    logits = torch.cat([first, second])
    torch.testing.assert_close(output[0].logits, logits, rtol=1e-5, atol=2e-6)


def test_one_head_for_rows(model, batch):
    """`head=`, or a context's, serves all rows, in their own order."""
    names = ["b", "__base__", "a", FUSE, "b"]
    output = model(**batch, adapter_names=names, head="spare")
    assert isinstance(output, SequenceClassifierOutput)
    expected = torch.cat(
        [
            alone(model, None if n == "__base__" else n, "spare", rows_of(batch, [i])).logits
            for i, n in enumerate(names)
        ]
    )
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=2e-6)
    with AdapterSetup("d", head_setup="spare"):
        same = model(**batch, adapter_names=names)
    torch.testing.assert_close(same.logits, output.logits)
    # the heads of a context's own setup are not those of the rows
    with AdapterSetup(Parallel("a", "d")), pytest.raises(ValueError, match="head_setup"):
        model(**batch)
    with AdapterSetup(Parallel("a", "d")):
        assert len(model(**batch, adapter_names=list("abcab"))) == 3


def test_rows_without_heads(model, batch):
    del batch["labels"]
    output = model(**batch, adapter_names=["d", FUSE, "__base__", "d", "d"])
    assert output.last_hidden_state.shape == (5, 7, 32)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    "setup", [Parallel("a", "b"), BatchSplit("a", "b", batch_sizes=[2, 3]), "d"], ids=repr
)
def test_tuples(model, batch, setup, labels):
    """As in adapters, the heads' outputs are tuples; the loss is the sum all the same."""
    if not labels:
        del batch["labels"]
    model.active_head = ["a", "b"]
    model.set_active_adapters(setup)
    whole, parts = model(**batch), model(**batch, return_dict=False)
    assert isinstance(parts, MultiHeadOutput)
    for own, part in zip(whole, parts, strict=True):
        assert isinstance(part, tuple)
        assert part[labels].equal(own.logits)
        if labels:
            assert part[0].equal(own.loss)
    assert (parts.loss is None) == (whole.loss is None)
    if whole.loss is not None:
        assert parts.loss.equal(whole.loss)


def test_tuples_of_rows(model, batch):
    parts = model(**batch, adapter_names=list("abbab"), return_dict=False)
    whole = model(**batch, adapter_names=list("abbab"))
    for own, part in zip(whole, parts, strict=True):
        assert part[0].equal(own.loss) and part[1].equal(own.logits) and part[-1].equal(own.rows)
    assert parts.loss.equal(whole.loss)


@pytest.mark.parametrize(
    ("setup", "heads"),
    [
        (Parallel("a", "b"), ["a", "b"]),
        (Stack("d", Parallel("b", "c")), ["b", "c"]),
        (BatchSplit("c", "b", batch_sizes=[2, 3]), BatchSplit("c", "b", batch_sizes=[2, 3])),
    ],
    ids=repr,
)
@pytest.mark.parametrize("active", ["d", Parallel("c", "a"), None], ids=repr)
def test_context(model, batch, setup, heads, active):
    """A context gives what `set_active_adapters` would, whatever is active."""
    model.set_active_adapters(setup)
    assert model.active_head == heads
    expected = model(**batch)
    model.active_head = "spare"
    model.set_active_adapters(active)
    before = model.active_head
    with AdapterSetup(setup):
        check_parts(model(**batch), expected)
    with AdapterSetup(setup, head_setup=heads):
        check_parts(model(**batch), expected)
    assert model.active_head == before
    with AdapterSetup("a"):
        torch.testing.assert_close(model(**batch).logits, alone(model, "a", "a", batch).logits)


def test_heads_that_stay(model):
    """A setup whose last element has not all its heads leaves the active one alone."""
    model.active_head = "spare"
    for setup in (
        "d", FUSE, Parallel("a", "d"), BatchSplit("d", "a", batch_sizes=1), Average("a", "b"),
        Split("a", "b", splits=[3, 4]), Stack("a", FUSE), Parallel("d", Stack("a", "d")), None,
    ):  # fmt: skip
        model.set_active_adapters(setup)
        assert model.active_head == "spare", setup
    model.set_active_adapters(Stack(Parallel("a", "b"), "c"))
    assert model.active_head == "c"
    model.set_active_adapters(Parallel("b"))
    assert model.active_head == "b"


def test_what_an_active_head_may_be(model):
    model.active_head = "a"
    labels = dict(model.config.id2label)
    for given, kept in (
        (["a", "b"], ["a", "b"]),
        (("b", "b"), ["b", "b"]),
        (["c"], "c"),
        (BatchSplit("a", "b", batch_sizes=2), BatchSplit("a", "b", batch_sizes=2)),
        (Parallel("a", "b"), ["a", "b"]),
        ([], None),
    ):
        model.active_head = given
        assert model.active_head == kept
    model.active_head = "a"
    assert model.config.id2label == labels
    for wrong in (3, ["a", 3], Stack("a", "b"), {"a": 1}):
        with pytest.raises(ValueError, match="active_head: expected a head's name, a list or"):
            model.active_head = wrong
    for wrong in (["a", "d"], BatchSplit("d", "a", batch_sizes=1)):
        with pytest.raises(ValueError, match=r"active_head: expected one of \['a', .*got 'd'"):
            model.active_head = wrong
    assert model.active_head == "a"


BAD_CALLS = {
    "one head for two channels": (
        lambda m, b: (m.set_active_adapters(Parallel("a", "d")), m(**b)),
        r"active_head: expected a list of 2 heads.*Parallel\('a', 'd'\).*got 'spare'",
    ),
    "three heads for two channels": (
        lambda m, b: run_in(AdapterSetup(Parallel("a", "b"), head_setup=["a", "b", "a"]), m, b),
        r"head_setup: expected a list of 2 heads.*got \['a', 'b', 'a'\]",
    ),
    "a Parallel lacks a head": (
        lambda m, b: (
            m.set_active_adapters(Parallel("a", "d")),
            setattr(m, "active_head", None),
            m(**b),
        ),
        r"active_head: expected a head for each child of Parallel\('a', 'd'\).*none for \['d'\]",
    ),
    "a BatchSplit lacks a head": (
        lambda m, b: (
            m.set_active_adapters(BatchSplit("a", "d", batch_sizes=[2, 3])),
            setattr(m, "active_head", "a"),
            m(**b),
        ),
        r"active_head: expected a head for each child of BatchSplit\('a', 'd'.*none for \['d'\]",
    ),
    "a BatchSplit lacks a head and none is active": (
        lambda m, b: (
            m.set_active_adapters(BatchSplit("d", "a", batch_sizes=[2, 3])),
            setattr(m, "active_head", None),
            m(**b),
        ),
        r"active_head: .*none for \['d'\]",
    ),
    "a BatchSplit lacks a head behind a Parallel that had its own": (
        lambda m, b: (
            m.set_active_adapters(Parallel("a", "b")),
            m.set_active_adapters(BatchSplit("a", "d", batch_sizes=[2, 3])),
            m(**b),
        ),
        r"active_head: .*none for \['d'\]",
    ),
    "a Parallel lacks a head behind one that had its own": (
        lambda m, b: (
            m.set_active_adapters(Parallel("a", "b")),
            m.set_active_adapters(Parallel("a", "d")),
            m(**b),
        ),
        r"active_head: expected a head for each child of Parallel\('a', 'd'\).*none for \['d'\]",
    ),
    "a Parallel lacks a head behind a name that had its own": (
        lambda m, b: (
            m.set_active_adapters("a"),
            m.set_active_adapters(Parallel("a", "d")),
            m(**b),
        ),
        r"active_head: expected a head for each child of Parallel\('a', 'd'\).*none for \['d'\]",
    ),
    "a Parallel has no heads behind one that had its own": (
        lambda m, b: (
            m.set_active_adapters(Parallel("a", "b")),
            m.set_active_adapters(Parallel("d", Stack("a", "d"))),
            m(**b),
        ),
        r"active_head: .*none for \['d', 'd'\]",
    ),
    "a BatchSplit lacks a head behind one that had its own": (
        lambda m, b: (
            m.set_active_adapters(BatchSplit("a", "b", batch_sizes=[2, 3])),
            m.set_active_adapters(BatchSplit("a", "d", batch_sizes=[2, 3])),
            m(**b),
        ),
        r"active_head: .*none for \['d'\]",
    ),
    "a context's BatchSplit has no heads, the active setup's children have": (
        lambda m, b: (
            m.set_active_adapters(Parallel("a", "b")),
            run_in(AdapterSetup(BatchSplit("d", Stack("a", "d"), batch_sizes=[2, 3])), m, b),
        ),
        r"head_setup: .*none for \['d', 'd'\]",
    ),
    "a context's Parallel lacks a head": (
        lambda m, b: run_in(AdapterSetup(Parallel("a", "d")), m, b),
        r"head_setup: expected a head for each child of Parallel\('a', 'd'\).*none for \['d'\]",
    ),
    "a context's BatchSplit lacks a head": (
        lambda m, b: run_in(AdapterSetup(BatchSplit("a", "d", batch_sizes=[2, 3])), m, b),
        r"head_setup: .*none for \['d'\]",
    ),
    "a context's head does not exist": (
        lambda m, b: run_in(AdapterSetup("a", head_setup="zzz"), m, b),
        r"head_setup: expected one of .*'zzz'",
    ),
    "labels of another size": (
        lambda m, b: m(**(b | {"labels": b["labels"][:4]}), adapter_names=list("abcab")),
        r"labels: expected \[5, \.\.\.\]; got \[4\]",
    ),
    "labels without rows": (
        lambda m, b: m(**(b | {"labels": torch.tensor(1)}), adapter_names=list("abcab")),
        r"labels: expected \[5, \.\.\.\]; got \[\]",
    ),
    "too few names": (
        lambda m, b: m(**b, adapter_names=list("abca")),
        "adapter_names: expected 5, one for each row, or 1; got 4",
    ),
    "a number out of range": (
        lambda m, b: (m.routing(["a"]), m(**b, adapter_ids=torch.tensor([0, 0, 1, 0, 0]))),
        "adapter_ids: expected numbers from 0 to 0; got 1",
    ),
    "several active heads for a row without its own": (
        lambda m, b: (setattr(m, "active_head", ["a", "b"]), m(**b, adapter_names=list("abdab"))),
        r"active_head: expected one head, for rows with Stack\('d'\); got \['a', 'b'\]",
    ),
    "an unknown head": (lambda m, b: m(**b, head="zzz"), r"head: expected one of \['a', .*'zzz'"),
}


def run_in(context, model, batch):
    with context:
        return model(**batch)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(model, batch, case):
    """What is wrong with the heads shows before the base model runs."""
    call, message = BAD_CALLS[case]
    model.active_head = "spare"
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("the base model ran"))
    with pytest.raises(ValueError, match=message):
        call(model, batch)


@pytest.mark.parametrize(
    ("setup", "names", "rows"),
    [
        (Parallel("a", "b"), None, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (BatchSplit("a", "b", batch_sizes=[2, 3]), None, [[0, 1], [2, 3, 4]]),
        (None, list("abbab"), [[0, 3], [1, 2, 4]]),
    ],
    ids=["Parallel", "BatchSplit", "rows"],
)
def test_heads_get_their_rows_of_the_mask(model, batch, setup, names, rows, monkeypatch):
    seen = []
    forward = type(model.heads["a"]).forward

    def watched(self, outputs, attention_mask=None, **kwargs):
        seen.append(attention_mask)
        return forward(self, outputs, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model.heads["a"]), "forward", watched)
    model.set_active_adapters(setup)
    model(**batch, adapter_names=names)
    for mask, own in zip(seen, rows, strict=True):
        assert mask.equal(batch["attention_mask"][own])
