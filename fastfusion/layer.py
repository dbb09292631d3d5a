"""One place of a model's layer where adapters may sit: from its plan to calls of the mixtures."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .composition import AdapterCompositionBlock
from .configuration import ModelAdaptersConfig
from .context import AdapterSetup, ForwardContext
from .lowering import Stage, lower
from .mixture import Mixture
from .modules import Adapter, AdapterFusion, NamedModules, parameters_by_name
from .packing import PackCache

_KEPT_PLANS = 8
"""Plans of `AdapterSetup` contexts that a place keeps, with their packed weights."""


class PlaceSettings(Protocol):
    """What the places of one model share."""

    config: ModelAdaptersConfig
    backend: str | None


class Step(NamedTuple):
    """A stage of the plan with the modules that it names."""

    stage: Stage
    mixture: Mixture
    before: list[list["Step"] | None]
    """For each branch of a Fuse: the steps of a child Stack in front of it, or None."""


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
        self.steps: list[Step] = []
        self._plans: dict[AdapterCompositionBlock | None, list[Step]] = {}

    def lower(
        self, setup: AdapterCompositionBlock | None, skip_layers: Sequence[int]
    ) -> list[Step]:
        """What a setup is at this place, with the modules that it names.

        Raises:
            ValueError: a Fuse of the setup has no fusion layer here.
        """
        if self.layer_idx in skip_layers:
            return []
        return [self._step(stage) for stage in lower(setup, self.adapters.__contains__)]

    def activate(self, steps: list[Step]) -> None:
        """Run these steps from now on; plans of other setups are forgotten."""
        self.steps = steps
        self._plans = {}

    def _current_steps(self) -> list[Step]:
        context = AdapterSetup.get_context()
        if context is None:
            return self.steps
        setup = context.adapter_setup
        steps = self._plans.get(setup)
        if steps is None:
            steps = self.lower(setup, self.settings.config.skip_layers)
            if len(self._plans) >= _KEPT_PLANS:
                # the oldest goes, and its packs with it
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[setup] = steps
        return steps

    def _step(self, stage: Stage) -> Step:
        adapters = [self.adapters[branch.adapter] for branch in stage.branches]
        fusion = None
        if stage.fusion is not None:
            if stage.fusion not in self.adapter_fusion_layer:
                raise ValueError(
                    f"setup: fusion {stage.fusion!r} has no weights at {self.location} of layer "
                    f"{self.layer_idx}, where adapters of its Fuse are present"
                )
            fusion = self.adapter_fusion_layer[stage.fusion]
        mixture = Mixture(adapters, fusion, self.packs, self.settings)
        before = [
            None if branch.before is None else [self._step(Stage.single(n)) for n in branch.before]
            for branch in stage.branches
        ]
        return Step(stage, mixture, before)

    def forward(self, hidden: Tensor, input: Tensor, layer_norm: nn.Module | None) -> Tensor:
        """The state behind the sub-layer: residual, LayerNorm and the active adapters.

        Args:
            hidden: [B, S, H], the sub-layer's output.
            input: [B, S, H], the sub-layer's input.
            layer_norm: the model's own, or None.
        """
        steps = self._current_steps()
        if not steps:
            summed = hidden + input
            return summed if layer_norm is None else layer_norm(summed)
        state = hidden
        for step in steps[:-1]:
            state = self._run(step, state, input, layer_norm)
        last = steps[-1]
        if self._takes_norm(last, state, layer_norm):
            mixture = last.mixture
            mask = None
            if mixture.fusion is not None:
                mask = _score_mask(mixture.fusion, state, len(mixture.adapters))
            out, attention = mixture.run_norm(state, input, layer_norm, mask)
            self._report(last.stage, attention)
            return out
        state = self._run(last, state, input, layer_norm)
        return reference.adapter_post(state, hidden, input, layer_norm, last.mixture.config)

    def _takes_norm(self, step: Step, state: Tensor, layer_norm: nn.Module | None) -> bool:
        mixture = step.mixture
        if self._is_literal or any(before is not None for before in step.before):
            return False
        if mixture.fusion is None:
            if not mixture.adapters[0].is_plain():
                return False
        elif any(map(_drops_path, mixture.adapters)):
            return False
        return mixture.takes_norm(state, layer_norm)

    def _run(self, step: Step, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        if step.mixture.fusion is None:
            return self._run_single(step, state, input, layer_norm)
        return self._run_fusion(step, state, input, layer_norm)

    def _run_single(self, step: Step, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        (adapter,) = step.mixture.adapters
        config = adapter.config
        x, _, residual = reference.adapter_pre(state, input, layer_norm, config)
        if self._is_literal:
            parameters = parameters_by_name(adapter)
            up = reference.adapter_up(x, parameters, config, adapter.scaling, adapter.training)
        elif adapter.is_plain():
            kept = None if config["is_parallel"] else residual
            return step.mixture.run([_packed_input(adapter, x)], None, kept, None)[0]
        else:
            parameters = parameters_by_name(adapter)
            up, _ = step.mixture.run([_packed_input(adapter, x)], None, None, None)
            if _drops_path(adapter):
                up = reference.drop_path(up, config["stochastic_depth"])
        out, gate = reference.adapter_output(up, x, residual, parameters, config, adapter.training)
        context = ForwardContext.get_context()
        if gate is not None and context is not None and context.output_adapter_gating_scores:
            name = step.stage.branches[0].adapter
            context.record("adapter_gating_scores", name, self.layer_idx, self.location, gate)
        return out

    def _run_fusion(self, step: Step, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        fusion, adapters = step.mixture.fusion, step.mixture.adapters
        x, query, residual = reference.adapter_pre(
            state, input, layer_norm, step.mixture.config, fusion.config
        )
        inputs = []
        for adapter, before in zip(adapters, step.before, strict=True):
            branch_x = x
            if before is not None:
                for single in before:
                    branch_x = self._run_single(single, branch_x, input, layer_norm)
                branch_x = reference.adapter_pre(branch_x, input, layer_norm, adapter.config).hidden
            inputs.append(branch_x)
        mask = _score_mask(fusion, x, len(adapters))
        # stochastic depth has a factor for each row and adapter: no packed weights hold that
        if self._is_literal or any(map(_drops_path, adapters)):
            up = [
                reference.adapter_up(x, parameters_by_name(a), a.config, a.scaling, a.training)
                for a, x in zip(adapters, inputs, strict=True)
            ]
            temperature = 1.0 if fusion.temperature is None else fusion.temperature
            out, attention = reference.adapter_fusion(
                query, torch.stack(up, dim=-2), residual, parameters_by_name(fusion),
                fusion.config, temperature, mask,
            )  # fmt: skip
        else:
            inputs = _packed_inputs(adapters, inputs)
            shared = len(inputs) == 1 and inputs[0] is query
            out, attention = step.mixture.run(inputs, None if shared else query, residual, mask)
        self._report(step.stage, attention)
        return out

    def _report(self, stage: Stage, attention: Tensor) -> None:
        context = ForwardContext.get_context()
        if context is None or not context.output_adapter_fusion_attentions or stage.fusion is None:
            return
        place = self.layer_idx, self.location
        context.record("adapter_fusion_attentions", stage.fusion, *place, attention)

    @property
    def _is_literal(self) -> bool:
        return self.settings.backend == "reference"


def _drops_path(adapter: Adapter) -> bool:
    if not adapter.training:
        return False
    return bool(adapter.config["stochastic_depth"]) and not adapter.config["is_parallel"]


def _packed_input(adapter: Adapter, x: Tensor) -> Tensor:
    """What the packed down-projection reads: with `ln_before`, the bare normalised rows."""
    return F.layer_norm(x, x.shape[-1:]) if adapter.config["ln_before"] else x


def _packed_inputs(adapters: list[Adapter], inputs: list[Tensor]) -> list[Tensor]:
    """One input where all adapters read the same rows, else one for each."""
    norms = {adapter.config["ln_before"] for adapter in adapters}
    if len(norms) == 1 and all(x is inputs[0] for x in inputs):
        return [_packed_input(adapters[0], inputs[0])]
    return [_packed_input(adapter, x) for adapter, x in zip(adapters, inputs, strict=True)]


def _score_mask(fusion: AdapterFusion, like: Tensor, num_adapters: int) -> Tensor | None:
    """Dropout on the scores, [B, S, N]; under one seed the one that `adapters` draws on a CPU."""
    if not fusion.training or not fusion.dropout:
        return None
    ones = like.new_ones(*like.shape[:-1], num_adapters)
    return F.dropout(ones, fusion.dropout)
