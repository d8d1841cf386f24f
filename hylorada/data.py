"""From documents to batches: held-out splits by document, blocks of tokens, padded or packed rows."""

from __future__ import annotations

import bisect
import itertools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .sources import Document, load_documents, stream_documents

logger = logging.getLogger(__name__)

__all__ = [
    "IGNORED_LABEL",
    "Block",
    "BlockStream",
    "Document",
    "PackedRow",
    "collate",
    "load_documents",
    "make_dataloader",
    "pack_blocks",
    "pad_token_id",
    "special_tokens",
    "split_documents",
    "stream_documents",
    "token_blocks",
    "windows",
]

IGNORED_LABEL = -100
# a single white space between words: there a tokenizer that keeps words apart is free to start anew
_WORD_START = re.compile(r"(?<=\S)\s(?=\S)")


class Block(TypedDict):
    """A row: consecutive tokens of one document."""

    document: str
    input_ids: list[int]


class PackedRow(TypedDict):
    """A row of several documents: position_ids begin at 0 with each, labels are -100 there."""

    input_ids: list[int]
    position_ids: list[int]
    labels: list[int]


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


def pack_blocks(blocks: Iterable[Block], max_length: int) -> list[PackedRow]:
    """Put several short blocks into one row of at most max_length tokens, the longest first, each where it fits best.

    Every block keeps its own positions from 0 on, which tell a model that it ends there, and its first token is not
    predicted. Batches of packed rows have no attention_mask: with one, or with a cache, transformers takes a row for a
    single text. The losses and the trainer of this package call models without a cache. Some models take no packed rows
    at all: `hylorada.evaluation.check_packing` tells.
    """
    rows: list[list[Block]] = []
    # (free tokens, number of the row), ascending
    free: list[tuple[int, int]] = []
    for block in sorted(blocks, key=lambda block: -len(block["input_ids"])):
        length = len(block["input_ids"])
        if length > max_length:
            raise ValueError(f"a block of {block['document']} has {length} tokens, more than max_length={max_length}")
        best = bisect.bisect_left(free, (length, 0))
        space, number = free.pop(best) if best < len(free) else (max_length, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(block)
        bisect.insort(free, (space - length, number))
    return [_packed_row(row) for row in rows]


def _packed_row(blocks: Sequence[Block]) -> PackedRow:
    parts = [block["input_ids"] for block in blocks]
    return PackedRow(
        input_ids=[token for part in parts for token in part],
        position_ids=[position for part in parts for position in range(len(part))],
        labels=[label for part in parts for label in (IGNORED_LABEL, *part[1:])],
    )


class BlockStream(IterableDataset):
    """The blocks of documents that are read, tokenized and forgotten one piece after the other.

    A long book never stands in memory as tokens. Pieces end before a white space, so that tokenizers that keep words
    apart give the tokens of the whole text. Several workers of a DataLoader share the documents; an epoch has no
    length, and no order but that of the documents.

    documents: as `stream_documents` returns them; not an iterator, which only one epoch could read
    piece: characters that are tokenized at once
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Any, max_length: int, piece: int = 100_000) -> None:
        if isinstance(documents, Iterator):
            raise TypeError("documents is an iterator, which a second epoch finds empty: pass stream_documents(...)")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 (one token to read, one to predict), got {max_length}")
        if piece < 1:
            raise ValueError(f"piece must be at least 1, got {piece}")
        self.documents = documents
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.piece = piece

    def __iter__(self) -> Iterator[Block]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for document in itertools.islice(self.documents, first, None, step):
            waiting: list[int] = []
            for tokens in self._pieces(document.text):
                waiting += tokens
                whole = len(waiting) - len(waiting) % self.max_length
                for window in windows(waiting[:whole], self.max_length):
                    yield Block(document=document.name, input_ids=window)
                del waiting[:whole]
            for window in windows(waiting, self.max_length):
                yield Block(document=document.name, input_ids=window)

    def _pieces(self, text: str) -> Iterator[list[int]]:
        prefix, suffix = special_tokens(self.tokenizer)
        yield prefix
        start = 0
        while start < len(text):
            border = _WORD_START.search(text, start + self.piece)
            end = border.start() if border else len(text)
            yield self.tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            start = end
        yield suffix


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and behind every text."""
    whole = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(f"{type(tokenizer).__name__} changes a text's tokens where it adds special ones")


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Pad rows on the right into one batch.

    rows: mappings with `input_ids` and optionally `labels` (default: the input_ids); all or none with `position_ids`
    Returns input_ids, labels (-100 on padding) and attention_mask (0 on padding), for packed rows in its place
    position_ids (from 0 on in the padding, a text of its own), each (B, L), int64.
    """
    packed = ["position_ids" in row for row in rows]
    if any(packed) != all(packed):
        raise ValueError("a batch has rows with and without position_ids: pack all of its rows, or none")
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED_LABEL)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.as_tensor(row["input_ids"])
        labels[i, :length] = torch.as_tensor(row.get("labels", row["input_ids"]))
        attention_mask[i, :length] = 1
        if packed[0]:
            position_ids[i, :length] = torch.as_tensor(row["position_ids"])
            position_ids[i, length:] = torch.arange(shape[1] - length)
    places = {"position_ids": position_ids} if packed[0] else {"attention_mask": attention_mask}
    return {"input_ids": input_ids, **places, "labels": labels}


def make_dataloader(
    blocks: Sequence[Block] | Sequence[PackedRow] | BlockStream,
    batch_size: int,
    pad_token_id: int = 0,
    shuffle: bool = False,
) -> DataLoader:
    """Return batches of blocks as `collate` builds them. A `BlockStream` has its own order: shuffle is an error."""
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
