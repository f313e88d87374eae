"""The command askew-cuda.    askew-cuda doctor"""

import argparse
import sys
from collections.abc import Sequence

from .doctor import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; the exit status."""
    parser = argparse.ArgumentParser(prog="askew-cuda", description="Looks after askew_cuda.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="torch, CUDA, compiler, backends and why one is absent, and a self-test of each against the reference"
    )
    parser.parse_args(arguments)
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
