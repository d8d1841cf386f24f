"""Disjoint splits, blocks of tokens, padded and packed batches."""

import pytest
import torch

from hylorada.data import (
    BlockStream,
    Document,
    collate,
    make_dataloader,
    pack_blocks,
    pad_token_id,
    special_tokens,
    split_documents,
    token_blocks,
    windows,
)
from hylorada.perplexity import batch_loss_sum, check_packing


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


def as_blocks(*parts):
    return [{"document": str(i), "input_ids": list(part)} for i, part in enumerate(parts)]


def test_packed_rows_hold_every_block_once_with_positions_of_its_own():
    rows = pack_blocks(as_blocks([10, 11], [20, 21, 22, 23, 24], [30, 31, 32], [40, 41, 42]), max_length=8)
    assert rows == [
        {
            "input_ids": [20, 21, 22, 23, 24, 30, 31, 32],
            "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
            "labels": [-100, 21, 22, 23, 24, -100, 31, 32],
        },
        {"input_ids": [40, 41, 42, 10, 11], "position_ids": [0, 1, 2, 0, 1], "labels": [-100, 41, 42, -100, 11]},
    ]


def test_blocks_go_where_they_fit_best():
    rows = pack_blocks(as_blocks(*(range(100 * i, 100 * i + n) for i, n in enumerate([9, 7, 3, 1]))), max_length=10)
    assert [row["input_ids"] for row in rows] == [[*range(9), 300], [*range(100, 107), 200, 201, 202]]


def test_block_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"block of 0 has 3 tokens, more than max_length=2"):
        pack_blocks(as_blocks([1, 2, 3]), max_length=2)


def test_padding_of_packed_rows_is_a_text_of_its_own():
    rows = pack_blocks(as_blocks([5, 6, 7], [8, 9]), max_length=3)
    batch = collate(rows, pad_token_id=2)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    with pytest.raises(ValueError, match="with and without position_ids"):
        collate([*rows, {"input_ids": [5]}])


PARTS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]


def test_packed_documents_do_not_see_one_another(make_base, family):
    model = make_base(family, torch.float64)
    if family == "opt":
        with pytest.raises(ValueError, match="OPTForCausalLM does not keep packed documents apart"):
            check_packing(model)
        return
    check_packing(model)
    rows = pack_blocks(as_blocks(*PARTS), max_length=9)
    assert len(rows) == 2
    with torch.no_grad():
        packed = model(
            **{name: value for name, value in collate(rows).items() if name != "labels"}, use_cache=False
        ).logits
        alone = {part[0]: model(torch.tensor([part])).logits[0] for part in PARTS}
    for row, logits in zip(rows, packed, strict=True):
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            torch.testing.assert_close(logits[start:end], alone[row["input_ids"][start]])


def test_packing_and_padding_train_on_the_same_loss(make_model):
    model = make_model(dtype=torch.float64, landmark_enabled=True, landmark_gate="prefix_mean", s2_attn_enabled=True)
    blocks = as_blocks(*PARTS)
    losses = []
    for rows in (blocks, pack_blocks(blocks, max_length=9)):
        loss, tokens = batch_loss_sum(model, collate(rows, pad_token_id=2))
        losses.append(loss.item() / tokens.item())
        assert tokens == sum(len(part) - 1 for part in PARTS)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


LONG_TEXT = "now it came to pass in the days of old,\n that there was  a famine.\n\n and a man went. " * 5


@pytest.mark.parametrize("piece", [1, 7, 50, 10_000])
def test_streamed_blocks_are_the_blocks_of_the_whole_text(tokenizer, piece):
    documents = [Document("a", LONG_TEXT), Document("b", "short one"), Document("c", LONG_TEXT[:33])]
    stream = BlockStream(documents, tokenizer, max_length=8, piece=piece)
    assert list(stream) == token_blocks(documents, tokenizer, max_length=8) == list(stream)


def test_streamed_words_keep_their_tokens_and_special_ones_stand_once():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([LONG_TEXT], trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"]))
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert special_tokens(tokenizer) == ([0], [1])
    documents = [Document("a", LONG_TEXT)]
    expected = token_blocks(documents, tokenizer, max_length=8)
    assert expected[0]["input_ids"][0] == 0 and expected[-1]["input_ids"][-1] == 1
    for piece in (1, 10, 100):
        assert list(BlockStream(documents, tokenizer, max_length=8, piece=piece)) == expected


def test_stream_tokenizes_no_further_than_it_is_read(tokenizer):
    read = []

    class Watched:
        def __call__(self, text, **options):
            read.append(text)
            return tokenizer(text, **options)

    blocks = iter(BlockStream([Document("a", LONG_TEXT)], Watched(), max_length=8, piece=10))
    next(blocks)
    assert 8 <= len("".join(text for text in read if text != "a")) < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_a_stream(tokenizer, workers):
    documents = [Document(str(i), LONG_TEXT[i : i + 20]) for i in range(5)]
    stream = BlockStream(documents, tokenizer, max_length=8)
    loader = make_dataloader(stream, batch_size=2, pad_token_id=2)
    loader = torch.utils.data.DataLoader(stream, batch_size=2, collate_fn=loader.collate_fn, num_workers=workers)
    rows = [row.tolist() for batch in loader for row in batch["input_ids"]]
    expected = token_blocks(documents, tokenizer, max_length=8)
    padded = [block["input_ids"] + [2] * (8 - len(block["input_ids"])) for block in expected]
    strip = [[token for token in row if token != 2] for row in rows]
    assert sorted(strip) == sorted([token for token in row if token != 2] for row in padded)


def test_stream_over_an_iterator_is_refused(tokenizer):
    with pytest.raises(TypeError, match="documents is an iterator"):
        BlockStream(iter([Document("a", "text")]), tokenizer, max_length=8)
