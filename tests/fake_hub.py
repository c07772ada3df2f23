"""As much of the Hugging Face hub as downloads and uploads need, over a directory, on a local port.

`python fake_hub.py DIRECTORY` serves the repositories DIRECTORY/owner/name and prints its address. Files that end in
.safetensors are large files with a hash. `DIRECTORY/drop-after` (a number of bytes) cuts every longer answer short.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def is_large(path):
    return path.suffix == ".safetensors"


def digest(path):
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest() if is_large(path) else hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    root = Path()
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        url = urlsplit(self.path)
        parts = [part for part in url.path.split("/") if part]
        if parts == ["api", "whoami-v2"]:
            self._user(self.headers.get("Authorization", "").removeprefix("Bearer "))
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._info(self.root / parts[2] / parts[3], "tree" in parts)
        elif "resolve" in parts and parts.index("resolve") == 2:
            self._file(self.root.joinpath(*parts[:2], *parts[4:]), body)
        else:
            self._json({"error": "no such page"}, 404)

    def _user(self, token):
        """Tokens are hf_x, which may write, and hf_read."""
        if token not in ("hf_x", "hf_read"):
            return self._json({"error": "Invalid user token"}, 401)
        role = "write" if token == "hf_x" else "read"
        return self._json({"type": "user", "name": "someone", "auth": {"accessToken": {"role": role}}})

    def _info(self, repository, tree):
        if not repository.is_dir():
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._json({"error": "Repository not found"}, 404, headers)
        files = []
        for path in sorted(p for p in repository.rglob("*") if p.is_file()):
            name, size = str(path.relative_to(repository)), path.stat().st_size
            file = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": "0", "blobId": "0"}
            if is_large(path):
                file["lfs"] = {"sha256": digest(path), "oid": digest(path), "size": size, "pointerSize": 130}
            files.append(file)
        name = "/".join(repository.parts[-2:])
        if tree:
            return self._json(files)
        return self._json({"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "siblings": files})

    def _file(self, path, body):
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": COMMIT}
            return self._json({"error": "Entry not found"}, 404, headers)
        data, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(path)}"', "Accept-Ranges": "bytes"}
        total = len(data)
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1, total) if last else total
            data, status = data[int(first) : end], 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{total}"
        self._send(data, status, headers, body)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [part for part in urlsplit(self.path).path.split("/") if part]
        if parts[-2:] == ["repos", "create"]:
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"http://{self.headers['Host']}/{name}", "id": "0", "name": name})
        if "preupload" in parts:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return self._json({"files": files})
        if "commit" in parts:
            return self._commit(self.root / parts[2] / parts[3], content)
        return self._json({"type": "model"})

    def _commit(self, repository, content):
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = repository / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        url = f"http://{self.headers['Host']}/{repository.parent.name}/{repository.name}/commit/{COMMIT}"
        return self._json({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def _json(self, content, status=200, headers=None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})}, True)

    def _send(self, data, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body or self.command == "HEAD":
            return
        limit = self.root / "drop-after"
        if limit.exists() and len(data) > int(limit.read_text()):
            self.wfile.write(data[: int(limit.read_text())])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def log_message(self, *_):
        with (self.root / "requests.log").open("a") as file:
            query = parse_qs(urlsplit(self.path).query)
            file.write(f"{self.command} {urlsplit(self.path).path} {self.headers.get('Range', '')} {query or ''}\n")


def main():
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
