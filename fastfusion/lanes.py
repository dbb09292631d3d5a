"""A plan with its modules: what lanes have ready at the same time, in one call of the op."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .lowering import Plan, Region
from .mixture import Mixture, MixtureGroup, compute_dtype
from .modules import Adapter
from .rows import can_look_at
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
    """Where a region's rows and tokens lie in the hidden states."""

    rows: slice | Tensor
    tokens: slice
    own: Tensor | None = None
    """[rows], which of the rows are the region's, where sizes may not depend on it; None: all."""

    def of(self, value: Tensor) -> Tensor:
        """That part of a tensor [B, S, ...]."""
        return value[self.rows, self.tokens]

    def put(self, value: Tensor, whole: Tensor) -> Tensor:
        """The whole with this part replaced; under autocast in the wider of the two types."""
        if self.own is not None:
            value = torch.where(self.own.view(-1, 1, 1), value, self.of(whole))
        if value.shape == whole.shape:
            return value
        whole = whole.to(torch.promote_types(value.dtype, whole.dtype), copy=True)
        whole[self.rows, self.tokens] = value.to(whole.dtype)
        return whole

    def record(
        self,
        record: Callable[..., None],
        shape: torch.Size,
        output: str,
        name: str,
        value: Tensor,
        own: Tensor | None = None,
    ) -> None:
        """Report a value of this part as one of all rows, and of all tokens unless it has none."""
        is_gate = output == "adapter_gating_scores"
        at = self.rows if is_gate else (self.rows, self.tokens)
        if own is None:
            own_shape = value.shape[: 1 if is_gate else 2]
            own = torch.ones(own_shape, dtype=torch.bool, device=value.device)
        if self.own is not None:
            own = own & self.own.view(-1, *[1] * (own.dim() - 1))
        whole_shape = shape[: own.dim()]
        whole = value.new_zeros(*whole_shape, *value.shape[own.dim() :])
        whole[at] = value
        whole_own = own.new_zeros(whole_shape)
        whole_own[at] = own
        record(output, name, whole, whole_own)


class LaneTable:
    """A number for each lane, looked up at the lanes' rows and tokens."""

    def __init__(self, values: Sequence[int]):
        self._values = torch.tensor(values, dtype=torch.int32)

    def at(self, lane_numbers: Tensor) -> Tensor:
        """int32, of the shape of `lane_numbers`."""
        values = self._values
        if values.device != lane_numbers.device:
            # once: a copy to a GPU in every forward would wait for it
            values = values.to(lane_numbers.device)
            if not torch.compiler.is_compiling():  # what a CUDA graph makes is not to be kept
                self._values = values
        return values[lane_numbers]


class Call(Protocol):
    """A part of what a plan runs."""

    def can_run_now(self, hidden: Tensor) -> bool:
        """Whether it computes what the modules ask for in their present modes, and cheaply."""

    def run(self, state: State, lane_numbers: Tensor | None, around: Around) -> Tensor:
        """The hidden states behind it.

        Args:
            state: of all lanes.
            lane_numbers: [B, S], or None where no call of the plan needs them.
            around: of all lanes.
        """


