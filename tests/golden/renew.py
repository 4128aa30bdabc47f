"""Write the losses of the golden runs anew, with the commit and the versions that gave them: `python -m tests.golden.renew`."""

import json
import platform
import subprocess

import torch

from tests.golden.runs import FILE, golden_runs, train


def main() -> None:
    """Run all and write `losses.json`."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=FILE.parent).stdout.strip()
    made_with = {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    losses = {}
    for name in golden_runs():
        losses[name] = train(name)
        print(f"{name}: {losses[name][0]:.4f} -> {losses[name][-1]:.4f}", flush=True)
    FILE.write_text(json.dumps({"made_with": made_with, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
