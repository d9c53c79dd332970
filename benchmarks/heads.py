"""How long heads on the features of a bank take: by default 100, of 5 features x 20 regularizations.

Features are synthetic (each view is its image plus noise, 64 directions vary most), float16, and read from
memory-mapped files as in a bank. With `--folds`, the regularization is chosen by grouped folds as well, which
is what `python -m featdistill probe` does: (folds + 1) times as many heads.

    OMP_NUM_THREADS=2 python benchmarks/heads.py
    OMP_NUM_THREADS=2 python benchmarks/heads.py --folds 5
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featdistill import command_line
from featdistill.bank.heads import STRENGTHS, best, cross_fit, fit_heads, grouped_folds
from featdistill.command_line import Parser, within


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    for flag, default in (("images", 10_000), ("views", 8), ("dim", 768), ("features", 5)):
        parser.add_argument(f"--{flag}", type=within(2), default=default, help=f"number of {flag}")
    parser.add_argument("--folds", type=within(0), default=0, help="also choose the regularization by folds")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    y = np.arange(args.images) % 2
    fold = grouped_folds(y, np.arange(args.images), args.folds) if args.folds else None
    print(
        f"{args.images} images x {args.views} views x {args.dim}, {os.environ.get('OMP_NUM_THREADS')} threads"
    )
    total_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.features):
            path = Path(folder) / f"{number}.npy"
            np.save(path, _features(y, args.views, args.dim, number))
            start = time.perf_counter()
            x = np.load(path, mmap_mode="r")
            heads = fit_heads(x, y)
            fitted_s = time.perf_counter() - start
            chosen = ""
            if fold is not None:
                number_of_best = best(cross_fit(x, y, fold), y, fold)
                chosen = (
                    f", with folds {time.perf_counter() - start:.1f} s (C {STRENGTHS[number_of_best]:.2g})"
                )
            total_s += time.perf_counter() - start
            print(f"feature {number + 1}: {len(heads)} heads in {fitted_s:.1f} s{chosen}", flush=True)
            path.unlink()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.features * len(STRENGTHS)} heads in {total_s:.1f} s, peak memory {peak_gib:.2f} GiB")


def _features(y: np.ndarray, views: int, dim: int, seed: int) -> np.ndarray:
    """Return (N, V, D) float16."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((64, dim), np.float32)
    images = rng.standard_normal((len(y), 64), np.float32) @ directions / 4
    images += np.outer(y, rng.standard_normal(dim, np.float32)) * 0.1
    result = np.empty((len(y), views, dim), np.float16)
    for view in range(views):
        result[:, view] = images + rng.standard_normal(images.shape, np.float32)
    return result


if __name__ == "__main__":
    command_line.run(main)
