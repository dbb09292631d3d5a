"""Composition blocks -> a plan: what runs at one place, decided before any tensor is there.

A plan cuts the hidden states [B, S, H] into lanes: parts of the rows and tokens, each with a chain
of stages. A stage is one mixture of bottlenecks: a single adapter (weight 1), an Average
(constants) or a Fuse (attention). A Stack appends stages; Split cuts the tokens, BatchSplit the
rows, Parallel and MultiTask give each child rows of its own. Adapters that are absent at the place
are left out, and a lane without a stage is what the model does without adapters. What a stage does
to one token may depend on all tokens that it gets (a gate is their mean), so each is kept with its
whole region too.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .composition import (
    AdapterCompositionBlock,
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Setup,
    Split,
    Stack,
)

Interval = tuple[int, int | None]
"""From a number up to another, or to the end."""


@dataclass(frozen=True)
class Branch:
    """One adapter of a mixture."""

    adapter: str
    before: tuple[str, ...] | None = None
    """In a Fuse over Stacks: the adapters of the child Stack that run before this one. None: the
    branch reads the stage's own input."""


@dataclass(frozen=True)
class Stage:
    """One mixture of adapters, or the weighted sum of what several plans make of one state."""

    branches: tuple[Branch, ...]
    fusion: str | None = None
    """The fusion layer that weighs the branches."""
    weights: tuple[float, ...] | None = None
    """Of an Average, for its branches or plans."""
    plans: "tuple[Plan, ...]" = ()
    """An Average over blocks, in place of branches."""
    pre: tuple[str, ...] = ()
    """Whose pre steps run before it, in order; the last one with the fusion's config."""


@dataclass(frozen=True)
class Region:
    """A part of the hidden states; a lane's rows and tokens are those in all four."""

    tokens: Interval = (0, None)
    rows: Interval = (0, None)
    """Of the batch, or of one channel of it."""
    channel: int | None = None
    """Which copy of the batch, under a Parallel."""
    task: int | None = None
    """Rows that the forward gives this number, under a MultiTask or one setup per row."""


@dataclass(frozen=True)
class Lane:
    """A region that no stage cuts any further."""

    region: Region = Region()
    stages: tuple[int, ...] = ()
    """Which of the plan's stages run there, in order."""
    last: str | None = None
    """The adapter whose post step ends them; None: there are no stages."""


@dataclass(frozen=True)
class Plan:
    """The stages of one place, the lanes that they make, and the sizes that they ask for."""

    stages: tuple[tuple[Region, Stage], ...]
    """In order, each with all rows and tokens that it runs on."""
    lanes: tuple[Lane, ...]
    """They cover all rows and tokens."""
    channels: int = 1
    """Copies of the batch that the setup makes, here or at another place."""
    tasks: int | None = None
    batch_size: int | None = None
    """Of a channel; None: any."""
    length: int | None = None
    """Of the sequence; None: any."""

    @property
    def is_whole(self) -> bool:
        """Whether one chain of stages serves all rows and tokens."""
        return len(self.lanes) == 1

    @property
    def has_channels(self) -> bool:
        """Whether the copies of the batch have lanes of their own, so that they must be there."""
        return any(lane.region.channel is not None for lane in self.lanes)

    def check(self, batch_size: int, length: int) -> None:
        """Raise a ValueError unless a batch (of one channel) has the sizes that the plan needs."""
        if self.batch_size not in (None, batch_size):
            raise ValueError(
                f"batch_sizes: expected a batch of {self.batch_size} rows, their sum; "
                f"got {batch_size}"
            )
        if self.length not in (None, length):
            raise ValueError(
                f"splits: expected sequences of {self.length} tokens, their sum; got {length}"
            )


Present = Callable[[str], bool]


def _names(setup: Setup) -> Iterator[str]:
    if isinstance(setup, str):
        yield setup
    else:
        for child in setup:
            yield from _names(child)


