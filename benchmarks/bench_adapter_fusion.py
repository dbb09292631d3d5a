"""One place of AdapterFusion: the literal formulas, the op's backends and its bare matrix products.

    python benchmarks/bench_adapter_fusion.py
    pytest benchmarks/bench_adapter_fusion.py --benchmark-only

T = 1024 rows (8 x 128), H = 768, d = 48, relu, packs cached, as in inference. `products` is the
floor: three `torch.mm(out=)` into tensors that exist already, without biases, with nothing between
them, their ragged columns rounded up to the multiple of eight that is faster. The bf16 mode
compares with the literal formulas in bf16; errors are against fp64. Medians and quartiles of
interleaved rounds; ratios are medians of the rounds' own ratios.
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
MODES = ("forward", "forward+backward", "bf16 forward")
# fp32: rounding alone. bf16: 8 bits of mantissa, some products deep
ALLOWED_ERROR = {"forward": 1e-4, "forward+backward": 1e-4, "bf16 forward": 2e-2}
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
    used = (columns + adapters + 7) // 8 * 8
    down, score, out = (torch.randn(n, HIDDEN) for n in (columns, used, used))
    z, t, result = (torch.empty(rows, n) for n in (columns, used, HIDDEN))

    def run(x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, HIDDEN)
        torch.mm(flat, down.t(), out=z)
        torch.mm(flat, score.t(), out=t)
        return torch.mm(t, out, out=result)

    return run


def to_dtype(drawn: tuple[list[Bottleneck], Attention], dtype: torch.dtype):
    """The same parameters, rounded to a dtype."""
    bottlenecks = [
        Bottleneck(*(t.to(dtype) for t in bottleneck[:4]), *bottleneck[4:])
        for bottleneck in drawn[0]
    ]
    return bottlenecks, Attention(*(t.to(dtype) for t in drawn[1]))


def packed(drawn: tuple[list[Bottleneck], Attention], dtype: torch.dtype) -> PackedWeights:
    """Packed in fp64 and cast once, as the inference cache does it."""
    weights = pack_absorbed(*to_dtype(drawn, torch.float64))
    cast = (t if t is None else t.to(dtype) for t in weights[:6])
    return cached(PackedWeights(*cast, *weights[6:]))


def setup(adapters: int, provider: str, mode: str) -> Callable[[], torch.Tensor]:
    """A call to time. Backward: of the input alone, through frozen weights."""
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    drawn = to_dtype(parameters(adapters), dtype)
    x = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    if provider == "products":
        run = products(adapters)
    elif provider == "fp64":
        run, x = literal(*to_dtype(drawn, torch.float64)), x.double()
    else:
        name = provider.removeprefix("compiled ")
        if name == "reference":
            run = literal(*drawn)
        else:
            run = mixture(packed(drawn, dtype), name)
        if name != provider:
            run = torch.compile(run, fullgraph=True)
    if mode != "forward+backward":

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run(x)

        return call

    x.requires_grad_()
    generator = torch.Generator().manual_seed(2)
    seed = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=generator).to(x.dtype)

    def step() -> torch.Tensor:
        return torch.autograd.grad(run(x), x, seed)[0]

    return step


def providers(mode: str) -> tuple[str, ...]:
    """The bare products have no backward; bf16 is a matter of the C++ backend."""
    if mode == "bf16 forward":
        return ("reference", "torch", "cpp")
    return PROVIDERS if mode == "forward" else PROVIDERS[1:]


def compare(adapters: int, mode: str, rounds: int) -> dict[str, dict]:
    """Interleaved rounds over all providers: times, ratios and the distance of their outputs."""
    calls = {provider: setup(adapters, provider, mode) for provider in providers(mode)}
    truth = setup(adapters, "fp64", mode)()
    results = {}
    for provider, call in calls.items():
        call()
        results[provider] = {"relative_error": None}
        if provider != "products":
            error = measure.relative_error(call(), truth, ALLOWED_ERROR[mode])
            results[provider]["relative_error"] = error
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
    arguments = measure.parser(__doc__.splitlines()[0], "adapter_fusion", rounds=25).parse_args()
    record = measure.start(arguments)
    for mode in MODES:
        for adapters in ADAPTERS:
            results = compare(adapters, mode, arguments.rounds)
            show(adapters, mode, results)
            measure.append(arguments.json, {**record, "results": {f"N={adapters} {mode}": results}})
    grown = growth(arguments.rounds)
    print(f"\ncpp, N=16 over N=8: {grown[1]:.2f}x")
    measure.append(arguments.json, {**record, "growth_8_to_16": grown})


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize(
    ("mode", "provider"), [(mode, provider) for mode in MODES for provider in providers(mode)]
)
def test_adapter_fusion(benchmark, adapters: int, mode: str, provider: str) -> None:
    call = setup(adapters, provider, mode)
    if provider != "products":
        measure.relative_error(call(), setup(adapters, "fp64", mode)(), ALLOWED_ERROR[mode])
    benchmark.group = f"N={adapters} {mode}"
    benchmark(call)


if __name__ == "__main__":
    main()
