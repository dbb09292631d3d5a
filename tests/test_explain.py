"""What `adapter_plan().explain()` says of a setup."""

import tiny
import torch
from test_rows import make

from fastfusion import AdapterSetup
from fastfusion.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from fastfusion.lanes import GroupedCall, LoneCall


def lines(plan) -> list[str]:
    return plan.explain().splitlines()


def test_one_setup_for_all_rows():
    model = make()
    model.set_active_adapters(Stack("a", Fuse("a", "b")))
    # 32 hidden columns: 2 products of 8 columns; 3 of 8 + 4
    assert lines(model.adapter_plan()) == [
        "setup: Stack('a', Fuse('a', 'b'))",
        "layers 0-1, mh_adapter; layers 0-1, output_adapter: one lane",
        "  all rows and tokens: a [8 columns, 512 multiply-adds] -> attention 'a,b' over a, b "
        "[12 columns, 1.15 k multiply-adds]",
    ]


def test_the_cost_of_a_fuse_over_stacks():
    model = make(num_hidden_layers=1)
    model.set_active_adapters(Fuse(Stack("d", "a"), "b"))
    # 3 products of 8 + 4 columns and 2 of 16
    assert lines(model.adapter_plan())[-1] == (
        "  all rows and tokens: attention 'a,b' over d -> a, b [28 columns, 2.18 k multiply-adds]"
    )


def test_absent_adapters_and_dropped_layers():
    model = make(num_hidden_layers=3)
    model.set_active_adapters("missing in layer 0", skip_layers=[2])
    assert lines(model.adapter_plan()) == [
        "setup: Stack('missing in layer 0')",
        "layers 0, 2, mh_adapter; layers 0, 2, output_adapter: no adapters",
        "layers 1, mh_adapter; layers 1, output_adapter: one lane",
        "  all rows and tokens: missing in layer 0 [4 columns, 256 multiply-adds]",
    ]


def test_cuts():
    model = make(num_hidden_layers=1)
    with AdapterSetup(
        Stack(BatchSplit("a", "b", batch_sizes=[1, 2]), Split("d", "a", splits=[3, 4]))
    ):
        found = lines(model.adapter_plan())
    assert found[1:] == [
        "layers 0, mh_adapter; layers 0, output_adapter: 4 lanes in 2 calls",
        "  rows 0 to 0, tokens 0 to 2: a [8 columns, 512 multiply-adds] -> d [16 columns, "
        "1.02 k multiply-adds]",
        "  rows 0 to 0, tokens 3 to 6: a [8 columns, 512 multiply-adds] -> a [8 columns, "
        "512 multiply-adds]",
        "  rows 1 to 2, tokens 0 to 2: b [4 columns, 256 multiply-adds] -> d [16 columns, "
        "1.02 k multiply-adds]",
        "  rows 1 to 2, tokens 3 to 6: b [4 columns, 256 multiply-adds] -> a [8 columns, "
        "512 multiply-adds]",
    ]


def test_channels():
    model = make(num_hidden_layers=1)
    model.set_active_adapters(Parallel("a", Stack("b", "g")))
    assert lines(model.adapter_plan())[2:] == [
        "  copy 0 of the batch: a [8 columns, 512 multiply-adds]",
        "  copy 1 of the batch: b [4 columns, 256 multiply-adds] -> g [4 columns, "
        "256 multiply-adds] (in a call of its own: ln_before)",
    ]


def test_rows():
    """Sequential and parallel adapters share a call; an Average over blocks has its own."""
    model = make(num_hidden_layers=1)
    entries = ["a", "c", "__base__", Average(Stack("a", "b"), "d", weights=[1, 3]), Stack("d", "a")]
    plan = model.adapter_plan(entries)
    assert lines(plan)[1:] == [
        "layers 0, mh_adapter: 5 lanes in 3 calls",
        "  rows numbered 0: average of [a [8 columns, 512 multiply-adds] -> b [4 columns, "
        "256 multiply-adds]; d [16 columns, 1.02 k multiply-adds]] (in a call of its own: an "
        "Average over blocks)",
        "  rows numbered 1: as without adapters",
        "  rows numbered 2: a [8 columns, 512 multiply-adds]",
        "  rows numbered 3: as without adapters",
        "  rows numbered 4: d [16 columns, 1.02 k multiply-adds] -> a [8 columns, "
        "512 multiply-adds]",
        "layers 0, output_adapter: 5 lanes in 3 calls",
        *[line.replace("3: as without adapters", "3: c [4 columns, 256 multiply-adds]")
          for line in lines(plan)[2:7]],
    ]  # fmt: skip
    with AdapterSetup("a", skip_layers=[0]):
        assert lines(model.adapter_plan(entries))[1].endswith(": no adapters")


def test_calls_that_are_counted_are_made(monkeypatch):
    """A stage of its own runs early, so that what follows it joins the other lanes."""
    model = make(num_hidden_layers=1)
    entries = [Stack("g", "a"), "b", Stack("a", "g", "d"), "__base__"]
    # a and b; g; g; d and a
    assert "4 lanes in 4 calls" in model.adapter_plan(entries).explain()
    made = []
    for kind in (LoneCall, GroupedCall):

        def run(call, *args, run=kind.run):
            made.append(type(call))
            return run(call, *args)

        monkeypatch.setattr(kind, "run", run)
    with torch.no_grad():
        model(tiny.ids(4), adapter_names=entries)
    assert made == [GroupedCall, LoneCall, LoneCall, GroupedCall] * 2
