"""The estimate of a training step: what can be counted is counted again, the long way."""

import pytest
import torch

from hylorada.estimate import count_attended_pairs


@pytest.mark.parametrize("length", [1, 3, 4, 5, 23, 64])
@pytest.mark.parametrize(("group", "shift"), [(4, 0), (4, 2), (7, 3), (64, 0), (64, 32), (1, 0)])
@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
def test_pairs_are_those_of_the_predicate(length, group, shift, sinks):
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    same = (i + group - shift) // group == (j + group - shift) // group
    assert count_attended_pairs(length, group, shift, sinks) == int(((j <= i) & (same | (j < sinks))).sum())
    assert count_attended_pairs(length) == int((j <= i).sum())


def test_full_over_sparse_at_the_published_shapes():
    """Billions of operations of one layer with 32 heads of 128, groups of 2048, halves of the heads shifted."""
    for length, full, sparse in ((4096, 137, 60), (8192, 550, 129), (32768, 8796, 541), (100_000, 81921, 1668)):
        per_pair = 4 * 128 * 32 / 1e9
        shifted = (count_attended_pairs(length, 2048) + count_attended_pairs(length, 2048, 1024)) / 2
        found = (count_attended_pairs(length) * per_pair, shifted * per_pair)
        assert found == pytest.approx((full, sparse), abs=1)


@pytest.mark.parametrize("mode", ["layers", "heads"])
def test_counts_are_those_of_the_model(make_model, family, mode):
    model = make_model(
        family,
        s2_attn_enabled=True,
        s2_group_size=8,
        s2_sink_tokens=2,
        s2_shift_mode=mode,
        daa_enabled=True,
        mixed_precision="fp32",
    )
    found = model.get_memory_estimate(64, batch_size=3)
    counts = model.count_params()
    assert found["adapter"] == 4 * counts["trainable"]
    assert found["weights"] == 4 * (counts["total"] - counts["trainable"])
    assert found["gradients"] == 4 * counts["trainable"]
    # the logarithm of the softmax, and a token's index and loss
    assert 4 * 3 * 63 * 97 <= found["logits"] <= 1.1 * 4 * 3 * 64 * 97

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(torch.randint(3, 97, (1, 8)), labels=torch.randint(3, 97, (1, 8))).loss.backward()
    optimizer.step()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert found["gradients"] == gradients and found["optimizer"] == sum(state.nbytes for state in states)

    # 2 layers of 4 heads of 8: a half of layers and heads is shifted, in both modes
    pairs = 4 * count_attended_pairs(64, 8, 0, 2) + 4 * count_attended_pairs(64, 8, 4, 2)
    assert found["attention_flops_s2"] == 3 * 4 * 8 * pairs
    assert found["attention_flops_full"] == 3 * 4 * 8 * 8 * 64 * 65 // 2
    assert found["attention_ratio"] == 8 * 64 * 65 / 2 / pairs
    assert (found["scores_full"], found["scores_s2"]) == (3 * 4 * 8 * 64 * 65 // 2, 3 * 4 * pairs)


def test_trained_parameters_of_the_base_are_weights(make_model):
    plain, trained = (make_model("gpt2", train_embeddings=which, train_norms=bool(which)) for which in (False, "all"))
    expected, found = plain.get_memory_estimate(64), trained.get_memory_estimate(64)
    assert trained.count_params()["base"] > 0
    assert (found["weights"], found["adapter"]) == (expected["weights"], expected["adapter"])
    assert found["gradients"] == expected["gradients"] + 4 * trained.count_params()["base"]


def test_without_groups_there_is_no_saving(make_model):
    found = make_model("llama").get_memory_estimate(64)
    assert found["attention_flops_s2"] == found["attention_flops_full"] and found["attention_ratio"] == 1


def test_an_automatic_group_follows_the_length(make_model):
    model = make_model("llama", s2_attn_enabled=True, s2_group_size="auto")
    assert model.get_memory_estimate(512)["attention_ratio"] == 1
    sparse = [count_attended_pairs(16384, 4096, shift) for shift in (0, 2048)]
    assert model.get_memory_estimate(16384)["attention_ratio"] == 2 * count_attended_pairs(16384) / sum(sparse)


def test_activations_follow_tokens_and_checkpointing(make_model):
    def found(seq_len, batch_size=1, **fields):
        return make_model("llama", mixed_precision="fp32", **fields).get_memory_estimate(seq_len, batch_size)

    plain, kept = found(32), found(32, gradient_checkpointing=True)
    per_token = (found(64)["activations"] - plain["activations"]) / 32
    assert found(64, 2)["activations"] - plain["activations"] == pytest.approx(96 * per_token, rel=0.02)
    # of two checkpointed layers only the inputs, 32 numbers a token each, and little else
    assert 2 * 4 * 32 * 32 < kept["activations"] < plain["activations"] / 3
    assert kept["total"] < plain["total"]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 1), ValueError, "seq_len must be at least 1, got 0"),
        ((8, 0), ValueError, "batch_size must be at least 1, got 0"),
        ((2.5, 1), TypeError, "seq_len must be a whole number, got 2.5"),
    ],
)
def test_other_sizes_are_refused(make_model, sizes, error, message):
    with pytest.raises(error, match=message):
        make_model("llama").get_memory_estimate(*sizes)
