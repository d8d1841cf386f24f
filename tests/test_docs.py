"""What the pages show is true: their code runs, their commands exist, their links lead somewhere, the site builds."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers

from hylorada import pretrained, sources
from tests.hylorada.conftest import LLAMA_LIKE
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = sorted(["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))])
LANGUAGES = {"python", "bash", "yaml", "bibtex", "text"}
# said in a page's source above a block that is not run, with the reason
NOT_RUN = re.compile(r"<!-- not run: (.*) -->\s*\Z")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND_IN_TEXT = re.compile(r"`((?:make|python|pytest|hylorada|pip) [^`]+)`")

BOOKS = [
    sources.Document(f"book {number}", f"In the beginning was the word, and the word was {word}. " * 12)
    for number, word in enumerate(["light", "water", "earth", "heaven", "fire", "wind", "stone", "grass"])
]


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, the line that it begins at, why it is not run, or ""."""

    language: str
    text: str
    line: int
    reason: str


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    text = read(page)
    blocks = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        mark = NOT_RUN.search(before)
        blocks.append(Block(match[1], match[2], before.count("\n") + 2, mark[1] if mark else ""))
    return blocks


@pytest.fixture
def tiny_hub(tmp_path, tokenizer, monkeypatch):
    """Whatever model a page names is a tiny random one; "kjv" is eight short texts; the folder is an empty one."""
    hub, folder = tmp_path / "hub", tmp_path / "folder"
    folder.mkdir()
    # wide enough for 4-bit blocks of 64 weights
    shape = LLAMA_LIKE | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **tokens)).save_pretrained(hub)
    tokenizer.save_pretrained(hub)
    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", staticmethod(from_folder_or(hub, kind.from_pretrained)))
    monkeypatch.setattr(pretrained, "_smollm2_directory", lambda: hub)
    monkeypatch.setitem(sources._BUNDLED, "kjv", lambda: iter(BOOKS))
    monkeypatch.chdir(folder)
    return hub


def from_folder_or(hub: Path, original):
    def from_pretrained(name, *args, **kwargs):
        return original(name if Path(str(name)).is_dir() else hub, *args, **kwargs)

    return from_pretrained


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language_and_why_it_is_not_run(page):
    text = read(page)
    assert text.count("\n```") % 2 == 0, "a fence is not closed"
    assert not [block for block in blocks_of(page) if block.language not in LANGUAGES]
    marks = re.findall(r"<!-- not run: *(.*?) *-->", text)
    assert all(len(reason.split()) > 2 for reason in marks)
    assert len(marks) == sum(bool(block.reason) for block in blocks_of(page)), "a mark stands above no block"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
def test_code_of_a_page_runs_from_top_to_bottom(page, tiny_hub):
    # a yaml block whose first line is "# name.yaml" is that file; commands of hylorada run where they stand
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)
        elif block.language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            for words in commands_of(block.text):
                if words[0] == "hylorada":
                    run_hylorada(words[1:])


