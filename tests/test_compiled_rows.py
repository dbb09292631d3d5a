"""Active setups and rows with setups of their own in compiled graphs."""

import pytest
import tiny
import torch
from row_models import ENTRIES, GROUPED, LENGTH, add_adapters, close, make
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertConfig

from fastfusion import AutoAdapterModel
from fastfusion.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from fastfusion.lanes import LaneTable

COMPILED = {
    "single": "a",
    "Stack": Stack("a", "b"),
    "Fuse": Fuse("a", "b"),
    "Fuse over a Stack": Fuse(Stack("d", "a"), "b"),
    "Split": Split("a", "b", splits=[3, 4]),
    "Split, open": Split("a", "b", split_index=2),
    "Split, one by one": Split("g", "a", splits=[3, 4]),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "Parallel": Parallel("a", "b"),
    "Average": Average("a", "b"),
    "Average over a Stack": Average(Stack("a", "b"), "d"),
    "MultiTask": MultiTask("a", Stack("b", "a")),
    "MultiTask, one by one": MultiTask("a", "c"),
}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The models are so small that threads cost more than they bring."""
    set_threads(1)


def compiled_gives_the_same(model, calls, recorded, backend="aot_eager"):
    """One graph without a break for all calls; where recorded, with the same gradients."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(recorded):
        for ids, arguments in calls:
            results = []
            for forward in (model, compiled):
                model.zero_grad()
                out = forward(ids, **arguments)[0]
                if recorded:
                    out.square().sum().backward()
                grads = {
                    n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
                }
                results.append((out.detach(), grads))
            (expected, truth), (actual, grads) = results
            close(actual, expected)
            # a compiled graph gives zeros to what no gradient reaches, such as the pooler
            assert grads.keys() >= truth.keys()
            assert not any(grad.any() for name, grad in grads.items() if name not in truth)
            for name, grad in truth.items():
                # sums over rows and tokens
                bound = 1e-4 * max(1.0, grad.abs().max().item())
                torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=bound, msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks(name, recorded):
    model = make(num_hidden_layers=1)
    model.set_active_adapters(COMPILED[name])
    tasks = [[0, 1, 1, 0], [1, 1, 1, 1]]
    is_task = isinstance(COMPILED[name], MultiTask)
    calls = [(tiny.ids(4, LENGTH), {"task_ids": torch.tensor(t)} if is_task else {}) for t in tasks]
    compiled_gives_the_same(model, calls, recorded)


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
def test_compiled_rows_with_a_head(recorded):
    """One head for all rows: the outputs' sizes do not depend on the numbers."""
    torch.manual_seed(1)
    config = BertConfig(**tiny.SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoAdapterModel.from_config(config)
    add_adapters(model)
    model.add_classification_head("h", num_labels=3)
    model.eval()
    numbers = model.routing(ENTRIES)
    ids = tiny.ids(len(ENTRIES), LENGTH)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(recorded):
        for own in (numbers, numbers.flip(0)):
            (actual,), (expected,) = (m(ids, adapter_ids=own) for m in (compiled, model))
            close(actual.logits.detach(), expected.logits.detach())
            assert torch.equal(actual.rows, torch.arange(len(ENTRIES)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("entries", [GROUPED, ENTRIES], ids=["one call", "calls of their own"])
def test_compiled_rows(entries, backend, recorded):
    """Other numbers of the same shape run the same graph."""
    model = make(num_hidden_layers=1)
    numbers = model.routing(entries)
    ids = tiny.ids(len(entries), LENGTH)
    orders = [numbers, numbers.flip(0), numbers[torch.randint(len(numbers), (len(numbers),))]]
    calls = [(ids, {"adapter_ids": own}) for own in orders]
    compiled_gives_the_same(model, calls, recorded, backend)


@pytest.mark.parametrize("setup", ["BatchSplit", "Split", "MultiTask"])
def test_a_compiled_graph_makes_nothing_on_the_cpu(setup):
    """A GPU would wait for the copy, in every call; the meta device stands in for one."""
    # transformers 4.57 looks for padding in ids and masks
    free = {"pad_token_id": None, "_attn_implementation": "eager"}
    model = make(num_hidden_layers=1, **free).to("meta")
    model.set_active_adapters(COMPILED[setup])
    ids = tiny.ids(4, LENGTH).to("meta")
    tasks = {"task_ids": torch.zeros(4, dtype=torch.int64, device="meta")}
    kwargs = tasks if setup == "MultiTask" else {}
    found = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                found.append(node.format_node())
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        model(ids, **kwargs)
        torch.compile(model, fullgraph=True, backend=backend)(ids, **kwargs)
    assert not found


def test_a_compiled_graph_keeps_nothing_on_a_device():
    """A table that a graph moved there would lie in its memory; the next call would trace anew."""
    table = LaneTable([3, 1, 2])
    counter = CompileCounterWithBackend("eager")
    at = torch.compile(table.at, fullgraph=True, backend=counter)
    for _ in range(2):
        assert at(torch.zeros(4, dtype=torch.int64, device="meta")).device.type == "meta"
    assert counter.frame_count == 1
    assert table.at(torch.tensor([1, 0])).tolist() == [1, 3]
