"""The literal recursion over a composition tree at one place: the truth of the tests.

Written from what `adapters` 1.3.0 does (`compose_*` in methods/adapter_layer_base.py and
bottleneck.py) and from the list of decisions where it fails, and from nothing of `fastfusion` but
the reference of a single adapter and a single fusion. A state is walked through the blocks, cut for
the children of a block that gives each its own part and put together again behind it:

- a name, and a block other than Stack, takes the pre step of its first adapter, a Fuse that of its
  last; the post step at the end is that of the last adapter in the tree;
- adapters that are absent are skipped, and "first" and "last" are meant among those present; rows
  and tokens that no adapter saw are the model's own, `layer_norm(hidden + input)`;
- the batch is copied by the first Parallel; a BatchSplit cuts each copy.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfusion import reference
from fastfusion.composition import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Split,
    Stack,
)
from fastfusion.modules import parameters_by_name


class Part(NamedTuple):
    """An adapter or a fusion."""

    config: Any
    parameters: dict[str, Tensor]
    scaling: float = 1.0


class Place(NamedTuple):
    """What a recursion finds at its place."""

    adapters: dict[str, Part]
    fusions: dict[str, Part]
    layer_norm: nn.Module | None


class State(NamedTuple):
    """What one block leaves for the next."""

    hidden: Tensor
    """[R, L, H]"""
    input: Tensor
    """[R, L, H]"""
    residual: Tensor
    """[R, L, H]"""
    ran: Tensor
    """[R, L], whether an adapter saw the token."""
    rows: Tensor
    """[R], the rows' numbers in the whole batch, with all its copies."""
    tokens: Tensor
    """[L], the tokens' numbers in the whole sequence."""
    tasks: Tensor | None
    """[R], of a MultiTask."""
    copies: int
    """How many copies of the batch the rows are."""


class Record(NamedTuple):
    """The attention of one run of a fusion, or one run of a gate, on a part of the batch."""

    kind: str
    name: str
    rows: Tensor
    tokens: Tensor
    value: Tensor


def leaves(modules: dict[str, nn.Module], dtype: torch.dtype) -> tuple[dict[str, Part], dict]:
    """The modules' parameters as fresh leaves: parts by name, and all leaves by parameter name."""
    made: dict[int, Tensor] = {}
    parts, named = {}, {}
    for name, module in modules.items():
        for parameter in module.parameters():
            made[id(parameter)] = parameter.detach().to(dtype).clone().requires_grad_()
        own = {key: made[id(p)] for key, p in parameters_by_name(module).items()}
        scaling = module.__dict__.get("scaling", 1.0)
        parts[name] = Part(module.config, own, scaling)
        named |= {f"{name}.{key}": made[id(p)] for key, p in module.named_parameters()}
    return parts, named


