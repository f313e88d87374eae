"""All benchmarks, one after another, each in a process of its own.    python -m benchmarks [--full] [--save [FOLDER]]"""

import subprocess
import sys
import time

SCRIPTS = ("bench_step", "bench_tensors", "bench_memory", "bench_train", "bench_scaling")


def main() -> None:
    failed = []
    for name in SCRIPTS:
        start = time.monotonic()
        print(f"===== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode != 0:
            failed.append(name)
        print(f"===== {name}: {time.monotonic() - start:.0f} s\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
