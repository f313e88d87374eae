"""The command askew-cuda, or ``python -m askew_cuda``: ``askew-cuda doctor``, ``askew-cuda inspect FILE``."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import __version__
from .doctor import doctor
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
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        return doctor(given.json)
    try:
        print(json.dumps(describe(given.file), indent=2) if given.json else inspect(given.file))
    except (OSError, ValueError) as error:
        print(f"askew-cuda inspect: {error}", file=sys.stderr)
        return 1
    return 0
