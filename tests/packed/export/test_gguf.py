"""GGUF: what was trained is what its readers compute, template and way back included, and damaged files change nothing.
Judged by llama.cpp and the gguf package in tests/runtimes."""

import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import askew_cuda as askew
from askew_cuda.packed.export.blocks import TYPES, Blocks, read_blocks, values, written_blocks
from askew_cuda.packed.export.ggml_file import GgufReader, NewTensor, plain_text, write_gguf
from askew_cuda.packed.export.gguf import blocks_of, export_gguf, load_gguf, trained_of
from askew_cuda.packed.file import read_tensors
from tests.packed.export.mutations import mutated
from tests.packed.export.trained import Holder, packed

# What every type is for: a codebook, and a granularity that its blocks divide.
CASES = {
    "Q1_0": "binary/channel", "TQ1_0": "ternary/group256", "TQ2_0": "ternary", "Q2_0": "ternary/group64",
    "Q2_K": "2bit/group256", "Q4_0": "int4/group32", "Q4_1": "4bit/group32", "Q8_0": "int8/group32",
}  # fmt: skip


def fresh(model: Holder) -> Holder:
    return Holder({name: torch.zeros_like(weight) for name, weight in model.state_dict().items()})


def bits_of(model: nn.Module) -> dict[str, list[int]]:
    return {name: value.detach().contiguous().view(torch.int32).tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", TYPES)
def test_blocks_by_hand(name):
    """Digits and scales come back, and stand for what the type says."""
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, kind.digits, (3, kind.weights), generator=generator, dtype=torch.uint8)
    d = torch.tensor([[0.5], [-3.0], [0.0625]]).half()
    m = torch.tensor([[1.0], [0.25], [-7.5]]).half() if kind.first is None else None
    raw = written_blocks(kind, Blocks(digits, d, m))
    assert raw.shape == (3, kind.size)
    again = read_blocks(kind, raw)
    assert torch.equal(again.digits, digits)
    assert torch.equal(again.d, d)
    for block in range(3):
        for place in (0, 1, kind.weights // 2, kind.weights - 1):
            digit, scale = int(digits[block, place]), float(d[block])
            wanted = scale * (kind.first + kind.step * digit) if m is None else scale * digit + float(m[block])
            assert float(values(kind, again)[block, place]) == wanted


@pytest.mark.parametrize("type", CASES)
def test_to_the_file_and_back_is_the_same_model_and_the_same_file(type, tmp_path):
    model = packed(tmp_path / "a", {"first": CASES[type], "second": CASES[type]})
    assert export_gguf(tmp_path / "a", tmp_path / "a.gguf", type=type) == {"first": type, "second": type}
    other = fresh(model)
    groups = load_gguf(tmp_path / "a.gguf", other)
    assert bits_of(other) == bits_of(model)
    optimizer = askew.AskewSGD(groups, lr=0.01, momentum=0.9, total_steps=4)
    trained, _ = read_tensors(tmp_path / "a")
    for name in ("first", "second"):
        weight, scale = other.get_parameter(name), trained[name].scale
        assert torch.equal(askew.scales.reference.spread(optimizer.state[weight]["scale"], weight).expand(weight.shape),
                           askew.scales.reference.spread(scale, weight).expand(weight.shape))  # fmt: skip
    askew.save_packed(other, optimizer, tmp_path / "b")
    export_gguf(tmp_path / "b", tmp_path / "b.gguf", type=type)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for _ in range(4):
        for weight in other.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    askew.save_packed(other, optimizer, tmp_path / "c")
    askew.load_packed(tmp_path / "c", other)
    export_gguf(tmp_path / "c", tmp_path / "c.gguf", type=type)
    again = fresh(model)
    load_gguf(tmp_path / "c.gguf", again)
    assert bits_of(again) == bits_of(other) != bits_of(model)


@pytest.mark.parametrize("form", [torch.float32, torch.float16, torch.bfloat16])
def test_a_template_keeps_its_names_its_metadata_and_the_order_of_its_rows(form, tmp_path):
    """As llama.cpp's converter leaves it: other names, rows of queries exchanged, vectors in float32."""
    model = packed(tmp_path / "a", {"q": "int4/group32", "k": "4bit/group64", "twin": "ternary/channel"})
    order = torch.randperm(6)
    rows = {"blk.0.attn_q": model.q[order], "blk.0.attn_k": model.k, "t": model.twin, "norm": model.bias}
    numbers = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
    plain = {}
    for name, value in rows.items():
        kept = value.detach().to(form if value.dim() > 1 else torch.float32)
        raw = kept.reshape(-1).view(torch.uint8)
        plain[name] = NewTensor(numbers[kept.dtype], tuple(kept.shape), lambda raw=raw: raw)
    metadata = {"general.architecture": plain_text("llama"), "a.list": (9, struct.pack("<IQ3f", 6, 3, 1, 2, 3))}
    write_gguf(tmp_path / "t.gguf", metadata, plain)
    made = export_gguf(tmp_path / "a", tmp_path / "a.gguf", template=tmp_path / "t.gguf")
    assert made == {"blk.0.attn_q": "Q4_0", "blk.0.attn_k": "Q4_1", "t": "TQ1_0"}
    with open(tmp_path / "a.gguf", "rb") as file:
        reader = GgufReader(file, "a.gguf")
        assert reader.metadata == metadata
        assert list(reader.tensors) == list(rows)
    other = Holder(
        {"q": torch.zeros(6, 512), "k": torch.zeros(6, 512), "t": torch.zeros(6, 512), "norm": torch.zeros(5)}
    )
    load_gguf(tmp_path / "a.gguf", other, {"q": "blk.0.attn_q", "k": "blk.0.attn_k"})
    for name, wanted in {"q": model.q[order], "k": model.k, "t": model.twin, "norm": model.bias}.items():
        assert torch.equal(other.get_parameter(name), wanted)
    packed(tmp_path / "b", {"q": "int4/group32", "other": "binary/channel"}, shape=(6, 256))
    with pytest.raises(ValueError, match=r"t\.gguf: none of its tensors has the rows of other, q \(2 in all\)"):
        export_gguf(tmp_path / "b", tmp_path / "b.gguf", template=tmp_path / "t.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_the_smallest_type_that_holds_a_codebook_is_taken(tmp_path):
    rules = {
        "binary": "binary", "ternary": "ternary/channel", "short": "ternary/group64", "two": "2bit/group256",
        "int": "int4/group32", "halves": "4bit", "odd": askew.Quantizer([-2, 0, 1]), "pow2": "pow2", "six": "6bit",
    }  # fmt: skip
    packed(tmp_path / "a", rules)
    assert export_gguf(tmp_path / "a", tmp_path / "a.gguf") == {
        "binary": "Q1_0", "ternary": "TQ1_0", "short": "Q2_0", "two": "Q2_K", "int": "Q4_0", "halves": "Q4_1",
        "odd": "Q2_0",
        "pow2": "Q8_0", "six": "Q8_0",
    }  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_training_for_a_type_gives_that_type(name, tmp_path):
    model = packed(tmp_path / "a", {"a": f"gguf:{name.lower()}"}, shape=(4, 256))
    made = export_gguf(tmp_path / "a", tmp_path / "a.gguf")
    assert made == {"a": "TQ1_0" if name == "TQ2_0" else name}  # which hold the same
    assert len(model.a.unique()) > 2


REFUSED = [
    pytest.param({"a": "nf4/channel"}, {}, r"a, nf4/channel, .* Q8_0: its digits don't hold levels", id="codebook"),
    pytest.param({"a": "int8"}, {"type": "Q4_0"}, r"Q4_0: its digits .*; Q8_0 would do", id="type"),
    pytest.param({"a": "ternary/group32"}, {"type": "TQ2_0"},
                 r"TQ2_0: blocks of 256 don't fit scales for every 32 .*; Q4_0 or Q4_1 or Q8_0", id="groups"),
    pytest.param({"a": "ternary"}, {"type": "i2_s"},
                 r"type = 'i2_s': bitnet\.cpp, for which it is, scales a tensor by the mean .* TQ1_0", id="i2_s"),
    pytest.param({"a": "nf4/channel"}, {}, r"No format here holds it", id="nobody"),
    pytest.param({"a.weight": "ternary/channel"}, {"shape": (8, 40)}, r"It fits onnx, torchao, compressed-tensors$",
                 id="others"),
    pytest.param({"a": "ternary"}, {"type": "TQ3_0"}, r"type = 'TQ3_0'; take one of Q1_0, TQ1_0", id="unknown"),
    pytest.param({"a": "int4/channel"}, {"fits": False}, r"float16 numbers, which .* is not: round them", id="scale"),
    pytest.param({"a": "ternary"}, {"shape": (6, 40)}, r"blocks of 32 don't fit", id="row"),
    pytest.param({"a": askew.Quantizer("ternary", scale=2.0**-26)}, {}, r"numbers, which 1.49011612e-08", id="small"),
    pytest.param({"a": askew.Quantizer("ternary", scale=2.0**-15)}, {}, r"a, ternary, .* which 3.05175781e-05",
                 id="subnormal"),
    pytest.param({"a": askew.Quantizer("ternary", scale=2.0**16)}, {}, r"numbers, which 65536", id="large"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "how", "match"), REFUSED)
def test_what_gguf_can_not_hold_is_refused_by_name(rules, how, match, tmp_path):
    keywords = {key: how[key] for key in how if key != "type"}
    packed(tmp_path / "a", rules, **keywords)
    with pytest.raises(ValueError, match=match):
        export_gguf(tmp_path / "a", tmp_path / "a.gguf", type=how.get("type"))
    assert not (tmp_path / "a.gguf").exists()


def test_weights_of_16_bits_are_written_where_nothing_was_rounded(tmp_path):
    packed(tmp_path / "a", {"a": "ternary/channel"}, dtype=torch.bfloat16)
    assert export_gguf(tmp_path / "a", tmp_path / "a.gguf") == {"a": "TQ1_0"}
    packed(tmp_path / "b", {"a": "int8/channel"}, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.bfloat16 weights are rounded, and it would not round them"):
        export_gguf(tmp_path / "b", tmp_path / "b.gguf")


# Files of others


def test_negative_and_dead_scales_of_others():
    """Quantizers of llama.cpp give half of the Q4_0 blocks a negative scale, and blocks of zeros a scale of 0."""
    generator = torch.Generator().manual_seed(0)
    for name in ("Q4_0", "Q2_0", "TQ2_0", "Q8_0", "Q1_0"):
        kind = TYPES[name]
        least, shape = int(name == "Q8_0"), (8, kind.weights)
        digits = torch.randint(least, kind.digits, shape, generator=generator, dtype=torch.uint8)
        d = torch.tensor([0.5, -0.5, -1, 0.25, 0, 0, -2, 3]).half().unsqueeze(1)
        blocks = Blocks(digits, d, None)
        if name == "Q1_0":
            with pytest.raises(ValueError, match=r"a scale is 0, and no level is"):
                trained_of(kind, blocks, (2, 4 * kind.weights), torch.float32)
            blocks = Blocks(digits, torch.where(d == 0, 1, d), None)
        found = trained_of(kind, blocks, (2, 4 * kind.weights), torch.float32)
        assert torch.equal(found.weight().reshape(8, -1), values(kind, blocks))
        assert bool((found.scale > 0).all())
        again = trained_of(kind, read_blocks(kind, written_blocks(kind, blocks)), (2, 4 * kind.weights), torch.float32)
        assert torch.equal(again.codes, found.codes)
        if name in ("Q4_0", "Q2_0"):  # with the digit that only one side has, the sign of each scale is clear
            digits[:, 0] = 0 if name == "Q4_0" else 3
            blocks = Blocks(digits, torch.where(d == 0, 1, d), None)
            found = trained_of(kind, blocks, (2, 4 * kind.weights), torch.float32)
            assert max(found.quantizer.codebook.levels) == (8 if name == "Q4_0" else 2)
            assert torch.equal(written_blocks(kind, blocks_of("a", found, name)[1]), written_blocks(kind, blocks))
    low = Blocks(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[-1.0]]).half(), None)
    with pytest.raises(ValueError, match=r"a negative scale with a digit of -128"):
        trained_of(TYPES["Q8_0"], low, (1, 32), torch.float32)
    with pytest.raises(ValueError, match=r"a scale is NaN"):
        trained_of(TYPES["Q4_0"], low._replace(d=torch.tensor([[torch.nan]]).half()), (1, 32), torch.float32)
    digits, d, m = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1).half(), torch.tensor([[-7.5], [-7.4]]).half()
    for scale, shift in ((d, m), (d * 0, m), (d * 0, m * 0), (d, m * torch.inf), (d, m[:1] + 7.1)):
        with pytest.raises(ValueError, match=r"blocks of Q4_1 have shifts of their own"):
            trained_of(TYPES["Q4_1"], Blocks(digits, scale, shift.expand(2, 1)), (2, 32), torch.float32)
    for kind in TYPES.values():
        with pytest.raises(ValueError, match=r"it is empty"):
            trained_of(kind, read_blocks(kind, torch.zeros(0, kind.size, dtype=torch.uint8)), (0, 256), torch.float32)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    packed(folder / "a", {"x": "int4/group32", "y": "ternary/channel", "z": "2bit/group256"}, shape=(2, 256))
    export_gguf(folder / "a", folder / "good")
    return folder / "good"


