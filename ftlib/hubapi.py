"""What a login node asks the Hub before anything is queued: may this account read it, which commit, how large.

Plain HTTP with the standard library: huggingface_hub belongs to the training packages, which a login node may lack.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from ftlib.errors import FtError, InputError, closest

Kind = Literal["model", "dataset"]
TIMEOUT_S = 10.0
# A file that every repository of a kind has; it need not be there for access to be checked.
PROBE = {"model": "config.json", "dataset": ".gitattributes"}


class Unreachable(FtError):
    """The Hub does not answer, or answers that it has trouble. Says nothing about the repository."""


@dataclass(frozen=True)
class Repository:
    """A model or dataset at one commit."""

    commit: str  # 40 hex digits
    files: dict[str, int]  # path in the repository -> size in bytes; 0 where the Hub does not say


@dataclass(frozen=True)
class _Answer:
    """An HTTP answer: its status, headers by lower-case name, and body."""

    status: int
    headers: dict[str, str]
    body: bytes


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT (a mirror), else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def page(kind: Kind, name: str) -> str:
    """Address of the repository's page, where a license is accepted."""
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"


def token_file() -> Path:
    """Where `hf auth login` keeps this user's token: HF_TOKEN_PATH, else in HF_HOME or ~/.cache/huggingface."""
    if named := os.environ.get("HF_TOKEN_PATH"):
        return Path(os.path.expandvars(named)).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = Path(os.environ["HF_HOME"]).expanduser() if os.environ.get("HF_HOME") else caches / "huggingface"
    return home / "token"


def token() -> str | None:
    """The user's token: HF_TOKEN, else the token file's content."""
    if value := os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return value.strip()
    try:
        return token_file().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def look_up(kind: Kind, name: str, revision: str | None = None) -> Repository:
    """The repository at `revision` (a branch, tag or commit; default: main), after a check that files can be read.

    InputError: gated, private, unknown name or revision, a refused token; says what to do. Unreachable: no answer.
    """
    reference = quote(revision or "main", safe="")
    prefix = "datasets/" if kind == "dataset" else ""
    # The API describes gated repositories to everyone; only a file's address shows whether they can be read.
    probe = _request(f"{endpoint()}/{prefix}{quote(name)}/resolve/{reference}/{PROBE[kind]}", method="HEAD")
    _check_access(probe, kind, name, revision)
    answer = _request(f"{endpoint()}/api/{kind}s/{quote(name)}/revision/{reference}?blobs=true")
    _check_access(answer, kind, name, revision)
    try:
        description = json.loads(answer.body)
        files = {str(file["rfilename"]): _size(file) for file in description.get("siblings", ())}
        return Repository(commit=str(description["sha"]), files=files)
    except (ValueError, KeyError, TypeError):
        raise Unreachable(f"{endpoint()} answers in a form that is not the Hub's (a proxy's page?)") from None


