"""Banks of what images show: only the view that is reduced and enlarged again, so that no traces are left."""

import contextlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from featdistill.command_line import Parser, UserError, within
from featdistill.images.reading import BrokenImage, read_image
from featdistill.inference import flags
from featdistill.recipe_groups import check_weights

if TYPE_CHECKING:
    from featdistill.bank.store import Bank

FLAGS = ("backbone", "weights", "feature", "content_side", "batch_size", "device")
BACKBONE, SIDE_PX, FEATURE = "timm:tf_efficientnet_lite0.in1k", 28, "pool"
# Images from whose sizes the default side follows.
_SAMPLE = 100
# That of a picture of 256 px at 28 px; in a larger one, 28 px leave less.
_REDUCTION = 9


def add_flags(parser: Parser, purpose: str) -> Any:
    """Add the flags that choose the backbone, and return their group; `purpose` says what they belong to."""
    group = parser.add_argument_group(purpose)
    group.add_argument("--backbone", metavar="NAME", help=f"short name or timm:NAME (default: {BACKBONE})")
    group.add_argument("--weights", help="of the backbone: hub, random, or a local file (default: hub)")
    group.add_argument("--feature", metavar="TEXT", help=f"as in recipes (default: {FEATURE})")
    group.add_argument(
        "--content-side",
        type=within(1),
        metavar="PX",
        help="side to which images are reduced, to remove the traces of generators (default: "
        f"{SIDE_PX}, less for small images)",
    )
    group.add_argument("--batch-size", type=within(1), metavar="N", help="images per batch (default: 32)")
    flags.add_flags(group, "device")
    return group


def check(arguments: Namespace, purpose: str, *, used: Sequence[str] = FLAGS) -> None:
    """Refuse flags that have no effect, and weights that do not exist.

    Args:
        purpose: what the flags belong to.
        used: those of `FLAGS` that have an effect.
    """
    for flag in FLAGS:
        if flag not in used and getattr(arguments, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} has an effect with {purpose} only")
    check_weights(arguments.weights or "hub")


def default_side(locations: Sequence[str]) -> int:
    """Return 28 px, or if images are small, a ninth of their shorter sides.

    At 28 px, an image of 112 px would keep traces of a few pixels. One side for all, from the tenth of the
    images that are the smallest, since sizes may tell the classes apart.
    """
    sides = []
    for location in locations[:: -(-len(locations) // _SAMPLE) or 1]:
        with contextlib.suppress(BrokenImage):  # it is reported when it is embedded
            sides.append(min(read_image(location).shape[:2]))
    return int(min(SIDE_PX, max(1, np.quantile(sides, 0.1) // _REDUCTION))) if sides else SIDE_PX


def make_bank(
    rows: pd.DataFrame, sources: dict[str, pd.DataFrame], out: Path, arguments: Namespace
) -> "Bank":
    """Embed what rows show to a bank, continuing one that was killed, and open it.

    Args:
        rows: of manifests.
        sources: path of the manifest -> its rows among these, for the record.
        arguments: with the flags of `add_flags`, and `workers`.

    Raises:
        UserError: a name appears twice, or the folder holds a bank of other images or settings.
    """
    repeated = rows["name"][rows["name"].duplicated()]
    if len(repeated):
        raise UserError(
            f"the name {repeated.iloc[0]} appears in two manifests ({len(repeated)} repeated names), and "
            "content is matched by name; make one manifest of them with data_prep.combine"
        )
    # Imported late: PyTorch takes seconds to import.
    from featdistill.bank import embed
    from featdistill.bank.store import open_bank
    from featdistill.bank.views import ViewPlan
    from featdistill.inference.processes import Processes

    side = arguments.content_side or default_side(rows["image"].tolist())
    settings = embed.Settings(
        backbone=arguments.backbone or BACKBONE,
        weights=arguments.weights or "hub",
        features=[arguments.feature or FEATURE],
        views=ViewPlan(control_side=side, clean=False),
        dtype="float32",
        batch_size=arguments.batch_size or 32,
        workers=arguments.workers,
        device=arguments.device,
    )
    entries = [embed.source(path, some) for path, some in sources.items()]
    embed.embed_rows(settings, rows, entries, out, Processes())
    return open_bank(out)
