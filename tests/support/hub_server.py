"""A hub on this machine: what huggingface_hub asks of one (info, tree, resolve with HEAD, GET,
Range), and faults.

Weights are "LFS" files: their address is a redirect to another origin, as of the real hub's CDN.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # the real one: tests shorten the pauses of the library
from urllib.parse import unquote, urlsplit

COMMIT = "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"
LFS = (".safetensors", ".gguf", ".model", ".bin")
PAGE = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"


def checksum(name: str, data: bytes) -> str:
    """What names a file on the hub: sha256 of large ones, git's sha1 of others."""
    if name.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What becomes of the next `times` requests whose "METHOD path" matches `where`."""

    where: str
    # a status, or cut, reset, stall; page (of another size), swap (a page of that size), rot
    kind: str | int
    times: int = 1
    headers: dict = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    """Repositories by name, each of {file: bytes}; `requests` is a list of (method, path,
    authorization).
    """

    daemon_threads = True

    def __init__(self, **repositories: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.commit = dict(repositories), COMMIT
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, where: str, kind: str | int, times: int = 1, **headers: str) -> None:
        self.faults.append(
            Fault(where, kind, times, {k.replace("_", "-"): v for k, v in headers.items()})
        )

    def asked(self, where: str) -> list[str]:
        """The requests so far that match."""
        return [
            line
            for method, path, _ in self.requests
            if re.search(where, line := f"{method} {path}")
        ]

    def take(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Authorization", "")))
        fault = self.server.take(f"{self.command} {path}")
        if fault and isinstance(fault.kind, int):
            return self._answer(fault.kind, b'{"error": "no"}', fault.headers)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            return self._tree(*match.groups(), fault)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._model(*match.groups(), fault)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups(), fault)
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._file(self.server.repositories[match[1]][match[2]], {}, fault)
        return self._answer(404, b"", {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _model(self, model: str, revision: str | None, fault: Fault | None) -> None:
        if fault:
            return self._answer(200, PAGE, {"Content-Type": "text/html"})
        if model not in self.server.repositories:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.server.commit):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        said = {
            "id": model,
            "modelId": model,
            "sha": self.server.commit,
            "siblings": [],
            "tags": [],
        }
        return self._answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _tree(self, model: str, revision: str, fault: Fault | None) -> None:
        if fault:
            return self._answer(200, PAGE, {"Content-Type": "text/html"})
        files = []
        for name, data in self.server.repositories[model].items():
            one = {"type": "file", "path": name, "size": len(data), "oid": checksum("", data)}
            if name.endswith(LFS):
                one["lfs"] = {"oid": checksum(name, data), "size": len(data), "pointerSize": 134}
            files.append(one)
        return self._answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def _resolve(self, model: str, _revision: str, name: str, fault: Fault | None) -> None:
        data = self.server.repositories[model][name]
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{checksum(name, data)}"'}
        if not name.endswith(LFS):
            return self._file(data, headers, fault)
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
        other = f"http://localhost:{self.server.server_port}/cdn/{model}/{name}"
        return self._answer(302, b"", headers | {"Location": other})

    def _file(self, data: bytes, headers: dict, fault: Fault | None) -> None:
        kind, start = fault and fault.kind, 0
        if kind in ("page", "swap"):
            data = PAGE if kind == "page" else PAGE.ljust(len(data))[: len(data)]
        elif kind == "rot":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        if kind not in ("cut", "reset", "stall") or self.command == "HEAD":
            return self._answer(206 if start else 200, body, headers)
        self._head(206 if start else 200, len(body), headers)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
        if kind == "stall":
            sleep(1.5)
        elif kind == "reset":  # RST instead of FIN
            sleep(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return None

    def _answer(self, status: int, body: bytes, headers: dict) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
