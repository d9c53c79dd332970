"""Where AUC is won and lost: by generator, distortion, level, chain length, source and size of the image.

Every row holds `auc` with its interval `low` and `high`; `n`, `real` and `ai`, how many images it is taken
over (`n` of a generator is what it made, its AUC is against all real images); and at 0.5 `accuracy`,
`real_accuracy` and `ai_accuracy`, None where scores lie outside [0, 1].
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from featdistill.distortions.libraries import LIBRARIES
from featdistill.evaluation.bootstrap import Resampling, auc_draws, interval
from featdistill.evaluation.metrics import ACCURACIES, accuracies, checked, roc_auc

# Numbers of rows, real and AI-generated.
Group = tuple[np.ndarray, np.ndarray]
# Longer sides in px. The challenge's images measure 256 to 4096, half of them up to about 1024.
_SIZES_PX = (512, 1024, 2048)


class Breakdowns:
    """The breakdowns of one split.

    Args:
        frame: `label`, `score`, `is_distorted`, `generator`, `source`, `chain`, `width`, `height` as
            `labels.join` gives them.
        resampling: how the intervals are drawn.
    """

    def __init__(self, frame: pd.DataFrame, resampling: Resampling) -> None:
        self._label, self._score = checked(frame["label"], frame["score"])
        self._frame, self._resampling = frame, resampling
        self._real, self._ai = np.flatnonzero(self._label == 0), np.flatnonzero(self._label == 1)
        self._is_probability = bool(((self._score >= 0) & (self._score <= 1)).all())
        self._known: dict[tuple[bytes, bytes], tuple[float | None, float | None]] = {}

    def remember(self, rows: np.ndarray, bounds: Sequence[float | None]) -> None:
        """Take over an interval that is known: clean images are also the chains of length 0.

        Args:
            rows: (N,) bool.
        """
        real, ai = self._split(np.flatnonzero(rows))
        self._known[real.tobytes(), ai.tobytes()] = (bounds[0], bounds[1])

    def generators(self) -> dict[str, dict]:
        """Return for each generator its images against all real ones."""
        own = _rows_of(self._frame["generator"].iloc[self._ai], self._ai)
        found = self._table({name: (self._real, rows) for name, rows in own.items()})
        return {name: {**row, "n": row["ai"]} for name, row in found.items()}

    def distortions(self) -> dict[str, dict]:
        """Return for each distortion the images whose chain holds it."""
        return self._by_rows({name for name, _ in chain} for chain in self._frame["chain"])

    def distortion_levels(self) -> dict[str, dict[str, dict]]:
        """Return for each distortion and level that `level_of` knows the images whose chain holds it."""
        steps = ({(name, level_of(name, scale)) for name, scale in chain} for chain in self._frame["chain"])
        found = self._by_rows([step for step in own if step[1] is not None] for own in steps)
        table: dict[str, dict[str, dict]] = {}
        for (name, level), row in found.items():
            table.setdefault(name, {})[str(level)] = row
        return table

    def levels(self) -> dict[str, dict]:
        """Return for each level the images whose strongest distortion, of those of a known level, has it."""
        levels = ([level_of(*step) for step in chain] for chain in self._frame["chain"])
        strongest = (max((level for level in own if level), default=None) for own in levels)
        found = self._by_rows([] if level is None else [level] for level in strongest)
        return {str(level): row for level, row in found.items()}

    def chain_lengths(self) -> dict[str, dict]:
        """Return for each number of distortions its images; a distorted one must have a chain."""
        pairs = zip(self._frame["is_distorted"], self._frame["chain"], strict=True)
        lengths = (
            [0] if state == 0 else [len(chain)] if state == 1 and chain else [] for state, chain in pairs
        )
        return {str(length): row for length, row in self._by_rows(lengths).items()}

    def sources(self) -> dict[str, dict]:
        """Return for each source its images; one of a single class against all of the other (`against`)."""
        groups, against = {}, {}
        for name, rows in _rows_of(self._frame["source"], np.arange(len(self._frame))).items():
            ai = self._label[rows] == 1
            groups[name] = (rows[~ai] if not ai.all() else self._real, rows[ai] if ai.any() else self._ai)
            against[name] = "all real" if ai.all() else "itself" if ai.any() else "all AI"
        found = self._table(groups)
        return {name: {**row, "against": against[name]} for name, row in found.items()}

    def sizes(self) -> dict[str, dict]:
        """Return for each range of the longer side its images, where the manifest has widths and heights."""
        longer = self._frame[["width", "height"]].max(axis=1, skipna=False).to_numpy()
        place = np.searchsorted(_SIZES_PX, longer)
        low = ["1", *(str(side + 1) for side in _SIZES_PX)]
        names = [f"{first} to {last} px" for first, last in zip(low, _SIZES_PX, strict=False)]
        names.append(f"from {low[-1]} px")
        groups = {name: np.flatnonzero((place == own) & (longer > 0)) for own, name in enumerate(names)}
        return self._table({name: self._split(rows) for name, rows in groups.items() if len(rows)})

    def _by_rows(self, keys: Iterable[Iterable]) -> dict:
        """Return a row for each key, over the images that have it."""
        rows_of: dict = {}
        for row, own in enumerate(keys):
            for key in own:
                rows_of.setdefault(key, []).append(row)
        return self._table({key: self._split(np.array(rows_of[key])) for key in sorted(rows_of)})

    def _split(self, rows: np.ndarray) -> Group:
        ai = self._label[rows] == 1
        return rows[~ai], rows[ai]

    def _table(self, groups: dict) -> dict:
        intervals = self._intervals(groups)
        table = {}
        for name, (real, ai) in groups.items():
            rows = np.concatenate([real, ai])
            label, score = self._label[rows], self._score[rows]
            low, high = intervals[name]
            table[name] = {
                "auc": roc_auc(label, score),
                "low": low,
                "high": high,
                "n": len(rows),
                "real": len(real),
                "ai": len(ai),
                **(accuracies(label, score) if self._is_probability else dict.fromkeys(ACCURACIES)),
            }
        return table

    def _intervals(self, groups: dict) -> dict:
        """Return (low, high) of each group; those with the same real images share the draws of these."""
        found = {name: (None, None) for name in groups}
        if not self._resampling.draws:
            return found
        shared: dict[bytes, list] = {}
        for name, (real, ai) in groups.items():
            if len(real) and len(ai):
                shared.setdefault(real.tobytes(), []).append(name)
        for key, names in shared.items():
            new = [name for name in names if (key, groups[name][1].tobytes()) not in self._known]
            if new:
                ai = [self._score[groups[name][1]][None] for name in new]
                drawn = auc_draws(self._score[groups[new[0]][0]][None], ai, self._resampling)
                for name, values in zip(new, drawn, strict=True):
                    self._known[key, groups[name][1].tobytes()] = interval(values[0])
            found |= {name: self._known[key, groups[name][1].tobytes()] for name in names}
        return found


@lru_cache(maxsize=65536)
def level_of(name: str, scale: float) -> int | None:
    """Return the level, 1 to 5, at which a library's operation has this scale; None where none has.

    The challenge's libraries are asked before the others. A scale that is drawn about its level's belongs to
    it; of two levels with one scale the lower one is meant.
    """
    for library in ("official", "evaluation", "extended", "extras"):
        operation = LIBRARIES[library].get(name)
        if operation is None or not isinstance(scale, (int, float)):
            continue
        gaps = [abs(scale - own) for own in operation.scales]
        nearest = int(np.argmin(gaps))
        if gaps[nearest] <= operation.spread + 1e-9:
            return nearest + 1
    return None


def _rows_of(names: pd.Series, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each name, sorted, but for the empty one, the rows that have it."""
    codes, known = pd.factorize(names.to_numpy(dtype=object), sort=True)
    return {name: rows[codes == code] for code, name in enumerate(known) if name}
