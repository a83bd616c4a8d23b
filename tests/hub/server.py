"""A Hub that runs in a test: repositories with commits, LFS, private ones, tokens, and a connection that can be made to break.

    hub = LocalHub().start()
    HfApi(endpoint=hub.url, token=TOKEN).upload_folder(...)
    hub.repos["tester/model"].files             what is in its main branch

It answers what huggingface_hub 1.31 to 2.4 and transformers ask when they create, upload, download and describe models, with
the status codes and headers of the real one: 401 without a token, 403 with another's, 404 for what is not there or not visible,
409 for a repository that exists, ETags, commit hashes, ranges. Files with the endings of weights go through LFS: objects that
have arrived are not asked for again, which is how an upload that broke goes on.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, OTHER_TOKEN = "hf_localtesterwritetokenABC123", "hf_localotherreadtokenXYZ789"
_LFS = (".safetensors", ".bin", ".png", ".model", ".gguf")


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # messages
    history: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


class LocalHub:
    """``repos`` by id; ``requests``: (method, path, authorization) of each; ``break_after``: bytes of LFS uploads that arrive
    before every further one is cut off; None mends the line."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.break_after: int | None = None
        self.lock = threading.Lock()

    def start(self) -> "LocalHub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, content=b"", status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, said: str) -> None:
        self._send({"error": said}, status, {"X-Error-Code": code, "X-Error-Message": said})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {TOKEN: "tester", OTHER_TOKEN: "other"}.get(token)

    def _note(self) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.headers.get("Authorization") or ""))

    def _visible(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._user != name.split("/")[0]):
            self._refuse(401 if self._user is None else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def do_GET(self):
        self._note()
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            if self._user is None:
                return self._refuse(401, "Unauthorized", "Invalid user token.")
            role = "write" if self._user == "tester" else "read"
            auth = {"accessToken": {"role": role, "displayName": "t"}, "type": "access_token"}
            return self._send({"type": "user", "name": self._user, "orgs": [], "auth": auth})
        if found := re.match(r"(?:/api/resolve-cache/models)?/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            return self._file(found[1], found[3])
        if found := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?$", path):
            repo = self._visible(found[1])
            if repo is not None:
                siblings = [{"rfilename": name} for name in sorted(repo.files)]
                facts = {
                    "id": found[1],
                    "modelId": found[1],
                    "sha": repo.sha,
                    "siblings": siblings,
                    "private": repo.private,
                }
                self._send(facts | {"tags": [], "downloads": 0, "likes": 0})
            return None
        if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            repo = self._visible(found[1])
            if repo is not None:
                entries = []
                for name, content in sorted(repo.files.items()):
                    oid = hashlib.sha1(content).hexdigest()
                    entry = {"type": "file", "oid": oid, "size": len(content), "path": name}
                    if name.endswith(_LFS):
                        entry["lfs"] = {
                            "oid": hashlib.sha256(content).hexdigest(),
                            "size": len(content),
                            "pointerSize": 130,
                        }
                    entries.append(entry)
                self._send(entries)
            return None
        return self._refuse(404, "NotFound", "no such page")

    do_HEAD = do_GET

    def _file(self, name: str, file: str) -> None:
        repo = self._visible(name)
        if repo is None:
            return
        content = repo.files.get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound", f"Entry not found: {file}")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repo.sha,
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        status, sent = 200, content
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            status, sent = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(sent) - 1}/{len(content)}"
        if self.command == "HEAD":
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(sent))}).items():
                self.send_header(key, value)
            self.end_headers()
            return
        self._send(sent, status, headers)

    def do_PUT(self):
        self._note()
        size, oid = int(self.headers.get("Content-Length") or 0), self.path.rsplit("/", 1)[1]
        room = self.hub.break_after
        if room is not None and room < size:
            self.rfile.read(room)
            self.hub.break_after = 0
            self.close_connection = True
            self.connection.close()
            return
        content = self._body()
        if room is not None:
            self.hub.break_after = room - size
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, "BadRequest", "the content is not that of the object")
        self.hub.objects[oid] = content
        self._send(b"")

    def do_POST(self):
        self._note()
        body = self._body()
        if self.path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if self._user is None:
            return self._refuse(401, "Unauthorized", "Invalid username or password.")
        if self._user != "tester":
            return self._refuse(403, "Forbidden", "you have read access only")
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'tester'}/{given['name']}"
            if name in self.hub.repos:
                return self._send(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
                )
            self.hub.repos[name] = Repo(bool(given.get("private")) or given.get("visibility") == "private")
            return self._send({"url": f"{self.hub.url}/{name}", "id": name, "name": name})
        found = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/(.*)", self.path)
        repo = self._visible(found[1]) if found else None
        if repo is None:
            return None
        if found[2].startswith("preupload"):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(_LFS) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        if found[2] == "info/lfs/objects/batch":
            objects = []
            for one in json.loads(body)["objects"]:
                entry = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in self.hub.objects:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
                objects.append(entry)
            return self._send({"transfer": "basic", "objects": objects})
        if found[2].startswith("commit/"):
            return self._commit(found[1], repo, body)
        return self._refuse(404, "NotFound", f"no such page: {self.path}")

    def _commit(self, name: str, repo: Repo, body: bytes) -> None:
        files, message = dict(repo.files), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._refuse(400, "BadRequest", f"{value['path']}: the object has not been uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        repo.files = files
        repo.commits.append(message)
        repo.history.append(files)
        url = f"{self.hub.url}/{name}/commit/{repo.sha}"
        return self._send({"commitUrl": url, "commitOid": repo.sha, "success": True, "hookOutput": ""})

    def _validate(self, given: dict) -> None:
        """The errors that the real one has for a card's metadata, as far as they concern us."""
        import yaml

        errors = []
        head = re.match(r"---\n(.*?)\n---", given.get("content", ""), re.S)
        try:
            data = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            data, errors = {}, [{"message": str(error)}]
        for key, kind in (("tags", list), ("library_name", str), ("pipeline_tag", str), ("license", (str, list))):
            if key in data and not isinstance(data[key], kind):
                errors.append({"message": f'"{key}" is not of the expected type'})
        if data.get("base_model_relation") not in (None, "finetune", "quantized", "merge", "adapter"):
            errors.append({"message": '"base_model_relation" must be one of finetune, quantized, merge, adapter'})
        for entry in data.get("model-index", []):
            if not entry.get("name") or not isinstance(
                entry.get("results"), list
            ):  # an empty list is what stock cards have
                errors.append({"message": '"model-index" needs name and results'})
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)
