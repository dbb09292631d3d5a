"""The lanes of a plan with their modules: all in one call of the op per stage, or one by one."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .context import ForwardContext
from .lowering import Plan, Region
from .mixture import Mixture, MixtureGroup
from .modules import Adapter
from .steps import Around, State, Step


class BoundLane(NamedTuple):
    """A lane with the modules that it names."""

    region: Region
    steps: list[Step]
    last: Adapter | None

    def post(self, output: Tensor, hidden: Tensor, around: Around) -> Tensor:
        """The last adapter's post step; without one the model's own, where `output` is `hidden`."""
        if self.last is not None:
            config = self.last.config
            return reference.adapter_post(output, hidden, around.input, around.layer_norm, config)
        summed = output + around.input
        return summed if around.layer_norm is None else around.layer_norm(summed)


class Part(NamedTuple):
    """Where a lane's rows and tokens lie in the hidden states."""

    rows: slice | Tensor
    tokens: slice

    def of(self, value: Tensor) -> Tensor:
        """That part of a tensor [B, S, ...]."""
        return value[self.rows, self.tokens]

    def spread(self, value: Tensor, shape: Sequence[int], has_tokens: bool) -> Tensor:
        """A tensor over all rows, and tokens where it has them, with zeros beside the part."""
        full = value.new_zeros(*shape[: 2 if has_tokens else 1], *value.shape[1 + has_tokens :])
        full[(self.rows, self.tokens) if has_tokens else self.rows] = value
        return full


class LaneTable:
    """A number for each lane, looked up at the lanes' rows and tokens."""

    def __init__(self, values: Sequence[int]):
        self._values = torch.tensor(values, dtype=torch.int32)

    def at(self, lane_numbers: Tensor) -> Tensor:
        """int32, of the shape of `lane_numbers`."""
        if self._values.device != lane_numbers.device:
            # once: a copy to a GPU in every forward would wait for it
            self._values = self._values.to(lane_numbers.device)
        return self._values[lane_numbers]


class GroupedStage:
    """One stage of all lanes, in one call of the op.

    Args:
        steps: each lane's, or None where it has none any more.
        make_group: from the distinct mixtures to their group.
    """

    def __init__(
        self,
        steps: Sequence[Step | None],
        make_group: Callable[[list[Mixture]], MixtureGroup],
    ):
        self.steps = list(steps)
        present = [step for step in steps if step is not None]
        mixtures = list(dict.fromkeys(step.mixture for step in present))
        self.group = make_group(mixtures)
        numbers = [-1 if s is None else mixtures.index(s.mixture) for s in steps]
        self.groups = LaneTable(numbers)
        self.has_base_rows = -1 in numbers
        self.fusions = {
            mixtures.index(step.mixture): step for step in present if step.stage.fusion is not None
        }
        # steps whose pre steps do the same need them once
        self.pres = list({_pre_kind(step): step for step in present}.values())
        kinds = [_pre_kind(step) for step in self.pres]
        self.pre_numbers = LaneTable(
            [-1 if s is None else kinds.index(_pre_kind(s)) for s in steps]
        )
        self.is_parallel = present[0].mixture.config["is_parallel"]

    def run(self, state: State, lane_numbers: Tensor, around: Around) -> State:
        """The state behind the stage; lanes without a step keep theirs."""
        groups = self.groups.at(lane_numbers)
        before = state
        state = self.pres[0].run_pre(before, around)[0]
        for i, step in enumerate(self.pres[1:], 1):
            own = self.pre_numbers.at(lane_numbers) == i
            other = step.run_pre(before, around)[0]
            chosen = own.unsqueeze(-1)
            state = State(*map(functools.partial(torch.where, chosen), other, state))
        kept = torch.zeros_like(state.residual) if self.is_parallel else state.residual
        if self.has_base_rows and kept is not before.hidden:
            kept = torch.where((groups < 0).unsqueeze(-1), before.hidden, kept)
        mask = None
        if self.group.dropout:
            widest = max(len(step.mixture.adapters) for step in self.fusions.values())
            ones = state.hidden.new_ones(*state.hidden.shape[:-1], widest)
            mask = F.dropout(ones, self.group.dropout)
        hidden, attention = self.group.run(state.hidden, kept, groups.flatten(), mask)
        for number, step in self.fusions.items():
            own = (groups == number).unsqueeze(-1)
            step.report(attention[..., : len(step.mixture.adapters)] * own, around)
        return State(hidden, state.residual)

    def is_groupable_now(self) -> bool:
        """Whether no step has, in its present mode, anything that packed weights cannot hold."""
        steps = [step for step in self.steps if step is not None]
        fusions = [step.mixture.fusion for step in self.fusions.values()]
        return all(step.is_one_mixture() for step in steps) and (
            len({fusion.dropout for fusion in fusions if fusion.training}) <= 1
        )