def read_json(kind: Kind, name: str, revision: str | None, file: str) -> dict[str, Any]:
    """A small JSON file of a repository. Raises as `look_up` does."""
    prefix = "datasets/" if kind == "dataset" else ""
    reference = quote(revision or "main", safe="")
    answer = _request(f"{endpoint()}/{prefix}{quote(name)}/resolve/{reference}/{file}")
    _check_access(answer, kind, name, revision)
    if answer.status == 404:
        raise InputError(f"{_field(kind)}: {name} has no {file} on {endpoint()}; expected what transformers saves")
    try:
        value = json.loads(answer.body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{kind}.name: {file} of {name} is no JSON object")
    return value


def _size(file: dict[str, Any]) -> int:
    return int((file.get("lfs") or {}).get("size") or file.get("size") or 0)


def _request(address: str, method: str = "GET") -> _Answer:
    """One request, with the user's token. Unreachable where no server answers, or one that has trouble."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise Unreachable("HF_HUB_OFFLINE is set, so the Hub was not asked")
    request = urllib.request.Request(address, method=method)
    if key := token():
        # Not sent along to another host that the Hub redirects to.
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        # A HEAD request shows the Hub's own headers only where its redirect to a file server is not followed.
        opener = urllib.request.build_opener(_no_redirect()) if method == "HEAD" else urllib.request.build_opener()
        with opener.open(request, timeout=TIMEOUT_S) as response:
            body, status, headers = response.read(), response.status, response.headers
    except urllib.error.HTTPError as error:
        with error:
            body, status, headers = error.read(), error.code, error.headers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{endpoint()} cannot be reached: {reason}") from None
    if status >= 500 or status in (408, 429):
        raise Unreachable(f"{endpoint()} answers {status}; it has trouble, or too many requests came from here")
    return _Answer(status, {name.lower(): value for name, value in headers.items()}, body)


def _no_redirect() -> Any:
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """Answers of 3xx become HTTPError, which carries their headers."""

        def redirect_request(self, *_: Any) -> None:
            return None

    return NoRedirect()


def _check_access(answer: _Answer, kind: Kind, name: str, revision: str | None) -> None:
    """InputError for an answer that says no; a missing file is no matter here."""
    if answer.status < 400:
        return
    code = answer.headers.get("x-error-code", "")
    message = answer.headers.get("x-error-message", "")
    if code == "EntryNotFound":
        return
    if code == "GatedRepo":
        raise InputError(_gated(kind, name))
    if code == "RevisionNotFound":
        raise InputError(_unknown_revision(kind, name, revision))
    if answer.status == 401 and "credentials" in message.lower():
        raise InputError(f"{_field(kind)}: the Hub refuses the token of {_token_source()}: {message}. {_LOGIN}")
    if code == "RepoNotFound" or answer.status in (401, 404):
        raise InputError(_unknown_name(kind, name))
    raise InputError(f"{_field(kind)}: the Hub refuses {name}: {answer.status} {message or code}. {_LOGIN}")


_LOGIN = "Run '.venv/bin/hf auth login' with a token of https://huggingface.co/settings/tokens, then try again"


def _field(kind: Kind) -> str:
    return "model.name" if kind == "model" else "data.hub"


def _token_source() -> str:
    return "the variable HF_TOKEN" if os.environ.get("HF_TOKEN") else str(token_file())


def _gated(kind: Kind, name: str) -> str:
    accept = f"Accept its license on {page(kind, name)} with your account"
    if token() is None:
        return (
            f"{_field(kind)}: {name} is gated and you are not logged in (no token in HF_TOKEN or {token_file()}). "
            f"{accept}. {_LOGIN}")
    return (
        f"{_field(kind)}: {name} is gated, and the account of the token in {_token_source()} has no access yet. "
        f"{accept} (a grant may take its authors a while), then try again. A fine-grained token needs the permission "
        "to read gated repositories")


def _unknown_name(kind: Kind, name: str) -> str:
    private = "or it is private and you are not logged in" if token() is None else "or your token may not read it"
    return f"{_field(kind)}: there is no {kind} {name!r} on {endpoint()}, {private}. Check its name. {_LOGIN}"


def _unknown_revision(kind: Kind, name: str, revision: str | None) -> str:
    field = "model.revision" if kind == "model" else "data.revision"
    known = _references(kind, name)
    listed = f" Allowed: a commit, or one of {', '.join(known[:20])}." if known else ""
    near = closest(str(revision), known)
    return (
        f"{field}: {revision!r} is no branch, tag or commit of {name}.{listed}"
        f"{f' Did you mean {near}?' if near else ''} See {page(kind, name)}/commits/main")


def _references(kind: Kind, name: str) -> list[str]:
    """Names of branches and tags; empty where the Hub does not tell."""
    try:
        found = json.loads(_request(f"{endpoint()}/api/{kind}s/{quote(name)}/refs").body)
        return [str(one["name"]) for group in ("branches", "tags") for one in found.get(group) or ()]
    except (Unreachable, ValueError, KeyError, TypeError, AttributeError):
        return []
