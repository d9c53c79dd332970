"""From `hub:OWNER/NAME[@REVISION]` to the folder of an expert in the cache of huggingface_hub.

`expert.json` and `expert.safetensors` are downloaded once per commit; without a network, or with
HF_HUB_OFFLINE=1, what the cache has is used. HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they do there.
"""

import re
from pathlib import Path
from typing import NamedTuple

from featdistill.command_line import UserError

PREFIX = "hub:"
LOG_IN = "set HF_TOKEN, or run hf auth login"
_REPOSITORY = r"[\w.-]+/[\w.-]+"


class Downloaded(NamedTuple):
    """An expert in the cache.

    Attributes:
        folder: with `expert.json` and `expert.safetensors`.
        pinned: `OWNER/NAME@COMMIT`, with the full hash of the commit.
    """

    folder: Path
    pinned: str


def is_hub(reference: str | Path) -> bool:
    """Return whether this names a repository, not a folder."""
    return str(reference).startswith(PREFIX)


def parse(reference: str | Path, prefix: str = PREFIX) -> tuple[str, str | None]:
    """Return the `OWNER/NAME` of a reference, and its revision if it has one.

    Args:
        prefix: what the reference starts with; nothing where only a repository can be named.

    Raises:
        UserError: it has another form; the nearest one is named.
    """
    given = Path(reference).as_posix()
    text = given.removeprefix(PREFIX)
    if given == f"{prefix}{text}" and (match := re.fullmatch(rf"({_REPOSITORY})(?:@([^\s@]+))?", text)):
        return match[1], match[2]
    # As in an address: https://huggingface.co/OWNER/NAME/tree/REVISION
    near = re.match(rf"(?:https?:/+[^/]+/)?({_REPOSITORY})(?:/(?:tree|commit)/([^/]+)|@(\S+))?", text)
    revision = near and (near[2] or near[3])
    meant = f" (did you mean {prefix}{near[1]}{f'@{revision}' if revision else ''}?)" if near else ""
    forms = f"{prefix}OWNER/NAME" + (f" or {prefix}OWNER/NAME@REVISION" if prefix else "")
    raise UserError(f"{reference} does not name a repository{meant}; write {forms}")


def download(reference: str | Path) -> Downloaded:
    """Return an expert's folder, downloaded unless its commit is in the cache.

    Raises:
        UserError: the reference has another form; the repository, its revision or a file does not exist, may
            not be read, or cannot be reached and is not in the cache.
    """
    repository, revision = parse(reference)
    # Here, so that mistakes are answered without loading PyTorch.
    from huggingface_hub import constants, errors, hf_hub_download

    from featdistill.models.expert import CARD_FILE, WEIGHTS_FILE
    from featdistill.models.weights import first_line

    page = f"{constants.ENDPOINT}/{repository}"
    file = CARD_FILE
    try:
        # A folder is named after its commit, so that both files are of the same one.
        folder = Path(hf_hub_download(repository, file, revision=revision)).parent
        file = WEIGHTS_FILE
        hf_hub_download(repository, file, revision=folder.name)
    except errors.GatedRepoError as error:
        raise UserError(f"access to {page} is granted on request; request it there, then {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{page} does not exist or is private; check the name, or {LOG_IN}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{page} has no revision {revision}; leave out @{revision} for the newest") from error
    except errors.LocalEntryNotFoundError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{reference} is not in the cache and cannot be downloaded ({reason}); connect to the network, "
            "or copy the expert's folder and name that"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{page} is not the repository of an expert: it has no {file}") from error
    except Exception as error:  # the client's libraries raise many types
        raise UserError(f"cannot download {reference} from {page}: {first_line(error)}") from error
    return Downloaded(folder, f"{repository}@{folder.name}")
