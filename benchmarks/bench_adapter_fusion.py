"""One place of AdapterFusion: the literal formulas, the op's backends and its bare matrix products.

    python benchmarks/bench_adapter_fusion.py --json benchmarks/results/adapter_fusion.json
    pytest benchmarks/bench_adapter_fusion.py --benchmark-only

T = 1024 rows (8 x 128), H = 768, d = 48, relu, packs cached, as in inference. `products` is the
floor: three `torch.mm(out=)` into tensors that exist already, without biases, with nothing between
them. Every round times each provider once, in turn, so that whatever else the machine does falls on
all of them; medians and quartiles are over the rounds. Ratios are medians of the rounds' ratios.
"""

import functools
from collections.abc import Callable

import measure
import pytest
import torch

from fastfusion import reference
from fastfusion.absorb import Attention, Bottleneck, pack_absorbed
from fastfusion.configuration import AdapterFusionConfig, SeqBnConfig
from fastfusion.ops import PackedWeights, adapter_fusion
from fastfusion.ops.activations import activation_code

BATCH, SEQUENCE, HIDDEN, SIZE = 8, 128, 768, 48
ADAPTERS = (3, 8, 16)
MODES = ("forward", "forward+backward")
PROVIDERS = ("products", "reference", "torch", "cpp", "compiled reference", "compiled torch")

ADAPTER_CONFIG = SeqBnConfig(reduction_factor=HIDDEN // SIZE)
FUSION_CONFIG = AdapterFusionConfig()


def parameters(adapters: int) -> tuple[list[Bottleneck], Attention]:
    """Random parameters whose scores are of the order of one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    bottlenecks = [
        Bottleneck(
            normal(SIZE, HIDDEN, scale=HIDDEN**-0.5),
            normal(SIZE, scale=0.1),
            normal(HIDDEN, SIZE, scale=SIZE**-0.5),
            normal(HIDDEN, scale=0.1),
            1.0,
            None,
            None,
            activation_code(ADAPTER_CONFIG["non_linearity"]),
        )
        for _ in range(adapters)
    ]
    square = functools.partial(normal, HIDDEN, HIDDEN, scale=HIDDEN**-0.5)
    bias = functools.partial(normal, HIDDEN, scale=0.1)
    return bottlenecks, Attention(square() * 0.3, bias(), square() * 0.3, bias(), square())


def literal(bottlenecks: list[Bottleneck], attention: Attention) -> Callable:
    """The reference's path: a loop over the adapters, then attention over their stacked outputs."""
    names = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    adapters = [dict(zip(names, bottleneck[:4], strict=True)) for bottleneck in bottlenecks]
    names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    fusion = dict(zip(names, attention, strict=True))

    def run(x: torch.Tensor) -> torch.Tensor:
        up = torch.stack(
            [reference.adapter_up(x, adapter, ADAPTER_CONFIG, 1.0) for adapter in adapters], dim=2
        )
        return reference.adapter_fusion(x, up, x, fusion, FUSION_CONFIG)[0]

    return run


def mixture(weights: PackedWeights, backend: str) -> Callable:
    """The op on packed weights."""

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, HIDDEN)
        return adapter_fusion([rows], None, rows, weights, backend=backend)[0].view_as(x)

    return run


def cached(weights: PackedWeights) -> PackedWeights:
    """The score weights directly behind the down weights, as the inference cache stores them."""
    stacked = torch.cat([weights.w_down, weights.w_score])
    w_down, w_score = stacked.split([weights.w_down.shape[0], weights.w_score.shape[0]])
    return weights._replace(w_down=w_down, w_score=w_score)


def products(adapters: int) -> Callable:
    """The three matrix products alone: down, score and output."""
    rows, columns = BATCH * SEQUENCE, adapters * SIZE
    used = columns + adapters
    down, score, out = (torch.randn(n, HIDDEN) for n in (columns, used, used))
    z, t, result = (torch.empty(rows, n) for n in (columns, used, HIDDEN))

    def run(x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, HIDDEN)
        torch.mm(flat, down.t(), out=z)
        torch.mm(flat, score.t(), out=t)
        return torch.mm(t, out, out=result)

    return run


