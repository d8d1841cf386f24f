"""Disjoint splits, blocks of tokens, padded and packed batches."""

import pytest
import torch

from hylorada.data import (
    Document,
    collate,
    make_dataloader,
    pad_token_id,
    split_documents,
    token_blocks,
    windows,
)


def make_documents(count):
    return [Document(f"d{i}", f"text {i}") for i in range(count)]


@pytest.mark.parametrize(("count", "fraction", "tests"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (66, 0.2, 13)])
def test_split_is_disjoint_and_complete(count, fraction, tests):
    documents = make_documents(count)
    train, test = split_documents(documents, fraction)
    assert len(test) == tests
    assert sorted([*train, *test], key=documents.index) == documents


def test_split_repeats_by_seed():
    documents = make_documents(20)
    assert split_documents(documents, seed=1) == split_documents(documents, seed=1)
    assert split_documents(documents, seed=1) != split_documents(documents, seed=2)


def test_equal_texts_never_stand_on_both_sides():
    documents = [Document(f"{i}", f"text {i % 3}") for i in range(30)]
    for seed in range(5):
        train, test = split_documents(documents, 0.4, seed)
        texts = [document.text for document in [*train, *test]]
        assert sorted(texts) == ["text 0", "text 1", "text 2"] and train and test


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_split_needs_two_sides(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_documents(make_documents(5), fraction)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2 different documents, got 1"):
        split_documents([Document("a", "same"), Document("b", "same")])


@pytest.mark.parametrize(
    ("length", "sizes"), [(0, []), (1, []), (2, [2]), (8, [8]), (9, [8]), (10, [8, 2]), (16, [8, 8]), (17, [8, 8])]
)
def test_windows_hold_every_token_that_can_be_predicted(length, sizes):
    cut = list(windows(range(length), 8))
    assert [len(window) for window in cut] == sizes
    assert [token for window in cut for token in window] == list(range(sum(sizes)))


def test_blocks_never_mix_documents(tokenizer):
    documents = [Document("a", "abcdefghij"), Document("b", "klmno")]
    blocks = token_blocks(documents, tokenizer, max_length=4)
    text = [(block["document"], tokenizer.decode(block["input_ids"])) for block in blocks]
    assert text == [("a", "abcd"), ("a", "efgh"), ("a", "ij"), ("b", "klmn")]


def test_limited_blocks_are_spread_evenly(tokenizer):
    documents = [Document("a", "abcdefghijklmnop")]
    every = token_blocks(documents, tokenizer, max_length=2)
    assert token_blocks(documents, tokenizer, max_length=2, limit=4) == every[::2]
    assert token_blocks(documents, tokenizer, max_length=2, limit=99) == every
    with pytest.raises(ValueError, match="limit must be at least 1"):
        token_blocks(documents, tokenizer, max_length=2, limit=0)


def test_padding_is_masked_in_batches():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8], "labels": [-100]}], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_dataloader_yields_every_block_once(tokenizer):
    blocks = token_blocks([Document("a", "abcdefghijk")], tokenizer, max_length=3)
    batches = list(make_dataloader(blocks, batch_size=2, pad_token_id=2, shuffle=True))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    tokens = [token for batch in batches for token in batch["input_ids"].flatten().tolist() if token != 2]
    assert sorted(tokens) == sorted(token for block in blocks for token in block["input_ids"])


def test_padding_token_falls_back_to_the_end_of_text(tokenizer):
    assert pad_token_id(tokenizer) == 2
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 1
