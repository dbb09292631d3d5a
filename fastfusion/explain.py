"""What a setup becomes, in words: the lanes and stages of every place, their cost and their way."""

import itertools
from collections.abc import Sequence

from .lanes import BoundLane, BoundPlan, obstacle
from .layer import AdapterLayer
from .lowering import Interval, Stage
from .steps import Step


class AdapterPlan:
    """The plans of a model's places.

    Args:
        setup: what they were made of, as a text.
        places: the places and their plans, first layer first.
        hidden_size: H.
    """

    def __init__(
        self, setup: str, places: Sequence[tuple[AdapterLayer, BoundPlan]], hidden_size: int
    ):
        self.setup = setup
        self.places = list(places)
        self.hidden_size = hidden_size

    def __repr__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The plans as a text: places with the same plan once.

        Returns:
            For each plan its lanes (rows, tokens, stages with the multiply-adds of their products a
            token, twice that in flops), how many calls they take together, and which stage has one
            of its own and why.
        """
        texts: dict[str, list[AdapterLayer]] = {}
        for layer, plan in self.places:
            texts.setdefault(self._plan(plan), []).append(layer)
        lines = [f"setup: {self.setup}"]
        for text, layers in texts.items():
            lines += [f"{_places(layers)}: {text}"]
        return "\n".join(lines)

    def _plan(self, plan: BoundPlan) -> str:
        if not any(lane.steps for lane in plan.lanes):
            return "no adapters"
        if plan.plan.is_whole:
            return f"one lane\n{self._lane(plan.lanes[0], is_only=True)}"
        lanes = "\n".join(self._lane(lane) for lane in plan.lanes)
        calls = plan.num_calls
        return f"{len(plan.lanes)} lanes in {calls} {'call' if calls == 1 else 'calls'}\n{lanes}"

    def _lane(self, lane: BoundLane, is_only: bool = False) -> str:
        region = lane.region
        parts = [
            "" if region.task is None else f"rows numbered {region.task}",
            "" if region.channel is None else f"copy {region.channel} of the batch",
            "" if region.rows == (0, None) else f"rows {_interval(region.rows)}",
            "" if region.tokens == (0, None) else f"tokens {_interval(region.tokens)}",
        ]
        where = ", ".join(filter(None, parts)) or "all rows and tokens"
        steps = [self._step(step, is_only) for step in lane.steps]
        return f"  {where}: {' -> '.join(steps) or 'as without adapters'}"

    def _step(self, step: Step, is_only: bool) -> str:
        alone = None if is_only else obstacle(step)
        return self._stage(step) + ("" if alone is None else f" (in a call of its own: {alone})")

    def _stage(self, step: Step) -> str:
        if step.mixture is None:
            children = [
                " and ".join(" -> ".join(map(self._stage, lane.steps)) for lane in plan.lanes)
                for plan in step.plans
            ]
            return f"average of [{'; '.join(children)}]"
        columns = sum(adapter.bottleneck_size for adapter in step.mixture.adapters)
        # down and up, and with attention the scores' product
        cost = (2 if step.stage.fusion is None else 3) * columns * self.hidden_size
        for before in itertools.chain(*filter(None, step.before)):
            columns += before.mixture.adapters[0].bottleneck_size
            cost += 2 * before.mixture.adapters[0].bottleneck_size * self.hidden_size
        text = f"{cost / 1e3:.3g} k" if cost >= 1e3 else cost
        return f"{_mixture(step.stage)} [{columns} columns, {text} multiply-adds]"


def _mixture(stage: Stage) -> str:
    names = []
    for branch in stage.branches:
        before = "".join(f"{name} -> " for name in branch.before or ())
        names.append(before + branch.adapter)
    if stage.fusion is not None:
        return f"attention {stage.fusion!r} over {', '.join(names)}"
    if stage.weights is not None:
        pairs = zip(stage.weights, names, strict=True)
        return " + ".join(f"{weight:.3g} {name}" for weight, name in pairs)
    return names[0]


def _interval(interval: Interval) -> str:
    start, end = interval
    return f"from {start}" if end is None else f"{start} to {end - 1}"


def _places(layers: Sequence[AdapterLayer]) -> str:
    """Layers as ranges, by location."""
    texts = []
    for location in dict.fromkeys(layer.location for layer in layers):
        numbers = [layer.layer_idx for layer in layers if layer.location == location]
        ranges = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            own = [number for _, number in run]
            ranges.append(str(own[0]) if len(own) == 1 else f"{own[0]}-{own[-1]}")
        texts.append(f"layers {', '.join(ranges)}, {location}")
    return "; ".join(texts)
