"""From documents to batches: held-out splits by document, blocks of tokens, padded or packed rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader

from .sources import Document, load_documents, stream_documents

logger = logging.getLogger(__name__)

__all__ = [
    "IGNORED_LABEL",
    "Block",
    "Document",
    "collate",
    "load_documents",
    "make_dataloader",
    "pad_token_id",
    "split_documents",
    "stream_documents",
    "token_blocks",
    "windows",
]

IGNORED_LABEL = -100


class Block(TypedDict):
    """A row: consecutive tokens of one document."""

    document: str
    input_ids: list[int]


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
