"""The table of docs/export.md, which format holds which codebook: ``python -m tests.packed.export.table`` writes it."""

import re
import tempfile
from pathlib import Path

import torch

from askew_cuda.packed.export.bitnet import export_bitnet
from askew_cuda.packed.export.blocks import TYPES, digits_for
from askew_cuda.packed.export.compressed import export_compressed
from askew_cuda.packed.export.mlx import export_mlx
from askew_cuda.packed.export.onnx import integers_of
from askew_cuda.packed.export.torchao import torchao_state
from askew_cuda.packed.file import read_tensors
from askew_cuda.quantizer import _NAMED, Codebook
from tests.packed.export.trained import packed

PAGE = Path(__file__).parent.parent.parent.parent / "docs/export.md"


def table() -> str:
    """Every named codebook, in groups of 256 weights, tried in every format."""
    rows = ["| codebook | GGUF | torchao | ONNX | compressed-tensors | MLX | BitNet |", "| --- " * 7 + "|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for book in _NAMED:
            packed(folder / "a", {"layer.weight": f"{book}/group256"}, shape=(2, 256), dtype=torch.float32)
            packed(folder / "b", {"layer.weight": book}, shape=(4, 256))  # with one scale
            types = [kind.name for kind in TYPES.values() if digits_for(kind, Codebook.named(book).levels) is not None]
            trained = read_tensors(folder / "a")[0]["layer.weight"]
            cells = [
                ", ".join(types) or "-",
                tried(lambda: str(torchao_state(folder / "a")["layer.weight"].target_dtype).removeprefix("torch.")),
                tried(lambda trained=trained: f"INT{integers_of('weight', trained).bits}"),
                tried(lambda: str(export_compressed(folder / "a", folder / "c")["layer.weight"])),
                tried(lambda: str(export_mlx(folder / "a", folder / "m")["layer.weight"][0])),
                tried(lambda: export_bitnet(folder / "b", folder / "n")["layer.weight"]),
            ]
            rows.append(f"| {book} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tried(export) -> str:
    try:
        return export()
    except ValueError:
        return "-"


def written(page: str) -> str:
    """The page with its table."""
    mark = r"(<!-- table: python -m tests.packed.export.table -->\n).*?(<!-- end -->)"
    return re.sub(mark, lambda match: f"{match[1]}{table()}\n{match[2]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
