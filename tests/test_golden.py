"""Every vector of golden.json but quirks (rows that the specification does not follow), sawb and schedules (other files).

Each row is stepped as a tensor of 37 equal weights: whole vectors and a rest, of which all must agree.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cases import BACKENDS, REFERENCE, Backend
from tests.compare import TOLERANCES, assert_close, assert_same_bits

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
COUNT = GOLDEN["meta"]["count"]
DTYPES = (torch.float64, torch.float32)
COPIES = 37
PLAIN = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
every = [pytest.mark.parametrize("dtype", DTYPES, ids=str), pytest.mark.parametrize("name", BACKENDS)]


def on_all(test):
    for mark in every:
        test = mark(test)
    return test


def sgd(backend: Backend, dtype: torch.dtype, levels, scale, w, g, *, buffer=0.0, **settings) -> dict[str, Tensor]:
    """One step of one weight: weight, momentum_buffer and code after it."""
    weight, grad, momentum_buffer = (torch.full((COPIES,), x, dtype=dtype) for x in (w, g, buffer))
    codes = torch.zeros(COPIES, dtype=torch.uint8)
    settings = PLAIN | {"skew_at": "velocity", "alpha": None, "recovery": None} | settings
    scales, outputs = ([torch.tensor(scale, dtype=dtype)], [codes]) if levels else ([], [])
    backend.sgd_([weight], [grad], [momentum_buffer], scales, levels, outputs, [], **settings)
    return _one({"weight": weight, "momentum_buffer": momentum_buffer, "code": codes})


def adamw(backend: Backend, dtype: torch.dtype, levels, scale, w, g, *, moments, step, **settings) -> dict[str, Tensor]:
    """The same with AdamW; `step` counts the steps before this one."""
    weight, grad, exp_avg, exp_avg_sq = (torch.full((COPIES,), x, dtype=dtype) for x in (w, g, *moments))
    codes, steps = torch.zeros(COPIES, dtype=torch.uint8), torch.tensor(float(step))
    settings = {"skew_at": "velocity", "alpha": None, "recovery": None, "amsgrad": False, "maximize": False} | settings
    backend.adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], [], [steps], [torch.tensor(scale, dtype=dtype)], levels, [codes], [], **settings
    )
    assert steps == step + 1
    return _one({"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "code": codes})


def _one(results: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, values in results.items():
        assert_same_bits(values, values[:1].expand(COPIES), f"{name}: equal weights side by side")
    return {name: values[0] for name, values in results.items()}


def shift(dtype: torch.dtype, levels, scale: float, w: float, epsilon: float) -> float:
    """How far rounding can move a weight among the levels: "within rounding of h = 0" (or of t = 0) is within this of it.

    In float64, golden.json's type, not at all; nor where w is a level or a midpoint that the type holds, and scale a power of two. Else u = w / scale, scale * level, their difference and its quotient by r_h carry fewer than eight roundings of half an ulp (u) of
    numbers up to |w| + r_h. r carries four of its own size, plus that of 1 - root, which the square root beside it magnifies:
    r_h u / sqrt(1 - root).
    """
    places = [*levels, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False))]
    if dtype == torch.float64 or (torch.tensor(w, dtype=dtype) == w and math.frexp(scale)[0] == 0.5 and w / scale in places):
        return 0.0
    unit = torch.finfo(dtype).eps / 2
    half = scale * max(b - a for a, b in zip(levels, levels[1:], strict=False)) / 2
    room = 1 - math.sqrt(epsilon)
    return unit * (8 * (abs(w) + half) + 4 * half / (math.sqrt(room) if room > 0 else 1))


def tolerance(dtype: torch.dtype, *sizes: float) -> float:
    return TOLERANCES[dtype] * max(abs(size) for size in sizes)


def expect(actual: Tensor, value: float, bound: float, what: str) -> None:
    assert_close(actual, torch.tensor(value, dtype=torch.float64), bound, what)


class Exempt:
    """Counts the rows whose branch rounding decides."""

    def __init__(self):
        self.rows = self.exempt = 0

    def branch(self, is_exempt: bool, actual, expected, what: str) -> None:
        self.rows += 1
        self.exempt += is_exempt
        assert is_exempt or actual == expected, f"{what}: branch {actual}, expected {expected}"

    def check(self, rows: int) -> None:
        assert self.rows == rows
        assert self.exempt < 0.05 * rows, f"{self.exempt} of {rows} rows are within rounding of a decision"


def gradient_step(backend, dtype, row, w, **settings) -> dict[str, Tensor]:
    """The authors' order with plain SGD; momentum_buffer, zero before the step, ends as the skewed gradient."""
    settings = {"alpha": row["alpha"], "lr": row["lr"], "momentum": 0.5, "anneal": "interval", "skew_at": "gradient"} | settings
    return sgd(backend, dtype, row["levels"], row["scale"], w, row["g"], **settings)