class Walk:
    """One forward of one place.

    Args:
        place: the adapters that are present, the fusions and the model's LayerNorm.
        is_copied: whether the batch comes with a copy for each child of a Parallel already.
    """

    def __init__(self, place: Place, is_copied: bool = False):
        self.place = place
        self.is_copied = is_copied
        self.records: list[Record] = []

    def run(self, setup: Any, hidden: Tensor, input: Tensor, tasks: Tensor | None = None) -> Tensor:
        """What leaves the place.

        Args:
            setup: a name, a block or None.
            hidden, input: [B, S, H], with `is_copied` all copies of it.
            tasks: [B], the rows' numbers of a MultiTask's children.
        """
        copies = _channels(setup) if self.is_copied else 1
        rows, tokens = torch.arange(hidden.shape[0]), torch.arange(hidden.shape[1])
        tasks = None if tasks is None else tasks.repeat(copies)
        ran = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        state = State(hidden, input, input, ran, rows, tokens, tasks, copies)
        state = self.compose(setup, state)
        hidden = hidden.repeat(state.hidden.shape[0] // hidden.shape[0], 1, 1)
        layer_norm = self.place.layer_norm
        native = hidden + state.input
        native = native if layer_norm is None else layer_norm(native)
        present = list(self.present(setup))
        if not present:
            return native
        config = self.place.adapters[present[-1]].config
        out = reference.adapter_post(state.hidden, hidden, state.input, layer_norm, config)
        return torch.where(state.ran.unsqueeze(-1), out, native)

    def present(self, setup: Any) -> Iterator[str]:
        """The names in a tree that are present, first to last."""
        if isinstance(setup, str):
            if setup in self.place.adapters:
                yield setup
        elif setup is not None:
            for child in setup:
                yield from self.present(child)

    def pre(self, name: str, state: State, fusion: Any = None) -> tuple[State, Tensor]:
        """The pre step of one adapter, and the query."""
        config, layer_norm = self.place.adapters[name].config, self.place.layer_norm
        hidden, query, residual = reference.adapter_pre(
            state.hidden, state.input, layer_norm, config, fusion
        )
        return state._replace(hidden=hidden, residual=residual), query

    def single(self, name: str, state: State) -> tuple[State, Tensor]:
        """One adapter without its pre step, and its scaled up-projection."""
        config, parameters, scaling = self.place.adapters[name]
        up = reference.adapter_up(state.hidden, parameters, config, scaling)
        out, gate = reference.adapter_output(up, state.hidden, state.residual, parameters, config)
        if gate is not None:
            self._record("adapter_gating_scores", name, state, gate)
        return state._replace(hidden=out, ran=torch.ones_like(state.ran)), up

    def _record(self, kind: str, name: str, state: State, value: Tensor) -> None:
        self.records.append(Record(kind, name, state.rows, state.tokens, value.detach()))

    def compose(self, setup: Any, state: State) -> State:
        present = list(self.present(setup))
        if not present:
            return state
        if isinstance(setup, str):
            return self.single(setup, state)[0]
        if isinstance(setup, Stack):
            for child in setup:
                if isinstance(child, str) and child in present:
                    state, _ = self.pre(child, state)
                state = self.compose(child, state)
            return state
        if isinstance(setup, Fuse):
            return self.fuse(setup, state)
        if isinstance(setup, Average):
            return self.average(setup, state)
        if isinstance(setup, Parallel) and state.copies == 1:
            state = self.copy(state, len(setup))
        before = state
        state, _ = self.pre(present[0], state)
        if isinstance(setup, MultiTask):
            # it runs as a BatchSplit, which takes a pre step too
            state, _ = self.pre(present[0], state)
        result = before
        for child, rows, tokens in _parts(setup, state):
            if not any(self.present(child)) or len(rows) == 0 or len(tokens) == 0:
                continue
            part = state._replace(
                hidden=state.hidden[rows][:, tokens],
                input=state.input[rows][:, tokens],
                residual=state.residual[rows][:, tokens],
                ran=state.ran[rows][:, tokens],
                rows=state.rows[rows],
                tokens=state.tokens[tokens],
                tasks=None if state.tasks is None else state.tasks[rows],
                copies=1 if isinstance(setup, Parallel) else state.copies,
            )
            part = self.compose(child, part)
            at = (rows.unsqueeze(1), tokens.unsqueeze(0))
            result = result._replace(
                hidden=result.hidden.index_put(at, part.hidden),
                ran=result.ran.index_put(at, part.ran),
            )
        return result

    def copy(self, state: State, count: int) -> State:
        """The state with a copy for each child of a Parallel, one behind the other."""
        size = len(state.rows)

        def repeated(rows: Tensor) -> Tensor:
            return torch.cat([rows + i * size for i in range(count)])

        self.records = [
            record._replace(
                rows=repeated(record.rows),
                value=record.value.repeat(count, *[1] * (record.value.dim() - 1)),
            )
            for record in self.records
        ]
        return state._replace(
            hidden=state.hidden.repeat(count, 1, 1),
            input=state.input.repeat(count, 1, 1),
            residual=state.residual.repeat(count, 1, 1),
            ran=state.ran.repeat(count, 1),
            rows=repeated(state.rows),
            tasks=None if state.tasks is None else state.tasks.repeat(count),
            copies=count,
        )

    def fuse(self, setup: Fuse, state: State) -> State:
        config, parameters, _ = self.place.fusions[setup.name]
        children = [child for child in setup if any(self.present(child))]
        last = list(self.present(children[-1]))[-1]
        state, query = self.pre(last, state, config)
        ups = []
        for child in children:
            branch, up = state, None
            for name in self.present(child):
                if not isinstance(child, str):
                    # a Stack's names take their own pre steps, behind that of the Fuse
                    branch, _ = self.pre(name, branch)
                records = list(self.records)
                branch, up = self.single(name, branch)
            # of a branch's last adapter only the up-projection is used, not its gate
            self.records = records
            ups.append(up)
        out, attention = reference.adapter_fusion(
            query, torch.stack(ups, dim=-2), state.residual, parameters, config,
            50.0 if config["temperature"] else 1.0,
        )  # fmt: skip
        self._record("adapter_fusion_attentions", setup.name, state, attention)
        return state._replace(hidden=out, ran=torch.ones_like(state.ran))

    def average(self, setup: Average, state: State) -> State:
        present = [i for i, child in enumerate(setup) if any(self.present(child))]
        state, _ = self.pre(list(self.present(setup))[0], state)
        weights = [setup.weights[i] for i in present]
        if setup.peer_scaling and len(present) == 1 < len(setup):
            weights = [sum(setup.weights) / len(setup)]
        else:
            share = sum(setup.weights) / sum(weights) if len(present) < len(setup) else 1.0
            count = len(present) if setup.peer_scaling else 1
            weights = [weight * share / count for weight in weights]
        outs = [self.compose(setup[i], state).hidden for i in present]
        hidden = sum(weight * out for weight, out in zip(weights, outs, strict=True))
        return state._replace(hidden=hidden, ran=torch.ones_like(state.ran))


def _channels(setup: Any) -> int:
    """The number of children of the tree's Parallels."""
    if setup is None or isinstance(setup, str):
        return 1
    if isinstance(setup, Parallel):
        return len(setup)
    return max(map(_channels, setup))


def _parts(setup: Any, state: State) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each child of a block with the rows and tokens that it gets."""
    rows, tokens = torch.arange(len(state.rows)), torch.arange(len(state.tokens))
    if isinstance(setup, Split):
        sizes = setup.splits
        if sizes is None:
            first = min(setup.split_index, len(tokens))
            sizes = [first, len(tokens) - first]
        assert sum(sizes) == len(tokens), (sizes, len(tokens))
        for child, part in zip(setup, tokens.split(sizes), strict=True):
            yield child, rows, part
    elif isinstance(setup, BatchSplit):
        assert sum(setup.batch_sizes) * state.copies == len(rows)
        batch = rows.view(state.copies, -1)
        for child, part in zip(setup, batch.split(setup.batch_sizes, dim=1), strict=True):
            yield child, part.flatten(), tokens
    elif isinstance(setup, Parallel):
        for child, part in zip(setup, rows.view(len(setup), -1), strict=True):
            yield child, part, tokens
    else:
        assert isinstance(setup, MultiTask)
        for i, child in enumerate(setup):
            yield child, (state.tasks == i).nonzero().flatten(), tokens


def spread(records: list[Record], rows: int, tokens: int) -> dict[tuple[str, str], Tensor]:
    """What a forward reports: the last value at each row and token, zeros where there is none."""
    found: dict[tuple[str, str], Tensor] = {}
    for kind, name, own_rows, own_tokens, value in records:
        key = kind, name
        if kind == "adapter_fusion_attentions":
            full = found.setdefault(key, value.new_zeros(rows, tokens, value.shape[-1]))
            full[own_rows.unsqueeze(1), own_tokens.unsqueeze(0)] = value
        else:
            full = found.setdefault(key, value.new_zeros(rows))
            full[own_rows] = value
    return found