class GroupedCall:
    """Steps of several lanes, one of each at most, in one call of the op.

    Args:
        steps: each lane's, or None where it has none now.
        make_group: from the distinct mixtures to their group.
    """

    def __init__(
        self,
        steps: Sequence[Step | None],
        make_group: Callable[[list[Mixture]], MixtureGroup],
    ):
        present = [step for step in steps if step is not None]
        mixtures = {m: i for i, m in enumerate(dict.fromkeys(s.mixture for s in present))}
        self._group = make_group(list(mixtures))
        numbers = [-1 if s is None else mixtures[s.mixture] for s in steps]
        self._groups = LaneTable(numbers)
        self._has_base_rows = -1 in numbers
        self._fusions = {mixtures[s.mixture]: s for s in present if s.stage.fusion is not None}
        # a large table has many others
        self._random = [s for s in present if obstacle(s, is_training=True) is not None]
        # steps whose pre steps do the same need them once
        pres = {_pre_kind(step): step for step in present}
        self._pres = list(pres.values())
        kinds = {kind: i for i, kind in enumerate(pres)}
        self._pre_numbers = LaneTable([-1 if s is None else kinds[_pre_kind(s)] for s in steps])
        is_parallel = [s is not None and bool(s.mixture.config["is_parallel"]) for s in steps]
        self._parallel = LaneTable(list(map(int, is_parallel))) if any(is_parallel) else None

    def can_run_now(self, hidden: Tensor) -> bool:
        mixtures = [step.mixture for step in self._fusions.values()]
        dropouts = {m.fusion.dropout if m.fusion.training else 0.0 for m in mixtures}
        return (
            len(dropouts) <= 1
            # a group has no temperature, which brings fp16's scores into range
            and not (mixtures and compute_dtype(hidden) == torch.float16)
            and all(step.is_one_mixture() for step in self._random)
            # a group has packed weights, which do not pay for few rows
            and all(mixture.is_absorbed(hidden) for mixture in mixtures)
        )

    def run(self, state: State, lane_numbers: Tensor, around: Around) -> Tensor:
        groups = self._groups.at(lane_numbers)
        before = state
        state = self._pres[0].run_pre(before, around)[0]
        for i, step in enumerate(self._pres[1:], 1):
            own = self._pre_numbers.at(lane_numbers) == i
            other = step.run_pre(before, around)[0]
            chosen = own.unsqueeze(-1)
            state = State(*map(functools.partial(torch.where, chosen), other, state))
        kept = state.residual
        if self._parallel is not None:
            is_parallel = self._parallel.at(lane_numbers).bool().unsqueeze(-1)
            kept = torch.where(is_parallel, torch.zeros_like(kept), kept)
        if self._has_base_rows and kept is not before.hidden:
            kept = torch.where((groups < 0).unsqueeze(-1), before.hidden, kept)
        mask = None
        if self._group.dropout:
            widest = max(len(step.mixture.adapters) for step in self._fusions.values())
            ones = state.hidden.new_ones(*state.hidden.shape[:-1], widest)
            mask = F.dropout(ones, self._group.dropout)
        hidden, attention = self._group.run(state.hidden, kept, groups.flatten(), mask)
        if around.forward.output_adapter_fusion_attentions:
            for number, step in self._fusions.items():
                own_attention = attention[..., : len(step.mixture.adapters)]
                step.report(own_attention, around, groups == number)
        return hidden


