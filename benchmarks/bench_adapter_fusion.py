"""One place of AdapterFusion: the literal formulas, the op's backends and its bare matrix products.

    python benchmarks/bench_adapter_fusion.py
    pytest benchmarks/bench_adapter_fusion.py --benchmark-only

T = 1024 rows (8 x 128), H = 768, d = 48, relu, packs cached, as in inference. `products` is the
floor: three `torch.mm(out=)` into tensors that exist already, without biases, with nothing between
them, their ragged columns rounded up to the multiple of eight that is faster. The bf16 mode
compares with the literal formulas in bf16; errors are against fp64. Medians and quartiles of
interleaved rounds; ratios are medians of the rounds' own ratios.
"""

from collections.abc import Callable

import measure
import pytest
import torch
from place import HIDDEN, SIZE, literal, mixture, packed, parameters, to

BATCH, SEQUENCE = 8, 128
ADAPTERS = (3, 8, 16)
MODES = ("forward", "forward+backward", "bf16 forward")
# fp32: rounding alone. bf16: 8 bits of mantissa, some products deep
ALLOWED_ERROR = {"forward": 1e-4, "forward+backward": 1e-4, "bf16 forward": 2e-2}
PROVIDERS = ("products", "reference", "torch", "cpp", "compiled reference", "compiled torch")


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


def setup(adapters: int, provider: str, mode: str) -> Callable[[], torch.Tensor]:
    """A call to time. Backward: of the input alone, through frozen weights."""
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    drawn = to(parameters(adapters), dtype)
    x = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    if provider == "products":
        run = products(adapters)
    elif provider == "fp64":
        run, x = literal(to(drawn, torch.float64)), x.double()
    else:
        name = provider.removeprefix("compiled ")
        if name == "reference":
            run = literal(drawn)
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
