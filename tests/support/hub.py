"""A stand-in for the Hugging Face hub: the requests of pushing and fetching, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """A server that holds repositories in memory.

    Attributes:
        repos: From id to the committed files, each with its bytes.
        private: Ids of the repositories that were made private.
        fails: From a part of a path to the status that requests for it are answered with.
        asked: Method and path of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.fails: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        self.server.asked.append(f"{self.command} {path}")
        status = next((code for part, code in self.server.fails.items() if part in path), None)
        if status is not None:
            return self._send(status, {"error": f"answers {status} on purpose"})
        if path.startswith("/lfs/"):
            self.server.large[path.rpartition("/")[2]] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        return self._api(path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _api(self, path: str, body: bytes) -> None:
        hub, given = self.server, json.loads(body) if body[:1] == b"{" and b"\n" not in body.strip() else {}
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "me", "type": "user"})
        if path == "/api/repos/create":
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name.startswith("others/"):
                return self._send(403, {"error": "You don't have the rights to create a model under others"})
            if name.startswith("nobody/"):
                return self._send(404, {"error": "no such organization"})
            if given.get("visibility") == "private":
                hub.private.add(name)
            hub.repos.setdefault(name, {})
            return self._send(200, {"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            large = ("safetensors", "tokenizer.json")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in given["files"]
            ]
            return self._send(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": thing["oid"],
                    "size": thing["size"],
                    "actions": {"upload": {"href": f"{hub.url}/lfs/{thing['oid']}", "header": {}}},
                }
                for thing in given["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.server.repos[name][value["path"]] = content
        self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/0", "commitOid": "0" * 40})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def running() -> Iterator[Hub]:
    """A stand-in that runs until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
