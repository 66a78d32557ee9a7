"""A small Hugging Face hub on loopback: what `datasets` and `huggingface_hub` ask for when they read a
dataset, so that the real clients can be tested without a network. It serves the folder
root/<owner>/<name>/** as dataset repositories and can be told to misbehave.

    with Hub(root) as hub:
        hub.fault = lambda request: "500" if ... else None
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url})
        hub.requests                              so far: (method, path, None or (first, last) byte)
"""

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""

class Hub:
    """fault(method, path, range) is asked before every reply and returns None for a good one, or what to do
    instead: an HTTP status to send, "drop" to cut the connection in the middle of the body, "short" or
    "empty" to send half or nothing of the body as if it were the whole."""

    def __init__(self, root):
        self.root = Path(root)
        self.revisions = {"main"}
        self.cut = {}  # file name: how many of its bytes the hub has
        self.fault = lambda method, path, span: None
        self.requests = []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Reply", (Reply,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def content(self, path):
        """(bytes, ETag) of a file."""
        content = path.read_bytes()[: self.cut.get(path.name)]
        return content, hashlib.sha1(content).hexdigest()

class Reply(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = span and (int(span[1]), int(span[2]))
        self.hub.requests.append((self.command, path, span))
        self.trouble = self.hub.fault(self.command, path, span)
        if isinstance(self.trouble, int):
            return self.send(self.trouble, b"{}")
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?(.*)", path):
            return self.api(*match.groups(), urllib.parse.parse_qs(url.query))
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            return self.file(*match.groups(), span)
        self.missing("EntryNotFound")

    do_HEAD = do_POST = do_GET

    def api(self, repo, what, revision, folder, query):
        base = self.hub.root / repo
        if revision not in self.hub.revisions | {COMMIT}:
            return self.missing("RevisionNotFound")
        if what == "revision":
            files = [str(path.relative_to(base)) for path in sorted(base.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": file} for file in files]
            return self.send(200, {"_id": "0", "id": repo, "sha": COMMIT, "tags": [], "siblings": siblings})
        if not (base / folder).is_dir():
            return self.missing("EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        listing = []
        for path in sorted((base / folder).rglob("*") if recursive else (base / folder).iterdir()):
            entry = {"path": str(path.relative_to(base))}
            if path.is_dir():
                entry |= {"type": "directory", "oid": "1" * 40, "size": 0}
            else:
                content, etag = self.hub.content(path)
                entry |= {"type": "file", "oid": etag, "size": len(content)}
            listing.append(entry)
        self.send(200, listing)

    def file(self, repo, revision, name, span):
        path = self.hub.root / repo / name
        if revision not in self.hub.revisions | {COMMIT}:
            return self.missing("RevisionNotFound")
        if not path.is_file():
            return self.missing("EntryNotFound")
        content, etag = self.hub.content(path)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {span[0]}-{span[1]}/{len(content)}"
            return self.send(206, content[span[0] : span[1] + 1], headers)
        self.send(200, content, headers)

    def missing(self, code):
        self.send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status, body, headers=None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if self.trouble in ("short", "empty"):
            body = body[: len(body) // 2 if self.trouble == "short" else 0]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.trouble == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)
