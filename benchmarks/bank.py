"""Images per second of a bank, next to a plain loop of the same backbone on tensors that are ready.

    python benchmarks/bank.py --backbone timm:vit_base_patch16_clip_quickgelu_224 --images photos
    python benchmarks/bank.py --backbone clip_l14 --precision bf16 --count 512             on a GPU

The two take turns, and the ratio is that of their median times, so that other work on the machine matters
little. On a CPU, times are processor time of all processes, workers included: a rate is one per core. On a
GPU they are wall-clock times. Each turn of the bank makes a new one from files: decoding, distorting, writing
and hashing are in its time, loading the backbone is not.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# As in predict.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import synchronize
from benchmarks.scenes import jpegs
from featdistill import command_line
from featdistill.bank import embed
from featdistill.bank.views import ViewDataset, ViewPlan
from featdistill.bank.writing import BankWriter, claim_bank
from featdistill.command_line import Parser, within
from featdistill.inference.compute import PRECISIONS, attention_kernels
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import make_manifest


def build_parser() -> Parser:
    parser = Parser(description="Speed of making a bank, next to a plain loop of its backbone.")
    parser.add_argument("--backbone", default="timm:vit_base_patch16_clip_quickgelu_224", metavar="NAME")
    parser.add_argument("--weights", default="random", help="hub, random, or a local file")
    parser.add_argument("--features", nargs="+", default=["pool", "mean_tokens"], metavar="TEXT")
    parser.add_argument(
        "--images", metavar="DIR", help="JPEGs (default: synthetic scenes of 0.66 megapixels)"
    )
    parser.add_argument("--count", type=within(1), default=32, help="images per turn")
    parser.add_argument("--views", type=within(1), default=3, help="views of each image")
    parser.add_argument("--distortions", default="test_public", metavar="POLICY")
    parser.add_argument("--turns", type=within(1), default=5, help="turns of each of the two")
    parser.add_argument("--batch-size", type=within(1), default=32, help="images per batch")
    parser.add_argument("--workers", type=within(0), help="loader processes (default: the cores, at most 8)")
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    views = ViewPlan(args.views - 1, "training", 0, Augmentation(distortions=args.distortions))
    names = ("backbone", "weights", "features", "batch_size", "workers", "precision", "device")
    settings = embed.Settings(**{name: getattr(args, name) for name in names}, views=views)
    encoder = embed.Encoder(settings)
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(args.images, args.count * args.turns, folder)
        turns = [
            _turns(encoder, settings, paths, args.count, turn, Path(folder)) for turn in range(args.turns)
        ]
    pictures, (bank_s, plain_s) = args.count * args.views, map(statistics.median, zip(*turns, strict=True))
    device = encoder.device
    where = "per core" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
    print(
        f"{args.backbone} in {encoder.precision}, {args.turns} turns of {args.count} images x {args.views} "
        f"views: bank {pictures / bank_s:.2f} and plain loop {pictures / plain_s:.2f} views/s {where}, ratio "
        f"of the median times {bank_s / plain_s:.3f}"
    )
    return 0


def _turns(
    encoder: embed.Encoder,
    settings: embed.Settings,
    paths: list[str],
    count: int,
    turn: int,
    folder: Path,
) -> tuple[float, float]:
    """Return the seconds of one turn of the bank and of the plain loop."""
    chosen = [paths[(turn * count + place) % len(paths)] for place in range(count)]
    rows = make_manifest({"image": chosen, "name": [f"{place}.jpg" for place in range(count)]})
    out, size = folder / f"bank-{turn}", encoder.preprocessing.size

    def bank() -> None:
        record = embed.describe(encoder, settings, [embed.source("turn", rows)], count)
        claim_bank(out, record, rows)
        writer = BankWriter(out, record)
        writer.prepare()
        dataset = ViewDataset(rows, encoder.preprocessing, settings.views)
        embed.fill(writer, encoder, dataset, writer.missing(), settings, show=False)
        writer.finish(rows, {})

    ready = torch.randn(count, 3, size, size, dtype=PRECISIONS[encoder.precision], device=encoder.device)
    ready = ready.contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        with torch.inference_mode(), attention_kernels(encoder.device):
            for _ in settings.views.names:
                for batch in ready.split(settings.batch_size):
                    encoder.backbone(batch)

    ways = [bank, plain] if turn % 2 else [plain, bank]
    times = {way: _seconds(way, encoder.device) for way in ways}
    return times[bank], times[plain]


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    clock = _processor_s if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def _processor_s() -> float:
    """Return the processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    command_line.run(main)
