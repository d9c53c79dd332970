"""Does a data set give its labels away? File properties, near-duplicates across its parts, broken images.

    python -m data_prep.audit data/train.csv data/train.holdout.csv --out data/audit

Where real images are JPEGs of all sizes and generated ones PNGs of 512 x 512, a detector scores well without
having learned anything. So a classifier that sees no pixels, only container, size, bytes, JPEG tables and the
like, is trained and scored on images held out by group; any AUC on these data has to be compared with its
AUC. If that is above 0.6 with its whole 95 % interval, a warning names the features.

Classes may also show different things, which a detector can learn as well. With `--content`, a head on frozen
features of the images reduced to 28 px or less, where no trace of a generator is left, is scored in the same
way: by the column `fold` if there is one, else by groups; held-out rows by a head of all others.

    python -m data_prep.audit data/train.csv data/holdout.csv --out data/audit --content \\
        --backbone timm:vit_base_patch16_clip_quickgelu_224.openai --limit 5000

| file | holds |
|---|---|
| `audit.json` | all results |
| `audit.md` | the same as tables |
| `audit.png` | sizes, bytes and JPEG quality by class, AUC by feature and by source |
| `content.csv` | `name,label,score` of `--content`: P(AI) by what an image shows |
| `content/` | the bank of `--content`, from which a killed run continues |

Near-duplicates are searched for among all rows. A row is held out if its `split`, or without one the name of
its manifest, contains holdout, val or test. If images cannot be read, the exit status is 1.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from data_prep.auditing import content
from data_prep.auditing.features import FEATURES, FileFacts, feature_table, measure
from data_prep.auditing.leaks import find_leaks, is_held_out
from data_prep.content import banks
from data_prep.duplicates.near import MAX_DISTANCE_BITS
from data_prep.writing.flags import add_flags
from data_prep.writing.parallel import map_in_order
from data_prep.writing.sampling import hash_positions
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, within
from featdistill.records.manifest import read_manifest
from featdistill.records.provenance import claim, read_record
from featdistill.seeds import hash_ranks

_log = logging.getLogger(__name__)


def read_rows(paths: list[str]) -> pd.DataFrame:
    """Return the rows of all manifests, with `manifest`, the path of each row's, and `held_out`.

    `split` is added, empty, where a manifest has none; `source` and `group` are never empty.
    """
    paths = list(dict.fromkeys(paths))
    rows = pd.concat([read_manifest(path).assign(manifest=path) for path in paths], ignore_index=True)
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
    """Return at most `limit` rows by a hash of (seed, name), the same share of each source and label."""
    if limit is None or limit >= len(rows):
        return rows
    strata = rows[["manifest", "split", "source"]].agg("\0".join, axis=1)
    strata += "\0" + rows["label"].astype("string").fillna("")
    # The position within the stratum as a share: the first `limit` take the same share of each.
    share = (hash_positions(rows["name"], strata, seed) + 0.5) / strata.groupby(strata).transform("size")
    order = pd.DataFrame({"share": share, "hash": hash_ranks(rows["name"], seed)}, index=rows.index)
    chosen = order.sort_values(["share", "hash"]).index[:limit]
    return rows.loc[sorted(chosen)].reset_index(drop=True)


def audit(rows: pd.DataFrame, facts: list[FileFacts], bits: int, seed: int) -> tuple[dict, pd.DataFrame]:
    """Return the audit of `read_rows`' rows as JSON values, and features and label of the labeled images."""
    # Imported late: scikit-learn takes a while to import.
    from data_prep.auditing.shortcut import measure_baseline

    table = feature_table(facts)
    for column in ("label", "source", "group", "name"):
        table[column] = rows[column].to_numpy()
    readable = table["fault"] == ""
    labeled = table[readable & rows["label"].notna()]
    baseline = measure_baseline(labeled.drop_duplicates("digest"), seed)
    with_digest = rows[["name", "label", "manifest", "held_out"]].assign(digest=table["digest"])
    named = list(zip(rows["name"], facts, strict=True))
    generators = rows["generator"][rows["label"] == 1].value_counts().sort_index()
    result = {
        "images": {"audited": len(rows), "unreadable": int((~readable).sum())},
        "baseline": {"verdict": baseline.verdict(), "telling": baseline.telling(), **asdict(baseline)},
        "near_duplicates": find_leaks(with_digest, [fact.hash for fact in facts], bits),
        "suspicious": [
            {"name": name, "reasons": list(fact.suspicions)} for name, fact in named if fact.suspicions
        ],
        "unreadable": [{"name": name, "reason": fact.fault} for name, fact in named if fact.fault],
        "sources": _counts(rows),
        "generators": [
            {"generator": name or "(none given)", "images": int(count)} for name, count in generators.items()
        ],
    }
    return result, labeled[[*FEATURES, "label"]]


