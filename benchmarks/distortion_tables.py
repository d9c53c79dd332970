"""The tables that the benchmark of the distortions prints, at most 110 columns wide."""

import numpy as np

from featdistill.distortions.operation import LEVELS


def print_report(report: dict) -> None:
    """Print what `distortions.py` measured.

    Args:
        report: see the keys that `distortions.py` saves.
    """
    yardstick_ms, measured_ms = report["yardstick_ms"], report["yardstick_measurements_ms"]
    print(
        f"Y = {yardstick_ms:.2f} ms (median of {len(measured_ms)} measurements, "
        f"{min(measured_ms):.2f} to {max(measured_ms):.2f})"
    )
    versions = [f"{name} {version}" for name, version in report["packages"].items()]
    print(
        "other implementations: " + (", ".join(versions) or "neither Albumentations nor kornia is importable")
    )
    for library, operations in report["operations"].items():
        _print_operations(library, operations, yardstick_ms)
    for package, libraries in report["others"].items():
        for library, operations in libraries.items():
            if operations:
                _print_ratios(f"{library} and {package}", operations)
    _print_compositions(report["compositions"], yardstick_ms)


def _print_operations(library: str, operations: dict, yardstick_ms: float) -> None:
    """Milliseconds at each level, and in yardsticks their mean and their highest."""
    titles = "".join(f"{f'level {level}':>9}" for level in LEVELS)
    print(f"\n{library:26} {'size':9}{titles}{'mean Y':>9}{'max Y':>9}")
    for name, sizes in operations.items():
        for size, levels in sizes.items():
            cells = "".join(f"{milliseconds:9.2f}" for milliseconds in levels)
            mean, highest = np.mean(levels) / yardstick_ms, max(levels) / yardstick_ms
            print(f"{name:26} {size:9}{cells}{mean:9.3f}{highest:9.3f}")


def _print_ratios(title: str, operations: dict) -> None:
    """Milliseconds of ours and theirs, means over the levels, and how many times as long theirs takes."""
    print(f"\n{title:30} {'size':9}{'ours ms':>10}{'theirs ms':>10}{'ratio':>8}  theirs")
    ratios: dict[str, list[float]] = {}
    for name, compared in operations.items():
        if "refused" in compared:
            print(f"{name:30} {compared['counterpart']} is left out: {compared['refused'][:50]}")
            continue
        theirs = compared["counterpart"] + (" (nearest)" if compared["nearest"] else "")
        for size, times in compared["sizes"].items():
            ratios.setdefault(size, []).append(times["ratio"])
            cells = f"{times['ours_ms']:10.2f}{times['theirs_ms']:10.2f}{times['ratio']:8.2f}"
            print(f"{name:30} {size:9}{cells}  {theirs}")
    for size, values in ratios.items():
        mean = float(np.exp(np.mean(np.log(values))))
        print(f"{'geometric mean':30} {size:9}{'':20}{mean:8.2f}")


def _print_compositions(presets: dict, yardstick_ms: float) -> None:
    """The time of one image: mean, median and 99th percentile over the plans."""
    if not presets:
        return
    columns = ("mean", "median", "p99")
    in_ms = "".join(f"{f'{name} ms':>11}" for name in columns)
    in_yardsticks = "".join(f"{f'{name} Y':>10}" for name in columns)
    print(f"\n{'preset':22}{'size':9}{in_ms}{in_yardsticks}{'p99/median':>12}")
    for preset, sizes in presets.items():
        for size, times in sizes.items():
            values = [times[f"{name}_ms"] for name in columns]
            cells = "".join(f"{value:11.2f}" for value in values)
            cells += "".join(f"{value / yardstick_ms:10.3f}" for value in values)
            print(f"{preset:22}{size:9}{cells}{times['p99_over_median']:12.2f}")