@dataclass
class _Lowering:
    present: Present
    stages: list[tuple[Region, Stage]] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=lambda: [Lane()])
    tasks: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def first(self, block: Setup) -> str | None:
        """The first adapter of a block that is present: its config counts for the pre step."""
        return next(filter(self.present, _names(block)), None)

    def append(self, region: Region, stage: Stage) -> None:
        for i in self._inside(region):
            lane = self.lanes[i]
            self.lanes[i] = replace(lane, stages=(*lane.stages, len(self.stages)))
        self.stages.append((region, stage))

    def _inside(self, region: Region) -> list[int]:
        """Cut the lanes so that each is in the region or outside; the numbers of those inside."""
        cut: list[Lane] = []
        inside: list[int] = []
        for lane in self.lanes:
            if _other(lane.region.channel, region.channel) or _other(lane.region.task, region.task):
                cut.append(lane)
                continue
            for tokens, tokens_in in _cut(lane.region.tokens, region.tokens):
                for rows, rows_in in _cut(lane.region.rows, region.rows):
                    if tokens_in and rows_in:
                        inside.append(len(cut))
                    part = replace(lane.region, tokens=tokens, rows=rows)
                    cut.append(replace(lane, region=part))
        self.lanes = cut
        return inside

    def apply(self, block: Setup, region: Region, pre: tuple[str, ...]) -> None:
        """Append what a block does to a region.

        Args:
            pre: the pre steps of the blocks around it that have not been taken yet.
        """
        first = self.first(block)
        if first is None:
            return
        if isinstance(block, str):
            self.append(region, Stage((Branch(block),), pre=pre))
        elif isinstance(block, Stack):
            for child in block:
                # a Stack's names take their own pre steps, its blocks see to theirs
                own = (child,) if isinstance(child, str) else ()
                self.apply(child, region, (*pre, *own))
                pre = () if self.first(child) is not None else pre
        elif isinstance(block, Fuse):
            branches = tuple(b for c in block if (b := _branch(c, self.present)) is not None)
            pre = (*pre, branches[-1].adapter)
            self.append(region, Stage(branches, fusion=block.name, pre=pre))
        elif isinstance(block, Average):
            self.append(region, self._average(block, region, (*pre, first)))
        else:
            # adapters 1.3.0 runs a MultiTask as a BatchSplit with a pre step of its own
            own = (first, first) if isinstance(block, MultiTask) else (first,)
            for child, part in zip(block, self._parts(block, region), strict=True):
                self.apply(child, part, (*pre, *own))

    def _parts(self, block: AdapterCompositionBlock, region: Region) -> list[Region]:
        """The regions of the children of a block that gives each child its own."""
        if isinstance(block, Split):
            start, end = region.tokens
            if block.splits is None:
                cut = start + block.split_index
                parts = [(start, cut), (cut, end)]
            else:
                parts = _consecutive(start, block.splits)
                self._set_size("length", end, parts[-1][1])
            return [replace(region, tokens=part) for part in parts]
        if isinstance(block, BatchSplit):
            parts = _consecutive(region.rows[0], block.batch_sizes)
            self._set_size("batch_size", region.rows[1], parts[-1][1])
            return [replace(region, rows=part) for part in parts]
        if isinstance(block, Parallel):
            self._copy_lanes("channel", len(block))
            return [replace(region, channel=i) for i in range(len(block))]
        assert isinstance(block, MultiTask)
        self._copy_lanes("task", len(block))
        self.tasks = len(block)
        return [replace(region, task=i) for i in range(len(block))]

    def _set_size(self, name: str, end: int | None, total: int) -> None:
        # where the end is known, composition.py has compared the sizes
        if end is None and self.sizes.setdefault(name, total) != total:
            argument = {"length": "splits", "batch_size": "batch_sizes"}[name]
            raise ValueError(
                f"{argument}: expected the same sum everywhere; got {self.sizes[name]} and {total}"
            )

    def _copy_lanes(self, attribute: str, count: int) -> None:
        """Give each child of a block a lane of its own wherever there is one for all."""
        known = {getattr(lane.region, attribute) for lane in self.lanes}
        if known == {None}:
            self.lanes = [
                replace(lane, region=replace(lane.region, **{attribute: i}))
                for i in range(count)
                for lane in self.lanes
            ]
        elif len(known) != count:
            raise ValueError(
                f"setup: expected blocks with the same number of children for {attribute}s; "
                f"got {len(known)} and {count}"
            )

    def _average(self, block: Average, region: Region, pre: tuple[str, ...]) -> Stage:
        present = [i for i, child in enumerate(block) if self.first(child) is not None]
        weights = _average_weights(block, present)
        children = [block[i] for i in present]
        if all(isinstance(child, str) for child in children):
            return Stage(tuple(map(Branch, children)), weights=weights, pre=pre)
        plans = []
        for child in children:
            lowering = _Lowering(self.present)
            lowering.apply(child, Region(), ())
            plan = lowering.plan(None)
            if plan.length is not None:
                self._set_size("length", region.tokens[1], plan.length)
            if plan.batch_size is not None:
                self._set_size("batch_size", region.rows[1], plan.batch_size)
            plans.append(plan)
        return Stage((), weights=weights, plans=tuple(plans), pre=pre)

    def plan(self, last: str | None, channels: int = 1) -> Plan:
        length, batch_size = self.sizes.get("length"), self.sizes.get("batch_size")
        lanes = tuple(
            replace(lane, last=last if lane.stages else None)
            for lane in self.lanes
            if _begins_before(lane.region.tokens, length)
            and _begins_before(lane.region.rows, batch_size)
        )
        return Plan(tuple(self.stages), lanes, channels, self.tasks, **self.sizes)


