"""A plan with its modules: stage k of all lanes in one call of the op, or one stage by one."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .context import ForwardContext
from .lowering import Plan, Region
from .mixture import Mixture, MixtureGroup, compute_dtype
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

    def put(self, value: Tensor, whole: Tensor) -> Tensor:
        """The whole with this part replaced; under autocast in the wider of the two types."""
        if value.shape == whole.shape:
            return value
        whole = whole.to(torch.promote_types(value.dtype, whole.dtype), copy=True)
        whole[self.rows, self.tokens] = value.to(whole.dtype)
        return whole

    def record(
        self,
        record: Callable[[str, str, Tensor], None],
        shape: torch.Size,
        output: str,
        name: str,
        value: Tensor,
    ) -> None:
        """Report a value of this part as one of all rows, and tokens, with zeros beside it."""
        if output == "adapter_fusion_attentions":
            whole = value.new_zeros(*shape[:2], *value.shape[2:])
            whole[self.rows, self.tokens] = value
        else:
            whole = value.new_zeros(shape[0], *value.shape[1:])
            whole[self.rows] = value
        record(output, name, whole)


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
        context = ForwardContext.get_context()
        if context is None or not context.output_adapter_fusion_attentions:
            return State(hidden, state.residual)
        for number, step in self.fusions.items():
            own = (groups == number).unsqueeze(-1)
            step.report(attention[..., : len(step.mixture.adapters)] * own, around)
        return State(hidden, state.residual)

    def is_groupable_now(self) -> bool:
        """Whether no step has, in its present mode, anything that packed weights cannot hold."""
        steps = [step for step in self.steps if step is not None]
        fusions = [step.mixture.fusion for step in self.fusions.values()]
        dropouts = {fusion.dropout if fusion.training else 0.0 for fusion in fusions}
        return all(step.is_one_mixture() for step in steps) and len(dropouts) <= 1


class BoundPlan:
    """A plan with the modules that it names.

    Args:
        plan: the plan.
        steps: its stages.
        lanes: its lanes.
        make_group: from mixtures to their group.
    """

    def __init__(
        self,
        plan: Plan,
        steps: Sequence[Step],
        lanes: Sequence[BoundLane],
        make_group: Callable[[list[Mixture]], MixtureGroup],
    ):
        self.plan = plan
        self.steps = list(steps)
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
            and compute_dtype(state.hidden) != torch.float16
            and all(stage.is_groupable_now() for stage in self._stages)
        )
        if is_grouped:
            return self._run_grouped(state, around, is_inner)
        return self._run_one_by_one(state, around, is_inner)

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

    def _run_one_by_one(self, state: State, around: Around, is_inner: bool) -> Tensor:
        current, shape = state.hidden, state.hidden.shape
        for (region, _), step in zip(self.plan.stages, self.steps, strict=True):
            part = self._part(region, shape)
            own = part.of(current)
            if own.numel() == 0:
                continue
            record = functools.partial(part.record, around.record, shape)
            own_around = around._replace(input=part.of(around.input), record=record)
            own_state = State(own, part.of(state.residual))
            current = part.put(step.run(own_state, own_around).hidden, current)
        if is_inner:
            return current
        if len(self._posts) == 1:
            return self._posts[0].post(current, state.hidden, around)
        out = current
        for lane in self.lanes:
            part = self._part(lane.region, shape)
            own_around = around._replace(input=part.of(around.input))
            result = lane.post(part.of(current), part.of(state.hidden), own_around)
            out = part.put(result, out)
        return out

    def _part(self, region: Region, shape: torch.Size) -> Part:
        """Where a region lies in hidden states [channels * B, S, H]."""
        channels, tokens = self.plan.channels, slice(*region.tokens)
        rows = _rows(region, shape[0], channels)
        if region.channel is None and region.rows != (0, None) and channels > 1:
            # the same rows of every copy of the batch
            every = torch.arange(shape[0]).view(channels, -1)[:, slice(*region.rows)]
            return Part(every.flatten(), tokens)
        if region.task is None:
            return Part(rows, tokens)
        numbers = _row_numbers(self.plan)
        (found,) = (numbers[rows] == region.task).nonzero(as_tuple=True)
        return Part(found + rows.start, tokens)

    def _lane_numbers(self, hidden: Tensor) -> Tensor:
        """The number of each row's and token's lane, [channels * B, S]."""
        size, length = hidden.shape[:2]
        key = (size, length, hidden.device)
        layout = self._layout
        if layout is None or layout[0] != key:
            # [tasks, rows, S]; one row stands for all where no lane cuts the batch
            regions = [lane.region for lane in self.lanes]
            cuts_batch = any(r.rows != (0, None) or r.channel is not None for r in regions)
            table = torch.zeros(self.plan.tasks or 1, size if cuts_batch else 1, length).int()
            for i, region in enumerate(regions):
                tasks = slice(None) if region.task is None else region.task
                rows = _rows(region, size, self.plan.channels) if cuts_batch else slice(None)
                table[tasks, rows, slice(*region.tokens)] = i
            # another thread may have put its own there meanwhile
            layout = self._layout = key, table.to(hidden.device)
        table = layout[1]
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
    context = ForwardContext.get_context()
    if context is None or context.row_numbers is None:
        raise ValueError(
            "task_ids: needed by a MultiTask; call the model that has the adapters, not the base "
            "model inside it"
        )
    return context.row_numbers.repeat(plan.channels)


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
            if mixture.config["is_parallel"]:
                return "a Fuse of parallel adapters"
            config = mixture.fusion.config
            if config["query_before_ln"] or config["residual_before"] or config["temperature"]:
                return "a fusion with query_before_ln, residual_before or a temperature"
        elif mixture.weights is not None and mixture.residual_share != 1.0:
            return "an Average whose weights do not sum to 1, or of parallel adapters"
    if len({bool(step.mixture.config["is_parallel"]) for step in steps}) > 1:
        return "sequential and parallel adapters"
    return None
