"""The facts beside a result."""

import json
import subprocess
from pathlib import Path

import torch
import transformers

from hylorada import provenance as module
from hylorada.provenance import provenance


def test_facts_are_those_of_this_run():
    facts = provenance()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["machine"]["cpu"]
    assert "pytest" in facts["command"] or "-c" in facts["command"]


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_is_the_source_tree_s_own(tmp_path, monkeypatch):
    source = tmp_path / "hylorada" / "provenance.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(module, "__file__", str(source))
    assert provenance()["commit"] is None

    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "start")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert provenance()["commit"] == commit
    source.write_text("changed")
    assert provenance()["commit"] == f"{commit}-dirty"


def test_commit_of_a_tree_around_an_installation_is_not_ours(tmp_path, monkeypatch):
    installed = tmp_path / ".venv" / "hylorada" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    (tmp_path / "theirs.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "theirs.py")
    git(tmp_path, "commit", "--quiet", "--message", "their project")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert provenance()["commit"] is None
