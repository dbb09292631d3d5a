"""Composition blocks: how hidden states flow through the adapters of a model.

Which block may stand in which is the table `_ALLOWED_CHILDREN`.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

Setup = Union[str, "AdapterCompositionBlock"]


class AdapterCompositionBlock:
    """A node of a composition tree: its children are adapter names or further blocks.

    Blocks are immutable and compare by type, children, their order and every parameter.

    Args:
        children: adapter names or blocks, at least one.

    Raises:
        ValueError: no children, or a child that is neither a name nor a block allowed here.
    """

    def __init__(self, *children: Setup):
        kind = type(self).__name__
        if not children:
            raise ValueError(f"{kind}: expected one or more adapters or blocks; got none")
        for child in children:
            if isinstance(child, str):
                if not child:
                    raise ValueError(f"{kind}: expected adapter names; got an empty string")
            elif not isinstance(child, _ALLOWED_CHILDREN[type(self)]):
                allowed = ["str", *(block.__name__ for block in _ALLOWED_CHILDREN[type(self)])]
                raise ValueError(
                    f"{kind}: expected children of type {', '.join(allowed)}; "
                    f"got {type(child).__name__} {child!r}"
                )
        self.children = tuple(children)

    @property
    def parameters(self) -> dict[str, Any]:
        """The block's keyword arguments."""
        return {}

    def __getitem__(self, index: int) -> Setup:
        return self.children[index]

    def __iter__(self) -> Iterator[Setup]:
        return iter(self.children)

    def __len__(self) -> int:
        return len(self.children)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self) -> tuple:
        return self.children, repr(sorted(self.parameters.items()))

    def __repr__(self) -> str:
        arguments = [repr(child) for child in self.children]
        arguments += [f"{k}={v!r}" for k, v in self.parameters.items() if v is not None]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def first(self) -> str:
        """The name of the first adapter, through nested blocks."""
        child = self.children[0]
        return child if isinstance(child, str) else child.first()

    def last(self) -> str:
        """The name of the last adapter, through nested blocks."""
        child = self.children[-1]
        return child if isinstance(child, str) else child.last()

    @property
    def parallel_channels(self) -> int:
        """How many copies of the batch leave the block."""
        return max(1 if isinstance(child, str) else child.parallel_channels for child in self)

    def flatten(self) -> set[str]:
        """The names of all adapters in the tree."""
        names = set()
        for child in self.children:
            names |= {child} if isinstance(child, str) else child.flatten()
        return names

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain data, in the format of `adapters`' adapter_setup.json."""
        children = [
            {"type": "single", "children": [child]} if isinstance(child, str) else child.to_dict()
            for child in self.children
        ]
        data = {"type": type(self).__name__, "children": children}
        if given := {k: v for k, v in self.parameters.items() if v is not None}:
            data["kwargs"] = given
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Setup:
        """The tree that `to_dict` wrote, here or in `adapters`.

        Args:
            data: what it returned, or a part of it.

        Raises:
            ValueError: something else, an unknown block type, or arguments that the block does not
                take.
        """
        types = {"type": str, "children": list, "kwargs": dict}
        given = {"kwargs": {}, **data} if isinstance(data, dict) else {}
        if not all(isinstance(given.get(key), kind) for key, kind in types.items()):
            raise ValueError(
                "data: expected a dictionary with a string 'type', a list 'children' and, if any, "
                f"a dictionary 'kwargs'; got {data!r}"
            )
        children = data["children"]
        if data["type"] == "single":
            if len(children) != 1 or not isinstance(children[0], str):
                raise ValueError(f"children: expected one name in a single; got {children!r}")
            return children[0]
        for block in _ALLOWED_CHILDREN:
            if block.__name__ == data["type"]:
                return block._from_data([cls.from_dict(child) for child in children], data)
        known = ", ".join(block.__name__ for block in _ALLOWED_CHILDREN)
        raise ValueError(f"type: expected single or one of {known}; got {data['type']!r}")

    @classmethod
    def _from_data(cls, children: list[Setup], data: dict[str, Any]) -> "AdapterCompositionBlock":
        try:
            return cls(*children, **data.get("kwargs", {}))
        except TypeError as error:
            raise ValueError(f"kwargs: {error}") from None


class Stack(AdapterCompositionBlock):
    """One child after the other: each reads what the one before it wrote."""


