"""Packed files: what was trained comes back to the last bit, and what is damaged, foreign or unfit changes nothing."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.look import codes, snap
from askew_cuda.packed import load_packed, save_packed
from askew_cuda.packed.bits import PACKINGS, fault, pack, restore, restore_, unpack, unpack_at, width
from askew_cuda.packed.safetensors import TensorReader, TensorWriter
from askew_cuda.quantizer import _NAMED

ROOT = Path(__file__).parent.parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def network(seed: int = 0) -> nn.Sequential:
    """Conv, batch norm and linear layers of odd sizes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 3)
    )


def trained(model: nn.Module, rules, optimizer=askew.AskewSGD, **keywords) -> torch.optim.Optimizer:
    """Its optimizer, with scales, and weights off their levels."""
    found = optimizer(askew.param_groups(model, rules, verbose=False, pretrained=True), lr=0.01, **keywords)
    found.prepare()
    return found


def saved(path: Path, seed: int = 0) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A network with three kinds of quantized weights, saved."""
    model = network(seed)
    optimizer = trained(
        model, {"0.weight": "ternary/channel", "4.weight": "2bit/group9", "6.weight": askew.Quantizer([-2, 0, 1])}
    )
    save_packed(model, optimizer, path)
    return model, optimizer


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Dtype and bytes of everything in the state_dict, in logical order: equal only for the same bits."""
    return {
        name: str(t.dtype).encode() + bytes(t.contiguous().view(-1).view(torch.uint8).tolist())
        for name, t in model.state_dict().items()
    }


def snapped_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    with optimizer.quantized():
        return bits_of(model)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group8"])
@pytest.mark.parametrize("name", _NAMED)
def test_every_codebook_granularity_and_dtype_comes_back_to_the_last_bit(name, granularity, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(24, 11, dtype=dtype) for dtype in DTYPES)
    optimizer = trained(model, {"*": f"{name}/{granularity}"})
    wanted = {
        weight: snap(weight, scale, levels.tolist()) for weight, _, levels, scale in optimizer.quantized_parameters()
    }
    save_packed(model, optimizer, tmp_path / "a")
    other = nn.ModuleList(nn.Linear(24, 11, dtype=dtype) for dtype in DTYPES)
    groups = load_packed(tmp_path / "a", other)
    for layer, loaded in zip(model, other, strict=True):
        assert loaded.weight.dtype == layer.weight.dtype
        assert torch.equal(loaded.weight, wanted[layer.weight])
        assert torch.equal(loaded.bias, layer.bias)
    again = askew.AskewSGD(groups, lr=0.1)
    again.prepare()
    for layer, loaded in zip(model, other, strict=True):
        scale, trained_scale = again.state[loaded.weight]["scale"], optimizer.state[layer.weight]["scale"]
        assert scale.dtype == trained_scale.dtype
        assert torch.equal(scale, trained_scale)
    save_packed(other, again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 1.6), (3, 2), (4, 2), (15, 4), (16, 4), (17, 8), (256, 8)])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_weights_restored_in_one_pass_are_those_of_their_codes(levels, bits, dtype, layout):
    """By kernels of every instruction set, over the ends of blocks and packs, with a scale for anything from one weight
    on."""
    generator = torch.Generator().manual_seed(levels)
    tables = [tuple(range(levels)), tuple(float(k) ** 3 for k in range(levels))] if levels <= 16 else [range(levels)]
    extension = askew.backends.extension
    known = ["plain Python"] if extension is None else extension.cpu_capabilities()
    for shape, scales in [
        ((3, 1284), (3, 1)),
        ((3, 1284), (3, 1284)),
        ((2, 21, 61), ()),
        ((6, 35), (6, 5)),
        ((1,), ()),
    ]:
        drawn = torch.randint(0, levels, shape, generator=generator, dtype=torch.uint8)
        scale = (torch.rand(scales, generator=generator) + 0.5).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        for table in tables:
            wanted = restore(drawn, scale, table, dtype)
            for name in known:
                before = None if extension is None else extension.set_cpu_capability(name)
                weight = torch.full(shape, 7, dtype=dtype)
                weight = weight.mT.contiguous().mT if layout == "transposed" and len(shape) > 1 else weight
                restore_(weight, pack(drawn, bits), bits, scale, table)
                assert torch.equal(weight, wanted), (name, shape)
                if extension is not None:
                    extension.set_cpu_capability(before)


