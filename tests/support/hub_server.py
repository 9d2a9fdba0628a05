"""An in-memory Hugging Face Hub of models on loopback: repositories, revisions, commits, large files, tokens.

It implements the HTTP endpoints that `huggingface_hub` calls to push and load models. Run as a script,
`python tests/support/hub_server.py`, it prints its address and serves until it is killed.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "tester", "hf_test"
LARGE = 10_000  # bytes; larger files are uploaded separately, as with Git LFS


class Repository:
    """Commits, each a snapshot of all files, and the branches and tags that point to them."""

    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.titles: list[tuple[str, str]] = []
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.branches["main"] = self.commit({}, "initial commit")

    def commit(self, files: dict[str, bytes], title: str) -> str:
        number = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[number] = files
        self.titles.insert(0, (number, title))
        return number

    def resolve(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


class HubError(Exception):
    """An HTTP error response."""

    def __init__(self, status: int, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(code)
        self.status, self.code, self.headers = status, code, headers or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, Repository]
    blobs: dict[str, bytes]
    before: Callable[["Handler"], None]

    def log_message(self, *args) -> None:
        pass

    def route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        try:
            type(self).before(self)
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in (self.command, "GET" if self.command == "HEAD" else self.command):
                    return action(self, *found.groups())
            raise HubError(404, "EntryNotFound")
        except HubError as error:
            headers = error.headers | ({"X-Error-Code": error.code} if error.code else {})
            self.answer(error.status, json.dumps({"error": error.code}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.has_token():
            raise HubError(401)

    def repository(self, name: str) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and not self.has_token()):
            raise HubError(404 if self.has_token() else 401, "RepoNotFound")
        return found

    def snapshot(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self.repository(name)
        number = repository.resolve(revision)
        if number is None:
            raise HubError(404, "RevisionNotFound")
        return repository, number

    # Endpoints

    def whoami(self) -> None:
        self.require_token()
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send_json({"type": "user", "name": USER, "orgs": [], "auth": token})

    def create(self) -> None:
        self.require_token()
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        address = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
        if name in self.repositories:
            return self.answer(409, json.dumps(address).encode())
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.repositories[name] = Repository(name, private)
        self.send_json(address)

    def delete(self) -> None:
        self.require_token()
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        self.repository(name)
        del self.repositories[name]
        self.send_json({})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def describe(self, name: str, revision: str | None = None) -> None:
        repository, number = self.snapshot(name, revision or "main")
        files = [{"rfilename": path} for path in repository.commits[number]]
        self.send_json({
            "id": name, "modelId": name, "sha": number, "private": repository.private, "gated": False, "tags": [],
            "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z", "siblings": files,
        })  # fmt: skip

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository, number = self.snapshot(name, revision)
        prefix = f"{folder}/" if folder else ""
        files = {path: data for path, data in repository.commits[number].items() if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, "EntryNotFound")
        self.send_json([describe_file(path, data) for path, data in files.items()])

    def paths_info(self, name: str, revision: str) -> None:
        repository, number = self.snapshot(name, revision)
        paths = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
        files = repository.commits[number]
        self.send_json([describe_file(path, files[path]) for path in paths if path in files])

    def refs(self, name: str) -> None:
        repository = self.repository(name)

        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()]

        self.send_json({
            "branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags), "converts": [],
        })  # fmt: skip

    def make_branch(self, name: str, branch: str) -> None:
        self.require_token()
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository, number = self.snapshot(name, start)
        if branch in repository.branches:
            raise HubError(409)
        repository.branches[branch] = number
        self.send_json({})

    def make_tag(self, name: str, revision: str) -> None:
        self.require_token()
        repository, number = self.snapshot(name, revision)
        repository.tags[json.loads(self.body)["tag"]] = number
        self.send_json({})

    def preupload(self, name: str, revision: str) -> None:
        self.require_token()
        self.snapshot(name, revision)
        files = json.loads(self.body)["files"]
        self.send_json({"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
            for file in files
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        self.require_token()
        objects = []
        for requested in json.loads(self.body)["objects"]:
            answer = {"oid": requested["oid"], "size": requested["size"]}
            if requested["oid"] not in self.blobs:
                href = f"http://{self.headers['Host']}/upload/{requested['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400)
        self.blobs[oid] = self.body
        self.answer(200, b"")

    def commit(self, name: str, revision: str) -> None:
        self.require_token()
        repository, number = self.snapshot(name, revision)
        files, title = dict(repository.commits[number]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, number):
                    raise HubError(412)
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise HubError(400, entry["key"])
        repository.branches[revision] = repository.commit(files, title)
        made = repository.branches[revision]
        address = f"http://{self.headers['Host']}/{name}/commit/{made}"
        self.send_json({"commitUrl": address, "commitOid": made, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, number = self.snapshot(name, revision)
        data = repository.commits[number].get(path)
        if data is None:
            raise HubError(404, "EntryNotFound", {"X-Repo-Commit": number})
        headers = {"X-Repo-Commit": number, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if requested:
            start, stop = int(requested[1]), int(requested[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers)
        self.answer(200, data, headers)


def describe_file(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{NAME}", Handler.describe),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.describe),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/(.+)", Handler.paths_info),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.make_branch),
    ("POST", f"/api/models/{NAME}/tag/(.+)", Handler.make_tag),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/upload/([0-9a-f]{64})", Handler.upload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """Print nothing for a client that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A running server.

    Attributes:
        address: its URL.
        repositories: its repositories by name.
    """

    def __init__(self, address: str, handler: type[Handler]):
        self.address, self.handler = address, handler
        self.repositories = handler.repositories

    def files(self, name: str) -> dict[str, bytes]:
        """The files of the main branch."""
        repository = self.repositories[name]
        return repository.commits[repository.branches["main"]]

    def call_before(self, function: Callable[[Handler], None]) -> None:
        """Call `function` with the handler before each later request; it may raise HubError."""
        self.handler.before = staticmethod(function)


@contextmanager
def serve_hub():
    """Serve an empty Hub; yields it."""
    handler = type(
        "FreshHandler", (Handler,), {"repositories": {}, "blobs": {}, "before": staticmethod(lambda handler: None)}
    )
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", handler)
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def serve():
    """Serve an empty Hub; yields its address."""
    with serve_hub() as hub:
        yield hub.address


if __name__ == "__main__":
    with serve() as address:
        print(address, flush=True)
        threading.Event().wait()
