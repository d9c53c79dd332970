"""Upload an expert, its card, a model card and perhaps a calibrator to the Hugging Face Hub, as one commit.

Paths of this machine do not go out: in `expert.json` and the calibrator, each is reduced to the name of its
file (of an expert's folder, with the run's). The weights are uploaded as they are.
"""

import json
import logging
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from featdistill import atomic
from featdistill.calibration import Calibrator
from featdistill.command_line import UserError
from featdistill.hub import model_card, training_data
from featdistill.hub.download import LOG_IN, PREFIX, parse
from featdistill.models.expert import CARD_FILE, WEIGHTS_FILE, Expert, load_expert, read_card
from featdistill.models.weights import first_line
from featdistill.records.provenance import claim, read_record

_log = logging.getLogger(__name__)
CALIBRATOR_FILE, README = "calibrator.json", "README.md"
# An absolute path within a text, of any system: not of an address, nor a slash between words.
_ABSOLUTE = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\][^\s'\",;:]+")


def push(args: Namespace) -> str:
    """Do what the command line requests, see `push_flags`; return a line about it.

    Raises:
        UserError: the expert or a file about it cannot be read, the folder exists, or the upload is refused.
    """
    repository, revision = parse(args.repository, prefix="")
    if revision:
        raise UserError(f"{args.repository}: a revision is made by the upload; leave out @{revision}")
    if args.out:
        claim(args.out, None, {}, occupied=Path(args.out).exists() and not _is_own(args.out, args.expert))
    files = prepare(args, repository)
    if not args.dry_run:
        message = args.message or f"Upload expert {repository.partition('/')[2]}"
        return upload(repository, files, message, private=args.private)
    if Path(args.out).exists():
        _log.info("%s has the files of an earlier --dry-run, which are replaced", args.out)
    with atomic.replace_folder(args.out) as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(content)
    return f"{args.out}: {', '.join(files)}; nothing was uploaded"


def _is_own(out: str, expert: str) -> bool:
    """Return whether a folder holds what `--dry-run` wrote and nothing else, and is not the expert's."""
    folder = Path(out)
    if not folder.is_dir() or folder.resolve() == Path(expert).resolve():
        return False
    names = {path.name for path in folder.iterdir()}
    own = {README, CARD_FILE, WEIGHTS_FILE}
    return own <= names <= own | {CALIBRATOR_FILE} and model_card.is_own(folder / README)


def prepare(args: Namespace, repository: str) -> dict[str, bytes | Path]:
    """Return what goes into the repository: name -> content, or the file that has it."""
    expert, card = load_expert(args.expert), read_card(args.expert)
    calibrator, record = None, None
    if args.calibrator:
        calibrator, record = Calibrator.load(args.calibrator), read_record(args.calibrator)
        check_calibrator(calibrator, expert, card, args.calibrator)
    parts, public = training_data.read_parts(card), without_paths(card)
    metrics = [without_paths(model_card.read_metrics(path)) for path in args.metrics]
    for path, result in zip(args.metrics, metrics, strict=True):
        check_metrics(result, card["weights_sha256"], path)
    rows = training_data.trained_rows(parts)
    terms = {} if rows is None else training_data.restricted(rows)
    if terms and not training_data.is_restricted(args.license):
        _log.warning(
            "--license %s, but %d of %d training images have other terms (%s); the model card says so",
            args.license,
            sum(terms.values()),
            len(rows),
            "; ".join(terms),
        )
    readme = model_card.write(repository, expert, public, parts, args.license, metrics, calibrator)
    files: dict[str, bytes | Path] = {
        README: readme.encode(),
        CARD_FILE: _json(public),
        WEIGHTS_FILE: Path(args.expert) / WEIGHTS_FILE,
    }
    return files if record is None else files | {CALIBRATOR_FILE: _json(without_paths(record))}


def check_calibrator(calibrator: Calibrator, expert: Expert, card: dict[str, Any], path: str) -> None:
    """Raise a `UserError` unless a calibrator was fitted for the scores of this expert alone."""
    if calibrator.made_for is None:
        return
    names = list(calibrator.made_for["experts"])
    if len(names) != 1:
        raise UserError(f"{path} was fitted for {len(names)} experts together; fit one for this expert alone")
    own = {"experts": card["weights_sha256"], "preprocessing": expert.preprocessing.describe()}
    own = {key: {names[0]: value} for key, value in own.items()}
    calibrator.check(calibrator.made_for | own, "this expert")


def check_metrics(metrics: dict[str, Any], weights_sha256: str, path: str) -> None:
    """Raise a `UserError` if metrics name other weights than these; warn if they name none."""
    made_by = model_card.made_by(metrics)
    if other := made_by - {weights_sha256, None}:
        raise UserError(
            f"{path} was measured with other weights than those of this expert: their SHA-256 is "
            f"{str(min(other, key=str))[:12]}..., not {weights_sha256[:12]}...; score the images with this "
            "expert, and run evaluate.py again"
        )
    if None in made_by:
        _log.warning(
            "%s does not name the weights that were measured, as the model card says; run evaluate.py again "
            "on predictions with a sidecar",
            path,
        )


def without_paths(value: Any) -> Any:
    """Return a JSON value whose paths have no folders; what is under the key `path` is always one."""
    if isinstance(value, dict):
        return {
            key: _file_of(inner) if key == "path" and isinstance(inner, str) else without_paths(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # A path may have spaces; a text that starts with one is taken to be nothing else.
    if _ABSOLUTE.match(value):
        return _file_of(value)
    return _ABSOLUTE.sub(lambda match: _file_of(match[0]), value)


def _file_of(path: str) -> str:
    if path.startswith(PREFIX):
        return path
    names = [name for name in re.split(r"[/\\]", path) if name]
    kept = 2 if names[-1:] in (["expert"], ["expert-last"]) else 1
    return "/".join(names[-kept:])


def _json(value: dict[str, Any]) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def upload(repository: str, files: dict[str, bytes | Path], message: str, *, private: bool) -> str:
    """Upload files as one commit; return a line about it.

    Raises:
        UserError: nobody is logged in, the repository has something else or is public against `private`, or
            the upload fails.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token

    if not get_token():
        raise UserError(f"nobody is logged in; {LOG_IN} with a token that may write")
    api, present = HfApi(), set()
    try:
        try:
            info = api.model_info(repository)
        except errors.RepositoryNotFoundError:
            api.create_repo(repository, private=private or None)
        else:
            present = {file.rfilename for file in info.siblings or ()} - {".gitattributes", README}
            if present and CARD_FILE not in present:
                raise UserError(f"{repository} has other files and is not an expert's; choose another name")
            if private and not info.private:
                raise UserError(
                    f"{repository} exists and is public; leave out --private, or choose another name"
                )
            if present:
                _log.info(
                    "%s has an expert; the new commit replaces it, and its history keeps it", repository
                )
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        # That of other weights.
        if CALIBRATOR_FILE in present - files.keys():
            operations.append(CommitOperationDelete(CALIBRATOR_FILE))
        commit = api.create_commit(repository, operations, commit_message=message)
    except UserError:
        raise
    except Exception as error:  # the client's libraries raise many types
        raise UserError(f"cannot push to {api.endpoint}/{repository}: {first_line(error)}") from error
    return f"{commit.commit_url}\nscore with --experts {PREFIX}{repository}@{commit.oid}"
