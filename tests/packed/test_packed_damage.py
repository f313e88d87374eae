"""Packed files that are damaged, foreign or hostile: a ValueError that says what and where, and the model is as it
was.
"""

import hashlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import askew_cuda as askew
from askew_cuda.packed import load_packed, save_packed
from askew_cuda.packed.safetensors import TensorReader, TensorWriter
from tests.packed.test_packed import bits_of, network, saved

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "good"
    saved(path)
    return path


def load_or_refuse(path: Path, seed: int = 1) -> str | None:
    """The message of the ValueError, or None when the file was loaded; any other exception comes through."""
    model = network(seed)
    before = bits_of(model)
    message = None
    try:
        load_packed(path, model)
    except ValueError as error:
        message = str(error)
    if message is None:
        wanted = network(seed)
        load_packed(path.parent / "good", wanted)
        before = bits_of(wanted)
    assert bits_of(model) == before
    assert message is None or message.startswith(f"{path}: ")
    return message


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_loads_the_same_model(good, data):
    raw = bytearray(good.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    place = (
        st.integers(0, len(raw) - 1)
        | st.integers(0, header - 1)
        | st.integers(0, 7)
        | st.integers(header, len(raw) - 1)
    )
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        at, kind = (
            data.draw(place, "at"),
            data.draw(st.sampled_from(["bit", "byte", "digit", "insert", "delete", "swap"]), "kind"),
        )
        at = min(at, len(raw) - 1)
        if kind == "bit":
            raw[at] ^= 1 << data.draw(st.integers(0, 7), "bit")
        elif kind in ("byte", "digit"):
            raw[at] = data.draw(
                st.integers(0, 255) if kind == "byte" else st.sampled_from(b'0123456789"[]{},:-.e '), "value"
            )
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4), "inserted")
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 4), "deleted")]
        else:
            other = min(data.draw(place, "other"), len(raw) - 1)
            raw[at], raw[other] = raw[other], raw[at]
    (good.parent / "bad").write_bytes(raw)
    load_or_refuse(good.parent / "bad")


def test_a_truncated_or_longer_file_is_refused(good):
    raw, bad = good.read_bytes(), good.parent / "cut"
    for size in {*range(0, 12), *range(0, len(raw), 97), len(raw) - 1}:
        bad.write_bytes(raw[:size])
        assert load_or_refuse(bad) is not None, size
    bad.write_bytes(raw + b"\0")
    assert "it is truncated, or grew" in load_or_refuse(bad)


def test_every_flipped_bit_of_the_data_is_found(good):
    raw, bad = good.read_bytes(), good.parent / "flipped"
    start = 8 + int.from_bytes(raw[:8], "little")
    for at in range(start, len(raw), 7):
        changed = bytearray(raw)
        changed[at] ^= 1 << at % 8
        bad.write_bytes(changed)
        assert "SHA-256" in load_or_refuse(bad)


