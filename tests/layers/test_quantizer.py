"""Codebooks, quantizers and their names; codes, snapped weights and distances."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from askew_cuda import reference
from askew_cuda.look import codes, distance, snap
from askew_cuda.quantizer import Codebook, Quantizer
from tests.compare import assert_close, assert_same_bits
from tests.tensors import draw_weight

GOLDEN = json.loads((Path(__file__).parent.parent / "golden.json").read_text())["codebooks"]
NAMES = [
    "binary",
    "ternary",
    *(f"{b}bit" for b in range(2, 9)),
    *(f"int{b}" for b in range(2, 9)),
    "authors_4bit",
    "nf4",
    "fp4",
    "pow2",
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Multiples of 1/8: far enough apart for every dtype to tell neighbouring levels from each other.
level_lists = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(
    lambda eighths: [n / 8 for n in sorted(eighths)]
)
positive = st.floats(1e-2, 1e2)  # float16 holds 8-bit levels times these


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("binary", (-1, 1)),
        ("1bit", (-1, 1)),
        ("ternary", (-1, 0, 1)),
        ("2bit", (-1.5, -0.5, 0.5, 1.5)),
        ("3bit", (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)),
        ("int2", (-2, -1, 0, 1)),
        ("int3", (-4, -3, -2, -1, 0, 1, 2, 3)),
        ("int8", tuple(range(-128, 128))),
        ("8bit", tuple(n + 0.5 for n in range(-128, 128))),
        ("authors_4bit", (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8)),
        ("binary", tuple(GOLDEN["binary"])),
        ("ternary", tuple(GOLDEN["ternary"])),
        ("2bit", tuple(GOLDEN["uniform2_half"])),
        ("nf4", tuple(GOLDEN["nf4"])),
        ("fp4", tuple(GOLDEN["fp4_e2m1"])),
        ("pow2", tuple(GOLDEN["pow2_4bit"])),
    ],
)
def test_named_levels(name, levels):
    codebook = Codebook.named(name)
    assert codebook.levels == levels
    assert codebook.name == ("binary" if name == "1bit" else name)
    assert len(codebook) == len(levels)


def test_every_name_is_its_own():
    assert [Codebook.named(name).name for name in NAMES] == NAMES
    assert len({Codebook.named(name) for name in NAMES}) == len(NAMES)


def test_uniform():
    assert [Codebook.uniform(bits).name for bits in range(1, 9)] == [
        "binary",
        "2bit",
        "3bit",
        "4bit",
        "5bit",
        "6bit",
        "7bit",
        "8bit",
    ]
    assert all(Codebook.uniform(bits).bits == bits and len(Codebook.uniform(bits)) == 2**bits for bits in range(1, 9))
    for bits in (0, 9, 2.0, True, "2", None):
        with pytest.raises(ValueError, match=r"bits = .*1 to 8"):
            Codebook.uniform(bits)


@pytest.mark.parametrize(
    ("levels", "bits", "rms", "mean_abs", "max_abs"),
    [
        ([-1, 1], 1, 1, 1, 1),
        ([-1, 0, 1], 2, math.sqrt(2 / 3), 2 / 3, 1),
        ([-1.5, -0.5, 0.5, 1.5], 2, math.sqrt(1.25), 1, 1.5),
        ([-3, 0, 1, 2, 4], 3, math.sqrt(6), 2, 4),
        ([-4, -3], 1, math.sqrt(12.5), 3.5, 4),
        (range(16), 4, math.sqrt(77.5), 7.5, 15),
        (range(17), 5, math.sqrt(88), 8, 16),
        (range(256), 8, math.sqrt(255 * 511 / 6), 127.5, 255),
    ],
)
def test_what_a_codebook_says_of_itself(levels, bits, rms, mean_abs, max_abs):
    codebook = Codebook(levels)
    assert codebook.bits == bits
    assert (codebook.rms, codebook.mean_abs, codebook.max_abs) == pytest.approx((rms, mean_abs, max_abs), rel=1e-15)


def test_levels_are_rounded_to_float32_and_compared_by_value():
    tenth = torch.tensor(0.1).item()
    codebook = Codebook([-1, 0.1])
    assert codebook.levels == (-1.0, tenth)
    assert tenth != 0.1
    assert (
        codebook == Codebook((-1.0, tenth)) == Codebook(torch.tensor([-1, 0.1])) == pickle.loads(pickle.dumps(codebook))
    )
    assert hash(codebook) == hash(copy.deepcopy(codebook))
    assert codebook != Codebook([-1, 0.2])
    assert codebook.name is None
    with pytest.raises(FrozenInstanceError):
        codebook.levels = (0.0, 1.0)


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ([1, 0], ValueError, r"levels\[0\] = 1 is not below levels\[1\] = 0.*sort"),
        ([0, 1, 1], ValueError, r"levels\[1\] = 1 is not below levels\[2\] = 1"),
        ([0, 1, 1 + 1e-9], ValueError, r"levels\[1\] = 1 is not below .* in float32"),
        ([0, math.nan], ValueError, r"levels\[1\] = nan.*finite"),
        ([-math.inf, 0], ValueError, r"levels\[0\] = -inf.*finite"),
        ([0, 1e39], ValueError, r"levels\[1\] = 1e\+39.*at most 1\.7e\+38"),
        ([0, 10**400], ValueError, r"levels\[1\] = 10000.*at most"),
        ([1], ValueError, "1 levels; 2 to 256"),
        ([], ValueError, "0 levels; 2 to 256"),
        (range(257), ValueError, "257 levels; 2 to 256"),
        ([0, "1"], TypeError, r"levels\[1\] = '1'; a number"),
        ([False, True], TypeError, r"levels\[0\] = False; a number"),
        ([[0, 1], [2, 3]], TypeError, r"levels\[0\] = \[0, 1\]; a number"),
        (torch.tensor(1.0), TypeError, r"levels = tensor\(1\.\); a list"),
        ("binary", TypeError, "levels = 'binary'.*Codebook.named"),
        (2, TypeError, "levels = 2; a list"),
        (None, TypeError, "levels = None; a list"),
    ],
)
def test_levels_that_are_none(levels, error, message):
    with pytest.raises(error, match=message):
        Codebook(levels)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'9bit' is not known.*binary, ternary, 2bit.*int8, authors_4bit, nf4, fp4, pow2, 1bit"
    ):
        Codebook.named("9bit")


@pytest.mark.parametrize(
    ("spec", "quantizer", "plain"),
    [
        ("binary", Quantizer("binary"), "binary"),
        ("1bit/tensor", Quantizer([-1, 1]), "binary"),
        ("ternary/channel", Quantizer([-1, 0, 1], granularity="channel"), "ternary/channel"),
        ("2bit/group128", Quantizer(Codebook.uniform(2), "auto", "group", 128), "2bit/group128"),
        (Quantizer("nf4", granularity="group", group_size=8), Quantizer("nf4", "auto", "group", 8), "nf4/group8"),
        (
            {"levels": [-2, 0, 1]},
            Quantizer([-2, 0, 1]),
            {"levels": [-2.0, 0.0, 1.0], "scale": "auto", "granularity": "tensor", "group_size": None},
        ),
        (
            {"levels": [-1, 1], "scale": 2, "granularity": "channel", "group_size": None},
            Quantizer("binary", 2.0, "channel"),
            {"levels": [-1.0, 1.0], "scale": 2.0, "granularity": "channel", "group_size": None},
        ),
        (
            Quantizer("binary", torch.tensor([[0.5, 1.0]]), "group", 4),
            Quantizer("binary", [[0.5, 1]], "group", 4),
            {"levels": [-1.0, 1.0], "scale": [[0.5, 1.0]], "granularity": "group", "group_size": 4},
        ),
        (
            Quantizer("ternary", "mse"),
            Quantizer("ternary", scale="mse"),
            {"levels": [-1.0, 0.0, 1.0], "scale": "mse", "granularity": "tensor", "group_size": None},
        ),
    ],
)
def test_parse_and_plain(spec, quantizer, plain):
    assert Quantizer.parse(spec) == quantizer
    assert Quantizer.parse(spec).plain() == plain


scales = st.one_of(
    st.sampled_from(["auto", "absmean", "absmax", "sawb", "mse"]), positive, st.lists(positive, min_size=1, max_size=3)
)


@settings(deadline=None, max_examples=50)
@given(
    st.one_of(st.sampled_from(NAMES), level_lists),
    scales,
    st.one_of(st.sampled_from([("tensor", None), ("channel", None)]), st.tuples(st.just("group"), st.integers(1, 512))),
)
def test_plain_form_goes_through_json_and_back(codebook, scale, layout):
    quantizer = Quantizer(codebook, scale, *layout)
    back = Quantizer.parse(json.loads(json.dumps(quantizer.plain())))
    assert back == quantizer
    assert hash(back) == hash(quantizer)
    assert back == pickle.loads(pickle.dumps(quantizer)) == copy.deepcopy(quantizer)
    assert back != Quantizer(codebook, 1e4, *layout)


def test_a_given_scale_keeps_every_bit():
    third = torch.tensor([[[1.0]], [[3.0]]]).reciprocal()
    kept = Quantizer("binary", torch.nn.Parameter(third), "channel").scale
    assert kept == ((((1.0,),), ((third[1].item(),),)))
    assert Quantizer("binary", torch.tensor(0.1, dtype=torch.float64)).scale == 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codebook": "septenary"}, ValueError, "codebook = 'septenary' is not known"),
        ({"codebook": 3}, TypeError, "levels = 3"),
        ({"codebook": [1, 1]}, ValueError, "not below"),
        ({"scale": "max"}, ValueError, "scale = 'max'; take one of auto, absmean"),
        ({"scale": 0}, ValueError, "scale = 0 is not positive and finite"),
        ({"scale": -1.5}, ValueError, r"scale = -1\.5 is not positive"),
        ({"scale": math.nan}, ValueError, "scale = nan is not positive"),
        ({"scale": math.inf}, ValueError, "scale = inf is not positive"),
        ({"scale": torch.tensor([1, math.nan])}, ValueError, "not positive and finite"),
        ({"scale": [1.0, [2.0]]}, TypeError, r"scale = \[1\.0, \[2\.0\]\]; take"),
        ({"scale": None}, TypeError, "scale = None; take one of auto"),
        ({"scale": True}, TypeError, "scale = True; take one of auto"),
        ({"scale": {"a": 1}}, TypeError, "scale = {'a': 1}; take"),
        ({"granularity": "row"}, ValueError, "granularity = 'row'; take one of tensor, channel, group"),
        ({"granularity": "group"}, ValueError, "group_size = None; .*at least 1"),
        ({"granularity": "group", "group_size": 0}, ValueError, "group_size = 0; .*at least 1"),
        ({"granularity": "group", "group_size": 2.0}, ValueError, r"group_size = 2\.0; .*whole number"),
        ({"granularity": "group", "group_size": True}, ValueError, "group_size = True; .*whole number"),
        ({"granularity": "channel", "group_size": 8}, ValueError, "group_size = 8 with granularity = 'channel'"),
        ({"group_size": 8}, ValueError, "group_size = 8 with granularity = 'tensor'"),
    ],
)
def test_quantizers_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        Quantizer(**{"codebook": "binary", **arguments})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (None, TypeError, "quantizer = None; a name such as"),
        (2, TypeError, "quantizer = 2; a name such as"),
        ([-1, 1], TypeError, r"quantizer = \[-1, 1\].*askew_cuda\.Quantizer"),
        ("", ValueError, "codebook = '' is not known"),
        ("9bit/channel", ValueError, "codebook = '9bit' is not known"),
        ("2bit/", ValueError, "quantizer = '2bit/'; the suffix is"),
        ("2bit/row", ValueError, "quantizer = '2bit/row'; the suffix is .*2bit/group128"),
        ("2bit/group", ValueError, "the suffix is"),
        ("2bit/group-4", ValueError, "the suffix is"),
        ("2bit/group4/channel", ValueError, "the suffix is"),
        ("2bit/group0", ValueError, "group_size = 0"),
        ({"scale": 1.0}, ValueError, r"quantizer = {'scale': 1\.0}; the plain form has levels"),
        ({"levels": [0, 1], "bits": 1}, ValueError, "the plain form"),
    ],
)
def test_specifications_that_are_none(spec, error, message):
    with pytest.raises(error, match=message):
        Quantizer.parse(spec)


@pytest.mark.parametrize(
    ("spec", "shape", "scale_shape"),
    [
        ("binary", (6, 4), ()),
        ("binary/channel", (6, 4), (6, 1)),
        ("binary/channel", (6, 4, 3, 3), (6, 1, 1, 1)),
        ("binary/group2", (6, 4), (6, 2)),
        ("binary/group9", (6, 4, 3, 3), (6, 4)),
        ("binary/group36", (6, 4, 3, 3), (6, 1)),
        ("binary/channel", (6,), ()),
        ("binary/group4", (6,), ()),
        ("binary/group4", (), ()),
        ("binary/channel", (0, 4), (0, 1)),
        ("binary/group4", (6, 0, 3), (6, 0)),
    ],
)
def test_scale_shapes(spec, shape, scale_shape):
    quantizer = Quantizer.parse(spec)
    quantizer.check(torch.empty(shape), "w")
    assert quantizer.scale_shape(torch.empty(shape)) == scale_shape


def test_check_names_the_tensor_its_shape_and_the_remedy():
    with pytest.raises(
        ValueError,
        match=r"group_size = 5 .* blocks\.0\.weight.*36 weights \(shape \(6, 4, 3, 3\)\); take a divisor of 36",
    ):
        Quantizer.parse("2bit/group5").check(torch.empty(6, 4, 3, 3), "blocks.0.weight")
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), but w of shape \(3, 2\) needs \(3, 1\)"):
        Quantizer("2bit", torch.ones(2), "channel").check(torch.empty(3, 2), "w")
    for taken in (torch.ones(3, 1), torch.ones(3)):
        Quantizer("2bit", taken, "channel").check(torch.empty(3, 2), "w")
    Quantizer("2bit", 0.5, "channel").check(torch.empty(3, 2), "w")


# levels, scale, weight, its code, its level in weight units, its distance in half gaps
PLACES = [
    ([-1, 1], 1.0, 0.0, 0, -1.0, 1.0),  # a tie
    ([-1, 1], 1.0, 0.25, 1, 1.0, 0.75),
    ([-1, 1], 0.5, 0.75, 1, 0.5, 0.5),  # outside
    ([-1, 1], 0.5, -0.5, 0, -0.5, 0.0),
    ([-1, 0, 1], 2.0, 1.0, 1, 0.0, 1.0),  # a tie
    ([-1, 0, 1], 2.0, -1.0, 0, -2.0, 1.0),  # a tie
    ([-1, 0, 1], 2.0, -0.5, 1, 0.0, 0.5),
    ([-4, -1, 0, 1], 1.0, -2.5, 0, -4.0, 1.0),  # a tie
    ([-4, -1, 0, 1], 1.0, -2.0, 1, -1.0, 2 / 3),  # half the gap is 1.5 on this side of -1,
    ([-4, -1, 0, 1], 1.0, -0.75, 1, -1.0, 0.5),  # and .5 on the other
    ([-4, -1, 0, 1], 1.0, -7.0, 0, -4.0, 2.0),
    ([0.25, 0.5, 1], 1.0, 0.625, 1, 0.5, 0.5),
    ([-1.5, -0.5, 0.5, 1.5], 4.0, 1e30, 3, 6.0, 5e29),
    ([-1, 1], 1.0, math.inf, 1, 1.0, math.inf),
    ([-1, 1], 1.0, math.nan, 0, math.nan, math.nan),
    ([-1, 0, 1], 1.0, math.nan, 0, math.nan, math.nan),
]


@pytest.mark.parametrize(("levels", "scale", "w", "code", "snapped", "away"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_places_by_hand(levels, scale, w, code, snapped, away, dtype):
    weight, scale = torch.tensor([w], dtype=dtype), torch.tensor(scale, dtype=dtype)
    assert_same_bits(codes(weight, scale, levels), torch.tensor([code], dtype=torch.uint8), "codes")
    assert_same_bits(snap(weight, scale, levels), torch.tensor([snapped], dtype=dtype), "snap")
    found = distance(weight, scale, levels)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(away, rel=1e-6, nan_ok=True)


def scale_for(
    granularity: str, weight_shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    shape = Quantizer("binary", "auto", granularity, 6 if granularity == "group" else None).scale_shape(
        torch.empty(weight_shape)
    )
    return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.3).to(reference.arithmetic(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("name", ["binary", "ternary", "3bit", "int8", "authors_4bit", "nf4", "fp4", "pow2"])
def test_codes_and_snapped_weights_are_those_of_a_step(name, granularity, dtype):
    """(E6), bit for bit: a step at lr = 0 moves nothing and writes both. NaN has no level: code 0 there, and NaN where
    weights are snapped to be used.
    """
    generator, levels = torch.Generator().manual_seed(7), Codebook.named(name).levels
    scale = scale_for(granularity, (5, 4, 3, 3), dtype, generator)
    weight = draw_weight(generator, (5, 4, 3, 3), scale.double(), levels, dtype, hostile=True).to(dtype)
    weight = weight.to(memory_format=torch.channels_last)
    before, expected_codes, expected = (
        weight.clone(),
        torch.empty_like(weight, dtype=torch.uint8),
        torch.empty_like(weight),
    )
    reference.sgd_([weight], [torch.ones_like(weight)], [], [scale], levels, [expected_codes], [expected], lr=0.0,
                   momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, epsilon=0.25,
                   anneal="capture", skew_at="velocity", recovery=0.5, alpha=None, max_step=0.5,
                   clip=False)  # fmt: skip
    assert_same_bits(codes(weight, scale, levels), expected_codes, "codes")
    assert_same_bits(snap(weight, scale, levels), torch.where(weight.isnan(), weight, expected), "snap")
    assert_same_bits(weight, before, "the weight")


@settings(deadline=None, max_examples=60)
@given(level_lists, positive, st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_no_level_is_nearer(levels, scale, weights):
    weight, scale = torch.tensor(weights, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    choices = scale * torch.tensor(levels, dtype=torch.float64)
    nearest = (weight.unsqueeze(1) - choices).abs().amin(1)
    snapped = snap(weight, scale, levels)
    # w / scale is rounded, so near a midpoint the other level may win by as much: 4 ulp of the largest number in sight
    bound = 4 * 2**-52 * torch.maximum(weight.abs(), choices.abs().max())
    assert_close((weight - snapped).abs(), nearest, bound, "distance to the level")
    assert_same_bits(snapped, choices[codes(weight, scale, levels).long()], "scale * levels[codes]")


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(st.sampled_from(NAMES).map(lambda name: Codebook.named(name).levels), level_lists),
    positive,
    st.sampled_from(DTYPES),
)
def test_a_level_is_given_back(levels, scale, dtype):
    scale = torch.tensor(scale, dtype=reference.arithmetic(dtype))
    weight = (scale * torch.tensor(levels, dtype=scale.dtype)).to(dtype)
    assert_same_bits(codes(weight, scale, levels), torch.arange(len(levels), dtype=torch.uint8), "codes")
    assert_same_bits(snap(weight, scale, levels), weight, "snapped")
    assert_same_bits(distance(weight, scale, levels), torch.zeros_like(weight, dtype=scale.dtype), "distance")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), positive, st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_snapping_keeps_the_codes(name, scale, dtype, seed):
    generator, levels = torch.Generator().manual_seed(seed), Codebook.named(name).levels
    scale = torch.tensor(scale, dtype=reference.arithmetic(dtype))
    weight = draw_weight(generator, (50,), scale.double(), levels, dtype, hostile=False).to(dtype)
    snapped = snap(weight, scale, levels)
    assert snapped.dtype == dtype
    assert_same_bits(codes(snapped, scale, levels), codes(weight, scale, levels), "codes")
    assert_same_bits(snap(snapped, scale, levels), snapped, "snapped twice")


def test_groups_are_runs_in_logical_order_whatever_the_layout():
    weight = torch.ones(2, 2, 1, 3).to(memory_format=torch.channels_last)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]).reshape(2, 2, 1, 3)
    assert_same_bits(snap(weight, scale, [-1, 1]), expected, "snapped")


@pytest.mark.parametrize("spec", ["2bit", "nf4/channel", "ternary/group8"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (4, 0, 3)])
def test_empty_tensors(shape, spec):
    quantizer, weight = Quantizer.parse(spec), torch.empty(shape)
    arguments = weight, torch.ones(quantizer.scale_shape(weight)), quantizer.codebook.levels
    assert_same_bits(codes(*arguments), torch.empty(shape, dtype=torch.uint8), "codes")
    assert_same_bits(snap(*arguments), weight, "snapped")
    assert_same_bits(distance(*arguments), weight, "distance")
