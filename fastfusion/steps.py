"""The stages of a plan with the modules that they name: what runs on one lane's hidden states."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .context import ForwardContext
from .lowering import Stage
from .mixture import Mixture
from .modules import Adapter, AdapterFusion, parameters_by_name


class Around(NamedTuple):
    """What a step finds at its place beside the state."""

    input: Tensor
    """[B, S, H], the sub-layer's input."""
    layer_norm: nn.Module | None
    """The model's own."""
    is_literal: bool
    """Whether the reference's formulas run."""
    record: Callable[..., None]
    """Takes an output's name, a fusion's or an adapter's, and value and `own` as
    `ForwardContext.record` does."""
    copies: int
    """How often the rows hold the batch, under a Parallel."""
    forward: ForwardContext
    """What the model's forward says of these rows; an empty one outside of it."""


class State(NamedTuple):
    """What one step leaves for the next."""

    hidden: Tensor
    """[B, S, H]"""
    residual: Tensor
    """[B, S, H], of the last pre step."""


class InnerPlan(Protocol):
    """A plan inside a stage: an Average's child."""

    steps: "list[Step]"

    def run(self, state: State, around: Around, is_inner: bool) -> Tensor:
        """What leaves its lanes."""


class Step:
    """A stage with its modules.

    Args:
        stage: what to run.
        mixture: its adapters, and the fusion over them; None for an Average over blocks.
        pre: the adapters whose pre steps come first.
        before: for each branch of a Fuse the steps in front of it, or None.
        plans: the children of an Average over blocks.
    """

    def __init__(
        self,
        stage: Stage,
        mixture: Mixture | None,
        pre: Sequence[Adapter],
        before: Sequence["list[Step] | None"] = (),
        plans: Sequence[InnerPlan] = (),
    ):
        self.stage = stage
        self.mixture = mixture
        self.pre = list(pre)
        self.before = list(before)
        self.plans = list(plans)

    def run(self, state: State, around: Around) -> State:
        """The state behind the stage."""
        state, query = self.run_pre(state, around)
        mixture = self.mixture
        if mixture is None:
            outputs = [plan.run(state, around, is_inner=True) for plan in self.plans]
            hidden = _weighted_sum(outputs, self.stage.weights)
        elif mixture.fusion is not None:
            hidden = self._run_fusion(state, query, around)
        elif self.stage.weights is not None:
            hidden = self._run_average(state, around)
        else:
            hidden = self._run_single(mixture.adapters[0], state, around)
        return State(hidden, state.residual)

    def run_pre(self, state: State, around: Around) -> tuple[State, Tensor]:
        """The state behind the pre steps, and the query of a fusion."""
        fusion = None if self.mixture is None else self.mixture.fusion
        query = state.hidden
        for i, adapter in enumerate(self.pre):
            is_last = i == len(self.pre) - 1
            hidden, query, residual = reference.adapter_pre(
                state.hidden, around.input, around.layer_norm, adapter.config,
                fusion.config if fusion is not None and is_last else None,
            )  # fmt: skip
            state = State(hidden, residual)
        return state, query

    def is_one_mixture(self) -> bool:
        """Whether the packed weights hold all that the stage computes behind its pre steps."""
        mixture = self.mixture
        if mixture is None or any(before is not None for before in self.before):
            return False
        if mixture.fusion is None:
            return all(adapter.is_plain() for adapter in mixture.adapters)
        # stochastic depth has a factor for each row and adapter: no packed weights hold that
        return not any(map(_drops_path, mixture.adapters))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all adapters and fusions that the stage runs."""
        if self.mixture is not None:
            for module in (*self.mixture.adapters, self.mixture.fusion):
                if module is not None:
                    yield from module.parameters()
        inner = itertools.chain(*filter(None, self.before), *(plan.steps for plan in self.plans))
        for step in inner:
            yield from step.parameters()

    def _run_single(self, adapter: Adapter, state: State, around: Around) -> Tensor:
        x, residual = state
        config = adapter.config
        # the mixture is this adapter and no more, not even its weight in an Average
        is_mixture = len(self.mixture.adapters) == 1 and self.mixture.weights is None
        is_mixture = is_mixture and not around.is_literal
        if is_mixture and adapter.is_plain():
            kept = None if config["is_parallel"] else residual
            return self.mixture.run([_packed_input(adapter, x)], None, kept, None)[0]
        parameters = parameters_by_name(adapter)
        if not is_mixture:
            up = reference.adapter_up(x, parameters, config, adapter.scaling, adapter.training)
        else:
            up, _ = self.mixture.run([_packed_input(adapter, x)], None, None, None)
            if _drops_path(adapter):
                up = reference.drop_path(up, config["stochastic_depth"])
        out, gate = reference.adapter_output(up, x, residual, parameters, config, adapter.training)
        if gate is not None:
            branch = self.mixture.adapters.index(adapter)
            around.record("adapter_gating_scores", self.stage.branches[branch].adapter, gate)
        return out

    def _run_average(self, state: State, around: Around) -> Tensor:
        adapters, weights = self.mixture.adapters, self.stage.weights
        inputs = {adapter.config["ln_before"] for adapter in adapters}
        if around.is_literal or not self.is_one_mixture() or len(inputs) > 1:
            outputs = [self._run_single(adapter, state, around) for adapter in adapters]
            return _weighted_sum(outputs, weights)
        share = self.mixture.residual_share
        residual = None if share == 0.0 else state.residual
        if residual is not None and share != 1.0:
            residual = share * residual
        x = _packed_input(adapters[0], state.hidden)
        return self.mixture.run([x], None, residual, None)[0]

    def _run_fusion(self, state: State, query: Tensor, around: Around) -> Tensor:
        fusion, adapters = self.mixture.fusion, self.mixture.adapters
        inputs = []
        for adapter, before in zip(adapters, self.before, strict=True):
            branch = state
            if before is not None:
                for single in before:
                    branch = single.run(branch, around)
                x = reference.adapter_pre(
                    branch.hidden, around.input, around.layer_norm, adapter.config
                ).hidden
                branch = State(x, branch.residual)
            inputs.append(branch.hidden)
        mask = score_mask(fusion, state.hidden, len(adapters))
        if around.is_literal or any(map(_drops_path, adapters)):
            up = [
                reference.adapter_up(x, parameters_by_name(a), a.config, a.scaling, a.training)
                for a, x in zip(adapters, inputs, strict=True)
            ]
            temperature = 1.0 if fusion.temperature is None else fusion.temperature
            out, attention = reference.adapter_fusion(
                query, torch.stack(up, dim=-2), state.residual, parameters_by_name(fusion),
                fusion.config, temperature, mask,
            )  # fmt: skip
        else:
            inputs = _packed_inputs(adapters, inputs)
            shared = len(inputs) == 1 and inputs[0] is query
            query = None if shared else query
            out, attention = self.mixture.run(inputs, query, state.residual, mask)
        self.report(attention, around)
        return out

    def report(self, attention: Tensor, around: Around, own: Tensor | None = None) -> None:
        """Hand a fusion's attention [B, S, N], of some tokens [B, S] or all, to the context."""
        if self.stage.fusion is not None:
            around.record("adapter_fusion_attentions", self.stage.fusion, attention, own)


def score_mask(fusion: AdapterFusion, like: Tensor, num_adapters: int) -> Tensor | None:
    """Dropout on the scores, [B, S, N]; under one seed the one that `adapters` draws on a CPU."""
    if not fusion.training or not fusion.dropout:
        return None
    ones = like.new_ones(*like.shape[:-1], num_adapters)
    return F.dropout(ones, fusion.dropout)


def _weighted_sum(outputs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total


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