class BoundPlan:
    """A plan with the modules that it names.

    Args:
        plan: the plan.
        lanes: its lanes.
        make_group: from mixtures to their group.
    """

    def __init__(
        self,
        plan: Plan,
        lanes: Sequence[BoundLane],
        make_group: Callable[[list[Mixture]], MixtureGroup],
    ):
        self.plan = plan
        self.lanes = list(lanes)
        self.obstacle = None if plan.is_whole else _obstacle(self.lanes)
        self._stages: list[GroupedStage] = []
        if not plan.is_whole and self.obstacle is None:
            depth = max((len(lane.steps) for lane in lanes), default=0)
            for i in range(depth):
                steps = [lane.steps[i] if i < len(lane.steps) else None for lane in lanes]
                self._stages.append(GroupedStage(steps, make_group))
        # lanes whose post steps do the same need them once
        self._posts = list({_post_kind(lane): lane for lane in self.lanes}.values())
        kinds = [_post_kind(lane) for lane in self._posts]
        self._post_numbers = LaneTable([kinds.index(_post_kind(lane)) for lane in self.lanes])
        self._layout: tuple | None = None

    def run(self, state: State, around: Around, is_inner: bool) -> Tensor:
        """What leaves the lanes.

        Args:
            is_inner: whether this is a child of an Average: no post step of its own.
        """
        is_grouped = (
            bool(self._stages)
            and not around.is_literal
            and state.hidden.dtype != torch.float16
            and all(stage.is_groupable_now() for stage in self._stages)
        )
        if is_grouped:
            return self._run_grouped(state, around, is_inner)
        return self._run_lanes(state, around, is_inner)

    def _run_grouped(self, state: State, around: Around, is_inner: bool) -> Tensor:
        hidden, numbers = state.hidden, self._lane_numbers(state.hidden)
        for stage in self._stages:
            state = stage.run(state, numbers, around)
        if is_inner:
            return state.hidden
        out = self._posts[0].post(state.hidden, hidden, around)
        for i, lane in enumerate(self._posts[1:], 1):
            own = (self._post_numbers.at(numbers) == i).unsqueeze(-1)
            out = torch.where(own, lane.post(state.hidden, hidden, around), out)
        return out

    def _run_lanes(self, state: State, around: Around, is_inner: bool) -> Tensor:
        out = torch.empty_like(state.hidden)
        for lane, part in zip(self.lanes, self._parts(state.hidden), strict=True):
            own_around = around._replace(
                input=part.of(around.input),
                record=lambda output, name, value, part=part: around.record(
                    output,
                    name,
                    part.spread(value, state.hidden.shape, output == "adapter_fusion_attentions"),
                ),
            )
            own = start = State(part.of(state.hidden), part.of(state.residual))
            if own.hidden.numel() == 0:
                continue
            for step in lane.steps:
                own = step.run(own, own_around)
            result = own.hidden if is_inner else lane.post(own.hidden, start.hidden, own_around)
            out[part.rows, part.tokens] = result
        return out

    def _parts(self, hidden: Tensor) -> list[Part]:
        """Where each lane lies in the hidden states [channels * B, S, H]."""
        parts = []
        for region in (lane.region for lane in self.lanes):
            rows: slice | Tensor = _rows(region, hidden.shape[0], self.plan.channels)
            if region.task is not None:
                numbers = _row_numbers(self.plan)
                (found,) = (numbers[rows] == region.task).nonzero(as_tuple=True)
                rows = found + rows.start
            parts.append(Part(rows, slice(*region.tokens)))
        return parts

    def _lane_numbers(self, hidden: Tensor) -> Tensor:
        """The number of each row's and token's lane, [channels * B, S]."""
        size, length = hidden.shape[:2]
        key = (size, length, hidden.device)
        if self._layout is None or self._layout[0] != key:
            # [tasks, rows, S]; one row stands for all where no lane cuts the batch
            regions = [lane.region for lane in self.lanes]
            cuts_batch = any(r.rows != (0, None) or r.channel is not None for r in regions)
            table = torch.zeros(self.plan.tasks or 1, size if cuts_batch else 1, length).int()
            for i, region in enumerate(regions):
                tasks = slice(None) if region.task is None else region.task
                rows = _rows(region, size, self.plan.channels) if cuts_batch else slice(None)
                table[tasks, rows, slice(*region.tokens)] = i
            self._layout = key, table.to(hidden.device)
        table = self._layout[1]
        if self.plan.tasks is None:
            return table[0].expand(size, length)
        numbers = _row_numbers(self.plan).to(hidden.device)
        rows = torch.arange(size, device=hidden.device) if table.shape[1] > 1 else 0
        return table[numbers, rows]


