"""Threads with different setups on one model at once give what each alone gives."""

import copy
import sys
import threading

import pytest
import tiny
import torch
from row_models import BASE, ENTRIES, LENGTH, alone, make, setup_of

from fastfusion import AdapterSetup
from fastfusion.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack

ROUNDS = 4


@pytest.fixture(autouse=True)
def many_switches(set_threads):
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    set_threads(1)
    yield
    sys.setswitchinterval(before)


def at_once(works) -> list[list]:
    """The results of each work, done several times by a thread of its own; all start at once."""
    results: list[list] = [[] for _ in works]
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def do(i: int) -> None:
        try:
            start.wait()
            for _ in range(ROUNDS):
                results[i].append(works[i]())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=do, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


SETUPS = [
    "a",
    Stack("a", Fuse("a", "b")),
    BatchSplit("a", "d", batch_sizes=[1, 2]),
    Parallel("a", "c"),
    Split("a", "b", splits=[3, 4]),
    Average("a", "b", Stack("d", "a")),
    MultiTask("a", "d"),
    None,
]
NAMES = [
    ["a", "b", "c"],
    ["a", BASE, Fuse("a", "b")],
    [Fuse("a", "b")],
    ["d", "a", "d"],
    [BASE] * 3,
    [Split("a", "b", splits=[3, 4]), "g", "b"],
    [Average("a", "b"), Stack("a", "b"), "missing in layer 0"],
    ["b", "a", "c"],
]


