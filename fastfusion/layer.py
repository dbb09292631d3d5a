"""One place of a model's layer where adapters may sit: its modules, its plans, its forward."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import reference
from .composition import AdapterCompositionBlock
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup, ForwardContext
from .lowering import Branch, Lane, Plan, Region, Stage, lower, lower_rows
from .mixture import Mixture
from .modules import Adapter, NamedModules
from .packing import PackCache
from .steps import Around, State, Step, score_mask

_KEPT_PLANS = 8
"""Plans of other setups than the active one that a place keeps, with their packed weights."""


class PlaceSettings(Protocol):
    """What the places of one model share."""

    config: ModelAdaptersConfig
    backend: str | None

    def copies_batch(self, place: "AdapterLayer") -> bool: ...


class BoundLane(NamedTuple):
    """A lane with the modules that it names."""

    region: Region
    steps: list[Step]
    last: Adapter | None


class BoundPlan(NamedTuple):
    """A plan with the modules that it names."""

    plan: Plan
    lanes: list[BoundLane]

    @property
    def is_empty(self) -> bool:
        """Whether no adapter runs."""
        return not any(lane.steps for lane in self.lanes)


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


class AdapterLayer:
    """The adapters and fusion layers of one place, and what runs there.

    Args:
        settings: what all places of the model share.
        layer_idx: the layer's number, encoder first.
        location: "mh_adapter" (behind attention) or "output_adapter" (behind the feed-forward).
    """

    def __init__(self, settings: PlaceSettings, layer_idx: int, location: str):
        self.settings = settings
        self.layer_idx = layer_idx
        self.location = location
        self.packs = PackCache()
        self.adapters = NamedModules(self.packs.drop)
        self.adapter_fusion_layer = NamedModules(self.packs.drop)
        self.plan = BoundPlan(Plan((Lane(),)), [BoundLane(Region(), [], None)])
        self._plans: dict[Hashable, BoundPlan] = {}

    # -- plans ----------------------------------------------------------------------------------

    def lower(
        self, setup: AdapterCompositionBlock | None, skip_layers: Sequence[int] = ()
    ) -> BoundPlan:
        """What a setup is at this place, with the modules that it names.

        Raises:
            ValueError: a Fuse of the setup has no fusion layer here.
        """
        skips = self.layer_idx in skip_layers
        return self._bind(lower(None if skips else setup, self.adapters.__contains__))

    def lower_rows(
        self, setups: Sequence[AdapterCompositionBlock | None], skip_layers: Sequence[int] = ()
    ) -> BoundPlan:
        """The same for one of several setups for each row."""
        skips = self.layer_idx in skip_layers
        setups = [None] * len(setups) if skips else setups
        return self._bind(lower_rows(setups, self.adapters.__contains__))

    def activate(self, plan: BoundPlan) -> None:
        """Run this plan from now on; plans of other setups are forgotten."""
        self.plan = plan
        self._plans = {}

    def current_plan(self) -> BoundPlan:
        """The plan of this forward: of its rows' setups, of a context, or the active one."""
        context = ForwardContext.get_context()
        if context is not None and context.row_setups is not None:
            return self._kept_plan(context.row_setups, self.lower_rows)
        setup = AdapterSetup.get_context()
        return self.plan if setup is None else self._kept_plan(setup.adapter_setup, self.lower)

    def _kept_plan(self, key: Hashable, make) -> BoundPlan:
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = make(key, self.settings.config.skip_layers)
            if len(self._plans) >= _KEPT_PLANS:
                # the one that was used longest ago goes, and its packs with it
                self._plans.pop(next(iter(self._plans)), None)
        self._plans[key] = plan
        return plan

    def _bind(self, plan: Plan) -> BoundPlan:
        mixtures: dict[Stage, Mixture] = {}
        lanes = [
            BoundLane(
                lane.region,
                [self._step(stage, mixtures) for stage in lane.stages],
                None if lane.last is None else self.adapters[lane.last],
            )
            for lane in plan.lanes
        ]
        return BoundPlan(plan, lanes)

    def _step(self, stage: Stage, mixtures: dict[Stage, Mixture]) -> Step:
        pre = [self.adapters[name] for name in stage.pre]
        if stage.plans:
            plans = [self._bind(plan) for plan in stage.plans]
            return Step(stage, None, pre, plans=[_Run(self, plan) for plan in plans])
        key = Stage(stage.branches, stage.fusion, stage.weights)
        mixture = mixtures.get(key)
        if mixture is None:
            mixture = mixtures[key] = self._mixture(stage)
        before = [self._steps_before(branch, mixtures) for branch in stage.branches]
        return Step(stage, mixture, pre, before)

    def _steps_before(self, branch: Branch, mixtures: dict[Stage, Mixture]) -> list[Step] | None:
        if branch.before is None:
            return None
        stages = [Stage((Branch(name),), pre=(name,)) for name in branch.before]
        return [self._step(stage, mixtures) for stage in stages]

    def _mixture(self, stage: Stage) -> Mixture:
        adapters = [self.adapters[branch.adapter] for branch in stage.branches]
        fusion = None
        if stage.fusion is not None:
            if stage.fusion not in self.adapter_fusion_layer:
                raise ValueError(
                    f"setup: fusion {stage.fusion!r} has no weights at {self.location} of layer "
                    f"{self.layer_idx}, where adapters of its Fuse are present"
                )
            fusion = self.adapter_fusion_layer[stage.fusion]
        return Mixture(adapters, fusion, stage.weights, self.packs, self.settings)

    # -- forward --------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, input: Tensor, layer_norm: nn.Module | None) -> Tensor:
        """The state behind the sub-layer: residual, LayerNorm and the active adapters.

        Args:
            hidden: [B, S, H], the sub-layer's output.
            input: [B, S, H], the sub-layer's input.
            layer_norm: the model's own, or None.

        Raises:
            ValueError: the setup asks for another batch size or sequence length.
        """
        plan = self.current_plan()
        around = Around(input, layer_norm, self.settings.backend == "reference", self._record)
        if plan.plan.is_whole:
            return self._run_whole(plan.lanes[0], hidden, around)
        channels = plan.plan.channels
        if channels > 1 and self.settings.copies_batch(self):
            hidden, input = (t.repeat(channels, 1, 1) for t in (hidden, input))
            around = around._replace(input=input)
        plan.plan.check(hidden.shape[0] // channels, hidden.shape[1])
        return self._run_lanes(plan, State(hidden, input), around, self._finish)

    def _run_whole(self, lane: BoundLane, hidden: Tensor, around: Around) -> Tensor:
        if not lane.steps:
            return self._finish(lane, hidden, hidden, around)
        state = State(hidden, around.input)
        for step in lane.steps[:-1]:
            state = step.run(state, around)
        step, mixture = lane.steps[-1], lane.steps[-1].mixture
        if (
            not around.is_literal
            and step.is_one_mixture()
            and mixture.takes_norm(state.hidden, around.layer_norm)
        ):
            mask = None
            if mixture.fusion is not None:
                mask = score_mask(mixture.fusion, state.hidden, len(mixture.adapters))
            out, attention = mixture.run_norm(state.hidden, around.input, around.layer_norm, mask)
            step.report(attention, around)
            return out
        state = step.run(state, around)
        return self._finish(lane, state.hidden, hidden, around)

    def _finish(self, lane: BoundLane, output: Tensor, hidden: Tensor, around: Around) -> Tensor:
        """The post step of a lane's last adapter; without one, what the model does."""
        if lane.last is not None:
            config = lane.last.config
            return reference.adapter_post(output, hidden, around.input, around.layer_norm, config)
        summed = hidden + around.input
        return summed if around.layer_norm is None else around.layer_norm(summed)

    def run_plan(self, plan: BoundPlan, state: State, around: Around) -> Tensor:
        """A plan inside another one: no post step of its own."""
        return self._run_lanes(plan, state, around, lambda lane, output, hidden, around: output)

    def _run_lanes(self, plan: BoundPlan, state: State, around: Around, finish) -> Tensor:
        out = torch.empty_like(state.hidden)
        for lane, part in zip(plan.lanes, _parts(plan.plan, state.hidden), strict=True):
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
            out[part.rows, part.tokens] = finish(lane, own.hidden, start.hidden, own_around)
        return out

    def _record(self, output: str, name: str, value: Tensor) -> None:
        context = ForwardContext.get_context()
        if context is not None and getattr(context, f"output_{output}"):
            context.record(output, name, self.layer_idx, self.location, value)


class _Run(NamedTuple):
    """A child plan as a step runs it."""

    layer: AdapterLayer
    plan: BoundPlan

    def __call__(self, state: State, around: Around) -> Tensor:
        return self.layer.run_plan(self.plan, state, around)


def _parts(plan: Plan, hidden: Tensor) -> list[Part]:
    """Where each lane of a plan lies in the hidden states [channels * B, S, H]."""
    size = hidden.shape[0] // plan.channels
    numbers = None
    if plan.tasks is not None:
        numbers = ForwardContext.get_context().row_numbers.repeat(plan.channels)
    parts = []
    for region in (lane.region for lane in plan.lanes):
        offset = (region.channel or 0) * size
        start, end = region.rows
        stop = hidden.shape[0] if region.channel is None else offset + size
        rows: slice | Tensor = slice(offset + start, stop if end is None else offset + end)
        if region.task is not None:
            (found,) = (numbers[rows] == region.task).nonzero(as_tuple=True)
            rows = found + rows.start
        parts.append(Part(rows, slice(*region.tokens)))
    return parts
