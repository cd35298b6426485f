"""From a model's name to its files: paths, aliases, and a local server that speaks the hub's protocol."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from jaxinfer.hub import ModelFiles, resolve_model

ROOT = Path(__file__).resolve().parent.parent


# ---- paths and names


def test_random_takes_a_shape_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(f"random:{tmp_path / 'config.json'}") == ModelFiles("random", tmp_path / "config.json")
    found = resolve_model("random:llama3-8b")
    assert found.kind == "random" and found.path.name == "llama3-8b.json"
    with pytest.raises(FileNotFoundError, match="Did you mean 'llama3-8b'"):
        resolve_model("random:lama3-8b")


def test_directories(tmp_path: Path) -> None:
    def found(*names: str) -> ModelFiles:
        path = tmp_path / "-".join(names or ["empty"])
        path.mkdir()
        for name in names:
            (path / name).touch()
        return resolve_model(str(path))

    assert found("config.json", "model.safetensors").kind == "safetensors"
    assert found("config.json", "model.safetensors.index.json").kind == "safetensors"
    assert found("config.json", "a.gguf").path.name == "a.gguf"
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, name the one to load: a\.gguf, b\.gguf"):
        found("a.gguf", "b.gguf")
    with pytest.raises(ValueError, match=r"torch pickles only \(pytorch_model\.bin\).*save_pretrained"):
        found("config.json", "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no config\.json; it has model\.safetensors"):
        found("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: it has README\.md, config\.json"):
        found("config.json", "README.md")
    with pytest.raises(FileNotFoundError, match="holds no weights: it has nothing"):
        found()


def test_files(tmp_path: Path) -> None:
    for name in ("x.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    assert resolve_model(str(tmp_path / "x.gguf")) == ModelFiles("gguf", tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=r"is a \.safetensors file; accepted: a directory with config\.json"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["smollm2-13m", "./no/such/dir", "/no/such/dir", "no/such.gguf", "a/b/c", "a b", ""])
def test_no_such_model(name: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        resolve_model(name)
    text = str(raised.value)
    assert f"no model {name!r}" in text and "'Qwen/Qwen3-0.6B'" in text and "random:" in text
    assert ("Did you mean 'smollm2-135m'" in text) == (name == "smollm2-13m")


# ---- a hub


def repository(value: float) -> dict[str, bytes]:
    """A model's files; the weights are large enough to be cut in the middle."""
    weights = {"a": np.full((512, 1024), value, np.float32)}
    return {
        "config.json": json.dumps({"value": value}).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model-00001-of-00002.safetensors": save({"b": np.full(3, value, np.float32)}),
        "model-00002-of-00002.safetensors": save(weights),
        "model.safetensors.index.json": b"{}",
        # what nobody asked for
        "README.md": b"# A model",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"again",
        "original/consolidated.00.pth": b"and again",
        "onnx/model.safetensors": b"and again",
    }


