"""Blocks: the nesting table, parsing, equality, plain data; and what they are lowered to."""

import pytest

from fastfusion.composition import (
    AdapterCompositionBlock,
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
    as_fuse,
    fusion_name,
    parse_composition,
)
from fastfusion.lowering import Branch, Stage, lower

ACCEPTED = [
    Stack("a"),
    Stack("a", "b"),
    Fuse("a", "b"),
    Stack("a", Fuse("b", "c")),
    Stack(Fuse("b", "c"), "a", Fuse("a", "b")),
    Fuse(Stack("a", "b"), "c"),
    Stack("a", Fuse("b", Stack("c", "d"))),
    Fuse("a", "b", name="named"),
    Split("a", "b", splits=[3, 0]),
    Split("a", "b", split_index=3),
    Split("a", Split("b", Stack("c", "d"), splits=[1, 2]), splits=[4, 3]),
    BatchSplit("a", BatchSplit("b", "c", batch_sizes=[1, 0]), batch_sizes=[2, 1]),
    Parallel("a", Stack("b", "c"), Average("d", Stack("e", "a"))),
    Average("a", Split("b", "c", splits=2), weights=[1.0, 3.0]),
    Average("a", "b", weights=[2.0, 2.0], normalize_weights=False),
    Average("a", "b", peer_scaling=True),
    MultiTask("d", Fuse("a", "b"), Average("a", Stack("b", "c"))),
    Stack("a", Parallel("b", "c"), MultiTask("d", Stack("a", "b")), "e"),
]
BLOCKS = (Stack, Fuse, Split, BatchSplit, Parallel, MultiTask, Average)


@pytest.mark.parametrize("block", ACCEPTED, ids=repr)
def test_accepted(block):
    assert parse_composition(block) is block
    assert AdapterCompositionBlock.from_dict(block.to_dict()) == block
    assert eval(repr(block), {kind.__name__: kind for kind in BLOCKS}) == block
    assert hash(block) == hash(AdapterCompositionBlock.from_dict(block.to_dict()))