def test_a_pickle_is_never_opened(good, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    bad = good.parent / "pickle"
    bad.write_bytes(pickle.dumps(Bomb()))
    assert "a whole safetensors file is needed" in load_or_refuse(bad)
    torch.save({"x": torch.ones(3), "bomb": Bomb()}, bad)
    assert load_or_refuse(bad) is not None
    assert not (tmp_path / "exploded").exists()


# A forged file has every checksum right, so that what lies behind them is seen.


def forge(source: Path, target: Path, manifest=None, tensors=None, unsigned=None) -> Path:
    """Copies a file: ``manifest`` changes it in place, ``tensors`` are replaced (None: left out), ``unsigned`` gets no
    checksum.
    """
    with open(source, "rb") as file:
        reader = TensorReader(file, source)
        values = {name: reader.read(name)[0] for name in reader.entries}
        said = json.loads(reader.metadata["askew_cuda"])
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del values[name]
        else:
            values[name] = tensor
    if manifest is not None:
        manifest(said)

    def metadata(digests):
        text = json.dumps({**said, "sha256": {name: digest for name, digest in digests.items() if name != unsigned}})
        return {"askew_cuda": text, "askew_cuda.sha256": hashlib.sha256(text.encode()).hexdigest()}

    with open(target, "wb") as file:
        writer = TensorWriter(file, {name: (t.dtype, tuple(t.shape)) for name, t in values.items()}, metadata)
        for name, tensor in values.items():
            writer.write(name, tensor)
        writer.finish()
    return target


def entry(**changed):
    return lambda said: said["quantized"]["0.weight"].update(changed)


deep: list = []
for _ in range(300):
    deep = [deep]

MANIFESTS = [
    pytest.param(
        lambda said: said.update(version=3), r"manifest has version 3; version 1 or 2 is needed", id="version"
    ),
    pytest.param(lambda said: said.update(version=True), r"manifest has version True", id="version-type"),
    pytest.param(
        lambda said: said.update(more=1), r"'more'.* version, quantized, tied and sha256 are needed", id="unknown-key"
    ),
    pytest.param(lambda said: said.update(tied=[]), r"version, quantized, tied and sha256", id="tied-type"),
    pytest.param(lambda said: said["tied"].update(x="nothing"), r"'x' is tied to 'nothing'", id="tied-to-nothing"),
    pytest.param(lambda said: said["tied"].update(x=["0.bias"]), r"'x' is tied to \['0.bias'\]", id="tied-to-a-list"),
    pytest.param(
        lambda said: said["tied"].update(x="0.bias"),
        r"names in the file .*missing none; unexpected 'x'",
        id="unexpected-name",
    ),
    pytest.param(
        lambda said: said["tied"].update({"0.bias": "1.bias"}), r"'0.bias' is tied to '1.bias'", id="tied-and-stored"
    ),
    pytest.param(lambda said: said["quantized"].update(y=3), r"'y' is described by 3", id="entry-type"),
    pytest.param(
        lambda said: said["quantized"].pop("0.weight"),
        r"missing none; unexpected '0.weight.codes', '0.weight.scale'",
        id="not-described",
    ),
    pytest.param(entry(bits=8, extra=1), r"'0.weight' is described by", id="entry-key"),
    pytest.param(entry(quantizer="ternary/row"), r"'0.weight' has quantizer 'ternary/row'", id="quantizer"),
    pytest.param(entry(quantizer=deep), r"'0.weight' has quantizer \[\[", id="quantizer-deep"),
    pytest.param(entry(quantizer={"levels": [-1, 0, 1], "scale": 2.0}), r"one without a scale", id="quantizer-scale"),
    pytest.param(
        entry(quantizer="2bit/channel", levels=[-1.5, -0.5, 0.5, 1.5]),
        r"bits = 1.6; .* for 4 levels",
        id="bits-too-few",
    ),
    pytest.param(
        entry(quantizer="ternary/group4"), r"does not divide a row of 0.weight, which has 27", id="group-size"
    ),
    pytest.param(
        entry(quantizer="ternary"),
        r"'0.weight.scale' is torch.float32 of shape \(5, 1, 1, 1\); .*\(\) is needed",
        id="granularity",
    ),
    pytest.param(entry(channel_dim=1), r"'0.weight.scale' is .* \(5, 1, 1, 1\); .*\(1, 3, 1, 1\)", id="dimension"),
    pytest.param(entry(channel_dim=4), r"channel_dim = 4 of 0.weight, which has 4 dimensions", id="dimension-none"),
    pytest.param(entry(channel_dim="0"), r"channel_dim = '0'; a dimension, or a list", id="dimension-type"),
    pytest.param(entry(levels=[-1, 0, 2]), r"'0.weight' has levels = \[-1, 0, 2\]; \[-1.0, 0.0, 1.0\]", id="levels"),
    pytest.param(
        entry(bits=2), r"'0.weight.codes' is torch.uint8 of shape \(27,\); torch.uint8 of shape \(34,\)", id="bits"
    ),
    pytest.param(entry(bits="2"), r"bits = '2'", id="bits-type"),
    pytest.param(entry(bits=3), r"bits = 3; 1, 1.6, 2, 4 or 8", id="bits-unknown"),
    pytest.param(entry(dtype="float64"), r"'0.weight' is torch.float64; torch.float32, as in the model", id="dtype"),
    pytest.param(entry(dtype="int8"), r"dtype = 'int8'", id="dtype-unknown"),
    pytest.param(entry(layout="column-major"), r"layout = 'column-major'; 'row-major' is needed", id="layout"),
    pytest.param(
        entry(shape=[5, 3, 9]), r"'0.weight' has shape \(5, 3, 9\); \(5, 3, 3, 3\), as in the model", id="shape"
    ),
    pytest.param(entry(shape=[5, 3, 3, 10**30]), r"'0.weight' has shape", id="shape-huge"),
    pytest.param(entry(shape=[5, 3, 3, -3]), r"shape = \[5, 3, 3, -3\]; a list of sizes", id="shape-negative"),
]
CODES = torch.full((27,), 121, dtype=torch.uint8)  # 135 weights, five to a byte, all of level 0
TENSORS = [
    pytest.param({"0.weight.codes": CODES.index_fill(0, torch.tensor(3), 250)},
                 r"'0.weight.codes': a byte is 250", id="byte"),
    pytest.param({"0.weight": torch.zeros(5, 3, 3, 3)}, r"'0.weight' is there twice, quantized and as torch.float32",
                 id="twice"),
    pytest.param({"4.weight.codes": CODES[:3]}, r"'4.weight.codes' is torch.uint8 of shape \(3,\)", id="codes-shape"),
    pytest.param({"0.weight.codes": CODES.to(torch.int8)}, r"'0.weight.codes' is torch.int8", id="codes-dtype"),
    pytest.param({"6.weight.codes": torch.tensor([0, 0, 0, 0, 3], dtype=torch.uint8)},
                 r"'6.weight.codes': the last byte", id="padding"),
    pytest.param({"4.weight.scale": torch.full((7, 5), 0.0)},
                 r"'4.weight.scale' holds a scale that is not positive", id="scale-zero"),
    pytest.param({"4.weight.scale": torch.full((7, 5), torch.nan)}, r"'4.weight.scale' holds a scale", id="scale-nan"),
    pytest.param({"4.weight.scale": torch.full((7, 5), torch.inf)}, r"'4.weight.scale' holds a scale", id="scale-inf"),
    pytest.param({"4.weight.scale": torch.full((7, 5), 1e-40)},
                 r"'4.weight.scale' holds a scale", id="scale-subnormal"),
    pytest.param({"4.weight.scale": torch.ones(7, 5).double()}, r"'4.weight.scale' is torch.float64", id="scale-dtype"),
    pytest.param({"4.weight.scale": torch.ones(35)},
                 r"'4.weight.scale' is torch.float32 of shape \(35,\)", id="scale-shape"),
    pytest.param({"4.weight.scale": None}, r"missing '4.weight.scale'; unexpected none", id="no-scale"),
    pytest.param({"4.bias": None}, r"missing '4.bias'; unexpected none", id="no-bias"),
    pytest.param({"more": torch.ones(1)}, r"missing none; unexpected 'more'", id="one-more"),
    pytest.param({"4.bias": torch.ones(8)}, r"'4.bias' has shape \(8,\); \(7,\), as in the model", id="bias-shape"),
    pytest.param({"4.bias": torch.ones(7).half()},
                 r"'4.bias' is torch.float16; torch.float32, as in the model", id="bias-dtype"),
]  # fmt: skip


def test_a_file_of_version_1_is_read(good):
    """It states no dimension, since that was always the first."""

    def older(said: dict) -> None:
        said["version"] = 1
        for entry in said["quantized"].values():
            assert entry.pop("channel_dim") == 0

    assert load_or_refuse(forge(good, good.parent / "version-1", manifest=older)) is None


@pytest.mark.parametrize(("manifest", "match"), MANIFESTS)
def test_a_forged_manifest_is_refused(manifest, match, good):
    message = load_or_refuse(forge(good, good.parent / "forged", manifest=manifest))
    assert message is not None
    assert re.search(match, message), message


@pytest.mark.parametrize(("tensors", "match"), TENSORS)
def test_a_forged_tensor_is_refused(tensors, match, good):
    message = load_or_refuse(forge(good, good.parent / "forged", tensors=tensors))
    assert message is not None
    assert re.search(match, message), message


def test_a_tensor_without_a_checksum_is_refused(good):
    assert "checksums: missing '4.bias'; unexpected none" in load_or_refuse(
        forge(good, good.parent / "forged", unsigned="4.bias")
    )


def test_forging_nothing_loads(good):
    assert load_or_refuse(forge(good, good.parent / "forged", tensors={})) is None


F32 = '"dtype":"F32","shape":[1]'
HEADERS = [
    pytest.param("[]", r"header is a JSON list", id="list"),
    pytest.param("{", r"is not the JSON", id="no-json"),
    pytest.param("[" * 100_000, r"is not the JSON", id="deep"),
    pytest.param('{"a":1}', r"'a' is described by 1", id="entry"),
    pytest.param(
        f'{{"a":{{{F32},"data_offsets":[0,4]}},"a":{{{F32},"data_offsets":[0,4]}}}}', r"a name occurs twice", id="twice"
    ),
    pytest.param(
        f'{{"a":{{{F32},"data_offsets":[0,4]}},"b":{{{F32},"data_offsets":[2,6]}}}}',
        r"'b' begins at byte 2 .* 4",
        id="overlap",
    ),
    pytest.param(
        f'{{"a":{{{F32},"data_offsets":[0,4]}},"b":{{{F32},"data_offsets":[6,10]}}}}',
        r"'b' begins at byte 6",
        id="hole",
    ),
    pytest.param(f'{{"a":{{{F32},"data_offsets":[0,5]}}}}', r"'a' has 5 bytes; 4", id="size"),
    pytest.param(f'{{"a":{{{F32},"data_offsets":[-4,0]}}}}', r"'a' has data_offsets", id="negative"),
    pytest.param(f'{{"a":{{{F32},"data_offsets":[4,0]}}}}', r"'a' has -4 bytes", id="reversed"),
    pytest.param(
        f'{{"a":{{{F32},"data_offsets":[0,4]}}}}', r"it has \d+ bytes; \d+, header and tensors", id="beyond-the-end"
    ),
    pytest.param('{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', r"'a' has dtype 'F31'", id="dtype"),
    pytest.param('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', r"'a' has shape \[1.0\]", id="shape"),
    pytest.param(
        '{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]}}', r"'a' has shape", id="shape-huge"
    ),
    pytest.param('{"__metadata__":{"askew_cuda":1}}', r"__metadata__ = ", id="metadata"),
    pytest.param('{"__metadata__":{"askew_cuda":"["}}', r"manifest is not JSON", id="manifest"),
    pytest.param(
        '{"__metadata__":{"askew_cuda":"{\\"version\\":1}"}}', r"manifest does not have the checksum", id="checksum"
    ),
]


@pytest.mark.parametrize(("header", "match"), HEADERS)
def test_a_bad_header_is_refused(header, match, good):
    bad = good.parent / "header"
    bad.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    message = load_or_refuse(bad)
    assert message is not None
    assert re.search(match, message), message


def test_a_truth_value_of_two_is_refused(tmp_path):
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.ones(5, dtype=torch.bool))
    save_packed(
        model, askew.AskewSGD(askew.param_groups(model, {"*": "binary"}, verbose=False), lr=0.1), tmp_path / "a"
    )
    raw = (tmp_path / "a").read_bytes()
    with open(tmp_path / "a", "rb") as file:
        reader = TensorReader(file, "a")
        at, manifest = reader.start + reader.entries["mask"].begin, reader.metadata["askew_cuda"]
    raw = raw[:at] + b"\2" + raw[at + 1 :]
    forged = manifest.replace(hashlib.sha256(b"\1" * 5).hexdigest(), hashlib.sha256(b"\2" + b"\1" * 4).hexdigest())
    for old, new in (
        (manifest, forged),
        *((hashlib.sha256(text.encode()).hexdigest() for text in (manifest, forged)),),
    ):
        raw = raw.replace(json.dumps(old)[1:-1].encode(), json.dumps(new)[1:-1].encode())
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError, match="'mask' holds the truth value 2"):
        load_packed(tmp_path / "a", model)