def _other(have: int | None, want: int | None) -> bool:
    return want is not None and have != want


def _cut(interval: Interval, by: Interval) -> list[tuple[Interval, bool]]:
    """The parts of an interval, and whether each lies in another one."""
    (start, end), (by_start, by_end) = interval, by
    low, high = max(start, by_start), _least(end, by_end)
    if high is not None and low >= high:
        # nothing in common; an empty part stays for an empty interval, which BatchSplit may have
        return [(interval, False)]
    parts = [((start, low), False), ((low, high), True)]
    if high is not None and (end is None or high < end):
        parts.append(((high, end), False))
    return [(part, is_in) for part, is_in in parts if part[1] is None or part[0] < part[1]]


def _begins_before(interval: Interval, end: int | None) -> bool:
    return end is None or interval[0] < end or interval == (0, None)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _consecutive(start: int, sizes: Sequence[int]) -> list[Interval]:
    parts = []
    for size in sizes:
        parts.append((start, start + size))
        start += size
    return parts


def _average_weights(block: Average, present: list[int]) -> tuple[float, ...]:
    """The weights of the children that are present: they share what the absent ones have."""
    weights, count = [block.weights[i] for i in present], len(present)
    absent = count < len(block)
    if block.peer_scaling:
        if absent and count == 1:
            # adapters 1.3.0 multiplies a lone child by the mean of all weights
            return (sum(block.weights) / len(block),)
        weights = [weight / count for weight in weights]
    if absent and sum(weights) != 0.0:
        factor = sum(block.weights) / sum(block.weights[i] for i in present)
        weights = [weight * factor for weight in weights]
    return tuple(weights)


def _branch(child: Setup, present: Present) -> Branch | None:
    if isinstance(child, str):
        return Branch(child) if present(child) else None
    names = [name for name in child if present(name)]
    return Branch(names[-1], tuple(names[:-1])) if names else None


OneOrRows = AdapterCompositionBlock | tuple[AdapterCompositionBlock | None, ...] | None
"""A setup, None for no adapters; or several in a tuple, one of which each row has."""


def lower(setup: OneOrRows, present: Present) -> Plan:
    """The plan of a setup at one place.

    Args:
        setup: a parsed composition, or None; of a tuple of them each row has one, and the forward
            says which. They are distinct then and have no blocks over rows.
        present: whether an adapter exists at this place.

    Raises:
        ValueError: parts of the setup, or setups, that ask for different sizes.
    """
    if isinstance(setup, tuple):
        return _lower_rows(setup, present)
    if setup is None:
        return _Lowering(present).plan(None)
    return _lowered(setup, frozenset(filter(present, _names(setup))))


@functools.lru_cache(maxsize=4096)
def _lowered(setup: AdapterCompositionBlock, present: frozenset[str]) -> Plan:
    # most places of a model have the same adapters, and a table of setups is lowered often
    lowering = _Lowering(present.__contains__)
    lowering.apply(setup, Region(), ())
    last = None
    for name in _names(setup):
        last = name if name in present else last
    return lowering.plan(last, setup.parallel_channels)


@functools.lru_cache(maxsize=4096)
def _numbered(plan: Plan, task: int) -> Plan:
    """A plan for the rows of a number."""
    return replace(
        plan,
        stages=tuple((replace(region, task=task), stage) for region, stage in plan.stages),
        lanes=tuple(replace(lane, region=replace(lane.region, task=task)) for lane in plan.lanes),
    )


def _lower_rows(setups: Sequence[AdapterCompositionBlock | None], present: Present) -> Plan:
    plans = [_numbered(lower(setup, present), i) for i, setup in enumerate(setups)]
    stages: list[tuple[Region, Stage]] = []
    lanes: list[Lane] = []
    for plan in plans:
        for lane in plan.lanes:
            numbers = tuple(len(stages) + number for number in lane.stages)
            lanes.append(Lane(lane.region, numbers, lane.last))
        stages += plan.stages
    lengths = {plan.length for plan in plans if plan.length is not None}
    if len(lengths) > 1:
        raise ValueError(f"splits: expected the same sum in every row; got {sorted(lengths)}")
    return Plan(
        tuple(stages),
        tuple(lanes),
        tasks=len(setups),
        length=next(iter(lengths), None),
    )
