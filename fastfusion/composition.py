"""Composition blocks: how hidden states flow through the adapters of a model.

`Stack` and `Fuse` so far; which block may stand in which is the table `_ALLOWED_CHILDREN`.
"""

import warnings
from collections.abc import Iterator, Sequence
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
        return self.children, tuple(sorted(self.parameters.items()))

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
        """The tree that `to_dict` wrote.

        Args:
            data: what it returned, or a part of it.

        Raises:
            ValueError: an unknown block type.
        """
        if data["type"] == "single":
            return data["children"][0]
        for block in _ALLOWED_CHILDREN:
            if block.__name__ == data["type"]:
                children = [cls.from_dict(child) for child in data["children"]]
                return block(*children, **data.get("kwargs", {}))
        known = ", ".join(block.__name__ for block in _ALLOWED_CHILDREN)
        raise ValueError(f"type: expected single or one of {known}; got {data['type']!r}")


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
        return {"name": self._name}

    @property
    def name(self) -> str:
        """The fusion layer's name."""
        if self._name is not None:
            return self._name
        return ",".join(child if isinstance(child, str) else child.last() for child in self)


_ALLOWED_CHILDREN: dict[type, tuple[type, ...]] = {Stack: (Fuse,), Fuse: (Stack,)}


def _check_depth(block: Setup, level: int = 0) -> None:
    """Below the top a Stack holds names only: Stack(a, Fuse(b, Stack(c, d))) is the deepest."""
    if isinstance(block, str):
        return
    if level > 0 and isinstance(block, Stack) and not all(isinstance(c, str) for c in block):
        raise ValueError(f"setup: a Stack inside another block may hold names only; got {block!r}")
    for child in block:
        _check_depth(child, level + 1)


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
        _check_depth(setup)
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
            _check_depth(parsed)
        return parsed
    raise ValueError(f"setup: expected a name, a block, a list or None; got {setup!r}")