class Fuse(AdapterCompositionBlock):
    """AdapterFusion over the children (Pfeiffer et al. 2021).

    Args:
        children: adapter names or Stacks.
        name: the fusion layer's name; by default the names of the children's last adapters, joined
            by commas.
    """

    def __init__(self, *children: Setup, name: str | None = None):
        super().__init__(*children)
        self._name = name

    @property
    def parameters(self) -> dict[str, Any]:
        """The fusion's name, where it has one of its own."""
        return {"name": self._name}

    @property
    def name(self) -> str:
        """The fusion layer's name."""
        return ",".join(self.adapter_names) if self._name is None else self._name

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that are fused: the last one of each child."""
        return [child if isinstance(child, str) else child.last() for child in self]


def _sizes(kind: str, argument: str, sizes: Sequence[int] | int, count: int) -> list[int]:
    """One size for each child: a single number stands for all of them."""
    listed = [sizes] * count if isinstance(sizes, int) else sizes
    listed = list(listed) if isinstance(listed, Iterable) else []
    is_valid = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed)
    if len(listed) != count or not is_valid:
        raise ValueError(
            f"{argument}: expected {count} sizes from 0, one for each child of the {kind}; "
            f"got {sizes!r}"
        )
    return listed


class Split(AdapterCompositionBlock):
    """One part of the sequence for each child, counted from the start of a key-value cache.

    Args:
        children: adapter names, or Split, Stack, BatchSplit or Average blocks.
        splits: the parts' lengths in tokens, or one length for all; their sum must be the length of
            every input, with what its cache holds.
        split_index: in place of `splits`, with two children: where the second one begins. The
            length is open.

    Raises:
        ValueError: not exactly one of the two, or sizes that do not fit the children.
    """

    def __init__(
        self,
        *children: Setup,
        splits: Sequence[int] | int | None = None,
        split_index: int | None = None,
    ):
        super().__init__(*children)
        if (splits is None) == (split_index is None):
            raise ValueError(
                f"Split: expected either splits or split_index; got splits={splits!r} and "
                f"split_index={split_index!r}"
            )
        if split_index is not None:
            if len(children) != 2:
                raise ValueError(f"split_index: expected two children; got {len(children)}")
            _sizes("Split", "split_index", [split_index, 0], 2)
        self.splits = None if splits is None else _sizes("Split", "splits", splits, len(children))
        self.split_index = split_index

    @property
    def parameters(self) -> dict[str, Any]:
        """`splits` and `split_index`, one of them None."""
        return {"splits": self.splits, "split_index": self.split_index}


class BatchSplit(AdapterCompositionBlock):
    """One part of the batch for each child.

    Args:
        children: adapter names, or Stack, Split, BatchSplit or Average blocks.
        batch_sizes: the parts' sizes in rows, or one size for all; their sum must be the size of
            every batch.

    Raises:
        ValueError: sizes that do not fit the children.
    """

    def __init__(self, *children: Setup, batch_sizes: Sequence[int] | int):
        super().__init__(*children)
        self.batch_sizes = _sizes("BatchSplit", "batch_sizes", batch_sizes, len(children))

    @property
    def parameters(self) -> dict[str, Any]:
        """`batch_sizes`, one for each child."""
        return {"batch_sizes": self.batch_sizes}


class Parallel(AdapterCompositionBlock):
    """A copy of the batch for each child, one behind the other (Rückle et al. 2021)."""

    @property
    def parallel_channels(self) -> int:
        return len(self.children)


class MultiTask(AdapterCompositionBlock):
    """For each row the child that the forward's `task_ids` name."""


class Average(AdapterCompositionBlock):
    """The weighted sum of what the children make of the same input.

    Args:
        children: adapter names, or Stack, Split or BatchSplit blocks.
        weights: one for each child; equal ones by default.
        normalize_weights: divide the weights by their sum.
        peer_scaling: divide by the number of children once more, as `adapters` 1.3.0 does.

    Raises:
        ValueError: weights that do not fit the children, or a sum of 0 to divide by.
    """

    def __init__(
        self,
        *children: Setup,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        peer_scaling: bool = False,
    ):
        super().__init__(*children)
        try:
            given = [1.0] * len(children) if weights is None else [float(w) for w in weights]
        except (TypeError, ValueError):
            given = []
        if len(given) != len(children) or not all(map(math.isfinite, given)):
            raise ValueError(
                f"weights: expected {len(children)} finite numbers, one for each child of the "
                f"Average; got {weights!r}"
            )
        total = sum(given) if normalize_weights or weights is None else 1.0
        if total == 0.0:
            raise ValueError(f"weights: expected a sum other than 0 to divide by; got {weights!r}")
        self.weights = [weight / total for weight in given]
        self.peer_scaling = peer_scaling

    @property
    def parameters(self) -> dict[str, Any]:
        """The weights as they are used, and `peer_scaling` where it is set."""
        return {"weights": self.weights, "normalize_weights": False} | (
            {"peer_scaling": True} if self.peer_scaling else {}
        )

    def to_dict(self) -> dict[str, Any]:
        """As for other blocks, with `peer_scaling` as a key of its own."""
        data = super().to_dict()
        # beside the arguments, where adapters does not look
        data["peer_scaling"] = data["kwargs"].pop("peer_scaling", False)
        return data

    @classmethod
    def _from_data(cls, children: list[Setup], data: dict[str, Any]) -> "Average":
        if "peer_scaling" not in data:
            _note_peer_scaling()
        arguments = {"peer_scaling": data.get("peer_scaling", True), **data.get("kwargs", {})}
        # those in a file were divided where they were to be
        arguments = {"normalize_weights": False, **arguments}
        return super()._from_data(children, {"kwargs": arguments})


@functools.cache
def _note_peer_scaling() -> None:
    warnings.warn(
        "An Average written by `adapters` is read with peer_scaling=True: it divides by the number "
        "of children twice.",
        stacklevel=2,
    )