class _Unused(torch.autograd.Function):
    """Parameters that no row uses: they get gradients of zeros, as in a group, for a small part of
    what a call with no rows would cost."""

    @staticmethod
    def forward(ctx, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


class LoneCall:
    """One stage on its whole region: what it does to a token may depend on all others there.

    Args:
        region: where it runs.
        step: the stage with its modules.
    """

    def __init__(self, region: Region, step: Step):
        self._region = region
        self._step = step

    def can_run_now(self, _: Tensor) -> bool:
        return True

    def run(self, state: State, _: Tensor | None, around: Around) -> Tensor:
        shape = state.hidden.shape
        part = self._part(shape, around)
        own = part.of(state.hidden)
        if own.numel() == 0:
            parameters = [p for p in self._step.parameters() if p.requires_grad]
            is_recorded = torch.is_grad_enabled() and len(parameters) > 0
            return _Unused.apply(state.hidden, *parameters) if is_recorded else state.hidden
        around = around._replace(
            input=part.of(around.input),
            record=functools.partial(part.record, around.record, shape),
        )
        behind = self._step.run(State(own, part.of(state.residual)), around)
        return part.put(behind.hidden, state.hidden)

    def _part(self, shape: torch.Size, around: Around) -> Part:
        region = self._region
        rows, tokens = _rows(region, shape[0], around.copies), _tokens(region, around.forward.past)
        if region.task is None:
            return Part(rows, tokens)
        own = _row_numbers(around)[rows] == region.task
        if not can_look_at(own):
            return Part(rows, tokens, own.to(around.input.device))
        return Part(torch.arange(shape[0])[rows][own], tokens)


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
        lone: list[Call] = [
            LoneCall(region, step) for (region, _), step in zip(plan.stages, steps, strict=True)
        ]
        self._lone_calls = lone
        # with the fewest calls first, then what can run in training and in fp16 too
        self._schedules: list[list[Call]] = []
        if not plan.is_whole:
            modes = itertools.product((False, True), repeat=2)
            obstacles = dict.fromkeys(
                tuple(obstacle(step, *mode) is None for step in steps) for mode in modes
            )
            for groupable in obstacles:
                self._schedules.append(self._scheduled(groupable, lone, make_group))
        # lanes whose post steps do the same need them once
        self._posts = list({_post_kind(lane): lane for lane in self.lanes}.values())
        kinds = [_post_kind(lane) for lane in self._posts]
        self._post_numbers = LaneTable([kinds.index(_post_kind(lane)) for lane in self.lanes])
        self._layout: tuple | None = None

    @property
    def num_calls(self) -> int:
        """How many calls the stages of all lanes take, outside of training."""
        return len(next(iter(self._schedules), self._lone_calls))

    def _scheduled(
        self,
        groupable: Sequence[bool],
        lone: Sequence[Call],
        make_group: Callable[[list[Mixture]], MixtureGroup],
    ) -> list[Call]:
        """The calls, in order: stages that need one of their own in the plan's order, as early as
        they can run, so that the lanes behind them may join the next group."""
        calls: list[Call] = []
        alone = [number for number, is_groupable in enumerate(groupable) if not is_groupable]
        ahead = [list(lane.stages) for lane in self.plan.lanes]
        while any(ahead):
            # it runs on its whole region, so every lane there must have come to it
            if alone and not any(alone[0] in stages[1:] for stages in ahead):
                number = alone.pop(0)
                now = {number}
                calls.append(lone[number])
            else:
                now = {stages[0] for stages in ahead if stages and groupable[stages[0]]}
                steps = [
                    self.steps[stages[0]] if stages and stages[0] in now else None
                    for stages in ahead
                ]
                calls.append(GroupedCall(steps, make_group))
            ahead = [stages[1:] if stages and stages[0] in now else stages for stages in ahead]
        return calls

    def run(self, state: State, around: Around, is_inner: bool) -> Tensor:
        """What leaves the lanes.

        Args:
            is_inner: whether this is a child of an Average: no post step of its own.
        """
        calls = self._lone_calls
        if not around.is_literal:
            for schedule in self._schedules:
                if all(call.can_run_now(state.hidden) for call in schedule):
                    calls = schedule
                    break
        needs_numbers = any(isinstance(call, GroupedCall) for call in calls)
        numbers = None
        if needs_numbers or (len(self._posts) > 1 and not is_inner):
            numbers = self._lane_numbers(state.hidden, around)
        hidden = state.hidden
        for call in calls:
            hidden = call.run(State(hidden, state.residual), numbers, around)
        if is_inner:
            return hidden
        out = self._posts[0].post(hidden, state.hidden, around)
        for i, lane in enumerate(self._posts[1:], 1):
            own = (self._post_numbers.at(numbers) == i).unsqueeze(-1)
            out = torch.where(own, lane.post(hidden, state.hidden, around), out)
        return out

    def _lane_numbers(self, hidden: Tensor, around: Around) -> Tensor:
        """The number of each row's and token's lane, [copies * B, S]."""
        size, length = hidden.shape[:2]
        table = self._lane_table(size, length, around)
        if self.plan.tasks is None:
            return table[0].expand(size, length)
        numbers = _row_numbers(around, hidden.device)
        rows = torch.arange(size, device=hidden.device) if table.shape[1] > 1 else 0
        return table[numbers, rows].expand(size, length)

    def _lane_table(self, size: int, length: int, around: Around) -> Tensor:
        """[tasks, copies * B, S]; one row or token stands for all where no lane cuts there."""
        regions = [lane.region for lane in self.lanes]
        size = size if any(r.rows != (0, None) or r.channel is not None for r in regions) else 1
        length = length if any(r.tokens != (0, None) for r in regions) else 1
        if torch.compiler.is_compiling():
            # a graph that reads what is kept here would be traced again when that changes
            return self._made_table(size, length, around)
        key = size, length, around.copies, around.forward.past, around.input.device
        layout = self._layout
        if layout is None or layout[0] != key:
            # another thread may have put its own there meanwhile
            layout = self._layout = key, self._made_table(size, length, around)
        return layout[1]

    def _made_table(self, size: int, length: int, around: Around) -> Tensor:
        device = around.input.device
        table = torch.zeros(self.plan.tasks or 1, size, length, dtype=torch.int32, device=device)
        for i, lane in enumerate(self.lanes):
            region = lane.region
            tasks = slice(None) if region.task is None else region.task
            rows, tokens = _rows(region, size, around.copies), _tokens(region, around.forward.past)
            table[tasks, rows, tokens] = i
        return table


def _rows(region: Region, size: int, copies: int) -> slice | Tensor:
    """The rows of a region among `size`, its task aside."""
    start, end = region.rows
    if region.channel is None and copies > 1 and region.rows != (0, None):
        # the same rows of every copy of the batch
        return torch.arange(size).view(copies, -1)[:, start:end].flatten()
    if region.channel is None:
        return slice(start, size if end is None else end)
    of_copy = size // copies
    offset = region.channel * of_copy
    return slice(offset + start, offset + (of_copy if end is None else end))


def _tokens(region: Region, past: int) -> slice:
    """The tokens of a region among those behind `past` others."""
    start, end = region.tokens
    return slice(max(0, start - past), None if end is None else max(0, end - past))


def _row_numbers(around: Around, device: torch.device | None = None) -> Tensor:
    forward = around.forward
    if forward.row_numbers is None:
        raise ValueError(
            "task_ids: needed by a MultiTask; call the model that has the adapters, not the base "
            "model inside it"
        )
    numbers = forward.row_numbers if device is None else forward.row_numbers_on(device)
    return numbers.repeat(around.copies)


_PRE_FIELDS = ("is_parallel", "original_ln_before", "residual_before_ln")


def _pre_kind(step: Step) -> tuple:
    return tuple(tuple(adapter.config[key] for key in _PRE_FIELDS) for adapter in step.pre)


def _post_kind(lane: BoundLane) -> tuple[bool, bool]:
    # without an adapter the model adds the residual and normalises
    if lane.last is None:
        return False, True
    return bool(lane.last.config["is_parallel"]), bool(lane.last.config["original_ln_after"])


def obstacle(step: Step, is_half: bool = False, is_training: bool = False) -> str | None:
    """Why a stage cannot share a call of the op with other lanes, or None.

    Args:
        step: the stage.
        is_half: whether to count what matters in fp16 alone.
        is_training: whether to count what matters in training alone.
    """
    mixture = step.mixture
    if mixture is None:
        return "an Average over blocks"
    if any(before is not None for before in step.before):
        return "a Fuse over Stacks"
    for adapter in mixture.adapters:
        config = adapter.config
        if config["ln_before"]:
            return "ln_before"
        if config["use_gating"] or config["ln_after"]:
            return "a gate or ln_after"
        if is_training and (config["dropout"] or config["stochastic_depth"]):
            return "dropout or stochastic depth"
    if mixture.fusion is not None:
        if is_half:
            return "fp16"
        if mixture.config["is_parallel"]:
            return "a Fuse of parallel adapters"
        config = mixture.fusion.config
        if config["query_before_ln"] or config["residual_before"] or config["temperature"]:
            return "query_before_ln, residual_before or a temperature"
    elif mixture.weights is not None and mixture.residual_share != 1.0:
        return "weights that do not sum to 1, or parallel adapters in an Average"
    return None
