"""The command askew-cuda: ``askew-cuda doctor``, ``askew-cuda inspect FILE``."""

import argparse
import sys
from collections.abc import Sequence

from .doctor import doctor
from .packed.inspect import inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="askew-cuda", description="Looks after askew_cuda.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="torch, CUDA, compiler, backends and why one is absent, and a self-test of each against the reference",
    )
    described = commands.add_parser(
        "inspect", help="a table of a packed file: tensors, bits, levels, scales, occupancy, sizes"
    )
    described.add_argument("file", help="written by askew_cuda.save_packed")
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        return doctor()
    try:
        print(inspect(given.file))
    except (OSError, ValueError) as error:
        print(f"askew-cuda inspect: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
