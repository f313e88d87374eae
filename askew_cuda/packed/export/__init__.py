"""Packed files in the formats of other runtimes, each exactly as it was trained or not at all: a file per format."""

from .bitnet import export_bitnet, load_bitnet
from .checkpoint_file import packed_checkpoint
from .compressed import export_compressed
from .gguf import export_gguf, load_gguf
from .mlx import export_mlx
from .onnx import export_onnx
from .torchao import export_torchao, torchao_state

__all__ = [
    "export_bitnet",
    "export_compressed",
    "export_gguf",
    "export_mlx",
    "export_onnx",
    "export_torchao",
    "load_bitnet",
    "load_gguf",
    "packed_checkpoint",
    "torchao_state",
]