def _rows(region: Region, size: int, channels: int) -> slice:
    """The rows of a region among `size`, its task aside."""
    of_channel = size // channels
    start, end = region.rows
    if region.channel is None:
        return slice(start, size if end is None else end)
    offset = region.channel * of_channel
    return slice(offset + start, offset + (of_channel if end is None else end))


def _row_numbers(plan: Plan) -> Tensor:
    return ForwardContext.get_context().row_numbers.repeat(plan.channels)


_PRE_FIELDS = ("is_parallel", "original_ln_before", "residual_before_ln")


def _pre_kind(step: Step) -> tuple:
    return tuple(tuple(adapter.config[key] for key in _PRE_FIELDS) for adapter in step.pre)


def _post_kind(lane: BoundLane) -> tuple[bool, bool]:
    # without an adapter the model adds the residual and normalises
    if lane.last is None:
        return False, True
    return bool(lane.last.config["is_parallel"]), bool(lane.last.config["original_ln_after"])


def _obstacle(lanes: Sequence[BoundLane]) -> str | None:
    """Why the lanes cannot go through one call of the op per stage, or None."""
    steps = [step for lane in lanes for step in lane.steps]
    if not steps:
        return "no adapter is here"
    for step in steps:
        mixture = step.mixture
        if mixture is None:
            return "an Average over blocks"
        if any(before is not None for before in step.before):
            return "a Fuse over Stacks"
        for adapter in mixture.adapters:
            config = adapter.config
            if config["ln_before"]:
                return "an adapter with ln_before"
            if config["use_gating"] or config["ln_after"]:
                return "an adapter with a gate or ln_after"
        if mixture.fusion is not None:
            config = mixture.fusion.config
            if config["query_before_ln"] or config["residual_before"] or config["temperature"]:
                return "a fusion with query_before_ln, residual_before or a temperature"
        elif mixture.weights is not None and mixture.residual_share != 1.0:
            return "an Average whose weights do not sum to 1, or of parallel adapters"
    if len({bool(step.mixture.config["is_parallel"]) for step in steps}) > 1:
        return "sequential and parallel adapters"
    return None
