"""One place of a model's layer where adapters may sit: its modules, plans of them, its forward."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from .context import ForwardContext
from .lanes import BoundLane, BoundPlan
from .lowering import Branch, OneOrRows, Plan, Stage, lower
from .mixture import Mixture, MixtureGroup
from .modules import NamedModules
from .packing import PackCache
from .steps import Around, State, Step, score_mask

_OUTSIDE = ForwardContext()
"""Where no forward of the place's model is running."""


class PlaceSettings(Protocol):
    """What the places of one model share."""

    backend: str | None

    def current_plans(self) -> "Mapping[AdapterLayer, BoundPlan]": ...

    def has_copies(self, place: "AdapterLayer") -> bool: ...


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

    # -- plans ----------------------------------------------------------------------------------

    def lower(self, setup: OneOrRows, skip_layers: Sequence[int] = ()) -> BoundPlan:
        """What a setup, or a setup for each row, is at this place, with the modules that it names.

        Raises:
            ValueError: a Fuse of the setup has no fusion layer here.
        """
        if self.layer_idx in skip_layers:
            setup = (None,) * len(setup) if isinstance(setup, tuple) else None
        return self._bind(lower(setup, self.adapters.__contains__))

    def current_plan(self) -> BoundPlan:
        """The plan of this forward, or of the next one where the model's is not running."""
        forward = self._forward_context()
        plans = self.settings.current_plans() if forward is _OUTSIDE else forward.plans
        return plans[self]

    def _forward_context(self) -> ForwardContext:
        """Of this model's forward: this may run inside another model's, whose rows are others."""
        forward = ForwardContext.get_context()
        return _OUTSIDE if forward is None or self not in forward.plans else forward

    def _bind(self, plan: Plan) -> BoundPlan:
        mixtures: dict[Stage, Mixture] = {}
        steps = [self._step(stage, mixtures) for _, stage in plan.stages]
        lanes = [
            BoundLane(
                lane.region,
                [steps[number] for number in lane.stages],
                None if lane.last is None else self.adapters[lane.last],
            )
            for lane in plan.lanes
        ]
        return BoundPlan(plan, steps, lanes, self._group)

    def _group(self, mixtures: list[Mixture]) -> MixtureGroup:
        return MixtureGroup(mixtures, self.packs, self.settings)

    def _step(self, stage: Stage, mixtures: dict[Stage, Mixture]) -> Step:
        pre = [self.adapters[name] for name in stage.pre]
        if stage.plans:
            return Step(stage, None, pre, plans=[self._bind(plan) for plan in stage.plans])
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
        forward = self._forward_context()
        copies = channels = plan.plan.channels
        if channels > 1 and not (forward.has_copies or self.settings.has_copies(self)):
            if plan.plan.has_channels:
                hidden, input = (t.repeat(channels, 1, 1) for t in (hidden, input))
            else:
                copies = 1
        is_literal = self.settings.backend == "reference"
        around = Around(input, layer_norm, is_literal, self._record, copies, forward)
        if plan.plan.is_whole:
            return self._run_whole(plan.lanes[0], hidden, around)
        plan.plan.check(hidden.shape[0] // copies, forward.past + hidden.shape[1])
        return plan.run(State(hidden, input), around, is_inner=False)

    def _run_whole(self, lane: BoundLane, hidden: Tensor, around: Around) -> Tensor:
        if not lane.steps:
            return lane.post(hidden, hidden, around)
        state = State(hidden, around.input)
        for step in lane.steps[:-1]:
            state = step.run(state, around)
        step, mixture = lane.steps[-1], lane.steps[-1].mixture
        if (
            not around.is_literal
            and step.is_one_mixture()
            # the op makes this pre step, not those of blocks around it, and this post step, not
            # that of an adapter whose part of the batch is empty
            and step.pre == mixture.adapters[-1:] == [lane.last]
            and mixture.takes_norm(state.hidden, around.layer_norm)
        ):
            mask = None
            if mixture.fusion is not None:
                mask = score_mask(mixture.fusion, state.hidden, len(mixture.adapters))
            out, attention = mixture.run_norm(state.hidden, around.input, around.layer_norm, mask)
            step.report(attention, around)
            return out
        state = step.run(state, around)
        return lane.post(state.hidden, hidden, around)

    def _record(self, output: str, name: str, value: Tensor, own: Tensor | None = None) -> None:
        forward = self._forward_context()
        if getattr(forward, f"output_{output}"):
            forward.record(output, name, self.layer_idx, self.location, value, own)
