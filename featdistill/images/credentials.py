"""Content Credentials: what the signed manifest (C2PA) in an image file states about where it comes from.

It is read with the optional package c2pa-python, and never changes a score. Nothing is fetched: a manifest
that is kept elsewhere is not read, and neither revocation nor a list of trusted signers is consulted. So a
valid signature means that file and manifest belong together, not that the signer is who it claims to be.
"""

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featdistill.command_line import UserError
from featdistill.images.listing import printable

NONE, VALID, INVALID, ELSEWHERE = "none", "valid", "invalid", "not fetched"
INSTALL = "Content Credentials need the package c2pa-python; run pip install c2pa-python"
_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
# IPTC's digital source types of images that a model made, in whole or in part.
_AI_SOURCES = {"trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"}
# Not an error of the file: we keep no list of trusted signers.
_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True)
class Credentials:
    """What a file's manifest states.

    Attributes:
        signature: `none` for a file without a manifest, `valid`, `invalid`, or `not fetched` for a manifest
            that is kept elsewhere.
        signer: the organization in the signing certificate.
        generator: the program that wrote the manifest.
        actions: what was done to the image, in order, such as `created` or `color_adjustments`.
        states_ai: whether the manifest, or that of an image it was made from, says that a model made it.
        problems: why the signature is invalid.
    """

    signature: str
    signer: str | None = None
    generator: str | None = None
    actions: tuple[str, ...] = ()
    states_ai: bool = False
    problems: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Return what is stated, in plain words."""
        if self.signature == NONE:
            return "The file has no Content Credentials."
        if self.signature == ELSEWHERE:
            return "The Content Credentials of this file are kept elsewhere, and were not fetched."
        by = f" by {self.signer}" if self.signer else ""
        if self.signature == INVALID:
            problems = "; ".join(self.problems) or "unknown reason"
            return f"The Content Credentials are signed{by} but not valid: {problems}."
        stated = "state" if self.states_ai else "do not say"
        parts = [
            f"The Content Credentials are validly signed{by}; who that is was not checked",
            f"They {stated} that the image is AI-generated",
        ]
        if self.generator:
            parts.append(f"Written by {self.generator}")
        if self.actions:
            parts.append(f"Actions: {', '.join(self.actions).replace('_', ' ')}")
        return f"{'. '.join(parts)}."


def require_credentials() -> None:
    """Raise a `UserError` that says what to do unless c2pa-python is installed."""
    if not has_credentials():
        raise UserError(INSTALL)


def has_credentials() -> bool:
    """Tell whether c2pa-python is installed."""
    return importlib.util.find_spec("c2pa") is not None


def read_credentials(data: bytes) -> Credentials:
    """Return what the manifest in the bytes of an image file states.

    Raises:
        UserError: c2pa-python is not installed.
    """
    require_credentials()
    import c2pa

    try:
        with c2pa.Context.from_dict(_OFFLINE) as context:
            reader = c2pa.Reader.try_create(None, io.BytesIO(data), context=context)
            if reader is None:
                return Credentials(NONE)
            with reader:
                return _stated(json.loads(reader.json()))
    except c2pa.C2paError.NotSupported:  # a format that cannot have a manifest
        return Credentials(NONE)
    except c2pa.C2paError.RemoteManifest:
        return Credentials(ELSEWHERE)
    except c2pa.C2paError as error:
        return Credentials(INVALID, problems=(_text(error),))


def _stated(store: dict[str, Any]) -> Credentials:
    active = store["manifests"][store["active_manifest"]]
    failures = store.get("validation_status", [])
    problems = [entry for entry in failures if entry.get("code") != _UNTRUSTED]
    is_valid = store.get("validation_state") in ("Valid", "Trusted") and not problems
    sources = {
        str(action.get("digitalSourceType", "")).rpartition("/")[2]
        for manifest in store["manifests"].values()
        for action in _actions(manifest)
    }
    generators = [
        " ".join(_text(info[key]) for key in ("name", "version") if info.get(key))
        for info in active.get("claim_generator_info", [])
    ]
    return Credentials(
        VALID if is_valid else INVALID,
        _text(active.get("signature_info", {}).get("issuer") or "") or None,
        (generators and generators[0]) or _text(active.get("claim_generator") or "") or None,
        tuple(_text(action.get("action", "")).removeprefix("c2pa.") for action in _actions(active)),
        bool(sources & _AI_SOURCES),
        tuple(_text(entry.get("explanation") or entry.get("code")) for entry in problems),
    )


def _actions(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for assertion in manifest.get("assertions", []):
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            yield from assertion.get("data", {}).get("actions", [])


def _text(value: Any) -> str:
    """Return a value in one printable line: it comes from the file."""
    return printable(" ".join(str(value).split()))[:200]