@pytest.mark.parametrize("bits", PACKINGS)
@pytest.mark.parametrize("numel", [0, 1, 4, 5, 7, 8, 9, 64])
def test_packing_by_hand(bits, numel):
    base, per_byte = PACKINGS[bits]
    drawn = torch.randint(0, base, (numel,), generator=torch.Generator().manual_seed(numel), dtype=torch.uint8)
    digits = drawn.tolist() + [0] * (-numel % per_byte)
    wanted = [
        sum(digit * base**k for k, digit in enumerate(digits[i : i + per_byte]))
        for i in range(0, len(digits), per_byte)
    ]
    packed = pack(drawn, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == wanted
    assert torch.equal(unpack(packed, bits, numel), drawn)
    assert torch.equal(unpack_at(packed, bits, torch.arange(numel).flip(0)), drawn.flip(0))
    assert fault(packed, bits, numel, base) is None
    if numel and drawn.max() > 0:
        assert "codes below" in fault(packed, bits, numel, int(drawn.max()))
    if numel % per_byte and base**per_byte == 256:
        packed[-1] |= 128
        assert "filled up with zeros" in fault(packed, bits, numel, base)


def test_a_byte_beyond_five_ternary_codes_is_a_fault():
    assert fault(torch.tensor([242], dtype=torch.uint8), 1.6, 5, 3) is None
    assert "at most 242" in fault(torch.tensor([243], dtype=torch.uint8), 1.6, 5, 3)


@pytest.mark.parametrize(
    ("levels", "ternary"), [(2, "1.6bit"), (3, "1.6bit"), (3, "2bit"), (4, "1.6bit"), (16, "1.6bit"), (256, "1.6bit")]
)
def test_packed_weights_take_their_storage_width_within_two_per_cent(levels, ternary, tmp_path):
    model = nn.Linear(256, 256, bias=False)
    save_packed(model, trained(model, {"*": askew.Quantizer(range(levels))}), tmp_path / "a", ternary=ternary)
    with open(tmp_path / "a", "rb") as file:
        entry = TensorReader(file, "a").entries["weight.codes"]
    least = math.log2(levels) if ternary == "1.6bit" else 2
    assert 65536 * least / 8 <= entry.end - entry.begin <= 1.02 * 65536 * least / 8


def test_the_package_safetensors_reads_our_files(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="pip install safetensors")
    model, optimizer = saved(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert json.loads(file.metadata()["askew_cuda"])["quantized"]["6.weight"]["levels"] == [-2.0, 0.0, 1.0]
        for weight, wanted, levels, scale in optimizer.quantized_parameters():
            name = next(name for name, each in model.named_parameters() if each is weight)
            assert torch.equal(file.get_tensor(f"{name}.scale"), scale)
            bits = width(len(levels))
            assert torch.equal(
                unpack(file.get_tensor(f"{name}.codes"), bits, weight.numel()).reshape(weight.shape), wanted
            )
        assert torch.equal(file.get_tensor("1.running_var"), model[1].running_var)
        assert torch.equal(file.get_tensor("1.num_batches_tracked"), model[1].num_batches_tracked)


def test_we_read_files_of_the_package_safetensors(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    kinds = [
        *DTYPES,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ]
    tensors = {str(dtype): torch.arange(-3, 3).reshape(2, 1, 3).to(dtype) for dtype in kinds} | {
        "empty": torch.ones(0, 3),
        "one": torch.tensor(2.5),
    }
    package.save_file(tensors, tmp_path / "a")
    with open(tmp_path / "a", "rb") as file:
        reader = TensorReader(file, "a")
        assert set(reader.entries) == set(tensors)
        for name, tensor in tensors.items():
            found, digest = reader.read(name)
            assert (found.dtype, found.shape, found.tolist()) == (tensor.dtype, tensor.shape, tensor.tolist())
            assert digest == hashlib.sha256(bytes(tensor.reshape(-1).view(torch.uint8).tolist())).hexdigest()
        written = io.BytesIO()
        writer = TensorWriter(
            written, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, lambda digests: {}
        )
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
        writer.finish()
    assert all((writer.start + each.begin) % each.dtype.itemsize == 0 for each in writer.entries.values())
    assert all(torch.equal(tensors[name], back) for name, back in package.load(written.getvalue()).items())


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    header = b'{"0.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"a: it is a safetensors file without a manifest of askew_cuda"):
        load_packed(tmp_path / "a", network())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group3"])
def test_empty_and_scalar_tensors(shape, granularity, tmp_path):
    def holder(value: float) -> nn.Module:
        model = nn.Module()
        model.w, model.empty = nn.Parameter(torch.full(shape, value)), nn.Parameter(torch.zeros(2, 0))
        return model

    model, other = holder(0.7), holder(0.1)
    optimizer = askew.AskewSGD([("w", model.w)], quantizer=f"ternary/{granularity}", pretrained=True)
    optimizer.prepare()
    save_packed(model, optimizer, tmp_path / "a")
    groups = load_packed(tmp_path / "a", other)
    assert bits_of(other) == snapped_bits(model, optimizer)
    again = askew.AskewAdamW(groups, lr=0.1)
    other.w.grad = torch.ones(shape)
    again.step()
    assert again.state[other.w]["scale"].shape == optimizer.state[model.w]["scale"].shape


def tied(tie: bool = True) -> nn.ModuleDict:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "norm": nn.LayerNorm(4), "last": nn.LayerNorm(4)}
    )
    if tie:
        model["head"].weight, model["last"].weight = model["embed"].weight, model["norm"].weight
    return model


def test_tied_tensors_are_stored_once_and_restored_to_every_name(tmp_path):
    model = tied()
    nn.init.normal_(model["norm"].weight)
    optimizer = trained(model, {"embed.weight": "4bit/channel"})
    save_packed(model, optimizer, tmp_path / "a")
    with open(tmp_path / "a", "rb") as file:
        names = set(TensorReader(file, "a").entries)
    codes = {"embed.weight", "embed.weight.codes", "embed.weight.scale"}
    assert names == {*codes, "head.bias", "norm.weight", "norm.bias", "last.bias"}
    for other in (tied(), tied(tie=False)):
        groups = load_packed(tmp_path / "a", other)
        assert bits_of(other) == snapped_bits(model, optimizer)
        quantized = [weight for group in groups if group["quantizer"] for _, weight in group["params"]]
        assert {id(weight) for weight in quantized} == {id(other["embed"].weight), id(other["head"].weight)}
    loose = tied(tie=False)
    save_packed(loose, trained(loose, {"re:(embed|head).weight": "4bit/channel"}), tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"b: 'head.weight' and 'embed.weight' are two tensors in the file, but one in the model"
    ):
        load_packed(tmp_path / "b", model)


def test_codes_are_in_logical_order_whatever_the_memory_format(tmp_path):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = network().to(memory_format=memory_format)
        save_packed(
            model, trained(model, {"0.weight": "2bit/group9", "4.weight": "ternary"}), tmp_path / str(memory_format)
        )
    assert (tmp_path / "torch.channels_last").read_bytes() == (tmp_path / "torch.contiguous_format").read_bytes()
    other = network(1).to(memory_format=torch.channels_last)
    load_packed(tmp_path / "torch.contiguous_format", other)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    plain = network(1)
    load_packed(tmp_path / "torch.channels_last", plain)
    assert bits_of(plain) == bits_of(other)


def test_saving_changes_nothing(tmp_path):
    model = network()
    optimizer = askew.AskewSGD(askew.param_groups(model, {"*": "binary"}, verbose=False), lr=0.1)
    before = bits_of(model)
    save_packed(model, optimizer, tmp_path / "a")
    assert bits_of(model) == before
    assert not any("scale" in state for state in optimizer.state.values())


def test_16_bit_storage_of_fine_levels_settles_on_one_code(tmp_path):
    """The outermost of 256 levels may be rounded closer to its neighbour: the code that is saved is the one that is
    found again.
    """
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = trained(model, {"weight": askew.Quantizer(range(256), scale=1.05 / 255)})
    with torch.no_grad():
        model.weight.copy_(torch.linspace(0, 1.1, 4096).reshape(64, 64))
    (_, first, levels, scale) = next(optimizer.quantized_parameters())
    snapped = restore(first, scale, levels.tolist(), torch.bfloat16)
    assert not torch.equal(codes(snapped, scale, levels.tolist()), first)  # the case is there
    save_packed(model, optimizer, tmp_path / "a")
    other = nn.Linear(64, 64, dtype=torch.bfloat16)
    groups = load_packed(tmp_path / "a", other)
    assert torch.equal(other.weight, snapped)
    save_packed(other, askew.AskewSGD(groups, lr=0.1), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Saving: what is refused, and what happens to the old file


def test_what_can_not_be_saved_is_refused_by_name(tmp_path):
    model = network()
    optimizer = trained(model, {"*": "binary"})
    refused = lambda match, *arguments, kind=ValueError: pytest.raises(kind, match=match)  # noqa: E731
    with refused("optimizer = SGD", kind=TypeError):
        save_packed(model, torch.optim.SGD(model.parameters()), tmp_path / "a")
    with refused("quantizes no weight"):
        save_packed(model, askew.AskewSGD(model.parameters(), lr=0.1, quantizer=None), tmp_path / "a")
    with refused(r"shape \(5, 3, 3, 3\) is not in the model"):
        save_packed(network(), optimizer, tmp_path / "a")
    with refused("ternary = '3bit'"):
        save_packed(model, optimizer, tmp_path / "a", ternary="3bit")
    good = optimizer.state[model[4].weight]["scale"]
    for bad in (
        torch.tensor(0.0),
        torch.tensor(math.inf),
        torch.tensor(math.nan),
        torch.ones(7, 1),
        torch.ones((), dtype=torch.float64),
    ):
        optimizer.state[model[4].weight]["scale"] = bad
        with refused(r"the scale of 4\.weight"):
            save_packed(model, optimizer, tmp_path / "a")
    optimizer.state[model[4].weight]["scale"] = good
    with torch.no_grad():
        model[6].weight[0, 0] = math.nan
    with refused(r"6\.weight holds 1 NaN"):
        save_packed(model, optimizer, tmp_path / "a")
    model[6].weight.data.zero_()
    model[1].register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with refused(r"1\.wide is torch.complex128"):
        save_packed(model, optimizer, tmp_path / "a")
    del model[1].wide
    model.append(type("Extra", (nn.Identity,), {"get_extra_state": lambda self: {"any": "thing"}})())
    with refused(r"7\._extra_state of the model's state_dict is dict"):
        save_packed(model, optimizer, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3, 11])
def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(error, after, tmp_path, monkeypatch):
    saved(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    count, write = iter(range(99)), TensorWriter.write

    def failing(self, name, tensor):
        if next(count) == after:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", failing)
    with pytest.raises(error):
        saved(tmp_path / "a", seed=1)
    assert next(count) == after + 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == old
    monkeypatch.undo()
    saved(tmp_path / "a", seed=1)
    assert (tmp_path / "a").read_bytes() != old


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_moment_leaves_the_old_file_whole(tmp_path):
    """Killed before each tensor, before the header, before the file is synced, before it is renamed; at last not at
    all.
    """
    code = f"""
import os, signal
import tests.conftest
from tests.packed.test_packed import TensorWriter, saved
moment, last = 0, None
def mortal(function):
    def call(*arguments):
        global moment
        if moment == last:
            os.kill(os.getpid(), signal.SIGKILL)
        moment += 1
        return function(*arguments)
    return call
TensorWriter.write, TensorWriter.finish = mortal(TensorWriter.write), mortal(TensorWriter.finish)
os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)
saved({str(tmp_path / "b")!r}, seed=1)  # imports what torch imports late, once for all children
moment, saved_path = 0, {str(tmp_path / "a")!r}
old, last, killed = open(saved_path, "rb").read(), 0, True
while killed:
    child = os.fork()
    if child == 0:
        saved(saved_path, seed=1)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(last, killed, open(saved_path, "rb").read() == old)
    last += 1
"""
    saved(tmp_path / "a")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    # 17 tensors, the header, fsync, replace: after these the new file is in its place, whether its folder has been
    # synced or not
    assert lines[:20] == [[str(moment), "True", "True"] for moment in range(20)], run.stdout + run.stderr
    assert lines[20:] == [["20", "True", "False"], ["21", "False", "False"]]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    saved(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load_packed(tmp_path / "a", network())


# Going on


@pytest.mark.parametrize(("optimizer", "lr"), [(askew.AskewSGD, 0.05), (askew.AskewAdamW, 0.01)])
def test_training_goes_on_from_the_file_and_ends_on_levels_again(optimizer, lr, tmp_path):
    saved(tmp_path / "a")
    model = network(1)
    groups = load_packed(tmp_path / "a", model)
    assert [[name for name, _ in group["params"]] for group in groups[:3]] == [["0.weight"], ["4.weight"], ["6.weight"]]
    assert [group.get("pretrained") for group in groups] == ["packed"] * 3 + [None]
    assert groups[3]["quantizer"] is None
    again = optimizer(groups, lr=lr)
    anneal = askew.Anneal(again, total_steps=200)
    again.prepare()
    scales = [again.state[weight]["scale"].clone() for weight, *_ in again.quantized_parameters()]
    first = [found.clone() for _, found, *_ in again.quantized_parameters()]
    x, y = torch.randn(32, 3, 5, 5), torch.randint(0, 3, (32,))
    for step in range(200):
        again.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        again.step()
        anneal.step()
        if step == 10:  # epsilon is 1
            away = [
                (weight != snap(weight, scale, levels.tolist())).float().mean()
                for weight, _, levels, scale in again.quantized_parameters()
            ]
            assert min(away) > 0.1
    report = again.finalize()
    assert report.share_on_level == 1.0
    last = list(again.quantized_parameters())
    assert sum(int((found != old).sum()) for (_, found, *_), old in zip(last, first, strict=True)) > 10
    assert all(torch.equal(scale, old) for (*_, scale), old in zip(last, scales, strict=True))


def test_scales_go_from_the_file_to_the_state_and_nowhere_else(tmp_path):
    """One group per codebook and output dimension; numbers that are many are tensors."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(16, 4), nn.Linear(8, 2), nn.Linear(8, 2)])
    optimizer = trained(model, {"2.weight": "ternary", "3.weight": "4bit/channel", "*": "4bit/group4"})
    save_packed(model, optimizer, tmp_path / "a")
    groups = load_packed(tmp_path / "a", model)
    assert [(group["quantizer"], len(group["params"])) for group in groups] == [
        ("4bit/group4", 2), ("ternary", 1), ("4bit/channel", 1), (None, 4),
    ]  # fmt: skip
    again = askew.AskewAdamW(groups, lr=0.1)
    for group, made in zip(groups, again.param_groups, strict=True):
        assert "scales" not in made
        for (_, weight), scale in zip(group["params"], group.get("scales", ()), strict="scales" in group):
            assert torch.equal(again.state[weight]["scale"], scale)
            assert again.state[weight]["scale"].data_ptr() != scale.data_ptr()
    assert not any(weight in again.state for _, weight in groups[-1]["params"])


@pytest.mark.parametrize("given", ["groups of a file", "a quantizer"])
def test_no_step_parses_numbers(given, tmp_path, monkeypatch):
    """However many scales there are: the param groups hold none, or they are looked at once."""
    model = nn.Linear(8, 512, bias=False)
    scale = torch.rand(512, 1) + 0.5
    optimizer = trained(model, {"*": askew.Quantizer("ternary", scale, "channel")})
    if given == "groups of a file":
        save_packed(model, optimizer, tmp_path / "a")
        optimizer = askew.AskewSGD(load_packed(tmp_path / "a", model), lr=0.1, total_steps=9)
        anneal = None
    else:
        anneal = askew.Anneal(optimizer, total_steps=9)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["scale"], scale)

    def refused(*arguments):
        raise AssertionError("a quantizer is made anew")

    monkeypatch.setattr(askew.Quantizer, "__init__", refused)
    for _ in range(8):
        optimizer.step()
        if anneal is not None:
            anneal.step()
    assert float(optimizer.param_groups[0]["epsilon"]) < 1


WRONG_SCALES = [
    pytest.param([torch.ones(4, 1)], r"scales = 1 for 2 weights", id="too few"),
    pytest.param(torch.ones(2, 4, 1), r"scales = Tensor for 2 weights", id="one tensor"),
    pytest.param(
        [torch.ones(4, 1), torch.ones(4, 2)], r"scale of b has shape \(4, 2\); \(4, 1\) is needed", id="shape"
    ),
    pytest.param([torch.ones(4, 1), torch.ones(4, 1).double()], r"scale of b is torch.float64", id="wide"),
    pytest.param([torch.ones(4, 1), torch.ones(4, 1).int()], r"scale of b is torch.int32", id="whole"),
    pytest.param([torch.ones(4, 1), 1.0], r"scale of b = 1.0; a tensor", id="number"),
    pytest.param([torch.ones(4, 1), torch.zeros(4, 1)], r"scale of b: 0.0 is outside of", id="zero"),
    pytest.param([torch.ones(4, 1), torch.full((4, 1), math.nan)], r"scale of b: nan is outside of", id="nan"),
]


@pytest.mark.parametrize(("scales", "match"), WRONG_SCALES)
def test_scales_that_do_not_fit_are_refused_by_name(scales, match):
    first, second = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = askew.AskewSGD([("c", nn.Parameter(torch.ones(3)))], lr=0.1)
    group = {"params": [("a", first), ("b", second)], "quantizer": "ternary/channel", "scales": scales}
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"scales = 1 for 1 weights, quantizer = None"):
        askew.AskewSGD([{"params": [("a", first)], "scales": [torch.ones(4, 1)]}], lr=0.1)


@pytest.mark.parametrize("stepped", [True, False])
def test_checkpoints_of_groups_with_one_scale_each_are_loaded(stepped, tmp_path):
    """As load_packed once made them: the same run goes on, bit for bit."""
    torch.manual_seed(0)
    models = [nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]) for _ in range(2)]
    scales = [torch.rand(4, 1) + 0.5, torch.rand(4, 1) + 0.5]
    old = [
        {"params": [(f"{k}.weight", layer.weight)], "quantizer": askew.Quantizer("2bit", scale, "channel")}
        for k, (layer, scale) in enumerate(zip(models[0], scales, strict=True))
    ]
    both = {"lr": 0.3, "momentum": 0.9, "pretrained": "packed", "total_steps": 20}
    before = askew.AskewSGD(old, **both)
    models[1].load_state_dict(models[0].state_dict())
    params = [(f"{k}.weight", layer.weight) for k, layer in enumerate(models[1])]
    now = askew.AskewSGD(
        [{"params": params, "quantizer": "2bit/channel", "scales": [torch.ones(4, 1), torch.ones(4, 1)]}], **both
    )

    def step(model, optimizer, k):
        for number, layer in enumerate(model):
            generator = torch.Generator().manual_seed(10 * k + number)
            layer.weight.grad = torch.randn(4, 4, generator=generator)
        optimizer.step()

    for k in range(12 if stepped else 0):
        step(models[0], before, k)
    models[1].load_state_dict(models[0].state_dict())
    now.load_state_dict(before.state_dict())
    assert now.param_groups[0]["quantizer"] == "2bit/channel"
    for layer, scale in zip(models[1], scales, strict=True):
        assert torch.equal(now.state[layer.weight]["scale"], scale)
    for k in range(12 if stepped else 0, 20):
        for model, optimizer in zip(models, (before, now), strict=True):
            step(model, optimizer, k)
    assert bits_of(models[0]) == bits_of(models[1])
    before.param_groups[1]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight .* lie in several groups of the checkpoint"):
        now.load_state_dict(before.state_dict())


@pytest.mark.parametrize("kind", ["a missing folder", "a folder in its place"])
def test_a_file_that_can_not_be_written_is_reported_under_its_own_name(kind, tmp_path):
    path = tmp_path / "none" / "a" if kind == "a missing folder" else tmp_path / "a"
    if kind != "a missing folder":
        path.mkdir()
    with pytest.raises(OSError, match=r"'[^']*/a'$") as caught:
        saved(path)
    assert caught.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ([] if kind == "a missing folder" else ["a"])


def test_frozen_weights_that_are_quantized_stay_known_and_equal_quantizers_share_a_group(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = {"2.weight": "ternary", "*": askew.Quantizer("ternary", scale=0.25)}
    save_packed(model, trained(model, rules), tmp_path / "a")
    for name in ("1.weight", "1.bias"):
        model.get_parameter(name).requires_grad_(False)
    groups = load_packed(tmp_path / "a", model)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "1.weight", "2.weight"],
        ["0.bias", "1.bias", "2.bias"],
    ]
    assert groups[0]["quantizer"] == "ternary"
    assert torch.equal(groups[0]["scales"][0], torch.tensor(0.25))
    save_packed(model, askew.AskewSGD(groups, lr=0.1), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