def model_of() -> Holder:
    return Holder({**{name: torch.ones(2, 256) for name in "xyz"}, "bias": torch.ones(5)})


def load_or_refuse(path: Path) -> str | None:
    """The message of the ValueError, or None when the file was loaded; any other exception comes through."""
    model, before = model_of(), bits_of(model_of())
    try:
        load_gguf(path, model)
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert bits_of(model) == before
    assert message.startswith(f"{path}: ")
    return message


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_loaded(good, data):
    """There are no checksums: what is changed inside of the data can't be found, but never breaks anything."""
    bad = good.parent / "bad"
    bad.write_bytes(damaged(good, data))
    load_or_refuse(bad)


def damaged(path: Path, data: st.DataObject) -> bytes:
    """The file with a few changes, most of them in its header."""
    raw = path.read_bytes()
    return mutated(raw, data, len(raw) - sum(each.size for each in sizes(path)))


def sizes(path: Path) -> list[NewTensor]:
    with open(path, "rb") as file:
        reader = GgufReader(file, path)
        return [NewTensor(each.number, each.shape, lambda: None) for each in reader.tensors.values()]


def test_a_truncated_file_is_refused(good):
    raw, bad = good.read_bytes(), good.parent / "cut"
    with open(good, "rb") as file:
        end = max(each.end for each in GgufReader(file, good).tensors.values())
    for size in {*range(0, end, 7), end - 1}:
        bad.write_bytes(raw[:size])
        assert load_or_refuse(bad) is not None, size
    assert load_or_refuse(good) is None


