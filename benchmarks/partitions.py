"""The two Dirichlet laws side by side: how many rows of each label each client has.

python benchmarks/partitions.py [--plot docs/partitions.png] [--seed 0]
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedsieve.data.partition import dirichlet, dirichlet_by_client

CLIENTS, LABELS, ROWS = 20, 10, 200
ALPHAS = (0.1, 1.0, 100.0)
LAWS = {"dirichlet": dirichlet, "dirichlet-by-client": dirichlet_by_client}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("docs/partitions.png"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    labels = np.repeat(np.arange(LABELS), ROWS)
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    grid = figure.subplots(len(LAWS), len(ALPHAS), sharex=True, sharey="row")
    for row, (name, law) in zip(grid, LAWS.items(), strict=True):
        for ax, alpha in zip(row, ALPHAS, strict=True):
            split = law(labels, CLIENTS, alpha, given.seed)
            held = np.array([np.bincount(labels[r], minlength=LABELS) for r in split.values()])
            before = np.cumsum(held, axis=1) - held
            for label in range(LABELS):
                ax.bar(range(CLIENTS), held[:, label], 0.9, before[:, label], color=f"C{label}")
            ax.set_title(f"{name}, alpha {alpha:g}", fontsize=9)
            sizes, kinds = held.sum(1), (held > 0).sum(1)
            print(
                f"{name:<20} alpha {alpha:<5g} rows {sizes.min()} to {sizes.max()}, "
                f"labels of a client {kinds.mean():.1f}"
            )
        row[0].set_ylabel("Rows")
    for ax in grid[-1]:
        ax.set_xlabel("Client")
    figure.savefig(given.plot, dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
