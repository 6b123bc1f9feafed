"""A Hub on loopback, for the real client: repositories in memory, with what pushing and downloading a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

MAY_WRITE, MAY_READ, OWNER = "hf_writer", "hf_reader", "owner"
"""Two tokens, and the only namespace that exists."""


class StubHub(ThreadingHTTPServer):
    """Repositories by id, each with its branches; a branch is a list of commits, a commit all files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, str | None] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_at = ""
        """Part of a path whose requests are answered with status 500."""

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch's newest commit holds."""
        return self.repositories[repo_id][branch][-1]

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A branch's newest commit, or the commit of a hash, with its hash."""
        branches = self.repositories.get(repo_id, {})
        commits = branches[revision][-1:] if revision in branches else [c for b in branches.values() for c in b]
        for files in commits:
            if revision in (*branches, commit_hash(files)):
                return commit_hash(files), files
        return None


def commit_hash(files: dict[str, bytes]) -> str:
    named = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
    return hashlib.sha1(json.dumps(named, sort_keys=True).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append(f"{self.command} {path}")
        if self.server.fail_at and self.server.fail_at in path:
            return self._send(500, {"error": "out of order"})
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return method(self, body, *match.groups())
        return self._send(404, {"error": f"no such route {path}"})

    def _send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _may_write(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == MAY_WRITE:
            return True
        self._send(403 if token == MAY_READ else 401, {"error": "no right to write" if token == MAY_READ else "who?"})
        return False

    # -- writing ---------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if not self._may_write():
            return None
        if not repo_id.startswith(f"{OWNER}/"):
            return self._send(404, {"error": f"no such owner as of {repo_id}"})
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self._send(409, {"error": "it exists", **url})
        self.server.repositories[repo_id] = {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]}
        self.server.private[repo_id] = wanted.get("visibility", wanted.get("private"))
        return self._send(200, url)

    def validate(self, body: bytes) -> None:
        block = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.S)
        try:
            yaml.safe_load(block[1] if block else "")
        except yaml.YAMLError as error:
            return self._send(400, {"errors": [{"message": f"bad YAML: {error}"}]})
        return self._send(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        branches = self.server.repositories[repo_id]
        if name in branches:
            return self._send(409, {"error": "it exists"})
        branches[name] = branches["main"][-1:]
        return self._send(200)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
        files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in zip(names, modes, strict=True)]
        return self._send(200, {"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        return self._send(200, {"transfer": "basic", "objects": objects})

    def large(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "another file"})
        self.server.large[oid] = body
        return self._send(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self._may_write():
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        commits = self.server.repositories[repo_id][revision]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        self.server.messages.append(lines[0]["value"]["summary"])
        made = commit_hash(files)
        return self._send(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{made}", "commitOid": made})

    # -- reading ---------------------------------------------------------------------------------

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        found = self.server.find(repo_id, revision)
        if found is None:
            return self._send(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in found[1]]
        return self._send(200, {"id": repo_id, "modelId": repo_id, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        found = self.server.find(repo_id, revision)
        if found is None:
            return self._send(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in found[1].items()
        ]
        return self._send(200, entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        sha, files = self.server.find(repo_id, revision) or ("", {})
        if name not in files:
            return self._send(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": sha}
        return self._send(200, files[name], headers)


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{ID}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{ID}/preupload/(.+)", Handler.preupload),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/(\w+)", Handler.large),
    (rf"POST /api/models/{ID}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{ID}", Handler.info),
    (rf"GET /api/models/{ID}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{ID}/tree/([^/]+)/?", Handler.tree),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[StubHub]:
    with StubHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
