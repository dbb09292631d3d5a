"""Bugs planted into copies of the Triton kernels: the checks of the other tests must see each.

TRITON_INTERPRET=1 pytest tests/test_planted_bugs.py

A bug is one change of one file's text. What it replaces must be there exactly once, so that a bug
whose place has moved fails here instead of being planted nowhere.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("of Triton's interpreter", allow_module_level=True)

import test_grouped as grouped
from test_adapter_fusion import (
    CASES,
    WEIGHTS,
    Case,
    as_double,
    assert_as_good,
    literal,
    literal_norm,
    norm_tensors_of,
    on,
    run,
    run_norm,
    tensors_of,
)
from triton.runtime.interpreter import InterpreterBuilder

from fastfusion.kernels.triton import tiles
from fastfusion.ops import adapter_fusion_norm, backends, stack

pytestmark = pytest.mark.usefixtures("poisoned_empty")


# --------------------------------------------------------------------------------------------------
# the checks, each for one launch or, WIDE, for sizes beyond what that holds

WIDE = replace(CASES["everything"], rows=37, sizes=(97, 40, 70), padding=0)


def parity(case, dtype=torch.float32, given=None, learn=()):
    """The op's results against the literal formulas, by the rule of `test_adapter_fusion`."""
    given = given or tensors_of(case, dtype, "cpu")
    truth = run(literal, case, as_double(given), learn)
    plain = run(literal, case, given, learn)
    assert_as_good(run(on("triton"), case, given, learn), plain, truth, dtype)


def large_sums():
    """Sums that are beyond fp16's range halfway."""
    case = Case(rows=20, hidden=128, sizes=(24,), score=False)
    given = tensors_of(case, torch.float16, "cpu")
    given["w_down"] += 16
    given["x0"][:, :64] += 160
    given["x0"][:, 64:] -= 160
    parity(case, torch.float16, given)


def high_scores(case):
    """Beyond what exp can take in fp32."""
    given = tensors_of(replace(case, mask=False), torch.float32, "cpu")
    given["w_score"] = given["w_score"] * 1e4
    results = run(on("triton"), case, given, ())
    assert results["p"].isfinite().all()
    assert results["out"].isfinite().all()


def groups(rows="shuffled", dtype=torch.float32):
    weights = stack(grouped.packs(dtype))
    numbers = grouped.ROWS[rows]
    grouped.compare("triton", dtype, numbers, weights, *grouped.inputs(len(numbers), dtype))


def norm():
    """With a LayerNorm in front and behind."""
    case = replace(CASES["plain"], mask=True)
    given = norm_tensors_of(case, torch.float32, "cpu")

    learn = ["x0", "residual", *WEIGHTS]

    def op(*args, **kwargs):
        return adapter_fusion_norm(*args, **kwargs, backend="triton")

    truth = run_norm(literal_norm, case, as_double(given), True, learn)
    plain = run_norm(literal_norm, case, given, True, learn)
    assert_as_good(run_norm(op, case, given, True, learn), plain, truth, torch.float32)


CHECKS = {
    "forward": lambda: parity(CASES["everything"]),
    "forward, wide": lambda: parity(WIDE),
    "large sums": large_sums,
    "high scores": lambda: high_scores(Case(sizes=(4, 4))),
    "high scores, wide": lambda: high_scores(replace(WIDE, temperature=None)),
    "groups": groups,
    "norm": norm,
    "backward": lambda: parity(CASES["everything"], learn=None),
    "backward, query is x": lambda: parity(CASES["temperature"], learn=None),
    "backward, long": lambda: parity(replace(CASES["mask"], rows=300), learn=None),
}


# --------------------------------------------------------------------------------------------------
# the bugs


class Bug(NamedTuple):
    file: str
    text: str
    instead: str
    check: str


def both(name: str, text: str, instead: str, check: str = "forward") -> dict[str, Bug]:
    """The same bug in one launch and in two."""
    return {
        name: Bug("projections", text, instead, check),
        f"{name}, wide": Bug("projections", text, instead, f"{check}, wide"),
    }


ROW_MASK = "mask_t = rows < num_rows"
GROUP_MASK = "mask_t = offs_t < count"
EXP = "e = tl.exp(s - tl.max(s, axis=1)[:, None])"
FIRST_SCORE = "tl.sum(tl.where(offs_n == 0, s, 0.0), axis=1)"
DOT = "tl.dot(a, w, acc, input_precision=PRECISION)"
IEEE = 'is_cuda else "ieee"'
MASK = "mask_tile = mask_ptr + rows[:, None] * num_scored + "
TEMPERATURE = "s /= tl.load(temperature_ptr)"
BUGS = {
    "row mask dropped": Bug("groups", ROW_MASK, "mask_t = rows >= 0", "forward"),
    "row mask dropped, wide": Bug("groups", ROW_MASK, "mask_t = rows >= 0", "forward, wide"),
    "row mask dropped, groups": Bug("groups", GROUP_MASK, "mask_t = offs_t >= 0", "groups"),
    "column mask dropped": Bug(
        "projections", "mask_r = offs_r < D", "mask_r = offs_r >= 0", "forward"
    ),
    "column mask dropped, wide": Bug(
        "projections", "mask_d = offs_d < D", "mask_d = offs_d >= 0", "forward, wide"
    ),
    **both("padded adapters score 0", 's, float("-inf"))', "s, 0.0)"),
    "wrong adapter": Bug(
        "one_launch",
        "mask=mask_d, other=-1)[:, None]",
        "mask=mask_d, other=-1)[:, None] + 1",
        "forward",
    ),
    "wrong adapter, wide": Bug(
        "two_launches",
        "one_hot = adapter[:, None]",
        "one_hot = adapter[:, None] + 1",
        "forward, wide",
    ),
    "wrong group": Bug(
        "groups",
        "tl.load(blocks_ptr + pid * 3), -2)",
        "tl.minimum(tl.load(blocks_ptr + pid * 3), 2), -2)",
        "groups",
    ),
    **both("no maximum in the softmax", EXP, "e = tl.exp(s)", "high scores"),
    **both(
        "the first score for the maximum",
        EXP,
        f"e = tl.exp(s - {FIRST_SCORE}[:, None])",
        "high scores",
    ),
    "sums in 16 bits": Bug("tiles", DOT, f"{DOT}.to(a.dtype).to(tl.float32)", "large sums"),
    "tf32": Bug("tiles", IEEE, IEEE.replace("ieee", "tf32"), "forward"),
    **both("dropout turned round", "s *= tl.load(mask_tile,", "s *= 1 - tl.load(mask_tile,"),
    **both("dropout of another adapter", f"{MASK}offs_n", f"{MASK}((offs_n + 1) % num_scored)"),
    **both("temperature left out", TEMPERATURE, TEMPERATURE.replace("/=", "+= 0 *")),
    **both("offset left out", "if offset_ptr is not None:", "if False:"),
    "barrier left out": Bug("norms", "tl.debug_barrier()", "pass", "norm"),
    "mean left out": Bug("projections", "squares / H - mean * mean", "squares / H", "norm"),
}