def blocks(setup: Setup | None) -> Iterator[AdapterCompositionBlock]:
    """A setup's blocks, from the outermost on.

    Args:
        setup: a name, which is no block, a block, or None.
    """
    if isinstance(setup, AdapterCompositionBlock):
        yield setup
        for child in setup:
            yield from blocks(child)


def fuses(setup: Setup | None) -> Iterator[Fuse]:
    """A setup's Fuses.

    Args:
        setup: as in `blocks`.
    """
    return (block for block in blocks(setup) if isinstance(block, Fuse))


def as_fuse(fusion: Fuse | Sequence[str] | str, name: str | None = None) -> Fuse:
    """The Fuse over a fusion's adapters.

    Args:
        fusion: a Fuse, the adapters' names, or these joined by commas.
        name: the fusion's, in place of its own.

    Raises:
        ValueError: none of these.
    """
    if isinstance(fusion, Fuse):
        return fusion if name is None else Fuse(*fusion, name=name)
    names = fusion.split(",") if isinstance(fusion, str) else fusion
    is_listing = isinstance(names, Sequence) and len(names) > 0
    if not is_listing or not all(isinstance(child, str) and child for child in names):
        raise ValueError(
            f"adapter_names: expected a Fuse, a list of adapters' names, or 'a,b,c'; got {fusion!r}"
        )
    return Fuse(*names, name=name)


def fusion_name(fusion: Fuse | Sequence[str] | str) -> str:
    """The name of a fusion.

    Args:
        fusion: a Fuse, its adapters' names, or the name itself.

    Raises:
        ValueError: none of these.
    """
    return fusion if isinstance(fusion, str) else as_fuse(fusion).name


_ALLOWED_CHILDREN: dict[type, tuple[type, ...]] = {
    Stack: (Fuse, Split, Parallel, BatchSplit, Average, MultiTask),
    Fuse: (Stack,),
    Split: (Split, Stack, BatchSplit, Average),
    Parallel: (Stack, BatchSplit, Average),
    MultiTask: (Stack, Average, Fuse),
    BatchSplit: (Stack, Split, BatchSplit, Average),
    Average: (Stack, Split, BatchSplit),
}


def _check(
    block: Setup, level: int = 0, length: int | None = None, rows: int | None = None
) -> None:
    """What a block's own arguments cannot show: the depth, and parts of parts that do not fit.

    Args:
        level: how many blocks are around this one.
        length, rows: of the part of the sequence and of the batch that it gets, where known.
    """
    if isinstance(block, str):
        return
    if level > 1 and not isinstance(block, Stack):
        raise ValueError(f"setup: expected names or Stacks below two blocks; got {block!r}")
    if level > 0 and isinstance(block, Stack) and not all(isinstance(c, str) for c in block):
        raise ValueError(f"setup: a Stack inside another block may hold names only; got {block!r}")
    lengths: list[int | None] = [length] * len(block)
    counts: list[int | None] = [rows] * len(block)
    if isinstance(block, Split):
        first = block.split_index
        if block.splits is not None:
            lengths = list(block.splits)
        else:
            lengths = [first, None if length is None else length - first]
        _check_sum("splits", block, None if None in lengths else lengths, length)
    elif isinstance(block, BatchSplit):
        counts = list(block.batch_sizes)
        _check_sum("batch_sizes", block, counts, rows)
    for child, length_, rows_ in zip(block, lengths, counts, strict=True):
        _check(child, level + 1, length_, rows_)


def _check_sum(argument: str, block: Setup, parts: list | None, whole: int | None) -> None:
    if parts is not None and whole is not None and (sum(parts) != whole or min(parts) < 0):
        raise ValueError(f"{argument}: expected a sum of {whole}, the part that {block!r} gets")


def parse_composition(setup: Any, level: int = 0) -> AdapterCompositionBlock | None:
    """What a user may give as a setup, as a block.

    Args:
        setup: a name (a Stack of one), a block, None or an empty sequence (no adapters), or, with a
            FutureWarning, nested sequences: a Stack outside, a Fuse one level in, Stacks below.
        level: how deep in such sequences this one is.

    Returns:
        The block, or None for no adapters.

    Raises:
        ValueError: a forbidden or too deep nesting, or something that is none of these.
    """
    if isinstance(setup, AdapterCompositionBlock):
        _check(setup)
        return setup
    if isinstance(setup, str):
        return Stack(setup)
    if setup is None or (isinstance(setup, Sequence) and len(setup) == 0):
        return None
    if isinstance(setup, Sequence):
        if level == 0:
            warnings.warn(
                "Setups given as lists are deprecated: use fastfusion.composition.Stack and Fuse.",
                FutureWarning,
                stacklevel=2,
            )
        block = Fuse if level == 1 else Stack
        children = [
            child
            if isinstance(child, (str, AdapterCompositionBlock))
            else parse_composition(child, level + 1)
            for child in setup
        ]
        parsed = block(*children)
        if level == 0:
            _check(parsed)
        return parsed
    raise ValueError(f"setup: expected a name, a block, a list or None; got {setup!r}")