def commands_of(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_hylorada(arguments: list[str]) -> str:
    from typer.testing import CliRunner

    from hylorada.cli import app

    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, f"hylorada {shlex.join(arguments)}: {outcome.output}"
    return outcome.output


@pytest.mark.parametrize("page", [*PAGES, "METHODOLOGY.md"])
def test_commands_of_a_page_exist(page):
    shown = [words for block in blocks_of(page) if block.language == "bash" for words in commands_of(block.text)]
    # in a table's row the options after the first command stand alone
    shown += [shlex.split(command) for command in COMMAND_IN_TEXT.findall(FENCE.sub("", read(page)))]
    for words in shown:
        check_command(words)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        makefile = read("Makefile")
        variables = {word.partition("=")[0] for word in arguments if "=" in word}
        assert {word for word in arguments if "=" not in word} <= set(re.findall(r"^([a-z-]+):", makefile, re.M)), words
        assert variables <= set(re.findall(r"^([A-Z_]+) [?:]?=", makefile, re.M)), words
    elif program == "pip":
        extras = {extra for group in re.findall(r"\[([\w,]+)\]", " ".join(arguments)) for extra in group.split(",")}
        assert extras <= set(re.findall(r"^(\w+) = \[", read("pyproject.toml"), re.MULTILINE)), words
    elif program == "pytest":
        check_pytest(arguments)
    elif program in ("python", "hylorada"):
        check_options(tuple(arguments) if program == "python" else ("-m", "hylorada", *arguments))
    else:
        assert program in ("pre-commit", "git"), f"no check for {program!r}: {shlex.join(words)}"


def check_pytest(arguments: list[str]) -> None:
    files = [word for word in arguments if word.endswith((".py", "/")) or "/" in word]
    assert all((ROOT / file).exists() for file in files if "results" not in file), arguments
    if "-k" in arguments:
        text = "".join(read(file) for file in files if file.endswith(".py"))
        assert all(word in text for word in re.findall(r"\w+", arguments[arguments.index("-k") + 1]) if word != "or")
    own = set(re.findall(r'"(--\w+)"', read("benchmarks/conftest.py")))
    assert {word for word in arguments if word.startswith("--")} <= own, arguments


def check_options(arguments: tuple[str, ...]) -> None:
    """Each option is one that the program's own --help names."""
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    script = arguments[:2] if arguments[0] == "-m" else arguments[:1]
    assert (ROOT / script[0]).exists() if len(script) == 1 else importlib.util.find_spec(script[1]), arguments
    words = arguments[len(script) :]
    most = 1 if script == ("-m", "hylorada") else len(words)
    first_value = next((i for i, word in enumerate(words) if re.search(r"^-|[./]", word)), len(words))
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if options or first_value:
        known = set(re.findall(r"--[\w-]+", help_of(script, words[: min(first_value, most)])))
        assert options <= known, f"{shlex.join(arguments)}: there is no {', '.join(options - known)}"


@cache
def help_of(script: tuple[str, ...], subcommands: tuple[str, ...]) -> str:
    if script == ("-m", "hylorada"):
        return run_hylorada([*subcommands, "--help"])
    told = io.StringIO()
    previous = sys.argv
    sys.argv = [script[-1], *subcommands, "--help"]
    try:
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as ended:
            if script[0] == "-m":
                runpy.run_module(script[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    finally:
        sys.argv = previous
    assert ended.value.code in (0, None), f"{script} {subcommands} has no --help"
    return told.getvalue()


@pytest.mark.parametrize("page", [*PAGES, "METHODOLOGY.md", "CHANGELOG.md"])
def test_links_within_the_project_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", FENCE.sub("", read(page)))
    local = [target for target in targets if not re.match(r"https?:|mailto:", target)]
    assert not [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]


def test_the_architecture_page_shows_the_floors_that_the_test_holds():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", read("docs/architecture.md"), re.MULTILINE)
    shown = [sorted(re.findall(r"`([\w.]+)`", names)) for _, names in sorted(rows, key=lambda row: int(row[0]))]
    assert shown == [sorted(floor) for floor in FLOORS]


def test_the_results_page_names_every_table_that_is_there():
    named = set(re.findall(r"benchmarks/results/([\w./-]+\.md)", read("docs/results.md")))
    results = ROOT / "benchmarks/results"
    assert len(named) > 10 and named == {path.relative_to(results).as_posix() for path in results.rglob("*.md")}


def test_the_site_builds_without_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    # a proxy that nobody answers at: a request would fail, and with it the build
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    built = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    foreign = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(?:https?:)?//")
    reference = (tmp_path / "site/reference/kernels/index.html").read_text(encoding="utf-8")
    # the second of two arguments in one line of the docstring has a row of its own
    of_the_op = reference.partition('id="hylorada_kernels.hybrid_linear"')[2]
    assert "<code>lora_b</code>" in of_the_op.partition('id="hylorada_kernels.shifted_attention"')[0]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10 and not [page for page in pages if foreign.search(page.read_text(encoding="utf-8"))]


def test_the_notebook_runs_on_the_cpu(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples/first_steps.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in code)