def literal_rows(group: str) -> list[dict]:
    """Rows of the groups of single authors' steps with their settings under the names of the operators."""
    rows = []
    for row in GOLDEN[group]:
        row = {"w_start": row.get("w_after_scale_clamp", row["w"])} | row
        if group == "binary_literal":  # no cap. K = alpha h / h', of which the authors' h has rounding errors of numbers up to 1
            h_slope = abs(4 * row["w"] * (row["w"] ** 2 - 1))
            row |= {"epsilon": row["eps"], "max_step": math.inf, "unclipped": row["w_new_unclamped"], "clipped": row["w_new"]}
            row["bound"] = 0 if row["direct"] else row["lr"] * row["alpha"] * 2**-51 / h_slope
        elif group == "uniform_literal":
            levels = [float(k) for k in range(-(2 ** (row["wbits"] - 1)), 2 ** (row["wbits"] - 1) + 1)]
            row |= {"epsilon": row["eps_normalised"], "max_step": 0.5, "levels": levels, "unclipped": row["w_new"], "clipped": None}
            row["bound"] = 1e-4 * row["scale"]  # meta's uniform_tolerance
        else:
            row |= {"levels": GOLDEN["codebooks"][row["codebook"]], "epsilon": row["eps"], "max_step": row["cap"] or math.inf, "bound": 0}
            row |= {"unclipped": row["w_new_noclamp"], "clipped": row["w_new"]}
        rows.append(row)
    return rows


@pytest.mark.parametrize("group", ["binary_literal", "uniform_literal", "general"])
@on_all
def test_single_steps_in_the_authors_order(name, dtype, group):
    backend, exempt = BACKENDS[name], Exempt()
    for row in literal_rows(group):
        what, w, settings = f"{group}, id {row['id']}", row["w_start"], {"epsilon": row["epsilon"], "max_step": row["max_step"]}
        moved = shift(dtype, row["levels"], row["scale"], w, row["epsilon"])
        near = [gradient_step(REFERENCE, torch.float64, row, w + by, clip=False, **settings) for by in (-moved, 0.0, moved)]
        direct = {step["momentum_buffer"].item() == row["g"] for step in near}
        # By as much the result may differ because the weight does; in float64 the golden value itself is known no better.
        slack = max(abs(step["weight"].item() - near[1]["weight"].item()) for step in near)
        bound = tolerance(dtype, row["scale"], w, row["unclipped"]) + slack + row["bound"]
        step = gradient_step(backend, dtype, row, w, clip=False, **settings)
        expect(step["weight"], row["unclipped"], bound, what)
        expect(step["momentum_buffer"], row["skewed_grad"], bound / row["lr"], what)
        if "robust_skewed_grad" in row:  # our formula, without the authors' rounding errors and their 1e-6
            expect(step["momentum_buffer"], row["robust_skewed_grad"], (bound - row["bound"]) / row["lr"], what)
            assert row["robust_direct"] == row["direct"]
        if row["clipped"] is not None:
            clipped = gradient_step(backend, dtype, row, w, clip=True, **settings)
            expect(clipped["weight"], row["clipped"], bound, what)
        is_direct = step["momentum_buffer"] == torch.tensor(row["g"], dtype=dtype)
        exempt.branch(len(direct) > 1, bool(is_direct), row["direct"], what)
    exempt.check(COUNT[group])


@on_all
def test_half_widths(name, dtype):
    """Where a weight stops being feasible, inside and outside the codebook, found by weights on both sides of that place."""
    backend, rows = BACKENDS[name], 0
    for row in GOLDEN["half_width"]:
        rows += 1
        r, r_outer, epsilon = row["r_inner"], row["r_outer"], row["eps"]
        inverse = (r * (2 - r)) ** 2
        assert abs(inverse - epsilon) <= 1e-12
        assert abs(1 - r - row["infeasible_half_band"]) <= 1e-12
        off = 2 * shift(dtype, [-1.0, 1.0], 1.0, 1.0, epsilon)  # of delta, which is |w - 1| here
        sides = [(1 + r_outer - off, False), (1 + r_outer + off, True)]
        if r < 1:
            sides += [(1 - r - off, True)] if 1 - r > off else []
            sides += [(1 - r + off, False)] if r > off else [(1.0, False)]
        for w, infeasible in sides if r_outer > off else [(1.0, False), *sides[1:]]:
            found = is_constrained(backend, dtype, [-1.0, 1.0], 1.0, w, {"epsilon": epsilon, "anneal": "interval", "recovery": 0.5})
            assert found == infeasible, f"id {row['id']}: epsilon {epsilon}, w {w}"
    assert rows == COUNT["half_width"]


def is_constrained(backend, dtype, levels, scale, w, settings) -> bool:
    """Whether a weight is captured, or infeasible: one of two large displacements, up and down, does not come through."""
    large = 1024.0 * scale
    settings = {"max_step": 0.5} | settings | {"lr": 1.0, "clip": False}
    for g in (large, -large):
        moved = sgd(backend, dtype, levels, scale, w, g, **settings)["weight"]
        if moved != torch.tensor(w, dtype=dtype) - torch.tensor(g, dtype=dtype):
            return True
    return False


def branch_of(backend, dtype, levels, scale, w, anneal: str, moved_freely: bool, settings: dict) -> str:
    if not is_constrained(backend, dtype, levels, scale, w, settings | {"anneal": anneal}):
        return "free"
    if anneal == "capture":
        return "captured"
    return "heals" if moved_freely else "pulled"


