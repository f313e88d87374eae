"""ONNX models: what onnxruntime and onnx's reference dequantize is what was trained."""

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.packed.export.onnx import export_onnx

onnx = pytest.importorskip("onnx", reason="make test-runtimes installs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="make test-runtimes installs it")


def saved(folder, rules) -> nn.Sequential:
    """A packed file, the snapped model, and its ONNX template: one weight as it is, one transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    optimizer = askew.AskewSGD(askew.param_groups(model, rules, pretrained=True, verbose=False), lr=0.1)
    askew.save_packed(model, optimizer, folder / "a")
    askew.load_packed(folder / "a", model)
    make, arrays = onnx.helper, onnx.numpy_helper
    numbers = {
        "w0": model[0].weight, "b0": model[0].bias, "w1": model[2].weight.mT.contiguous(), "b1": model[2].bias,
    }  # fmt: skip
    graph = make.make_graph(
        [
            make.make_node("Gemm", ["x", "w0", "b0"], ["h"], transB=1),
            make.make_node("Relu", ["h"], ["r"]),
            make.make_node("MatMul", ["r", "w1"], ["m"]),
            make.make_node("Add", ["m", "b1"], ["y"]),
        ],
        "network",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 16])],
        [arrays.from_array(value.detach().numpy(), name) for name, value in numbers.items()],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10), folder / "t.onnx")
    return model


CASES = [
    ({"0.weight": "int4/group32", "2.weight": "ternary/channel"}, 4, ["INT4", "INT4"]),
    ({"0.weight": "2bit/group16", "2.weight": "4bit"}, 4, ["INT4", "INT8"]),
    ({"0.weight": "binary", "2.weight": "int8/group16"}, 4, ["INT4", "INT8"]),
    ({"0.weight": "ternary/group16", "2.weight": "int2/channel"}, 2, ["INT2", "INT2"]),
]


@pytest.mark.parametrize(("rules", "bits", "kinds"), CASES)
def test_the_weights_of_the_graph_are_those_that_were_trained(rules, bits, kinds, tmp_path):
    model = saved(tmp_path, rules)
    made = export_onnx(tmp_path / "a", tmp_path / "b.onnx", template=tmp_path / "t.onnx", bits=bits)
    assert made == dict(zip(("w0", "w1"), kinds, strict=True))
    graph = onnx.load(tmp_path / "b.onnx")
    onnx.checker.check_model(graph, full_check=True)
    for name in ("w0", "w1"):
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    x = torch.randn(5, 64).numpy()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    from onnx.reference import ReferenceEvaluator

    for _, first, second in (session.run(None, {"x": x}), ReferenceEvaluator(graph).run(None, {"x": x})):
        assert torch.equal(torch.tensor(first), model[0].weight)
        assert torch.equal(torch.tensor(second).mT, model[2].weight)
    plain = onnxruntime.SessionOptions()  # else it multiplies by activations rounded to 8 bits
    plain.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    outputs = [
        onnxruntime.InferenceSession(tmp_path / name, plain).run(None, {"x": x})[0] for name in ("t.onnx", "b.onnx")
    ]
    assert torch.allclose(*map(torch.tensor, outputs), rtol=1e-5, atol=1e-5)


def test_what_onnx_can_not_hold_is_refused_by_name(tmp_path):
    saved(tmp_path, {"0.weight": "nf4/channel", "2.weight": None})
    with pytest.raises(ValueError, match=r"0\.weight, nf4/channel of torch.float32: DequantizeLinear"):
        export_onnx(tmp_path / "a", tmp_path / "b.onnx", template=tmp_path / "t.onnx")
    saved(tmp_path, {"0.weight": "ternary", "2.weight": None})
    (tmp_path / "other").mkdir()
    saved(tmp_path / "other", {"0.weight": "int4", "2.weight": None})
    with pytest.raises(ValueError, match=r"t\.onnx: no initializer is 0\.weight \(1 in all\)"):
        export_onnx(tmp_path / "a", tmp_path / "b.onnx", template=tmp_path / "other" / "t.onnx")
    with pytest.raises(ValueError, match=r"bits = 3; 2, 4 or 8"):
        export_onnx(tmp_path / "a", tmp_path / "b.onnx", template=tmp_path / "t.onnx", bits=3)
    assert not (tmp_path / "b.onnx").exists()
