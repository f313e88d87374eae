"""The command askew-cuda, or ``python -m askew_cuda``: ``askew-cuda doctor``, ``askew-cuda inspect FILE``, ``askew-cuda
export FILE|CHECKPOINT --to gguf``.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .doctor import doctor
from .packed.export import (
    export_bitnet,
    export_compressed,
    export_gguf,
    export_mlx,
    export_onnx,
    export_torchao,
    packed_checkpoint,
)
from .packed.inspect import describe, inspect

_FOLDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "compressed-tensors": export_compressed,
    "mlx": export_mlx,
    "bitnet": export_bitnet,
}
FORMATS = ("gguf", "torchao", "onnx", *_FOLDERS)


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
    exported.add_argument(
        "file", help="written by askew_cuda.save_packed; or a checkpoint that has the states of model and optimizer"
    )
    exported.add_argument("--to", required=True, choices=FORMATS)
    exported.add_argument("--out", required=True, help=f"the file to write; for {', '.join(_FOLDERS)} a folder")
    exported.add_argument("--template", help="gguf, onnx: the same model, snapped, as their own converters write it")
    exported.add_argument("--type", help="gguf: the type of the blocks, such as Q4_0; else the smallest that fits")
    exported.add_argument("--config", help=f"{', '.join(_FOLDERS)}: the model's config.json")
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
    goes_with = {"template": ("gguf", "onnx"), "type": ("gguf",), "config": tuple(_FOLDERS)}
    for option, formats in goes_with.items():
        if getattr(given, option) is not None and given.to not in formats:
            raise ValueError(f"--{option} goes with --to {' or '.join(formats)}; this is {given.to}")
    with packed_checkpoint(given.file) as file:
        made = _exported(given, file)
    return "\n".join([*(f"{name}  {kind}" for name, kind in made.items()), f"written: {given.out}"])


def _exported(given: argparse.Namespace, file: str) -> dict[str, Any]:
    """How each quantized tensor of a packed file was written."""
    if given.to == "gguf":
        return export_gguf(file, given.out, template=given.template, type=given.type)
    if given.to == "onnx":
        if given.template is None:
            raise ValueError("--to onnx needs --template, what torch.onnx.export makes of the snapped model")
        return export_onnx(file, given.out, template=given.template)
    if given.to == "torchao":
        export_torchao(file, given.out)
        return {}
    return _FOLDERS[given.to](file, given.out, config=given.config)