def setup(adapters: int, provider: str, mode: str) -> Callable[[], torch.Tensor]:
    """A call to time. Backward: of the input alone, through frozen weights."""
    if provider == "products":
        run = products(adapters)
    else:
        drawn = parameters(adapters)
        name = provider.removeprefix("compiled ")
        if name == "reference":
            run = literal(*drawn)
        else:
            run = mixture(cached(pack_absorbed(*drawn)), name)
        if name != provider:
            run = torch.compile(run, fullgraph=True)
    x = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1))
    if mode == "forward":

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run(x)

        return call

    x.requires_grad_()
    seed = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(2))

    def step() -> torch.Tensor:
        return torch.autograd.grad(run(x), x, seed)[0]

    return step


def providers(mode: str) -> tuple[str, ...]:
    """The bare products have no backward."""
    return PROVIDERS if mode == "forward" else PROVIDERS[1:]


def compare(adapters: int, mode: str, rounds: int) -> dict[str, dict]:
    """Interleaved rounds over all providers: times, ratios and the distance of their outputs."""
    calls = {provider: setup(adapters, provider, mode) for provider in providers(mode)}
    truth = calls["reference"]().double()
    results = {}
    for provider, call in calls.items():
        call()
        results[provider] = {"relative_error": None}
        if provider != "products":
            error = (call().double() - truth).norm() / truth.norm()
            results[provider]["relative_error"] = float(f"{error:.2e}")
    times_ms = measure.interleaved(calls, rounds, warmup=1)
    for provider, own in times_ms.items():
        results[provider]["ms"] = measure.quartiles(own)
        for other in ("products", "reference"):
            if other in times_ms:
                results[provider][f"over_{other}"] = measure.ratios(own, times_ms[other])
    return results


def growth(rounds: int) -> list[float]:
    """Time at N=16 over time at N=8, of the C++ backend."""
    calls = {str(adapters): setup(adapters, "cpp", "forward") for adapters in (8, 16)}
    times_ms = measure.interleaved(calls, rounds)
    return measure.ratios(times_ms["16"], times_ms["8"])


def show(adapters: int, mode: str, results: dict[str, dict]) -> None:
    """A table on standard output."""
    print(f"\nN={adapters}, {mode}: median ms [quartiles], over the products, speed-up, error")
    for provider, result in results.items():
        low, middle, high = result["ms"]
        floor = f"{result['over_products'][1]:.2f}x" if "over_products" in result else "-"
        speedup = 1 / result["over_reference"][1]
        error = result["relative_error"]
        print(
            f"  {provider:20s}{middle:8.2f} [{low:.2f}, {high:.2f}]  {floor:>6s}  "
            f"{speedup:6.2f}x  {'-' if error is None else f'{error:.0e}'}"
        )


def main() -> None:
    arguments = measure.parser(__doc__.splitlines()[0], rounds=25).parse_args()
    torch.set_num_threads(arguments.threads)
    record = {**measure.environment(), "rounds": arguments.rounds, "results": {}}
    for mode in MODES:
        for adapters in ADAPTERS:
            results = compare(adapters, mode, arguments.rounds)
            show(adapters, mode, results)
            record["results"][f"N={adapters} {mode}"] = results
    record["growth_8_to_16"] = growth(arguments.rounds)
    print(f"\ncpp, N=16 over N=8: {record['growth_8_to_16'][1]:.2f}x")
    measure.append(arguments.json, record)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize(
    ("mode", "provider"), [(mode, provider) for mode in MODES for provider in providers(mode)]
)
def test_adapter_fusion(benchmark, adapters: int, mode: str, provider: str) -> None:
    call = setup(adapters, provider, mode)
    if provider != "products":
        truth = setup(adapters, "reference", mode)()
        torch.testing.assert_close(call(), truth, rtol=1e-4, atol=1e-4)
    benchmark.group = f"N={adapters} {mode}"
    benchmark(call)


if __name__ == "__main__":
    main()
