"""``python -m askew_cuda``: the command askew-cuda."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
