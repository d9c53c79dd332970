"""A stand-in for the Hugging Face Hub on loopback: repositories of models, kept in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Commits (hash -> path -> content) and branches (name -> hash)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add, replace or (None) delete files; return the hash of the commit."""
        content = self.commits.get(self.refs.get(branch, ""), {}) | files
        content = {path: data for path, data in content.items() if data is not None}
        name = hashlib.sha1(f"{len(self.commits)}{sorted(content)}".encode()).hexdigest()
        self.commits[name], self.refs[branch] = content, name
        return name

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class Hub:
    """The server: `with Hub() as hub`; `url` is what HF_ENDPOINT must be.

    Attributes:
        repositories: by `OWNER/NAME`.
        requests: `METHOD path` of each, in their order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **flags: bool) -> str:
        repository = self.repositories.setdefault(name, Repository(**flags))
        return repository.commit(files)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.hub.requests.append(f"{method} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        name = r"(?P<name>[^/]+/[^/]+)"
        for pattern, answer in (
            (rf"/{name}/resolve/(?P<revision>.+)/(?P<file>[^/]+)", self._resolve),
            (rf"/api/models/{name}(?:/revision/main)?", self._info),
            (rf"/api/models/{name}/tree/(?P<revision>.+)", self._tree),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            (rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(?P<oid>\w+)", self._upload),
            (rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
        ):
            if match := re.fullmatch(pattern, path):
                answer(**match.groupdict())
                return
        self._error(404, "NoSuchRoute")

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, **headers: str) -> None:
        self._send(status, X_Error_Code=code, X_Error_Message=code, **headers)

    def _found(self, name: str, *, writing: bool = False) -> Repository | None:
        """Return a repository that may be read (or written); else answer as the Hub does."""
        repository = self.hub.repositories.get(name)
        if writing and not self.is_known:
            self._error(401, "Unauthorized")
        elif repository is None or (repository.private and not self.is_known):
            self._error(404 if self.is_known else 401, "RepoNotFound")
        else:
            return repository
        return None

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if not (repository := self._found(name)):
            return
        commit = repository.refs.get(revision, revision)
        if repository.gated and not self.is_known:
            self._error(403, "GatedRepo")
        elif commit not in repository.commits:
            self._error(404, "RevisionNotFound")
        elif file not in repository.commits[commit]:
            self._error(404, "EntryNotFound", X_Repo_Commit=commit)
        else:
            content = repository.commits[commit][file]
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, X_Repo_Commit=commit, ETag=f'"{etag}"')

    def _info(self, name: str) -> None:
        if repository := self._found(name):
            files = [{"rfilename": path} for path in repository.files] if repository.refs else []
            more = {"private": repository.private, "siblings": files, "xetEnabled": False}
            self._json({"id": name, "sha": repository.refs.get("main")} | more)

    def _tree(self, name: str, revision: str) -> None:
        if repository := self._found(name):
            files = repository.commits.get(repository.refs.get(revision, revision), {})
            self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in files.items()
                ]
            )

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.is_known:
            self._error(401, "Unauthorized")
        elif name in self.hub.repositories:
            self._json({"error": "You already created this model repo"}, 409)
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[name] = Repository(private)
            self._json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, name: str, revision: str) -> None:
        if self._found(name, writing=True):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def _batch(self, name: str) -> None:
        if self._found(name, writing=True):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        self.hub.uploads[oid] = self.body
        self._send(200)

    def _commit(self, name: str, revision: str) -> None:
        if not (repository := self._found(name, writing=True)):
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        commit = repository.commit(files, revision)
        self._json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})