HEAD = b"GGUF" + struct.pack("<I", 3)
KEY = HEAD + struct.pack("<QQQ1s", 0, 1, 1, b"a")
ALIGN = HEAD + struct.pack("<QQQ17s", 0, 1, 17, b"general.alignment")
ONE = struct.pack("<Q1sI2QIQ", 1, b"a", 2, 32, 1, 0, 0)
HEADERS = [
    pytest.param(b"GGML" + bytes(20), r"does not begin with GGUF", id="magic"),
    pytest.param(b"GGUF" + struct.pack("<IQQ", 1, 0, 0), r"version 1; 2 or 3", id="version"),
    pytest.param(HEAD + struct.pack("<QQ", 2**63, 0), r"announces 9223372036854775808 entries", id="tensors"),
    pytest.param(HEAD + struct.pack("<QQ", 0, 2**63) + bytes(64), r"announces 9223372036854775808 entries", id="keys"),
    pytest.param(HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64), r"its header goes on beyond its end", id="key"),
    pytest.param(KEY + struct.pack("<IIQ", 9, 4, 2**61), r"announces 2305843009213693952", id="array"),
    pytest.param(KEY + struct.pack("<I", 13) + bytes(9), r"a value of type 13", id="value"),
    pytest.param(KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6, r"of type 9", id="deep"),
    pytest.param(HEAD + struct.pack("<QQQ1sI", 0, 1, 1, b"\xff", 13) + bytes(9), r"is not UTF-8", id="utf-8"),
    pytest.param(ALIGN + struct.pack("<IIQ", 4, 12, 0), r"alignment = 12", id="align"),
    pytest.param(ALIGN + struct.pack("<IQQ", 10, 32, 0), r"of type 10", id="align-type"),
    pytest.param(HEAD + struct.pack("<QQQ1sI", 1, 0, 1, b"a", 5) + bytes(64), r"'a' has 5 dimensions", id="dimensions"),
    pytest.param(HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI2QIQ", 1, b"a", 2, 2**60, 2**60, 0, 0),
                 r"'a' has bytes 96 to .* inside of the file", id="huge"),
    pytest.param(HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI2QIQ", 1, b"a", 2, 31, 1, 2, 0) + bytes(256),
                 r"its type 2 has blocks of 32 along", id="blocks"),
    pytest.param(HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI2QIQ", 1, b"a", 2, 32, 1, 99, 0) + bytes(256),
                 r"'a' is of type 99", id="type"),
    pytest.param(HEAD + struct.pack("<QQ", 2, 0) + ONE + ONE + bytes(256), r"name occurs twice", id="twice"),
    pytest.param(HEAD + struct.pack("<QQ", 2, 0) + ONE + ONE.replace(b"a", b"b") + bytes(256),
                 r"'b' begins at byte .* goes on to", id="overlap"),
    pytest.param(HEAD + struct.pack("<QQ", 1, 0) + ONE[:-8] + struct.pack("<Q", 8) + bytes(256),
                 r"multiples of 32", id="offset"),
    pytest.param(HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI2QIQ", 1, b"a", 2, 32, 1, 36, 0) + bytes(256),
                 r"'a' is of type 36 \(i2_s: bitnet\.cpp", id="i2_s"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "match"), HEADERS)