def without(text: str, instead: str, check: str = "backward", file: str = "backward") -> Bug:
    """A term of the gradients left out."""
    return Bug(file, text, instead, check)


ACT = "activate_backward(dz, pre, code, CODES)"
BUGS |= {
    "dp without g . v": without("starts_here, dp,", "starts_here & (offs_a < 0), dp,"),
    "dp without dw . z": without("* dw, one_hot", "* dw * 0.0, one_hot"),
    "ds without the mean": without("p * (dp - tl.sum(p * dp", "p * (dp - tl.sum(0 * dp"),
    "ds without p": without("p * (dp - tl.sum(p * dp", "(dp - tl.sum(p * dp"),
    "ds without the temperature": without("if temperature_ptr is not None", "if False"),
    "ds without dropout": without("if mask_ptr is not None", "if False"),
    "dz without p dw": without("p_columns * dz + ds_columns * t", "ds_columns * t"),
    "dz without ds t": without("p_columns * dz + ds_columns * t", "p_columns * dz"),
    "dz without p": without("p_columns * dz + ds_columns * t", "dz + ds_columns * t"),
    "dM without z": without(
        "(ds_columns * w).to", "tl.where(mask_d[None, :], ds_columns, ds_columns * w).to"
    ),
    "dC left out": without(
        "(ds_columns * w).to", "tl.where(mask_d[None, :], ds_columns * w, 0.0).to"
    ),
    "dV without p": without("w = p_columns * w", "w = tl.where(mask_d[None, :], w, p_columns * w)"),
    "dv left out": without(
        "w = p_columns * w", "w = tl.where(mask_d[None, :], p_columns * w, 0.0)"
    ),
    "dpre without act'": without(ACT, "dz"),
    "dx without D": without("if dpre_ptr is not None:", "if False:"),
    "dquery left out": without("if dy_ptr is not None:", "if False:"),
    "dx without M": without("if dy_ptr is not None:", "if False:", "backward, query is x"),
    "doffset left out": without("tl.sum(ds, axis=1)", "tl.sum(0 * ds, axis=1)"),
    "db without the last rows": without(
        "bias += tl.sum(a", "bias = tl.sum(a", "backward, long", "weight_gradients"
    ),
    "a split left out": without(
        "range(num_splits)", "range(1, num_splits)", "backward, long", "weight_gradients"
    ),
    "norm without the mean": without("- mean[:, None] -", "-", "norm", "norm_backward"),
    "norm without the slope": without("- normalised * slope[:, None]", "", "norm", "norm_backward"),
    "norm without what is added": without(
        "if add_ptr is not None:", "if False:", "norm", "norm_backward"
    ),
    "row mask dropped, backward": without(
        "mask = offs < last", "mask = offs >= 0", "backward, long", "weight_gradients"
    ),
}


# --------------------------------------------------------------------------------------------------
# planting


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Make a copy of the kernels, with a bug or without, the "triton" backend of this test."""

    def planted(bug: Bug | None) -> None:
        package = tmp_path / "planted"
        shutil.copytree(Path(tiles.__file__).parent, package, ignore=lambda *_: {"__pycache__"})
        if bug is not None:
            path = package / f"{bug.file}.py"
            source = path.read_text()
            found = source.count(bug.text)
            if found != 1:
                pytest.fail(f"{path.name} has {bug.text!r} {found} times: where is its place now?")
            path.write_text(source.replace(bug.text, bug.instead))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(backends._MODULES, "triton", "planted.backend")
        # the copy corrects the interpreter again
        for name in ("create_dot", "cast_impl"):
            monkeypatch.setattr(InterpreterBuilder, name, getattr(InterpreterBuilder, name))
        backends.load.cache_clear()

    yield planted
    backends.load.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "planted"]:
        del sys.modules[name]


@pytest.mark.parametrize("check", CHECKS)
def test_passes_without_a_bug(check, plant):
    plant(None)
    CHECKS[check]()
    assert backends.load("triton").__name__ == "planted.backend"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what a bug makes of numbers
@pytest.mark.parametrize("name", BUGS)
def test_is_caught(name, plant):
    plant(BUGS[name])
    with pytest.raises(AssertionError):
        CHECKS[BUGS[name].check]()