def works_of(model, kind):
    """8 forwards with inputs of their own."""
    batches = [tiny.ids(3, LENGTH) for _ in range(8)]
    if kind == "ids":
        numbers = [model.routing(names * (3 // len(names))) for names in NAMES]

    def work(i: int):
        def run() -> torch.Tensor:
            with torch.no_grad():
                if kind == "names" or (kind == "mixed" and i % 2):
                    return model(batches[i], adapter_names=NAMES[i])[0]
                if kind == "ids":
                    return model(batches[i], adapter_ids=numbers[i])[0]
                tasks = {"task_ids": [1, 0, 1]} if isinstance(SETUPS[i], MultiTask) else {}
                with AdapterSetup(SETUPS[i]):
                    return model(batches[i], **tasks)[0]

        return run

    return [work(i) for i in range(8)]


@pytest.mark.parametrize("fresh", [False, True], ids=["", "first plans at once"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", ["setups", "names", "ids", "mixed"])
def test_8_threads(kind, backend, fresh):
    model = make(backend=backend)
    works = works_of(model, kind)
    expected = [work() for work in works]
    if fresh:
        # every thread makes its plan and its packs while the others do
        model.model_adapters.update_plans()
    for own, results in zip(expected, at_once(works), strict=True):
        assert len(results) == ROUNDS
        assert all(torch.equal(result, own) for result in results)


def test_one_plan_for_all_threads():
    """The same setups, other rows: the plan is shared, the row numbers are not."""
    model = make(dtype=torch.float64)
    entries = ["a", BASE, Fuse("a", "b"), Split("a", "b", splits=[3, 4])]
    batches = [(tiny.ids(4, LENGTH), [entries[i] for i in torch.randperm(4)]) for _ in range(8)]
    with torch.no_grad():
        expected = [alone(model, names, ids) for ids, names in batches]

    def work(ids, names):
        def run():
            with torch.no_grad():
                return model(ids, adapter_names=names)[0]

        return run

    for own, results in zip(expected, at_once([work(*b) for b in batches]), strict=True):
        for result in results:
            torch.testing.assert_close(result, own, rtol=1e-9, atol=1e-9)


def test_more_setups_than_plans_are_kept():
    """Plans that one thread pushes out while another runs them."""
    model = make(dtype=torch.float64)
    entries = ENTRIES[:8]
    ids = tiny.ids(1, LENGTH)
    with torch.no_grad():
        expected = [alone(model, [entry], ids) for entry in ENTRIES]

    def work(offset):
        def run():
            with torch.no_grad():
                order = [(offset + i) % len(ENTRIES) for i in range(len(ENTRIES))]
                found = {}
                for i in order:
                    with AdapterSetup(setup_of(ENTRIES[i])):
                        found[i] = model(ids)[0]
                return found

        return run

    for results in at_once([work(i) for i in range(len(entries))]):
        for found in results:
            for i, result in found.items():
                torch.testing.assert_close(result, expected[i], rtol=1e-9, atol=1e-9)


def test_gradients_in_threads():
    """Each thread's loss has the gradients of its own setup."""
    model = make(dtype=torch.float64)
    batches = [tiny.ids(3, LENGTH) for _ in range(8)]
    parameters = dict(model.named_parameters())

    def work(i):
        def run():
            out = model(batches[i], adapter_names=NAMES[i])[0]
            grads = torch.autograd.grad(out.square().sum(), parameters.values(), allow_unused=True)
            return dict(zip(parameters, grads, strict=True))

        return run

    works = [work(i) for i in range(8)]
    expected = [run() for run in works]
    for own, results in zip(expected, at_once(works), strict=True):
        for found in results:
            for name, grad in own.items():
                assert (grad is None) == (found[name] is None), name
                if grad is not None:
                    torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-9)


def test_attentions_in_threads():
    """What a forward reports is its own."""
    model = make(dtype=torch.float64)
    batches = [tiny.ids(i + 1, LENGTH) for i in range(8)]

    def work(i):
        def run():
            with torch.no_grad():
                asked = {"output_adapter_fusion_attentions": i % 2 == 0}
                output = model(batches[i], adapter_names=[Fuse("a", "b")], **asked)
            return output.get("adapter_fusion_attentions")

        return run

    for i, results in enumerate(at_once([work(i) for i in range(8)])):
        for found in results:
            if i % 2:
                assert found is None
            else:
                assert found["a,b"][1]["output_adapter"].shape == (i + 1, LENGTH, 2)


def test_a_table_that_is_reset_meanwhile():
    """A forward has the table that it began with, whole."""
    model = make(dtype=torch.float64)
    entries = ["a", Stack("a", "b"), Fuse("a", "b")]
    batch = tiny.ids(3, LENGTH)
    with torch.no_grad():
        expected = alone(model, entries, batch)
    is_over = threading.Event()

    def reset():
        while not is_over.is_set():
            model.reset_routing()
            model.routing(entries)

    thread = threading.Thread(target=reset)
    thread.start()
    try:
        ran = 0
        while ran < 30 and thread.is_alive():
            try:
                with torch.no_grad():
                    actual = model(batch, adapter_ids=[0, 1, 2])[0]
            except ValueError as error:
                # it began with the empty table
                assert "adapter_ids: expected numbers" in str(error)
                continue
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
            ran += 1
        assert ran == 30
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("kind", ["routing", "names", "context"])
def test_an_adapter_that_is_replaced_meanwhile(kind, monkeypatch):
    """What another thread lowers from the old modules is not used behind the change."""
    model, batch = make(dtype=torch.float64), tiny.ids(1, LENGTH)
    adapters = model.model_adapters
    layer = adapters.layers[-1]
    has_begun, may_end = threading.Event(), threading.Event()
    lower = layer.lower

    def slow_lower(*args):
        plan = lower(*args)
        if threading.current_thread() is thread:
            has_begun.set()
            may_end.wait(5)
        return plan

    def forward():
        with torch.no_grad():
            if kind == "routing":
                return model(batch, adapter_ids=model.routing(["a"]))[0]
            if kind == "names":
                return model(batch, adapter_names=["a"])[0]
            with AdapterSetup("a"):
                return model(batch)[0]

    thread = threading.Thread(target=forward)
    monkeypatch.setattr(layer, "lower", slow_lower)
    update_plans = adapters.update_plans

    def late_update():
        # the modules are the new ones by now
        threading.Timer(0.1, may_end.set).start()
        update_plans()

    monkeypatch.setattr(adapters, "update_plans", late_update)
    thread.start()
    assert has_begun.wait(5)
    model.add_adapter("a", "double_seq_bn[reduction_factor=2]", overwrite_ok=True)
    thread.join()
    tiny.randomize(model)
    model.eval()
    actual = forward()
    with torch.no_grad():
        model.set_active_adapters("a")
        torch.testing.assert_close(actual, model(batch)[0], rtol=1e-9, atol=1e-9)


def test_a_stale_table_is_lowered_once(monkeypatch):
    model, batch = make(), tiny.ids(1, LENGTH)
    numbers = model.routing(["a"])
    model.add_adapter("new", "double_seq_bn")
    lowered = []
    lower = model.model_adapters.lower
    monkeypatch.setattr(
        model.model_adapters, "lower", lambda *args: (lowered.append(args), lower(*args))[1]
    )
    at_once([lambda: model(batch, adapter_ids=numbers)] * 8)
    assert len(lowered) == 1


def test_a_copy_has_a_lock_of_its_own():
    model = make()
    other = copy.deepcopy(model)
    with other.model_adapters._lock:
        at_once([lambda: model.routing(["a"])])
    assert other.routing(["b", "a"]).tolist() == [0, 1]