def test_a_hostile_header_is_refused(raw, match, good):
    bad = good.parent / "header"
    bad.write_bytes(raw)
    message = load_or_refuse(bad)
    assert message is not None
    assert re.search(match, message), message


def test_models_that_do_not_fit_are_left_alone(good):
    def refused(model: nn.Module, match: str, names: dict[str, str] | None = None) -> None:
        before = bits_of(model) if model.x.dtype == torch.float32 else None
        with pytest.raises(ValueError, match=match):
            load_gguf(good, model, names)
        assert before is None or bits_of(model) == before

    model = model_of()
    model.more = nn.Parameter(torch.ones(1))
    refused(
        model, r"more \(1 in all\) of the model are not in it; names= says what they are called there, such as 'bias'"
    )
    refused(model_of(), r"w \(1 in all\)|are not in it", {"x": "w"})
    refused(Holder({**model_of().state_dict(), "x": torch.ones(256, 2)}), r"'x' has shape \(2, 256\); \(256, 2\), as x")
    refused(model_of().half(), r"'bias' is torch.float32, more than bias, torch.float16|float32 weights; x is")


def test_blocks_of_a_type_that_is_not_ours_are_stepped_over(tmp_path):
    """Files of others mix types; only what the model needs has to be readable."""
    plain = NewTensor(0, (4,), lambda: torch.arange(4.0).view(torch.uint8))
    foreign = NewTensor(14, (1, 256), lambda: torch.zeros(210, dtype=torch.uint8))
    write_gguf(tmp_path / "a", {}, {"foreign": foreign, "bias": plain})
    model = Holder({"bias": torch.zeros(4)})
    load_gguf(tmp_path / "a", model)
    assert model.bias.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"'foreign' is of type 14; Q1_0, .* can be read"):
        load_gguf(tmp_path / "a", Holder({"foreign": torch.zeros(256)}))