LARGE = "model-00002-of-00002.safetensors"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@dataclass
class Hub:
    """What the server holds, what it should break, and what it was asked for."""

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)  # (repository, commit) → files
    cuts: dict[str, int] = field(default_factory=dict)  # file → how many answers are cut in the middle
    stalls: set[str] = field(default_factory=set)  # files that stop in the middle until `go_on` is set
    go_on: threading.Event = field(default_factory=threading.Event)
    gated: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def gets(self, name: str) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [ranged for method, path, ranged in self.log if method == "GET" and path.endswith(f"/{name}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if api:
            return self.api(api[1], api[2] or "revision", api[3] or "main")
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self.file(*file.groups())
        self.reply(404, b"")

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; answers with the hub's error and returns None if there is no such thing."""
        commit = COMMITS.get(revision, revision)
        if repo in self.hub.gated:
            self.reply(403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        elif repo not in {name for name, _ in self.hub.files}:
            self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif (repo, commit) not in self.hub.files:
            self.reply(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, self.hub.files[repo, commit]
        return None

    def api(self, repo: str, what: str, revision: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        self.reply(200, json.dumps(tree if what == "tree" else info).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        headers |= {"X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if ranged:
            start = int(ranged[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        cut = self.command == "GET" and self.hub.cuts.get(name, 0) > 0
        if cut:
            self.hub.cuts[name] -= 1
        self.reply(206 if ranged else 200, data, headers, sent=len(data) // 2 if cut else None)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        """sent: close the connection after so many bytes of the body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET" and self.path.rpartition("/")[2] in self.hub.stalls:
            self.wfile.write(body[: len(body) // 2])
            self.hub.go_on.wait(60)
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    state.files = {("org/tiny", COMMITS["main"]): repository(1.0), ("org/tiny", COMMITS["v2"]): repository(2.0)}

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is no news: some are killed."""

    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


# huggingface_hub reads its environment when it is imported, so every download has a process of its own.
CLIENT = """
import sys
from jaxinfer.hub import resolve_model
name, revision, cache = sys.argv[1:4]
try:
    found = resolve_model(name, revision=revision or None, download_dir=cache or None)
    print(found.kind, found.path)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    kept = {key: value for key, value in kept.items() if "proxy" not in key.lower()}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return {**kept, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def client(
    hub: Hub, cache: Path, name: str = "org/tiny", revision: str = "", before: str = "", **more: str
) -> tuple[int, str]:
    """Exit status (0, or 3 after an error) and what was found, or the error. before: code that runs first."""
    result = subprocess.run(
        [sys.executable, "-c", before + CLIENT, name, revision, str(cache / "hub")],
        cwd=ROOT, env=environment(hub, cache, **more), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode in (0, 3), result.stderr[-3000:]
    return result.returncode, result.stdout.strip()


def downloaded(answer: tuple[int, str]) -> Path:
    status, text = answer
    assert status == 0, text
    kind, _, path = text.partition(" ")
    assert kind == "safetensors"
    return Path(path)


def test_download_by_id(hub: Hub, tmp_path: Path) -> None:
    """The model's files, nothing else; a second call downloads nothing."""
    path = downloaded(client(hub, tmp_path))
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"),
        *("model.safetensors.index.json", "model-00001-of-00002.safetensors", LARGE),
    }
    assert path.name == COMMITS["main"] and path.is_relative_to(tmp_path / "hub")
    for name in names:
        assert (path / name).read_bytes() == hub.files["org/tiny", COMMITS["main"]][name]
    assert (load_file(path / LARGE)["a"] == 1).all()
    hub.log.clear()
    assert downloaded(client(hub, tmp_path)) == path
    assert not [path for method, path, _ in hub.log if method == "GET" and "/resolve/" in path]


def test_revision(hub: Hub, tmp_path: Path) -> None:
    path = downloaded(client(hub, tmp_path, revision="v2"))
    assert path.name == COMMITS["v2"] and json.loads((path / "config.json").read_text()) == {"value": 2.0}
    assert downloaded(client(hub, tmp_path, revision=COMMITS["v2"])) == path
    status, text = client(hub, tmp_path, revision="v3")
    assert status == 3 and "FileNotFoundError the model 'org/tiny' has no revision 'v3'" in text


def test_offline(hub: Hub, tmp_path: Path) -> None:
    """Offline finds what was downloaded, says so when it was not, and never asks the server."""
    path = downloaded(client(hub, tmp_path))
    hub.log.clear()
    assert downloaded(client(hub, tmp_path, HF_HUB_OFFLINE="1")) == path
    status, text = client(hub, tmp_path, revision="v2", HF_HUB_OFFLINE="1")
    assert (
        status == 3 and "FileNotFoundError the model 'org/tiny' at revision 'v2' is not complete in the cache" in text
    )
    assert "HF_HUB_OFFLINE is set" in text and str(tmp_path) in text
    assert client(hub, tmp_path / "other", HF_HUB_OFFLINE="1")[0] == 3
    assert hub.log == []


def test_a_cut_connection_is_resumed(hub: Hub, tmp_path: Path) -> None:
    """Within a download: huggingface_hub keeps what arrived, in units of 10 MiB, and asks for the rest."""
    whole = np.random.default_rng(0).bytes(36 << 20)
    hub.files["org/tiny", COMMITS["main"]][LARGE] = whole
    hub.cuts[LARGE] = 2
    path = downloaded(client(hub, tmp_path))
    assert (path / LARGE).read_bytes() == whole
    ranges = hub.gets(LARGE)
    assert len(ranges) == 3 and ranges[0] is None
    first, second = (int(str(r).removeprefix("bytes=").removesuffix("-")) for r in ranges[1:])
    assert 0 < first < second < len(whole)


def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    """A client killed while one file arrives: the cache is seen to be incomplete, and the next call fetches that file and
    keeps the complete ones."""
    hub.stalls.add(LARGE)
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, "org/tiny", "", str(tmp_path / "hub")],
        cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        complete: set[str] = set()
        deadline = time.monotonic() + 60
        while len(complete) < 6 or not hub.gets(LARGE):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
            complete = {file.name for file in (tmp_path / "hub").rglob("snapshots/*/*")}
    finally:
        process.kill()
        process.wait()
        hub.go_on.set()
    assert LARGE not in complete
    status, text = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert status == 3 and "is not complete in the cache" in text
    hub.stalls.clear()
    hub.log.clear()
    path = downloaded(client(hub, tmp_path))
    assert (path / LARGE).read_bytes() == hub.files["org/tiny", COMMITS["main"]][LARGE]
    assert len(hub.gets(LARGE)) == 1
    assert not [name for name in complete if hub.gets(name)]


def test_a_download_that_breaks_off(hub: Hub, tmp_path: Path) -> None:
    """The library gives up: a clear error, and the next call succeeds."""
    hub.cuts[LARGE] = 1000
    impatient = "import huggingface_hub.file_download as f; f.time.sleep = lambda seconds: None"
    status, text = client(hub, tmp_path, before=impatient)
    assert status == 3 and "ConnectionError the download of 'org/tiny' broke off" in text
    assert "Start it again: files that are complete are kept" in text
    hub.cuts.clear()
    assert downloaded(client(hub, tmp_path)).name == COMMITS["main"]


def test_no_such_repository(hub: Hub, tmp_path: Path) -> None:
    status, text = client(hub, tmp_path, "org/nothing")
    assert status == 3 and f"FileNotFoundError no model 'org/nothing' at {hub.url}" in text
    assert "HF_TOKEN" in text and "random:" in text


def test_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("org/tiny")
    status, text = client(hub, tmp_path)
    assert (
        status == 3 and f"PermissionError the model 'org/tiny' is gated: accept its terms at {hub.url}/org/tiny" in text
    )


def test_the_hub_cannot_be_reached(hub: Hub, tmp_path: Path) -> None:
    path = downloaded(client(hub, tmp_path))
    nowhere = "http://127.0.0.1:9"
    assert downloaded(client(hub, tmp_path, HF_ENDPOINT=nowhere)) == path
    status, text = client(hub, tmp_path / "empty", HF_ENDPOINT=nowhere)
    assert status == 3 and f"{nowhere} cannot be reached" in text


def test_repositories_of_other_formats(hub: Hub, tmp_path: Path) -> None:
    main = COMMITS["main"]
    hub.files["org/torch", main] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    hub.files["org/gguf", main] = {"README.md": b"", "x-Q4_0.gguf": b"GGUF q4", "x-Q8_0.gguf": b"GGUF q8"}
    hub.files["org/data", main] = {"README.md": b"", "data.parquet": b"1"}
    status, text = client(hub, tmp_path, "org/torch")
    assert status == 3 and "ValueError the model 'org/torch' has torch pickles only (pytorch_model.bin)" in text
    status, text = client(hub, tmp_path, "org/gguf")
    assert status == 3 and "name one as 'org/gguf:FILE', FILE one of x-Q4_0.gguf, x-Q8_0.gguf" in text
    status, text = client(hub, tmp_path, "org/data")
    assert status == 3 and "has no config.json with .safetensors files; it has README.md, data.parquet" in text
    status, text = client(hub, tmp_path, "org/gguf:x-Q8_0.gguf")
    assert status == 0 and text.startswith("gguf ") and Path(text[5:]).read_bytes() == b"GGUF q8"
    status, text = client(hub, tmp_path, "org/gguf:x-Q5_0.gguf")
    assert status == 3 and "FileNotFoundError the model 'org/gguf' has no file 'x-Q5_0.gguf'" in text
    assert not list((tmp_path / "hub").rglob("*.bin"))
