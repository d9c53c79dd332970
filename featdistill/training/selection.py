"""Which epoch's expert is kept as the best one, and when a run stops because no better one comes."""

from typing import Any

from featdistill.recipe_groups import Selection


def quality(holdout: dict[str, Any], options: Selection) -> float | None:
    """Return s robust AUC + (1 - s) clean AUC, s = `best_robust_share`.

    Args:
        holdout: `clean_auc` and `robust_auc`. Where one is None, because the images of that part have one
            class, it is the other; None if both are.
    """
    clean, robust = holdout["clean_auc"], holdout["robust_auc"]
    if clean is None or robust is None:
        return clean if robust is None else robust
    share = options.best_robust_share
    return share * robust + (1 - share) * clean


class BestEpoch:
    """The best epoch so far.

    Attributes:
        epoch: its number, from 1; 0 before the first.
        quality: see the function of that name; -1 if it was not defined.
    """

    def __init__(self, options: Selection) -> None:
        self.options, self.epoch, self.quality = options, 0, -1.0

    def add(self, epoch: int, holdout: dict[str, Any]) -> bool:
        """Account for the next epoch, and return whether it is the best so far; of equals, the first is."""
        value = quality(holdout, self.options)
        is_best = epoch == 1 or (value is not None and value > self.quality)
        if is_best:
            self.epoch = epoch
            self.quality = self.quality if value is None else value
        return is_best

    def waited_enough(self, epoch: int) -> bool:
        """Return whether the last `patience` of `epoch` epochs were not the best."""
        return 0 < self.options.patience <= epoch - self.epoch
