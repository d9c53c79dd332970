"""A local result beside the published ones: the challenge's table and the paper's Table 2.

The published figures are copied from where they were published. A local figure comes from this machine, of
published labels or of labels of one's own, and was never ranked by the organisers.
"""

from dataclasses import dataclass

# Images of the public and of the private test split (report of the challenge).
TEST_IMAGES = 2500
TEST_SPLITS = ("public_test", "private_test")
NOTE = "local; the other rows are the published ones, mean of public and private test"


@dataclass(frozen=True)
class Entry:
    """A published row of the challenge: place, team, and ROC AUCs of clean and of distorted images."""

    place: int
    team: str
    clean_auc: float
    robust_auc: float


# Report of the challenge, arXiv 2604.11487: mean of public and private test.
CHALLENGE = (
    Entry(1, "MICV", 0.9974, 0.9723),
    Entry(2, "Ant International", 0.9972, 0.9721),
    Entry(3, "TeleAI-TeleGuard", 0.9786, 0.9251),
    Entry(4, "INTSIG", 0.9853, 0.9130),
    Entry(5, "vincentlc", 0.9527, 0.8730),
    Entry(6, "UESTC (FeatDistill)", 0.9729, 0.8679),
    Entry(9, "Shallow Real", 0.9953, 0.8336),
)
# The same report: FeatDistill's robust AUC of each test split.
FEATDISTILL_ROBUST = {"public_test": 0.8558, "private_test": 0.8800}
# FeatDistill, arXiv 2603.21939, Table 2: robust AUC on val and in the test phase, where given.
TABLE_2: tuple[tuple[str, float | None, float | None], ...] = (
    ("Swin-T", 0.785, None),
    ("CLIP-RN50x64", 0.828, None),
    ("MoCoV3", 0.851, None),
    ("ConvNeXt", 0.855, None),
    ("BEiT", 0.857, None),
    ("DINOv2", 0.868, None),
    ("CLIP-L/14", 0.8926, None),
    ("SigLIP So400M, stage 2", 0.926, 0.848),
    ("CLIP-L/14, stage 2", 0.934, 0.845),
    ("ensemble", None, 0.856),
)


def leaderboard(splits: dict[str, dict]) -> dict:
    """Set splits beside the published results.

    Args:
        splits: name -> at least `clean_auc` and `robust_auc`; `val` also stands in Table 2's own column.

    Returns:
        `note`; `challenge`: rows of `place` (None where local), `name`, `clean_auc`, `robust_auc`, the best
        robust AUC first; `featdistill_robust`: the published one of each test split that is there; `table_2`:
        rows of `name`, `val_robust_auc`, `test_robust_auc`, `local`.
    """
    rows = [
        {"place": one.place, "name": one.team, "clean_auc": one.clean_auc, "robust_auc": one.robust_auc}
        for one in CHALLENGE
    ]
    for name, split in splits.items():
        if name != "val":
            aucs = {key: split[key] for key in ("clean_auc", "robust_auc")}
            rows.append({"place": None, "name": f"this run, {name} (local)", **aucs})
    rows.sort(key=lambda row: -1.0 if row["robust_auc"] is None else row["robust_auc"], reverse=True)
    table = [
        {"name": name, "val_robust_auc": val, "test_robust_auc": test, "local": False}
        for name, val, test in TABLE_2
    ]
    for name, split in splits.items():
        own = (split["robust_auc"], None) if name == "val" else (None, split["robust_auc"])
        table.append(
            {
                "name": f"this run, {name} (local)",
                "val_robust_auc": own[0],
                "test_robust_auc": own[1],
                "local": True,
            }
        )
    published = {name: value for name, value in FEATDISTILL_ROBUST.items() if name in splits}
    return {"note": NOTE, "challenge": rows, "featdistill_robust": published, "table_2": table}


def chosen_splits(splits: dict[str, dict], asked: bool) -> tuple[dict[str, dict], list[str]]:
    """Return the splits that belong beside the published results, and why others of their names do not.

    These are the challenge's test splits, by name and number of images; a split of another size under such a
    name, as the demo's, is not what was published. Where the leaderboard is asked for, all splits but the
    hard one are, or the hard one if there is no other.
    """
    if asked:
        chosen = {name: split for name, split in splits.items() if "hard" not in name}
        return chosen or dict(splits), []
    named = {name: split for name, split in splits.items() if name in TEST_SPLITS}
    counts = {
        name: split["images"] + split["unreadable"] + split["unlabelled"] for name, split in named.items()
    }
    found = {name: split for name, split in named.items() if counts[name] == TEST_IMAGES}
    notes = [
        f"{name}: {counts[name]:,} images, where the challenge's has {TEST_IMAGES:,}: "
        "not set beside the published results; --leaderboard does it all the same"
        for name in named
        if name not in found
    ]
    if found and "val" in splits:
        found = {"val": splits["val"], **found}
    return found, notes