def with_queries(path, heads: int = 2, architecture: str = "llama", name: str = "blk.3.attn_q.weight") -> torch.Tensor:
    """A file with queries of ``heads`` heads of four rows, in pairs; the rows as a model has them, in halves."""
    rows = torch.arange(8.0).repeat_interleave(32).reshape(8, 32)
    pairs = rows[[0, 2, 1, 3, 4, 6, 5, 7]]  # number 0 of both halves, number 1 of both halves, of each head
    metadata = {"general.architecture": plain_text(architecture)}
    if heads:
        metadata["llama.attention.head_count"] = (4, struct.pack("<I", heads))
    raw = pairs.reshape(-1).view(torch.uint8)
    write_gguf(path, metadata, {name: NewTensor(0, (8, 32), lambda: raw)})
    return rows


def test_rows_of_queries_are_put_back_taken_as_they_are_or_refused(tmp_path):
    rows = with_queries(tmp_path / "a")
    model, names = Holder({"q": torch.zeros(8, 32)}), {"q": "blk.3.attn_q.weight"}
    with pytest.raises(ValueError, match=r"'blk\.3\.attn_q\.weight', architecture 'llama': for some .* rows='halves'"):
        load_gguf(tmp_path / "a", model, names)
    assert not model.q.any()
    load_gguf(tmp_path / "a", model, names, rows="halves")
    assert torch.equal(model.q, rows)
    load_gguf(tmp_path / "a", model, names, rows="stored")
    assert torch.equal(model.q, rows[[0, 2, 1, 3, 4, 6, 5, 7]])
    with pytest.raises(ValueError, match=r"rows = 'pairs'; take one of 'halves', 'stored'"):
        load_gguf(tmp_path / "a", model, names, rows="pairs")
    for heads in (0, 3, 8):
        with_queries(tmp_path / "a", heads)
        with pytest.raises(
            ValueError, match=rf"has 8 rows, and llama\.attention\.head_count = {heads}; heads of an even"
        ):
            load_gguf(tmp_path / "a", model, names, rows="halves")
    with_queries(tmp_path / "a", name="blk.3.attn_qkv.weight")
    with pytest.raises(ValueError, match=r"holds queries, keys and values; .* rows='stored' only"):
        load_gguf(tmp_path / "a", model, {"q": "blk.3.attn_qkv.weight"}, rows="halves")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_with_queries_is_refused_or_loaded(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated-queries"
    folder.mkdir(exist_ok=True)
    with_queries(folder / "good")
    (folder / "bad").write_bytes(damaged(folder / "good", data))
    model = Holder({"q": torch.ones(8, 32)})
    try:
        load_gguf(folder / "bad", model, {"q": "blk.3.attn_q.weight"}, rows="halves")
    except ValueError as error:
        message = str(error)
    else:
        return
    assert message.startswith(f"{folder / 'bad'}: ")
    assert bool((model.q == 1).all())


def test_blocks_change_their_rows_with_their_scales(tmp_path):
    """Every row has a scale of its own."""
    model = packed(tmp_path / "a", {"q": "ternary/channel"}, shape=(8, 256))
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    with_queries(tmp_path / "t")
    with open(tmp_path / "t", "rb") as file:
        metadata = GgufReader(file, "t").metadata
    raw = model.q.detach()[order].reshape(-1).view(torch.uint8)
    write_gguf(tmp_path / "t", metadata, {"blk.3.attn_q.weight": NewTensor(0, (8, 256), lambda: raw)})
    export_gguf(tmp_path / "a", tmp_path / "b", template=tmp_path / "t")
    other = Holder({"q": torch.zeros(8, 256)})
    groups = load_gguf(tmp_path / "b", other, {"q": "blk.3.attn_q.weight"}, rows="halves")
    assert torch.equal(other.q, model.q)
    assert torch.equal(groups[0]["scales"][0], read_tensors(tmp_path / "a")[0]["q"].scale)


def test_blocks_of_no_codebook_are_refused_or_taken_as_numbers(tmp_path):
    """As llama.cpp's quantizer writes Q4_1: every block has a shift of its own."""
    kind, generator = TYPES["Q4_1"], torch.Generator().manual_seed(0)
    digits = torch.randint(0, 16, (4, 32), generator=generator, dtype=torch.uint8)
    d, m = torch.rand(4, 1, generator=generator).half(), -torch.rand(4, 1, generator=generator).half()

    def write(m: torch.Tensor) -> Blocks:
        blocks = Blocks(digits, d, m)
        write_gguf(tmp_path / "a", {}, {"w": NewTensor(3, (2, 64), lambda: written_blocks(kind, blocks).reshape(-1))})
        return blocks

    blocks = write(m)
    model = Holder({"w": torch.zeros(2, 64)})
    with pytest.raises(ValueError, match=r"'w': blocks of Q4_1 have shifts of their own.*; floats=True takes"):
        load_gguf(tmp_path / "a", model)
    assert not model.w.any()
    (group,) = load_gguf(tmp_path / "a", model, floats=True)
    assert group["quantizer"] is None
    assert torch.equal(model.w.reshape(4, 32), values(kind, blocks))
    for bad in (torch.inf, torch.nan):
        write(m * bad)
        with pytest.raises(ValueError, match=r"'w' holds NaN or infinity"):
            load_gguf(tmp_path / "a", model, floats=True)
    assert torch.equal(model.w.reshape(4, 32), values(kind, blocks))


def released(path) -> dict[str, str]:
    """A file of somebody else's model: queries whose rows were exchanged, a norm, and tensors that are no model's.
    Returns the names of the model's tensors there.
    """
    kind, generator = TYPES["TQ2_0"], torch.Generator().manual_seed(0)
    digits = torch.randint(0, 3, (8, 256), generator=generator, dtype=torch.uint8)
    raw = written_blocks(kind, Blocks(digits, torch.rand(8, 1, generator=generator).half() + 1, None)).reshape(-1)
    norm, other = torch.rand(5, generator=generator), torch.rand(3, generator=generator)
    metadata = {"general.architecture": plain_text("llama"), "llama.attention.head_count": (4, struct.pack("<I", 2))}
    write_gguf(path, metadata, {
        "blk.0.attn_q.weight": NewTensor(kind.number, (8, 256), lambda: raw),
        "norm": NewTensor(0, (5,), lambda: norm.view(torch.uint8)),
        "rope_freqs": NewTensor(0, (3,), lambda: other.view(torch.uint8)),
    })  # fmt: skip
    return {"q": "blk.0.attn_q.weight", "bias": "norm"}


def test_a_released_file_is_trained_on_and_written_again_by_its_names(tmp_path):
    names = released(tmp_path / "a")
    model = Holder({"q": torch.zeros(8, 256), "bias": torch.zeros(5)})
    groups = load_gguf(tmp_path / "a", model, names, rows="halves")
    optimizer = askew.AskewSGD(groups, lr=0.5, total_steps=20)
    askew.save_packed(model, optimizer, tmp_path / "packed")
    how = {"template": tmp_path / "a", "names": names, "rows": "halves"}
    assert export_gguf(tmp_path / "packed", tmp_path / "b", **how) == {"blk.0.attn_q.weight": "TQ2_0"}  # not TQ1_0
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    target = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        optimizer.zero_grad()
        ((model.q - target).square().sum() + model.bias.square().sum()).backward()
        optimizer.step()
    optimizer.finalize()
    askew.save_packed(model, optimizer, tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "b", **how)
    again = Holder({"q": torch.zeros(8, 256), "bias": torch.zeros(5)})
    load_gguf(tmp_path / "b", again, names, rows="halves")
    assert bits_of(again) == bits_of(model)
    with open(tmp_path / "a", "rb") as first, open(tmp_path / "b", "rb") as second:
        readers = GgufReader(first, "a"), GgufReader(second, "b")
        assert readers[0].metadata == readers[1].metadata
        kept, same, changed = (
            torch.equal(*(reader.read(name) for reader in readers))
            for name in ("rope_freqs", "norm", "blk.0.attn_q.weight")
        )
        assert (kept, same, changed) == (True, False, False)

    assert export_gguf(tmp_path / "packed", tmp_path / "c", type="TQ1_0", **how) == {"blk.0.attn_q.weight": "TQ1_0"}
    for changes, match in (
        ({"rows": None}, r"'blk\.0\.attn_q\.weight', architecture 'llama': .* rows='halves'"),
        (
            {"names": {"q": "norm", "bias": "norm"}},
            r"'norm', which q of shape \(8, 256\) is to take the place of: it has shape \(5,\)",
        ),
        ({"names": {"q": names["q"]}}, r"'bias', which bias of shape \(5,\) is to take the place of: there is none"),
        ({"rows": "pairs"}, r"export_gguf: rows = 'pairs'; take one of"),
        ({"template": None}, r"names and rows go with a template"),
    ):
        with pytest.raises(ValueError, match=match):
            export_gguf(tmp_path / "packed", tmp_path / "d", **{**how, **changes})
        assert not (tmp_path / "d").exists()