# Models that the file does not fit


def test_models_that_do_not_fit_are_left_alone(good):
    def refused(model: nn.Module, match: str) -> None:
        before = bits_of(model)
        with pytest.raises(ValueError, match=match):
            load_packed(good, model)
        assert bits_of(model) == before

    refused(
        network().double(),
        r"good: '0\.weight' is torch.float32; torch.float64, as in the model, is needed; model\.to\(torch\.float32\)",
    )
    refused(network().append(nn.Linear(3, 3)), r"missing '7\.bias', '7\.weight'; unexpected none")
    refused(network()[:6], r"missing none; unexpected '6\.bias', '6\.weight'")
    model = network()
    model[4] = nn.Linear(45, 8)
    refused(model, r"'4\.bias' has shape|'4\.weight' has shape \(7, 45\); \(8, 45\), as in the model")
    model = network()
    model[1].running_var = torch.ones(1).expand(5)
    refused(model, r"'1\.running_var' is expanded in the model")
    with pytest.raises(ValueError, match=r"0\.weight of the model's state_dict is Parameter; .*not meta"):
        load_packed(good, network().to("meta"))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none", network())


def test_loading_works_where_nothing_is_compiled(good):
    code = f"""
import sys, tests.conftest
sys.modules["askew_cuda._C"] = None
import warnings; warnings.simplefilter("ignore")
import askew_cuda as askew
from askew_cuda.packed import load_packed, save_packed
from tests.packed.test_packed import network
model = network(1)
optimizer = askew.AskewSGD(load_packed({str(good)!r}, model), lr=0.1)
save_packed(model, optimizer, {str(good.parent / "again")!r})
assert askew.build_info() is None
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert (good.parent / "again").read_bytes() == good.read_bytes()
