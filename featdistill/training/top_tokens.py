"""Which patch tokens the part `top_tokens` of a feature averages: chosen once, at the start of a run."""

import logging

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.loading import make_loader
from featdistill.data.sampling import limit_per_class
from featdistill.models.expert import Expert
from featdistill.models.features import FisherSums, top_positions
from featdistill.records.provenance import read_record
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder

_log = logging.getLogger(__name__)
# Ours: the score of a token is a mean over hundreds of channels, so that few images rank the tokens.
IMAGES_PER_CLASS = 256


def choose(
    task: nn.Module,
    rows: pd.DataFrame,
    clean: Dataset,
    recipe: Recipe,
    run: RunFolder,
    accelerator: Accelerator,
    *,
    is_new: bool,
) -> None:
    """Choose the tokens, unless the expert has them or its feature needs none.

    The score of `FisherSums` is computed by the main process, from clean training images: at most
    `IMAGES_PER_CLASS` of each class, by (seed, name). The choice is written to the run's folder, from which a
    run that is continued takes it.

    Args:
        task: its expert and all that are built like it get the choice.
        rows: of training images; those without a label do not count.
        clean: a `ScoreDataset` of the rows.
        is_new: whether the run begins now.

    Raises:
        UserError: no training image has a label.
    """
    expert: Expert = task.expert
    if not expert.feature.needs_positions:
        return
    if rows["label"].isna().all():
        raise UserError(
            f"feature {expert.spec.feature}: the tokens that tell the classes apart are chosen on labeled "
            "images; name some with --train, or use another --feature"
        )
    alike = [part for part in task.modules() if isinstance(part, Expert) and part.spec == expert.spec]
    path, positions = run.path / "top_tokens.json", None
    if accelerator.is_main_process:
        record = None if is_new else read_record(path, "remove it to choose the tokens again")
        positions = (record or {}).get("positions")
        if positions is None:
            scores = _scores(expert, rows, clean, recipe, accelerator.device)
            positions = list(top_positions(scores, expert.feature.top_count))
            atomic.write_json(path, {"feature": expert.spec.feature, "positions": positions})
            _log.info("%s: the patch tokens %s tell the classes apart best", run.path, positions)
    shared = [positions]
    broadcast_object_list(shared)
    for module in alike:
        module.choose_tokens(shared[0])


@torch.inference_mode()
def _scores(
    expert: Expert, rows: pd.DataFrame, clean: Dataset, recipe: Recipe, device: torch.device
) -> np.ndarray:
    """Return the score of each patch token, (N,) float64."""
    rows = rows.reset_index(drop=True)
    labels, last = rows["label"].fillna(-1).to_numpy(int), expert.backbone.depth
    places = limit_per_class(rows.assign(place=rows.index), IMAGES_PER_CLASS, recipe.seed)["place"].tolist()
    size, sums = recipe.score_batch_size, FisherSums()
    batches = [places[first : first + size] for first in range(0, len(places), size)]
    was_training = expert.training
    expert.to(device).eval()
    for batch in make_loader(clean, batches, recipe.workers):
        if "images" in batch:
            (images,) = batch["images"].values()
            tokens = expert.read(images.to(device), [last]).layers[last].tokens
            sums.add(tokens, labels[batch["index"].numpy()])
    expert.cpu().train(was_training)
    return sums.scores()
