"""A hub on this machine: the endpoints that huggingface_hub's client uses for models, over HTTP on the loopback.

Repositories live in memory. What the hub stores as large files is stored like any other file, which the hub does too
for files that are small enough.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_ann": "ann", "hf_bob": "bob"}
"""Who a token belongs to. Everybody may write what is theirs, and read what is not private."""

Files = dict[str, bytes]
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


class Refused(Exception):
    """What the hub answers instead: a status, and the code and the message that the client reads."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.body = body if body is not None else {"error": message or code}


@dataclass
class Repository:
    """Branches are names of commits; a commit is all files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        state = repr((sorted(files.items()), self.branches.get(branch), branch, len(self.commits)))
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.sha(revision)]


def blob_id(data: bytes) -> str:
    """What git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the hub's check of a model card refuses, as far as our cards can run into it."""
    block = re.match(r"^(\s*---\r?\n)([\S\s]*?)(\r?\n---[ \t]*(\r?\n|$))", content)
    if not block:
        return []
    try:
        data = yaml.safe_load(block[2]) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be an object"]
    errors = []

    def texts(key: str) -> list[str]:
        value = data.get(key, [])
        found = [value] if isinstance(value, str) else value
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
        errors.append(f'"{key}" must be a string or an array of strings')
        return []

    for key in ("tags", "license", "library_name", "pipeline_tag", "language", "metrics"):
        texts(key)
    for key in ("base_model", "datasets"):
        for each in texts(key):
            if not _REPOSITORY.fullmatch(each):
                errors.append(f'"{key}" with value {each!r} is not valid. Use a model id from https://hf.co/models.')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            named = (result.get("task", {}), "type"), (result.get("dataset", {}), "type"), (result["dataset"], "name")
            if not all(isinstance(where.get(key), str) and where[key] for where, key in named):
                errors.append('"model-index[0].results[0]" needs task.type, dataset.type and dataset.name')
            if not all(isinstance(metric.get("type"), str) and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors


class Hub:
    """Repositories by name, and what was asked for: `(method, path)` of every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""
        self.lock = threading.Lock()

    def readable(self, name: str, user: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and name.split("/")[0] != user):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, name: str, user: str | None) -> Repository:
        repository = self.readable(name, user)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if name.split("/")[0] != user:
            raise Refused(403, "", f"You don't have the rights to write to {name}")
        return repository

    # Each endpoint: (method, pattern of the path, function of user, body, query and the pattern's groups)

    def create(self, user: str | None, body: Any, query: Any) -> Any:
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = body.get("organization") or user
        name = f"{owner}/{body['name']}"
        if owner != user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner!r}.")
        if name in self.repositories:
            url = f"{self.endpoint}/{name}"
            raise Refused(409, "", "You already created this model repo", {"error": "exists", "url": url})
        self.repositories[name] = Repository(body.get("visibility") == "private")
        self.repositories[name].commit("main", {".gitattributes": b"*.bin filter=lfs\n"}, "initial commit")
        return {"url": f"{self.endpoint}/{name}", "name": name, "id": name}

    def validate(self, user: str | None, body: Any, query: Any) -> Any:
        errors = [{"message": message} for message in metadata_errors(body["content"])]
        if errors:
            raise Refused(400, "", "", {"errors": errors, "warnings": []})
        return {"errors": [], "warnings": []}

    def whoami(self, user: str | None, body: Any, query: Any) -> Any:
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def preupload(self, user: str | None, body: Any, query: Any, name: str, revision: str) -> Any:
        files = self.writable(name, user).files(revision)
        oids = {path: blob_id(data) for path, data in files.items()}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": oids.get(file["path"]),
                }
                for file in body["files"]
            ]
        }

    def commit(self, user: str | None, body: Any, query: Any, name: str, revision: str) -> Any:
        pull_request = "create_pr" in query
        repository = self.readable(name, user) if pull_request else self.writable(name, user)
        if revision not in repository.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(repository.files(revision)), ""
        for line in body:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "", f"this hub cannot do {line['key']}")
        number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
        sha = repository.commit(f"refs/pr/{number}" if pull_request else revision, files, message)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{name}/commit/{sha}"}
        return {**answer, "pullRequestUrl": f"{self.endpoint}/{name}/discussions/{number}"} if pull_request else answer

    def branch(self, user: str | None, body: Any, query: Any, name: str, branch: str) -> Any:
        repository = self.writable(name, user)
        if branch.startswith("refs/"):
            raise Refused(400, "", f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            raise Refused(409, "", f"Reference {branch} already exists")
        repository.branches[branch] = repository.sha((body or {}).get("startingPoint", "main"))
        return {}

    def info(self, user: str | None, body: Any, query: Any, name: str, revision: str = "main") -> Any:
        repository = self.readable(name, user)
        sha = repository.sha(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        return {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": repository.private,
            "siblings": siblings,
        }

    def refs(self, user: str | None, body: Any, query: Any, name: str) -> Any:
        branches = self.readable(name, user).branches.items()
        listed = [{"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha} for branch, sha in branches]
        return {"branches": listed, "tags": [], "converts": []}

    def tree(self, user: str | None, body: Any, query: Any, name: str, revision: str) -> Any:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            for path, data in sorted(self.readable(name, user).files(revision).items())
        ]

    def resolve(self, user: str | None, body: Any, query: Any, name: str, revision: str, path: str) -> Any:
        repository = self.readable(name, user)
        sha = repository.sha(revision)
        if path not in repository.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = repository.commits[sha][path]
        return data, {"X-Repo-Commit": sha, "ETag": f'"{blob_id(data)}"'}


_MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ENDPOINTS = [
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", _MODEL + r"/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", _MODEL + r"/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", _MODEL + r"/branch/(?P<branch>[^/]+)", Hub.branch),
    ("GET", _MODEL, Hub.info),
    ("GET", _MODEL + r"/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", _MODEL + r"/refs", Hub.refs),
    ("GET", _MODEL + r"/tree/(?P<revision>[^/]+)", Hub.tree),
    ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length) if length else self._chunks()
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        headers: dict[str, str] = {}
        with self.hub.lock:
            self.hub.requests.append((self.command, unquote(self.path)))
            try:
                status, body = 200, self._call(method, url.path, parse_qs(url.query), content)
            except Refused as refused:
                status, body = refused.status, refused.body
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        if isinstance(body, tuple):
            body, headers = body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers["Content-Type"] = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = answer

    def _call(self, method: str, path: str, query: Any, content: bytes) -> Any:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        lines = "ndjson" in self.headers.get("Content-Type", "")
        body = [json.loads(line) for line in content.splitlines()] if lines else json.loads(content or b"null")
        for verb, pattern, function in ENDPOINTS:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                return function(
                    self.hub, TOKENS.get(token), body, query, **{k: unquote(v) for k, v in found.groupdict().items()}
                )
        raise Refused(404, "", f"this hub has no {method} {path}")

    def _chunks(self) -> bytes:
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers on the loopback while the context lasts; its address is `endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
