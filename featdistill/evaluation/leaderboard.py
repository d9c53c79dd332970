"""A local result next to the published ones: the challenge's table and the paper's Table 2.

A local result comes from this machine and was never ranked by the organizers.
"""

# Images of the public and of the private test split (report of the challenge).
TEST_IMAGES = 2500
TEST_SPLITS = ("public_test", "private_test")
NOTE = "local; the other rows are the published ones, mean of public and private test"
# Report of the challenge, arXiv 2604.11487, means of both test splits: place, team, clean and robust AUC.
CHALLENGE = (
    (1, "MICV", 0.9974, 0.9723),
    (2, "Ant International", 0.9972, 0.9721),
    (3, "TeleAI-TeleGuard", 0.9786, 0.9251),
    (4, "INTSIG", 0.9853, 0.9130),
    (5, "vincentlc", 0.9527, 0.8730),
    (6, "UESTC (FeatDistill)", 0.9729, 0.8679),
    (9, "Shallow Real", 0.9953, 0.8336),
)
# The same report: FeatDistill's robust AUC on each test split.
FEATDISTILL_ROBUST = {"public_test": 0.8558, "private_test": 0.8800}
# FeatDistill, arXiv 2603.21939, Table 2: robust AUC on val and in the test phase, where published.
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
    """Return splits next to the published results.

    Args:
        splits: name -> at least `clean_auc` and `robust_auc`; `val` goes in its own column of Table 2.

    Returns:
        `note`; `challenge`: rows of `place` (None if local), `name`, `clean_auc`, `robust_auc`, sorted by the
        last; `featdistill_robust`: the published one of each test split in `splits`; `table_2`: rows of
        `name`, `val_robust_auc`, `test_robust_auc`, `local`.
    """
    rows = [dict(zip(("place", "name", "clean_auc", "robust_auc"), row, strict=True)) for row in CHALLENGE]
    columns = ("name", "val_robust_auc", "test_robust_auc", "local")
    table = [dict(zip(columns, (*row, False), strict=True)) for row in TABLE_2]
    for name, split in splits.items():
        title, clean, robust = f"this run, {name} (local)", split["clean_auc"], split["robust_auc"]
        if name != "val":
            rows.append({"place": None, "name": title, "clean_auc": clean, "robust_auc": robust})
        aucs = (robust, None) if name == "val" else (None, robust)
        table.append(dict(zip(columns, (title, *aucs, True), strict=True)))
    rows.sort(key=lambda row: -1.0 if row["robust_auc"] is None else row["robust_auc"], reverse=True)
    published = {name: value for name, value in FEATDISTILL_ROBUST.items() if name in splits}
    return {"note": NOTE, "challenge": rows, "featdistill_robust": published, "table_2": table}


def chosen_splits(splits: dict[str, dict], requested: bool) -> tuple[dict[str, dict], list[str]]:
    """Return the splits to show next to the published results, and why others with their names are not shown.

    These are the challenge's test splits, by name and number of images. A split of another size under such a
    name, as in the demo, is not what was published.

    Args:
        requested: show all splits except the hard one, or the hard one if there is no other.
    """
    if requested:
        chosen = {name: split for name, split in splits.items() if "hard" not in name}
        return chosen or dict(splits), []
    chosen, notes = {}, []
    for name in (name for name in splits if name in TEST_SPLITS):
        count = sum(splits[name][state] for state in ("images", "unreadable", "unlabeled"))
        if count == TEST_IMAGES:
            chosen[name] = splits[name]
        else:
            notes.append(
                f"{name}: {count:,} images, where the challenge has {TEST_IMAGES:,}, so it is not shown next "
                "to the published results; --leaderboard shows it anyway"
            )
    if chosen and "val" in splits:
        chosen = {"val": splits["val"], **chosen}
    return chosen, notes
