"""The command askew-cuda, or ``python -m askew_cuda``: ``askew-cuda doctor``, ``askew-cuda inspect FILE``, ``askew-cuda
export FILE --to gguf``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .doctor import doctor
from .packed.export import export_compressed, export_gguf, export_mlx, export_onnx, export_torchao
from .packed.inspect import describe, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="askew-cuda", description="Looks after askew_cuda.")
    parser.add_argument("--version", action="version", version=f"askew_cuda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    examined = commands.add_parser(
        "doctor",
        help="torch, CUDA, compiler, backends and why one is absent, and a self-test of each against the reference",
    )
    described = commands.add_parser(
        "inspect", help="a table of a packed file: tensors, bits, levels, scales, occupancy, sizes"
    )
    described.add_argument("file", help="written by askew_cuda.save_packed")
    for each in (examined, described):
        each.add_argument("--json", action="store_true", help="print plain data instead")
    exported = commands.add_parser("export", help="writes a packed file for another runtime, exactly as it was trained")
    exported.add_argument("file", help="written by askew_cuda.save_packed")
    exported.add_argument("--to", required=True, choices=("gguf", "torchao", "onnx", "compressed-tensors", "mlx"))
    exported.add_argument("--out", required=True, help="the file to write; for compressed-tensors and mlx a folder")
    exported.add_argument("--template", help="gguf, onnx: the same model, snapped, as their own converters write it")
    exported.add_argument("--type", help="gguf: the type of the blocks, such as Q4_0; else the smallest that fits")
    exported.add_argument("--config", help="compressed-tensors, mlx: the model's config.json")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        return doctor(given.json)
    try:
        if given.command == "export":
            print(_export(given))
        else:
            print(json.dumps(describe(given.file), indent=2) if given.json else inspect(given.file))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"askew-cuda {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _export(given: argparse.Namespace) -> str:
    """Writes what is asked for; a line for each quantized tensor."""
    goes_with = {"template": ("gguf", "onnx"), "type": ("gguf",), "config": ("compressed-tensors", "mlx")}
    for option, formats in goes_with.items():
        if getattr(given, option) is not None and given.to not in formats:
            raise ValueError(f"--{option} goes with --to {' or '.join(formats)}; this is {given.to}")
    made: dict[str, Any] = {}
    if given.to == "gguf":
        made = export_gguf(given.file, given.out, template=given.template, type=given.type)
    elif given.to == "onnx":
        if given.template is None:
            raise ValueError("--to onnx needs --template, what torch.onnx.export makes of the snapped model")
        made = export_onnx(given.file, given.out, template=given.template)
    elif given.to == "torchao":
        export_torchao(given.file, given.out)
    else:
        made = (export_mlx if given.to == "mlx" else export_compressed)(given.file, given.out, config=given.config)
    return "\n".join([*(f"{name}  {kind}" for name, kind in made.items()), f"written: {given.out}"])
