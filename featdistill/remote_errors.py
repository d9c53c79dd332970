"""What an error of a remote storage means: it passes, it concerns one file, or it concerns all of them.

Every package that fsspec uses has errors of its own, for the same few answers of a server.
"""

import errno
import re

from featdistill.command_line import UserError

_PASSING_CODES = re.compile(
    "5..|408|425|429|InternalError|ServiceUnavailable|SlowDown|RequestTimeout|Throttling.*|RequestLimitExceeded"
    "|ConditionalRequestConflict"
)
_PASSING_ERRNOS = {errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EBUSY, errno.EIO, errno.EAGAIN}
# Classes of botocore, aiohttp and httpx, by name, since none of them needs to be installed.
_PASSING = {"HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "ClientConnectionError"}
_PASSING |= {"ClientPayloadError", "TransportError", "TimeoutError", "ConnectionError", "EOFError"}
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "gaierror"}
_UNREACHABLE |= {"ConnectionRefusedError", "ConnectError"}
AGAIN = "run the command again to continue"
_LOGIN_CODES = {"401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_LOGIN_CODES |= {"InvalidClientTokenId", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}
_LOGIN = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_LOGIN |= {"TokenRetrievalError", "SSOTokenLoadError", "GoogleAuthError", "ClientAuthenticationError"}


def explained(address: str, error: Exception, is_web: bool, tries: int) -> Exception:
    """Return the error to raise for a file: an `OSError` if it concerns this one, a `UserError` if all.

    Args:
        is_web: whether it is on a web server: each file of a manifest may be on another one.
        tries: how often it was tried, if it passes.
    """
    code, names, reason = code_of(error), _names_of(error), line_of(error)
    if code in _LOGIN_CODES or names & _LOGIN:
        if not is_web:
            return UserError(f"{address}: the storage refuses the credentials ({reason}); check them")
        error = PermissionError(reason)
    if code == "NoSuchBucket" or "bucket does not exist" in reason:
        return UserError(f"{address}: the bucket does not exist")
    if names & _UNREACHABLE and not is_web:
        return UserError(f"{address}: the storage cannot be reached ({reason}); {AGAIN}")
    if isinstance(error, FileExistsError) or code in ("412", "PreconditionFailed"):
        return FileExistsError(f"{address} exists")
    if isinstance(error, PermissionError) or code == "403":
        return PermissionError(f"{address}: access denied ({reason})")
    if passes(error):  # before the next: fsspec says of any failure of a web server that there is no file
        return OSError(f"{address}: {reason}, {tries} tries")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{address} does not exist")
    return OSError(f"{address}: {reason}")


def passes(error: Exception) -> bool:
    """Tell whether the same request may succeed a little later."""
    if code := code_of(error):
        return _PASSING_CODES.fullmatch(code) is not None
    names = _names_of(error)
    is_passing = bool(names & _PASSING) or getattr(error, "errno", None) in _PASSING_ERRNOS
    return is_passing and not names & _LOGIN


def code_of(error: Exception) -> str:
    """Return what the server answered: an HTTP status, or the code of S3's API; "" if there is neither."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    for owner, name in ((cause, "status"), (cause, "code"), (response, "status_code")):
        if isinstance(status := getattr(owner, name, None), int | str) and str(status).isdigit():
            return str(status)
    return ""


def _names_of(error: Exception) -> set[str]:
    """Return the names of the classes of an error and of what caused it."""
    return {kind.__name__ for one in (error, error.__cause__) if one for kind in type(one).__mro__}


def line_of(error: Exception) -> str:
    """Return an error's message in one line of up to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