def check_out(out: Path) -> None:
    """Refuse a folder that holds anything but an audit; an audit, even an unfinished one, is replaced."""
    recorded = read_record(out / "audit.json")
    is_ours = bool(recorded and "baseline" in recorded) or (out / content.BANK / "bank.json").is_file()
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    claim(out, {} if is_ours else None, {}, occupied=occupied)


def build_parser() -> Parser:
    about = "Measure how well files alone predict the labels; find near-duplicates and broken images."
    parser = Parser(prog="python -m data_prep.audit", description=about)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--near-duplicates",
        type=within(0, MAX_DISTANCE_BITS),
        default=4,
        metavar="BITS",
        help="images look alike if their 64-bit hashes differ in at most BITS bits",
    )
    add_flags(parser, "limit", "seed", "workers")
    parser.add_argument(
        "--content", action="store_true", help="measure how well what images show predicts the labels"
    )
    banks.add_flags(parser, "--content")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    banks.check(arguments, "--content", used=banks.FLAGS if arguments.content else ())
    check_out(arguments.out)
    from data_prep.auditing import page

    rows = read_rows(arguments.manifests)
    chosen = sample(rows, arguments.limit, arguments.seed)
    if arguments.content:
        content.check(chosen)
    facts = map_in_order(measure, chosen["image"].tolist(), arguments.workers, "audit")
    result, table = audit(chosen, facts, arguments.near_duplicates, arguments.seed)
    result["images"]["rows"] = len(rows)
    result = {"manifests": list(dict.fromkeys(arguments.manifests)), **result}
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.content:
        result["content"] = content.measure_content(chosen, out, arguments)
    # First, so that a killed audit is recognized.
    atomic.write_json(out / "audit.json", result)
    atomic.write_text(out / "audit.md", page.markdown(result))
    page.save_plots(result, table, out / "audit.png")
    leaks, counts = result["near_duplicates"], result["images"]
    _log.info(page.verdict_line(result))
    if arguments.content:
        _log.info(page.content_line(result["content"]))
    _log.info(
        f"{leaks['pairs']} pairs look alike: {leaks['across_manifests']} across manifests, "
        f"{leaks['across_holdout']} across a hold-out, {leaks['two_labels']} with two labels"
    )
    _log.info(
        f"{counts['audited']} of {counts['rows']} images: {counts['unreadable']} unreadable, "
        f"{len(result['suspicious'])} suspicious; see {out / 'audit.md'} and {out / 'audit.png'}"
    )
    return 1 if result["unreadable"] else 0


def _counts(rows: pd.DataFrame) -> list[dict]:
    counts = pd.crosstab(rows["source"], rows["label"].astype("float").fillna(-1))
    counts = counts.reindex(columns=[0, 1, -1], fill_value=0)
    counts.columns = ["real", "ai", "unlabeled"]
    return counts.reset_index().to_dict("records")


if __name__ == "__main__":
    command_line.run(main)
