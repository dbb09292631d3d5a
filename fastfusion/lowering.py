"""Composition blocks -> stages: what runs at one place, decided before any tensor is there.

A stage is one mixture of bottlenecks: a single adapter (weight 1) or a Fuse (attention). A Stack is
its stages one after the other; adapters that are absent at the place are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .composition import AdapterCompositionBlock, Fuse, Setup, Stack


@dataclass(frozen=True)
class Branch:
    """One adapter of a mixture."""

    adapter: str
    before: tuple[str, ...] | None = None
    """In a Fuse over Stacks: the adapters of the child Stack that run before this one. None: the
    branch reads the stage's own input."""


@dataclass(frozen=True)
class Stage:
    """One mixture: its branches, and the fusion layer that weighs them (None: one adapter)."""

    branches: tuple[Branch, ...]
    fusion: str | None = None

    @classmethod
    def single(cls, adapter: str) -> "Stage":
        """The stage of one adapter by itself."""
        return cls((Branch(adapter),))


def _branch(child: Setup, present: Callable[[str], bool]) -> Branch | None:
    if isinstance(child, str):
        return Branch(child) if present(child) else None
    names = [name for name in child if present(name)]
    return Branch(names[-1], tuple(names[:-1])) if names else None


def lower(
    setup: AdapterCompositionBlock | None, present: Callable[[str], bool]
) -> tuple[Stage, ...]:
    """The stages of a setup at one place.

    Args:
        setup: a parsed composition, or None.
        present: whether an adapter exists at this place.

    Returns:
        The stages in order; none where no adapter of the setup is present.
    """
    if setup is None:
        return ()
    stages = []
    for child in setup if isinstance(setup, Stack) else (setup,):
        if isinstance(child, Fuse):
            branches = tuple(b for c in child if (b := _branch(c, present)) is not None)
            if branches:
                stages.append(Stage(branches, child.name))
        elif present(child):
            stages.append(Stage.single(child))
    return tuple(stages)
