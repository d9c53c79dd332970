"""Does a data set give its labels away? What its files say, twins across its parts, and broken images.

    python -m data_prep.audit data/train.csv data/train.holdout.csv --out data/audit

Where real images are JPEGs of all sizes and generated ones PNGs of 512 x 512, a detector scores well without
having learned anything. So a classifier that sees no pixel, but container, size, bytes, JPEG tables and the
like, is trained and scored on images held out by group; its AUC is what any AUC on these data is to be held
against. Above 0.6, with its whole 95 % interval, there is a warning that names the features.

| file | holds |
|---|---|
| `audit.json` | all that was found |
| `audit.md` | the same as tables |
| `audit.png` | sizes, bytes and JPEG quality by class, AUC by feature and by source |

Near-duplicates are looked for between all rows. A row counts as held out by its column `split`, or where it
has none by the name of its manifest: one with holdout, val or test in it. Images that cannot be read are in
all three files' counts, and the status is then 1.
"""

import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from data_prep.auditing import page as audit_page
from data_prep.auditing.features import FEATURES, FileFacts, feature_table, measure
from data_prep.auditing.leaks import find_leaks, is_held_out
from data_prep.auditing.shortcut import measure_baseline
from data_prep.duplicates import near as near_duplicates
from data_prep.writing.parallel import map_images
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError
from featdistill.records.manifest import read_manifest
from featdistill.seeds import hash_ranks


def read_rows(paths: list[str]) -> pd.DataFrame:
    """Return the rows of all manifests, with `manifest`, the path of each row's, and `held_out`.

    `split` is there, empty where a manifest has none, and so are `source` and `group`, never empty.
    """
    frames = []
    for path in dict.fromkeys(paths):
        frame = read_manifest(path)
        frames.append(frame.assign(manifest=path))
    rows = pd.concat(frames, ignore_index=True)
    if rows.empty:
        raise UserError(f"{', '.join(paths)} has no rows")
    rows["split"] = rows["split"].fillna("") if "split" in rows else ""
    parts = list(zip(rows["manifest"], rows["split"], strict=True))
    held = {part: is_held_out(*part) for part in set(parts)}
    rows["held_out"] = [held[part] for part in parts]
    rows["source"] = rows["source"].where(rows["source"] != "", "(no source)")
    rows["group"] = rows["group"].where(rows["group"] != "", "name:" + rows["manifest"] + ":" + rows["name"])
    return rows


def sample(rows: pd.DataFrame, limit: int | None, seed: int) -> pd.DataFrame:
    """Return at most `limit` rows, of each source and label its share, by a hash of (seed, name)."""
    if limit is None or limit >= len(rows):
        return rows
    rank = pd.Series(hash_ranks(rows["name"], seed), index=rows.index)
    stratum = rows[["manifest", "split", "source"]].agg("\0".join, axis=1)
    stratum += "\0" + rows["label"].astype("string").fillna("")
    # Its place within the stratum as a share: the first `limit` take the same share of each.
    place = (rank.groupby(stratum).rank(method="first") - 0.5) / stratum.groupby(stratum).transform("size")
    order = pd.DataFrame({"place": place, "rank": rank}).sort_values(["place", "rank"]).index[:limit]
    return rows.loc[sorted(order)].reset_index(drop=True)


def audit(rows: pd.DataFrame, facts: list[FileFacts], bits: int, seed: int) -> tuple[dict, pd.DataFrame]:
    """Put together what is known of the images.

    Args:
        rows: as `read_rows` returns it, indexed by 0..N-1.
        facts: one a row.

    Returns:
        The audit, of JSON values; features and label of the labelled images that can be read.
    """
    table = feature_table(facts)
    for column in ("label", "source", "group", "name"):
        table[column] = rows[column].to_numpy()
    readable = table["fault"] == ""
    labelled = table[readable & rows["label"].notna()]
    baseline = measure_baseline(labelled.drop_duplicates("digest"), seed)
    twins = rows[["name", "label", "manifest", "held_out"]].assign(digest=table["digest"])
    result = {
        "images": {"audited": len(rows), "unreadable": int((~readable).sum())},
        "baseline": {
            "verdict": baseline.verdict(),
            "telling": baseline.telling(),
            **asdict(baseline),
        },
        "near_duplicates": find_leaks(twins, [one.hash for one in facts], bits),
        "suspicious": [
            {"name": name, "reasons": list(one.suspicions)}
            for name, one in zip(rows["name"], facts, strict=True)
            if one.suspicions
        ],
        "unreadable": [
            {"name": name, "reason": one.fault}
            for name, one in zip(rows["name"], facts, strict=True)
            if one.fault
        ],
        "sources": _counts(rows),
        "generators": [
            {"generator": name or "(none given)", "images": int(count)}
            for name, count in rows["generator"][rows["label"] == 1].value_counts().sort_index().items()
        ],
    }
    return result, labelled[[*FEATURES, "label"]]


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.audit",
        description="Measure how much files alone tell of their labels, find twins and broken images.",
    )
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for audit.json, .md and .png")
    parser.add_argument(
        "--near-duplicates",
        type=int,
        default=4,
        metavar="BITS",
        help="images whose 64-bit hashes differ in at most so many bits look alike",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images, of each source its share")
    parser.add_argument("--seed", type=int, default=0, help="another seed samples and divides otherwise")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read images")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be 1 or more, not {arguments.limit}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {arguments.seed}")
    near_duplicates.check_distance(arguments.near_duplicates)
    rows = read_rows(arguments.manifests)
    chosen = sample(rows, arguments.limit, arguments.seed)
    facts = map_images(measure, chosen["image"].tolist(), arguments.workers, "audit")
    result, table = audit(chosen, facts, arguments.near_duplicates, arguments.seed)
    result["images"]["rows"] = len(rows)
    result = {"manifests": list(dict.fromkeys(arguments.manifests)), **result}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    audit_page.save_plots(result, table, out / "audit.png")
    atomic.write_text(out / "audit.md", audit_page.markdown(result))
    atomic.write_json(out / "audit.json", result)
    _print_summary(result, out)
    return 1 if result["unreadable"] else 0


def _counts(rows: pd.DataFrame) -> list[dict]:
    counts = pd.crosstab(rows["source"], rows["label"].astype("float").fillna(-1))
    counts = counts.reindex(columns=[0, 1, -1], fill_value=0)
    names = ("real", "ai", "unlabelled")
    return [
        {"source": source, **dict(zip(names, map(int, counts.loc[source]), strict=True))}
        for source in counts.index
    ]


def _print_summary(result: dict, out: Path) -> None:
    leaks, counts = result["near_duplicates"], result["images"]
    print(audit_page.verdict_line(result))
    print(
        f"{leaks['pairs']} pairs look alike: {leaks['across_manifests']} across manifests, "
        f"{leaks['across_holdout']} across a hold-out, {leaks['two_labels']} with two labels"
    )
    print(
        f"{counts['audited']} of {counts['rows']} images: {counts['unreadable']} unreadable, "
        f"{len(result['suspicious'])} suspicious; see {out / 'audit.md'} and {out / 'audit.png'}"
    )


if __name__ == "__main__":
    command_line.run(main)