def test_what_parsing_takes():
    assert parse_composition("a") == Stack("a")
    assert parse_composition(None) is None and parse_composition([]) is None
    with pytest.warns(FutureWarning, match="lists"):
        assert parse_composition(["a", ["b", "c"]]) == Stack("a", Fuse("b", "c"))
    with pytest.warns(FutureWarning):
        assert parse_composition(["a", ["b", ["c", "d"]]]) == Stack("a", Fuse("b", Stack("c", "d")))
    with pytest.warns(FutureWarning):
        assert parse_composition(("a", Fuse("b", "c"))) == Stack("a", Fuse("b", "c"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fuse(), "none"),
        (lambda: Fuse(Fuse("a", "b"), "c"), "Fuse: expected children of type str, Stack"),
        (lambda: Stack(Stack("a"), "b"), "Stack: expected children of type str, Fuse"),
        (lambda: Stack("a", 3), "int"),
        (lambda: Stack("a", ""), "empty"),
        (lambda: Parallel(Parallel("a"), "b"), "Parallel: expected children of type str, Stack"),
        (lambda: MultiTask("a", Split("b", splits=1)), "MultiTask: expected children"),
        (lambda: Average("a", Average("b")), "Average: expected children"),
        (lambda: Average("a", "b", weights=[1]), "weights: expected 2"),
        (lambda: Average("a", "b", weights=["x", "y"]), "weights: expected 2.*got .'x'"),
        (lambda: Average("a", "b", weights=2.0), "weights: expected 2.*got 2.0"),
        (lambda: BatchSplit("a", "b", batch_sizes=None), "batch_sizes: expected 2.*got None"),
        (lambda: BatchSplit("a", "b", batch_sizes=2.0), "batch_sizes: expected 2.*got 2.0"),
        (lambda: Average("a", weights=[float("nan")]), "weights: expected 1 finite"),
        (lambda: Average("a", "b", weights=[1, -1]), "weights: expected a sum other than 0"),
        (lambda: Split("a", "b"), "Split: expected either splits or split_index"),
        (lambda: Split("a", "b", splits=1, split_index=1), "Split: expected either"),
        (lambda: Split("a", "b", splits=[1]), "splits: expected 2 sizes"),
        (lambda: Split("a", "b", splits=[1, -1]), "splits: expected 2 sizes"),
        (lambda: Split("a", split_index=1), "split_index: expected two children"),
        (lambda: Split("a", "b", split_index=-1), "split_index: expected"),
        (lambda: BatchSplit("a", "b", batch_sizes=[1.0, 2.0]), "batch_sizes: expected 2 sizes"),
        (lambda: BatchSplit("a", "b", batch_sizes=[True, 2]), "batch_sizes: expected 2 sizes"),
        (lambda: parse_composition(Stack(Split(Average("a"), splits=1))), "below two blocks"),
        (
            lambda: parse_composition(Split(Split("a", splits=2), "b", splits=[3, 1])),
            "splits: expected a sum of 3",
        ),
        (lambda: parse_composition(Fuse(Stack("a", Fuse("b", "c")), "d")), "names only"),
        (lambda: parse_composition(7), "setup"),
        (lambda: AdapterCompositionBlock.from_dict({"type": "Maze", "children": []}), "Maze"),
        *(
            (lambda data=data: AdapterCompositionBlock.from_dict(data), "^data: expected .*; got ")
            for data in (
                {},
                None,
                "a",
                ["a"],
                {"type": "Stack"},
                {"children": []},
                {"type": ["Stack"], "children": []},
                {"type": "Stack", "children": "ab"},
                {"type": "Stack", "children": ["a"]},
                {"type": "Average", "children": [], "kwargs": [1]},
            )
        ),
        *(
            (
                lambda names=names: AdapterCompositionBlock.from_dict(
                    {"type": "single", "children": names}
                ),
                "^children: expected one name",
            )
            for names in ([], [1], ["a", "b"])
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equality():
    """adapters 1.3.0 takes Stack("a") for Stack("a", "b"), and names for nothing."""
    assert Stack("a") != Stack("a", "b") and Stack("a", "b") != Stack("b", "a")
    assert Stack("a", "b") != Fuse("a", "b")
    assert Fuse("a", "b") != Fuse("a", "b", name="x")
    assert Fuse("a", Stack("b", "c")) == Fuse("a", Stack("b", "c"))


def test_walking():
    block = Stack("a", Fuse(Stack("b", "c"), "d"), "e")
    assert block.first() == "a" and block.last() == "e" and len(block) == 3
    assert block[1].first() == "b" and block[1].last() == "d"
    assert block.flatten() == set("abcde")
    assert block[1].name == "c,d" and Fuse("a", name="n").name == "n"
    assert block[1].adapter_names == ["c", "d"]
    assert as_fuse("c,d") == as_fuse(("c", "d")) == Fuse("c", "d")
    assert fusion_name(block[1]) == fusion_name("c,d") == fusion_name(["c", "d"]) == "c,d"


def everywhere(_):
    return True


def stages_of(setup, present=everywhere):
    plan = lower(setup, present)
    (lane,) = plan.lanes
    return tuple(plan.stages[i][1] for i in lane.stages)


def test_lowering():
    assert stages_of(Stack("a", Fuse("b", Stack("c", "d")), "e")) == (
        Stage((Branch("a"),), pre=("a",)),
        Stage((Branch("b"), Branch("d", before=("c",))), fusion="b,d", pre=("d",)),
        Stage((Branch("e"),), pre=("e",)),
    )
    assert stages_of(Fuse("a", "b", name="n")) == (
        Stage((Branch("a"), Branch("b")), fusion="n", pre=("b",)),
    )
    assert stages_of(None) == ()


def test_lowering_leaves_out_what_is_absent():
    present = {"a", "c", "d"}.__contains__
    assert stages_of(Stack("a", "b"), present) == (Stage((Branch("a"),), pre=("a",)),)
    assert stages_of(Fuse("a", "b", "c"), present) == (
        Stage((Branch("a"), Branch("c")), fusion="a,b,c", pre=("c",)),
    )
    # a child Stack whose last adapter is absent ends with the one before it
    assert stages_of(Fuse(Stack("a", "b"), Stack("d", "c")), present) == (
        Stage((Branch("a", before=()), Branch("c", before=("d",))), fusion="b,c", pre=("c",)),
    )
    assert stages_of(Stack("b", Fuse("b", Stack("e"))), present) == ()
