"""GGUF files by llama.cpp's own code and by the gguf package: the very weights that were trained."""

import ctypes

import pytest
import torch

import askew_cuda as askew
from askew_cuda.packed.export.blocks import TYPES, Blocks, read_blocks, values, written_blocks
from askew_cuda.packed.export.gguf import export_gguf
from tests.packed.export.test_gguf import CASES
from tests.packed.export.trained import packed
from tests.runtimes.llama_cpp import library

gguf = pytest.importorskip("gguf", reason="make test-runtimes installs it")


def by_llama_cpp(type: str, raw: torch.Tensor, count: int) -> torch.Tensor:
    """(bytes,) uint8 to (count,) float32, by ggml."""
    found = torch.empty(count)
    function = getattr(library("ggml-base"), f"dequantize_row_{'q2_K' if type == 'Q2_K' else type.lower()}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    raw = raw.contiguous()
    function(raw.data_ptr(), found.data_ptr(), count)
    return found


@pytest.mark.parametrize("type", CASES)
def test_llama_cpp_computes_what_was_trained(type, tmp_path):
    model = packed(tmp_path / "a", {"first": CASES[type], "second": CASES[type]}, shape=(6, 1024))
    export_gguf(tmp_path / "a", tmp_path / "a.gguf", type=type)
    with open(tmp_path / "a.gguf", "rb") as file:
        from askew_cuda.packed.export.ggml_file import GgufReader

        reader = GgufReader(file, "a")
        for name in ("first", "second"):
            found = by_llama_cpp(type, reader.read(name), 6 * 1024).view(torch.int32)
            assert torch.equal(found, model.get_parameter(name).detach().flatten().view(torch.int32))


@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_reads_any_digits_as_we_do(type):
    kind = TYPES[type]
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, kind.digits, (64, kind.weights), generator=generator, dtype=torch.uint8)
    d = torch.randn(64, 1, generator=generator).half()
    m = torch.randn(64, 1, generator=generator).half() if kind.first is None else None
    raw = written_blocks(kind, Blocks(digits, d, m))
    found = by_llama_cpp(type, raw, digits.numel()).view(64, -1)
    wanted = values(kind, read_blocks(kind, raw))
    if m is None:
        assert torch.equal(found, wanted)
    else:  # with any shift the product is rounded or fused, which is the compiler's choice
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("type", [name for name in CASES if name not in ("Q1_0", "Q2_0")])
def test_the_package_gguf_computes_what_was_trained(type, tmp_path):
    """It has no codec for the two others."""
    model = packed(tmp_path / "a", {"first": CASES[type]})
    export_gguf(tmp_path / "a", tmp_path / "a.gguf", type=type)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {"first", "bias"}
    assert tensors["first"].tensor_type.name == type
    found = torch.from_numpy(gguf.quants.dequantize(tensors["first"].data, tensors["first"].tensor_type))
    assert torch.equal(found, model.first)
    assert torch.equal(torch.from_numpy(tensors["bias"].data.copy()), model.bias)


def test_files_of_the_package_gguf_are_read(tmp_path):
    """Its own blocks, quantized by it: half of the scales of Q4_0 are negative."""
    from askew_cuda.packed.export.gguf import load_gguf
    from tests.packed.export.trained import Holder

    torch.manual_seed(0)
    weight = torch.randn(8, 512) * 0.02
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokens", ["a", "longer", ""])
    writer.add_float32("rope", 1.5)
    kinds = ("Q4_0", "Q8_0", "TQ1_0", "TQ2_0")
    for name in kinds:
        type = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), type), raw_dtype=type)
    writer.add_tensor("norm", weight[0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Holder({**{name: torch.zeros(8, 512) for name in kinds}, "norm": torch.zeros(512)})
    groups = load_gguf(tmp_path / "a.gguf", model)
    assert [group["quantizer"] is not None for group in groups] == [True] * 3 + [False]  # both ternary types are alike
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors[:4]:
        wanted = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(model.get_parameter(tensor.name), wanted)
    assert torch.equal(model.norm, weight[0])
    optimizer = askew.AskewSGD(groups, lr=0.1)
    askew.save_packed(model, optimizer, tmp_path / "a")
    made = export_gguf(tmp_path / "a", tmp_path / "b.gguf")
    assert made == {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "TQ1_0": "TQ1_0", "TQ2_0": "TQ1_0"}
    again = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors[:3]:
        assert (again[tensor.name] == tensor.data).all()  # byte for byte
