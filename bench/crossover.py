"""TaylorShift's crossover on this machine beside the counted one: `python -m bench.crossover` writes bench/results/crossover.json."""

import json
from pathlib import Path

import torch

from linattn.layers.taylor import crossover, measured_crossover

from .machine import facts, git, versions


def main() -> None:
    """Forward and backward, one head, one thread."""
    torch.set_num_threads(1)
    rows = []
    for d in (16, 32, 64):
        both, causal = measured_crossover(d), measured_crossover(d, causal=True)
        rows.append({"d": d, "counted": crossover(d), "paper": crossover(d, symmetric=False), "both_sides": both, "causal": causal})
        print(rows[-1], flush=True)
    record = {"command": "python -m bench.crossover", "machine": facts() | versions() | git(), "tokens": rows}
    Path(__file__).parent.joinpath("results", "crossover.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
