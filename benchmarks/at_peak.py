"""As many floating-point operations as one training step has, all of them in the product that this machine is fastest at.

It takes turns with the training programs (`benchmarks.programs`), so the peak that their shares are of is that of the same
minutes, as a median of as many turns: on a machine with neighbours the best moment of another hour says little.

Settings: threads, and precision (fp32 or bf16).
"""

import json
import sys

import torch

from benchmarks.limits import DTYPES, fastest_product
from benchmarks.protocol import claim_stdout, serve
from benchmarks.workload import Workload


def main() -> None:
    """Serve steps."""
    answers = claim_stdout()
    work, settings = Workload.from_json(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    best = fastest_product(DTYPES[settings["precision"]])
    count = max(1, round(work.flops / best.flops))

    def step() -> None:
        for _ in range(count):
            best.multiply()

    serve(step, {"flops": count * best.flops, "fastest_flops_per_s": best.rate}, answers)


if __name__ == "__main__":
    main()
