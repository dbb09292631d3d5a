"""One place of a model's layer where adapters may sit: from its plan to calls of the op."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import absorb, reference
from .configuration import BnConfig
from .context import AdapterSetup, ForwardContext
from .lowering import Branch, Plan, Stage, lower
from .mixture import Mixture
from .modules import Adapter, AdapterFusion, NamedModules, parameters_by_name
from .packing import PackCache


def _drops_path(adapter: Adapter) -> bool:
    config = adapter.config
    return bool(adapter.training and config["stochastic_depth"] and not config["is_parallel"])


def _adapter_input(adapter: Adapter, x: Tensor) -> Tensor:
    """What the packed down-projection reads: behind a LayerNorm of its own, the bare normalised rows."""
    return F.layer_norm(x, x.shape[-1:]) if adapter.config["ln_before"] else x


def _score_mask(fusion: AdapterFusion, like: Tensor, num_adapters: int) -> Tensor | None:
    """Dropout on the scores, [B, S, N]; under one seed the one that `adapters` draws on a CPU."""
    if not fusion.training or not fusion.dropout:
        return None
    ones = like.new_ones(*like.shape[:-1], num_adapters)
    return F.dropout(ones, fusion.dropout)


class AdapterLayer:
    """The adapters and fusion layers of one place, and what runs there.

    Args:
        model_adapters: what all places of the model share: its `config` and `backend`.
        layer_idx: the layer's number, encoder first.
        location: "mh_adapter" (behind attention) or "output_adapter" (behind the feed-forward).
    """

    def __init__(self, model_adapters: Any, layer_idx: int, location: str):
        self.model_adapters = model_adapters
        self.layer_idx = layer_idx
        self.location = location
        self.packs = PackCache()
        self.adapters = NamedModules(self.packs.drop)
        self.adapter_fusion_layer = NamedModules(self.packs.drop)
        self.plan: Plan = ()

    def update_plan(self) -> None:
        """Lower the model's active setup again: after a change of it, or of the place's modules."""
        self.plan = self._lower(self.model_adapters.config.active_setup)
        self.packs.clear()

    def _lower(self, setup) -> Plan:
        if self.layer_idx in self.model_adapters.config.skip_layers:
            return ()
        return lower(setup, self.adapters.__contains__)

    def _current_plan(self) -> Plan:
        context = AdapterSetup.get_context()
        return self.plan if context is None else self._lower(context.adapter_setup)

    def forward(self, hidden: Tensor, input: Tensor, layer_norm: nn.Module | None) -> Tensor:
        """The state behind the sub-layer: residual, LayerNorm and the active adapters.

        Args:
            hidden: [B, S, H], the sub-layer's output.
            input: [B, S, H], the sub-layer's input.
            layer_norm: the model's own, or None.
        """
        plan = self._current_plan()
        if not plan:
            summed = hidden + input
            return summed if layer_norm is None else layer_norm(summed)
        state = hidden
        for stage in plan[:-1]:
            state = self._run(stage, state, input, layer_norm)
        if self._takes_norm(plan[-1], state, layer_norm):
            mixture = self._mixture(plan[-1], state)
            if mixture.absorbed:
                return self._run_with_norm(mixture, plan[-1], state, input, layer_norm)
        state = self._run(plan[-1], state, input, layer_norm)
        config = self._last_config(plan[-1])
        return reference.adapter_post(state, hidden, input, layer_norm, config)

    def _last_config(self, stage: Stage) -> BnConfig:
        """The pre step, post step and norms of a mixture are those of its last adapter."""
        return self.adapters[stage.branches[-1].adapter].config

    def _run(self, stage: Stage, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        if stage.fusion is None:
            return self._run_single(stage.branches[0].adapter, state, input, layer_norm)
        return self._run_fusion(stage, state, input, layer_norm)

    def _run_single(self, name: str, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        adapter, stage = self.adapters[name], Stage((Branch(name),))
        x, _, residual = reference.adapter_pre(state, input, layer_norm, adapter.config)
        if adapter.is_plain() and not self._is_literal:
            kept = None if adapter.config["is_parallel"] else residual
            return self._mixture(stage, x).run([_adapter_input(adapter, x)], None, kept, None)[0]
        parameters = parameters_by_name(adapter)
        if self._is_literal:
            up = reference.adapter_up(
                x, parameters, adapter.config, adapter.scaling, adapter.training
            )
        else:
            up = self._mixture(stage, x).run([_adapter_input(adapter, x)], None, None, None)[0]
            if _drops_path(adapter):
                up = reference.drop_path(up, adapter.config["stochastic_depth"])
        out, gate = reference.adapter_output(
            up, x, residual, parameters, adapter.config, adapter.training
        )
        context = ForwardContext.get_context()
        if gate is not None and context is not None and context.output_adapter_gating_scores:
            places = context.adapter_gating_scores[name][self.layer_idx]
            places[self.location] = gate.detach()
        return out

    def _run_fusion(self, stage: Stage, state: Tensor, input: Tensor, layer_norm) -> Tensor:
        fusion = self.adapter_fusion_layer[stage.fusion]
        adapters = [self.adapters[branch.adapter] for branch in stage.branches]
        pre = functools.partial(reference.adapter_pre, input=input, layer_norm=layer_norm)
        x, query, residual = pre(state, config=adapters[-1].config, fusion_config=fusion.config)
        inputs = []
        for branch, adapter in zip(stage.branches, adapters, strict=True):
            branch_x = x
            if branch.before is not None:
                for name in branch.before:
                    branch_x = self._run_single(name, branch_x, input, layer_norm)
                branch_x = pre(branch_x, config=adapter.config).hidden
            inputs.append(branch_x)
        mask = _score_mask(fusion, x, len(adapters))
        # stochastic depth has a factor of its own for each row and adapter: no packed weights hold it
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
            if all(branch.before is None for branch in stage.branches):
                norms = {adapter.config["ln_before"] for adapter in adapters}
                if len(norms) == 1:
                    inputs, adapters = inputs[:1], adapters[:1]
            inputs = [_adapter_input(a, x) for a, x in zip(adapters, inputs, strict=True)]
            if len(inputs) == 1 and inputs[0] is query:
                query = None
            out, attention = self._mixture(stage, x).run(inputs, query, residual, mask)
        self._report(stage, attention)
        return out

    def _report(self, stage: Stage, attention: Tensor) -> None:
        context = ForwardContext.get_context()
        if context is not None and context.output_adapter_fusion_attentions:
            places = context.adapter_fusion_attentions[stage.fusion][self.layer_idx]
            places[self.location] = attention.detach()

    @property
    def _is_literal(self) -> bool:
        return self.model_adapters.backend == "reference"

    def _parameters(self, stage: Stage) -> absorb.Parameters:
        attention = None
        if stage.fusion is not None:
            attention = self.adapter_fusion_layer[stage.fusion].attention()
        adapters = [self.adapters[branch.adapter].bottleneck() for branch in stage.branches]
        return absorb.Parameters(adapters, attention)

    def _mixture(self, stage: Stage, like: Tensor) -> Mixture:
        fusion = None if stage.fusion is None else self.adapter_fusion_layer[stage.fusion]
        backend = self.model_adapters.backend
        return Mixture(self._parameters(stage), fusion, self.packs, stage, like, backend)

    def _run_with_norm(self, mixture: Mixture, stage: Stage, state, input, layer_norm) -> Tensor:
        mask = None
        if stage.fusion is not None:
            fusion = self.adapter_fusion_layer[stage.fusion]
            mask = _score_mask(fusion, state, len(stage.branches))
        ln_before = self._last_config(stage)["original_ln_before"]
        out, attention = mixture.run_norm(state, input, layer_norm, ln_before, mask)
        if stage.fusion is not None:
            self._report(stage, attention)
        return out

    def _takes_norm(self, stage: Stage, state: Tensor, layer_norm) -> bool:
        """Whether the stage is the residual and LayerNorm of the model around one mixture."""
        config = self._last_config(stage)
        if (
            self._is_literal
            or type(layer_norm) is not nn.LayerNorm
            or layer_norm.weight is None
            or layer_norm.bias is None
            or config["is_parallel"]
            or config["residual_before_ln"] is not True
            or not config["original_ln_after"]
            or torch.is_autocast_enabled(state.device.type)
        ):
            return False
        trains_norm = layer_norm.weight.requires_grad or layer_norm.bias.requires_grad
        if trains_norm and torch.is_grad_enabled():
            return False
        adapters = [self.adapters[branch.adapter] for branch in stage.branches]
        if stage.fusion is None:
            return adapters[0].is_plain() and not config["ln_before"]
        fusion = self.adapter_fusion_layer[stage.fusion]
        reads_x = not (fusion.config["query_before_ln"] and config["original_ln_before"])
        return reads_x and not any(
            branch.before is not None or adapter.config["ln_before"] or _drops_path(adapter)
            for branch, adapter in zip(stage.branches, adapters, strict=True)
        )
