"""Scale rules: by hand, against the definition of each, and min-MSE against brute force."""

import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from askew_cuda.look import snap
from askew_cuda.quantizer import Codebook, Quantizer
from askew_cuda.scales import estimate, is_torch_default, min_mse, share_outside
from tests.compare import assert_close, assert_same_bits

GOLDEN = json.loads((Path(__file__).parent.parent / "golden.json").read_text())["sawb"]
RULES = ["absmean", "absmax", "sawb", "mse"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def scale_of(weight, quantizer: Quantizer | str, pretrained: bool | str = False) -> Tensor:
    weight = weight if isinstance(weight, Tensor) else torch.tensor(weight)
    return estimate(weight, Quantizer.parse(quantizer), pretrained=pretrained, name="w")


def draw(kind: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    values = {
        "normal": normal,
        "uniform": 2 * uniform - 1,
        "heavy": normal / uniform.sqrt(),  # of infinite variance
        "shifted": normal + 1,
        "negative": -uniform - 0.1,
        "two sizes": torch.where(uniform < 0.9, 0.01 * normal, normal),
        "coarse": (3 * normal).round(),  # zeros and ties
    }
    return values[kind].to(dtype)


KINDS = ["normal", "uniform", "heavy", "shifted", "negative", "two sizes", "coarse"]


def error_at(rows: Tensor, scale: Tensor, levels) -> Tensor:
    """Sum of (w - scale q)^2 of each row at the nearest levels, by definition."""
    choices = scale.reshape(-1, 1, 1) * torch.tensor(levels, dtype=torch.float64)
    return (rows.unsqueeze(2) - choices).abs().amin(2).square().sum(1)


def least_error(rows: Tensor, levels) -> Tensor:
    """The least error of each row over all assignments of levels to its weights, and over all scales > 0."""
    assigned = torch.cartesian_prod(*[torch.tensor(levels, dtype=torch.float64)] * rows.shape[1]).reshape(
        -1, rows.shape[1]
    )
    a, b = rows @ assigned.T, assigned.square().sum(1)
    removed = torch.where((a > 0) & (b > 0), a * a / b, 0).amax(1)  # at a / b; elsewhere, the closer to 0 the better
    return rows.square().sum(1) - removed


def sorted_fit(rows: Tensor, levels: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A and B of the assignment at a scale, (rows,), in another way than the search's: once the weights are sorted, by
    a few binary searches per row.
    """
    ascending = rows.sort(1).values
    sums = torch.nn.functional.pad(ascending.cumsum(1, dtype=torch.float64), (1, 0))
    middles, jump, square_jump = (levels[:-1] + levels[1:]) / 2, levels.diff(), (levels * levels).diff()

    def fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        below = torch.searchsorted(ascending, (scale.unsqueeze(1) * middles).to(rows.dtype), right=True)
        a = levels[-1] * sums[:, -1] - (jump * sums.gather(1, below)).sum(1)
        b = levels[-1] ** 2 * rows.shape[1] - (square_jump * below).sum(1)
        return a, b

    return fit


def error_on_grid(rows: Tensor, levels, points: int) -> Tensor:
    """The least error of each row over a fine grid of scales, from far beyond max|w| down to where all weights are
    clipped.
    """
    fit = sorted_fit(rows, torch.tensor(levels, dtype=torch.float64))  # see test_the_sorted_fit_sums_what_it_says
    high, least = 6 * rows.abs().amax(1) / max(map(abs, levels)), torch.full_like(rows[:, 0], math.inf)
    for fraction in torch.linspace(0, 1, points, dtype=torch.float64):
        scale = high * 1e-3**fraction
        a, b = fit(scale)
        least = torch.minimum(least, rows.square().sum(1) - 2 * scale * a + scale * scale * b)
    return least


# weight, quantizer, pretrained, scale
BY_HAND = [
    ([-3.0, 1.0], "binary", True, math.sqrt(5)),  # as large as the weights in the mean square
    ([-3.0, 1.0], "binary", "packed", 2.0),
    ([-3.0, 1.0], "binary", False, 2.0),  # of the least squared error
    ([-3.0, 1.0, 0.0], "ternary", False, 3.0),
    ([-3.0, 1.0], Quantizer([0, 1]), False, 1.0),
    ([-3.0, 1.0, 0.0], "ternary", "packed", 3.0),  # -3 0 0 leaves 1; all at 2 leaves 2
    ([-3.0, 2.0, 0.0], "ternary", True, 2.5),
    ([-3.0, -1.0, 1.0, 3.0], "2bit", False, 2.0),
    ([-3.0, -1.0, 1.0, 3.0], "2bit", True, 0.85 * 2.0),  # they move on, and have less way to go
    ([-7.5, -0.5, 0.5, 7.5], "4bit", True, 1.0),  # 8 levels and more: the way is short anyway
    ([-3.0, 1.0], Quantizer("ternary", "absmean"), True, 3.0),  # 2 / (2 / 3)
    ([-3.0, 1.0], Quantizer("2bit", "absmean"), False, 2.0),
    ([-3.0, 1.0], Quantizer("2bit", "absmax"), False, 2.0),
    ([-3.0, 1.0], Quantizer("int4", "absmax"), False, 0.375),
    ([-3.0, 1.0], Quantizer("binary", "sawb"), False, 2.0),
    ([-3.0, 1.0], Quantizer("2bit", "sawb"), False, (3.12 * math.sqrt(5) - 2.064 * 2) / 1.5),
    ([-3.0, 1.0], Quantizer("ternary", "sawb"), False, 2.6 * math.sqrt(5) - 1.71 * 2),
    ([-3.0, 1.0], Quantizer(range(-7, 8), "sawb"), False, (12.035 * math.sqrt(5) - 12.03 * 2) / 7),
    ([-3.0, 1.0], Quantizer(range(-63, 64), "sawb"), False, (28.24 * math.sqrt(5) - 30.81 * 2) / 63),
    ([-3.0, 1.0], Quantizer(range(-127, 128), "sawb"), False, (31.76 * math.sqrt(5) - 35.04 * 2) / 127),
    ([-3.0, 3.0], Quantizer("4bit", "sawb"), False, 0.4),  # 12.68 < 12.80: max|w|
    ([-3.0, 1.0], Quantizer("binary", 0.3), True, 0.3),
    (0.0, Quantizer("binary", 0.3), False, 0.3),
    (-5.0, "binary", True, 5.0),
    ([-3.0, -1.0], Quantizer([0, 1]), True, 3.0),  # no scale serves these; max|w| / max|level|
]


@pytest.mark.parametrize(("weight", "quantizer", "pretrained", "scale"), BY_HAND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_by_hand(weight, quantizer, pretrained, scale, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = scale_of(torch.tensor(weight, dtype=dtype), quantizer, pretrained)
    assert found.dtype == wide
    assert_close(found, torch.tensor(scale, dtype=wide), 8 * scale * torch.finfo(wide).eps, "scale")


def test_scales_per_channel_and_group_by_hand():
    weight = torch.tensor([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 2.0, -2.0], [8.0, -8.0, 0.0, 0.0]])
    per_channel = torch.tensor([[4.0], [1.0], [4.0]])
    assert_same_bits(scale_of(weight, Quantizer("binary", "mse", "channel")), per_channel, "per channel")
    others = (2 + 6 + 2 + 8) / 4  # for the two groups of zeros
    per_group = torch.tensor([[2, 6], [others, 2], [8, others]])
    assert_same_bits(scale_of(weight, Quantizer("binary", "mse", "group", 2)), per_group, "per group")
    assert_same_bits(
        scale_of(weight.reshape(3, 2, 2), Quantizer("binary", "mse", "group", 2)), per_group, "three dimensions"
    )
    assert_same_bits(
        scale_of(weight[0], Quantizer("binary", "mse", "group", 3)), torch.tensor(4.0), "below two dimensions"
    )


@pytest.mark.parametrize("rule", ["auto", *RULES])
@pytest.mark.parametrize("name", ["binary", "ternary", "2bit", "4bit", "8bit"])
def test_every_row_is_a_tensor_of_its_own(name, rule):
    weight = draw("normal", 6, 4, 3, 4, dtype=torch.float32)
    whole = lambda w: scale_of(w, Quantizer(name, rule)).item()  # noqa: E731
    per_channel = torch.tensor([whole(row) for row in weight]).reshape(6, 1, 1, 1)
    assert_same_bits(scale_of(weight, Quantizer(name, rule, "channel")), per_channel, "per channel")
    per_group = torch.tensor([[whole(part) for part in row.reshape(3, 16)] for row in weight])
    assert_same_bits(scale_of(weight, Quantizer(name, rule, "group", 16)), per_group, "per group")


@pytest.mark.parametrize("granularity", [("tensor",), ("channel",), ("group", 9)])
@pytest.mark.parametrize("rule", ["auto", *RULES])
def test_neither_layout_nor_storage_matters(rule, granularity):
    weight, quantizer = draw("normal", 8, 4, 3, 3, dtype=torch.float32), Quantizer("ternary", rule, *granularity)
    expected = scale_of(weight, quantizer)
    last = weight.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert_same_bits(scale_of(last, quantizer), expected, "channels_last")
    assert_same_bits(scale_of(weight.mT.contiguous().mT, quantizer), expected, "transposed")
    spaced = torch.full((8, 4, 3, 6), math.nan)[..., ::2]
    assert_same_bits(scale_of(spaced.copy_(weight), quantizer), expected, "strided")
    for narrow in (weight.bfloat16(), weight.half()):
        assert_same_bits(scale_of(narrow, quantizer), scale_of(narrow.float(), quantizer), "16 bits")


@pytest.mark.parametrize("name", ["ternary", "4bit", "8bit"])
def test_threads_do_not_matter(name):
    weight, threads, found = draw("normal", 300, 1000, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(torch.stack([scale_of(weight, Quantizer(name, rule)) for rule in RULES]))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(found[0], found[1], "scales")


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(RULES),
    st.sampled_from([[-1, 1], [-1, 0, 1], [-1, 0, 3], [-1.5, -0.5, 0.5, 1.5], range(-8, 9), range(-16, 16)]),
    st.sampled_from(KINDS),
    st.integers(-100, 100),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_scales_grow_with_the_weights(rule, levels, kind, exponent, dtype, seed):
    """A power of two changes no rounding, so it goes through to the last bit - also where squares don't fit float32."""
    weight, quantizer = draw(kind, 5, 20, seed=seed, dtype=dtype) + 0.01, Quantizer(levels, rule, "channel")
    assert_same_bits(scale_of(weight * 2.0**exponent, quantizer), scale_of(weight, quantizer) * 2.0**exponent, "scale")


# Shapes by which the formula is a round number: (out, in, ..), and sqrt(2 / fan_in) (16 / sqrt(fan_in fan_out))^(1/4).
@pytest.mark.parametrize(
    ("module", "size"), [(nn.Linear(32, 8), 0.25), (nn.Conv2d(2, 128, 4), 0.125), (nn.Conv1d(32, 8, 1), 0.25)]
)
@pytest.mark.parametrize(
    ("name", "rms"), [("binary", 1), ("ternary", math.sqrt(2 / 3)), ("2bit", math.sqrt(1.25)), ("int2", math.sqrt(1.5))]
)
def test_the_default_initialisation_gets_a_scale_by_its_shape(module, size, name, rms):
    found = []
    for _ in range(2):
        module.reset_parameters()
        found.append(scale_of(module.weight, f"{name}/channel"))
        assert not found[0].requires_grad
        assert_close(scale_of(module.weight, name), torch.tensor(size / rms), 1e-6, "per tensor")
    assert_same_bits(found[0], found[1], "other weights, the same scale")
    assert_close(
        found[0], torch.full((len(module.weight), *[1] * (module.weight.dim() - 1)), size / rms), 1e-6, "per channel"
    )


def test_a_small_init_gets_a_scale_by_its_shape():
    """Without normalisation layers the signal must not fade; between them, and trained, it is another matter."""
    small = 0.02 * draw("normal", 30, 40, dtype=torch.float32)
    least = math.sqrt(2 / 40) * (16 / math.sqrt(30 * 40)) ** 0.25
    for granularity in (("tensor",), ("channel",), ("group", 8)):
        for name in ("binary", "ternary", "4bit"):
            quantizer = Quantizer(name, "auto", *granularity)
            size = {"4bit": 2.0}.get(name, 1.0) * least  # many levels leave room
            wanted = torch.full(quantizer.scale_shape(small), size / quantizer.codebook.rms)
            assert_close(scale_of(small, quantizer), wanted, 1e-6, name)
            assert (scale_of(small, quantizer, "packed") < wanted / 2).all()


def test_auto_says_which_rule_it_is():
    default, other = nn.Linear(40, 30).weight.detach(), 2 * draw("normal", 30, 40, dtype=torch.float32)
    for granularity in (("tensor",), ("channel",), ("group", 8)):
        for name in ("binary", "ternary", "2bit", "nf4"):
            auto, mse = Quantizer(name, "auto", *granularity), Quantizer(name, "mse", *granularity)
            assert_same_bits(scale_of(default, auto, "packed"), scale_of(default, mse), f"{name}, packed")
            assert_same_bits(scale_of(other, auto), scale_of(other, mse), f"{name}, deliberate init")


MODULES = [
    (nn.Linear, 1, 1),
    (nn.Linear, 3, 5),
    (nn.Linear, 64, 10),
    (nn.Linear, 300, 200),
    (nn.Conv1d, 4, 8, 5),
    (nn.Conv2d, 1, 6, 5),
]
MODULES += [
    (nn.Conv2d, 16, 16, 3),
    (partial(nn.Conv2d, groups=16), 16, 32, 3),
    (nn.Conv3d, 2, 4, 3),
    (nn.ConvTranspose2d, 8, 4, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_default_initialisation_is_recognised(module, dtype):
    kind, *sizes = module
    for seed in range(10):
        torch.manual_seed(seed)
        assert is_torch_default(kind(*sizes, dtype=dtype).weight), seed  # drawn in its dtype,
        assert is_torch_default(kind(*sizes).weight.to(dtype)), seed  # and rounded to it


OTHER_WEIGHTS = {
    "He, normal": nn.init.kaiming_normal_,
    "He, uniform": nn.init.kaiming_uniform_,
    "Xavier, uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "GPT-2": lambda w: nn.init.normal_(w, std=0.02),
    "a normal of the default's rms": lambda w: nn.init.normal_(w, std=1 / math.sqrt(3 * w[0].numel())),
    "the default, trained a little": lambda w: w.add_(0.3 * torch.randn_like(w) / math.sqrt(w[0].numel())),
    "the default, decayed": lambda w: w.mul_(0.8),
    "the default, grown": lambda w: w.mul_(1.02),
    "the default, one weight outside": lambda w: w.view(-1)[:1].copy_(1.05 / math.sqrt(w[0].numel())),
    "binary": lambda w: w.sign_().div_(math.sqrt(w[0].numel())),
    "zeros": nn.init.zeros_,
    "NaN": lambda w: w.view(-1)[:1].fill_(math.nan),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS.keys())
def test_other_weights_are_not_taken_for_the_default(change, dtype):
    for module in (nn.Linear(64, 64), nn.Linear(768, 96), nn.Conv2d(32, 32, 3)):
        torch.manual_seed(1)
        module.reset_parameters()
        with torch.no_grad():
            change(module.weight)
        assert not is_torch_default(module.weight.to(dtype))


def test_a_bias_and_an_empty_weight_are_not_the_default():
    for weight in (nn.Linear(30, 40).weight[0], torch.tensor(0.5), torch.empty(0, 4), torch.empty(4, 0)):
        assert not is_torch_default(weight)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["id"]))
def test_sawb_against_the_golden_vectors(case):
    weight = torch.tensor(case["w"], dtype=torch.float64)
    for bits, clip in case["clip_ibm"].items():
        codebook = Codebook.uniform(int(bits))
        clipped = scale_of(weight, Quantizer(codebook, "sawb")) * codebook.max_abs
        assert_close(clipped, torch.tensor(clip, dtype=torch.float64), 1e-12, f"{bits} bits")
    authors = scale_of(weight, Quantizer("authors_4bit", "sawb"))
    assert_close(authors, torch.tensor(case["scale_authors_4bit"], dtype=torch.float64), 1e-12, "17 levels")


# Levels of which brute force can try all assignments, and how many weights of a row it can take.
FEW = [
    (6, each)
    for each in [
        (-1, 1),
        (-1, 0, 1),
        (0, 1),
        (-1, 2),
        (-1, 0, 3),
        (1, 2),
        (-3, -1),
        (0.5, 1, 4),
        (-2, -1, 0),
        (-1, 0.5, 1),
    ]
]
FEW += [
    (5, each)
    for each in [
        (-1.5, -0.5, 0.5, 1.5),
        (-2, -1, 0, 1),
        (-1, 0, 1, 4),
        (0, 0.5, 1, 4),
        (1, 2, 3, 4),
        (-1, -0.5, 0, 0.5, 1),
    ]
]


@pytest.mark.parametrize(("count", "levels"), FEW)
@pytest.mark.parametrize("kind", KINDS)
def test_min_mse_is_within_one_per_cent(levels, kind, count):
    for rows in (draw(kind, 60, 1), draw(kind, 60, 2), draw(kind, 60, count)):
        scale, least, nothing = min_mse(rows, Codebook(levels)), least_error(rows, levels), rows.square().sum(1)
        served = least < (1 - 1e-12) * nothing
        error = error_at(rows, scale, levels)
        assert (error <= 1.01 * least + 1e-12 * nothing)[served].all()
        largest = rows.abs().amax(1) / max(map(abs, levels))
        assert_same_bits(scale[~served], largest[~served], "rows that no scale serves")


@pytest.mark.parametrize("kind", KINDS)
def test_min_mse_of_a_long_ternary_row_is_within_one_per_cent(kind):
    rows = draw(kind, 1, 50_000)
    largest_first = rows.abs().sort(descending=True).values.cumsum(1)  # the k largest at +-scale, the others at 0
    least = rows.square().sum(1) - (largest_first**2 / torch.arange(1, 50_001)).amax(1)
    assert (error_at(rows, min_mse(rows, Codebook.named("ternary")), [-1, 0, 1]) <= 1.01 * least).all()


BOOKS = [Codebook([-1, 0, 3]), Codebook([0, 1])]
BOOKS += map(Codebook.named, ["ternary", "2bit", "3bit", "4bit", "int2", "int4", "authors_4bit", "nf4", "fp4", "pow2"])


@pytest.mark.parametrize("kind", KINDS)
def test_min_mse_of_many_levels_is_within_one_per_cent(kind):
    """Rows as long as those of a layer: the grids are coarser from 1,024 weights on."""
    rows, levels = draw(kind, 2, 1024, dtype=torch.float32).double(), Codebook.named("int8").levels
    found = error_at(rows, min_mse(rows, Codebook(levels)), levels)
    for middle in (rows.abs().amax(1) / 128, min_mse(rows, Codebook(levels))):
        ratios = torch.exp(torch.linspace(-0.15, 0.15, 500, dtype=torch.float64))
        least = torch.stack([error_at(rows, middle * ratio, levels) for ratio in ratios]).amin(0)
        assert (found <= 1.01 * least + 1e-12 * rows.square().sum(1)).all()


@pytest.mark.parametrize("codebook", BOOKS, ids=lambda codebook: codebook.name or str(codebook.levels))
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "negative", "coarse"])
def test_min_mse_is_as_good_as_a_fine_grid(codebook, kind):
    short, long = draw(kind, 4, 128), draw(kind, 1, 2**16 // (len(codebook) - 1) + 100)
    for rows in (short, long):
        error = error_at(rows, min_mse(rows, codebook), codebook.levels)
        assert (error <= 1.01 * error_on_grid(rows, codebook.levels, 600)).all()


@pytest.mark.parametrize(
    "levels",
    [Codebook.uniform(5).levels, range(-32, 32), Codebook.uniform(8).levels, [k * abs(k) for k in range(-9, 10)]],
)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy"])
def test_min_mse_of_many_levels(levels, kind):
    codebook, rows = Codebook(levels), draw(kind, 1, 20_000)
    error = (rows - snap(rows, min_mse(rows, codebook).unsqueeze(1), codebook.levels)).square().sum(1)
    assert (error <= 1.01 * error_on_grid(rows, levels, 600)).all()
    short = draw(kind, 20, 60)  # whose error is so jagged that no search finds the best of all scales
    error = error_at(short, min_mse(short, codebook), levels)
    assert (error <= (1 + 1e-12) * error_at(short, short.abs().amax(1) / codebook.max_abs, levels)).all()
    assert error.mean() <= 1.05 * error_on_grid(short, levels, 600).mean()


@pytest.mark.parametrize("levels", [(-1.5, -0.5, 0.5, 1.5), (-1, 0, 3), (0.25, 0.5, 1), tuple(range(-128, 128))])
def test_the_sorted_fit_sums_what_it_says(levels):
    rows, scale = draw("normal", 3, 50), torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64)
    choices = torch.tensor(levels, dtype=torch.float64)
    nearest = choices[(rows.unsqueeze(2) - scale.reshape(3, 1, 1) * choices).abs().argmin(2)]
    a, b = sorted_fit(rows, choices)(scale)
    assert_close(a, (rows * nearest).sum(1), 1e-9, "A")
    assert_close(b, nearest.square().sum(1), 1e-9, "B")


@pytest.mark.parametrize("rule", ["auto", *RULES])
def test_an_empty_tensor_has_scale_1(rule):
    for shape, granularity in itertools.product(
        [(0,), (0, 4), (4, 0), (4, 0, 3)], [("tensor",), ("channel",), ("group", 8)]
    ):
        quantizer, weight = Quantizer("2bit", rule, *granularity), torch.empty(shape)
        assert_same_bits(
            scale_of(weight, quantizer), torch.ones(quantizer.scale_shape(weight)), f"{shape}, {granularity}"
        )


def test_a_given_scale_is_taken_as_it_is():
    weight = torch.zeros(2, 4)  # nothing is estimated, so zeros will do
    given = torch.tensor([[0.1], [0.7]])
    assert_same_bits(scale_of(weight, Quantizer("2bit", given, "channel")), given, "a tensor")
    assert_same_bits(scale_of(weight, Quantizer("2bit", 0.1, "group", 2)), torch.full((2, 2), 0.1), "a number")
    assert_same_bits(
        scale_of(weight.double(), Quantizer("2bit", 1e-50)), torch.tensor(1e-50, dtype=torch.float64), "float64"
    )
    found = scale_of(weight, Quantizer("2bit", 0.1, "channel"))
    found[0] = 5  # has memory of its own
    assert found[1].item() != 5


def test_dead_rows_take_the_mean_of_the_others():
    weight = torch.tensor([[1.0, -1.0], [1e-44, 0.0], [0.0, 0.0], [3.0, 3.0]])
    for rule in ("absmean", "absmax", "sawb", "mse"):
        assert_same_bits(
            scale_of(weight, Quantizer("binary", rule, "channel")), torch.tensor([[1.0], [2], [2], [3]]), rule
        )


@pytest.mark.parametrize(
    ("weight", "quantizer", "message"),
    [
        (torch.tensor([1.0, math.nan, math.inf]), "binary", "w holds 2 NaN or infinite weights.*repair"),
        (torch.tensor([[1.0, -math.inf]]).bfloat16(), "2bit/channel", "w holds 1 NaN or infinite weights"),
        (torch.zeros(3, 4), "ternary", r"w holds nothing but zeros.*scale=0\.05"),
        (torch.zeros(3, 4), Quantizer("4bit", "sawb", "channel"), "w holds nothing but zeros"),
        (torch.zeros(1, 1), "binary", "w holds nothing but zeros"),
        (torch.full((2, 2), 1e-44), Quantizer("ternary", "absmean"), "w holds nothing but zeros"),
        (
            torch.ones(2, 2),
            Quantizer("pow2", "sawb"),
            "'sawb' of w: .* 9 levels, only for 2, 3, 4, 8, 15, 16, 17.*take 'mse'",
        ),
        (
            torch.ones(2, 2),
            Quantizer("binary", 1e-50),
            r"scale of w: 1e-50 is outside of 1\.18e-38 .. 3\.4e\+38, .*float32",
        ),
        (torch.ones(2, 2), Quantizer("binary", 1e39), r"scale of w: 1e\+39 is outside of"),
        (
            torch.full((2, 2), 1e30),
            Quantizer([-1e-30, 1e-30], "absmax"),
            "scale = 'absmax' of w: .* outside of .*; take levels",
        ),
        (
            torch.ones(2, 6),
            "binary/group4",
            r"group_size = 4 does not divide a row of w, which has 6 weights \(shape \(2, 6\)\)",
        ),
        (
            torch.ones(2, 6),
            Quantizer("binary", [1.0, 2.0, 3.0], "channel"),
            r"scale has shape \(3,\), but w of shape \(2, 6\) needs \(2, 1\)",
        ),
    ],
)
def test_weights_that_have_no_scale(weight, quantizer, message):
    with pytest.raises(ValueError, match=message):
        scale_of(weight, quantizer)


def test_weights_are_left_as_they_are():
    weight = nn.Parameter(draw("normal", 6, 40, dtype=torch.float32))
    before, version = weight.detach().clone(), weight._version
    for rule, name in itertools.product(["auto", *RULES], ["ternary", "4bit", "8bit"]):
        assert not scale_of(weight, Quantizer(name, rule, "channel")).requires_grad
    assert_same_bits(weight.detach(), before, "weight")
    assert weight._version == version


def test_share_outside_by_hand():
    weight, levels = torch.tensor([[-0.6, -0.5, 0.0, 1.0], [1.1, -1.0, 2.0, 5.0]]), (-1, 2)
    assert share_outside(weight, torch.tensor(0.5), levels) == 5 / 8
    assert share_outside(weight, torch.tensor([[0.5], [1.0]]), levels) == 2 / 8
    assert share_outside(weight, torch.tensor([[0.6, 0.4], [0.6, 2.0]]), levels) == 3 / 8
    assert share_outside(torch.empty(0, 4), torch.ones(0, 1), levels) == 0
    # 1.005 is between two numbers of bfloat16, of which the weight is the upper: it is outside, however the bound would
    # be rounded
    assert share_outside(torch.tensor([1.0078125]).bfloat16(), torch.tensor(1.005), (-1, 1)) == 1