@on_all
def test_single_steps_of_the_specification(name, dtype):
    backend, exempt = BACKENDS[name], Exempt()
    for row in GOLDEN["step"]:
        what, levels, scale, w = f"id {row['id']}", GOLDEN["codebooks"][row["codebook"]], row["scale"], row["w"]
        constraint = {"epsilon": row["epsilon"], "recovery": row["recovery"], "max_step": row["max_step"]}
        settings = constraint | {"lr": row["lr"], "anneal": row["anneal"]}

        def step(backend, dtype, w, clip, levels=levels, scale=scale, g=row["g"], settings=settings):
            return sgd(backend, dtype, levels, scale, w, g, clip=clip, **settings)

        def branch(backend, dtype, w, row=row, step=step, levels=levels, scale=scale, constraint=constraint):
            freely = step(backend, dtype, w, False)["weight"] == step(backend, dtype, w, False, levels=[])["weight"]
            return branch_of(backend, dtype, levels, scale, w, row["anneal"], freely, constraint)

        moved = shift(dtype, levels, scale, w, row["epsilon"])
        near = [step(REFERENCE, torch.float64, w + by, False)["weight"].item() for by in (-moved, 0.0, moved)]
        bound = tolerance(dtype, scale, w, row["displacement"]) + max(abs(x - near[1]) for x in near)
        unclipped = step(backend, dtype, w, False)["weight"]
        expect(unclipped, row["w_unclipped"], bound, what)
        expect(unclipped.double() - w, row["displacement"], bound, what)
        result = step(backend, dtype, w, True)
        expect(result["weight"], row["w_new"], bound, what)
        assert result["code"] == row["code"], what
        branches = {branch(REFERENCE, torch.float64, w + by) for by in (-moved, moved)}
        exempt.branch(len(branches) > 1, branch(backend, dtype, w), row["branch"], what)
    exempt.check(COUNT["step"])


@pytest.mark.parametrize("restart", [False, True], ids=["run", "restarted"])
@on_all
def test_runs(name, dtype, restart):
    """Several steps with changing lr and r. In float32 each starts from the golden state: a run would carry rounding errors over a branch."""
    if dtype == torch.float32 and not restart:
        pytest.skip("a float32 run may take another branch than the truth, and then be anywhere")
    backend, exempt, rows = BACKENDS[name], Exempt(), 0
    for run in GOLDEN["runs"]:
        rows += 1
        levels, scale = GOLDEN["codebooks"][run["codebook"]], run["scale"]
        state = {"w": run["w0"], "momentum_buffer": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
        for count, wanted in enumerate(run["steps"]):
            what, w = f"run {run['id']}, step {count}", state["w"]
            constraint = {"epsilon": wanted["epsilon"], "recovery": run["recovery"], "max_step": run["max_step"]}

            def step(backend, dtype, w, clip=True, levels=levels, run=run, count=count, wanted=wanted, state=state, constraint=constraint):
                settings = constraint | {"lr": wanted["lr"], "weight_decay": run["weight_decay"], "anneal": run["anneal"], "clip": clip}
                if run["rule"] == "adamw":
                    settings |= {"beta1": run["betas"][0], "beta2": run["betas"][1], "eps": run["eps"], "step": count}
                    moments = (state["exp_avg"], state["exp_avg_sq"])
                    return adamw(backend, dtype, levels, run["scale"], w, wanted["g"], moments=moments, **settings)
                # torch fills the momentum buffer with the first gradient, undamped
                settings |= {"momentum": run["momentum"], "nesterov": run["nesterov"], "dampening": run["dampening"] if count else 0.0}
                return sgd(backend, dtype, levels, run["scale"], w, wanted["g"], buffer=state["momentum_buffer"], **settings)

            moved = shift(dtype, levels, scale, w, wanted["epsilon"]) if restart else 0.0
            near = [step(REFERENCE, torch.float64, w + by)["weight"].item() for by in (-moved, 0.0, moved)]
            result = step(backend, dtype, w)
            bound = tolerance(dtype, scale, w, wanted["w"], wanted["w"] - w) + max(abs(x - near[1]) for x in near)
            expect(result["weight"], wanted["w"], bound, what)
            assert result["code"] == wanted["code"], what
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if key in wanted:
                    expect(result[key], wanted[key], tolerance(dtype, wanted[key], state[key], 1e-3), f"{what}: {key}")
            constrained = {is_constrained(REFERENCE, torch.float64, levels, scale, w + by, constraint | {"anneal": run["anneal"]}) for by in (-moved, moved)}
            found = is_constrained(backend, dtype, levels, scale, w, constraint | {"anneal": run["anneal"]})
            exempt.branch(len(constrained) > 1, found, wanted["branch"] != "free", what)
            state = {key: wanted[key] if restart else result["weight" if key == "w" else key].item() for key in ("w", *set(wanted) & set(state))} 
    assert rows == COUNT["runs"]
    exempt.check(sum(len(run["steps"]) for run in GOLDEN["runs"]))
