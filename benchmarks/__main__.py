"""All benchmarks of speed, one after another.    python -m benchmarks [--full] [--save [FOLDER]]

Each is a process of its own.
"""

import subprocess
import sys
import time

SCRIPTS = ("step", "tensors", "memory", "setup", "files", "train", "scaling")


def main() -> None:
    failed = []
    for name in SCRIPTS:
        start = time.monotonic()
        print(f"===== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.speed.{name}", *sys.argv[1:]]).returncode != 0:
            failed.append(name)
        print(f"===== {name}: {time.monotonic() - start:.0f} s\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
