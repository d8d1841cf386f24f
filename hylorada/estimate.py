"""Tells what a training step of an adapted model costs: bytes, counted; operations of its attention, in closed form."""

from typing import Any

from torch import nn

from .config import whole_number
from .footprint import LOGITS, training_footprint
from .s2_attention import Groups, attention_layers


def memory_estimate(
    model: nn.Module,
    adapter: list[nn.Parameter],
    groups: Groups | None,
    mixed_precision: str,
    seq_len: int,
    batch_size: int = 1,
) -> dict[str, float]:
    """Bytes and floating-point operations of one training step on (batch_size, seq_len) tokens without padding.

    The bytes are those of `training_footprint`, which goes through the step without computing it (seconds):
        weights: every parameter of the base model.   adapter: every other parameter.
        gradients: of what is trainable, each in its parameter's dtype.   optimizer: AdamW's state of the same.
        activations: what the forward keeps for the backward, the norms that the adapted layers keep included.
        logits: what it keeps for the head and the loss.   temporaries: what else there is at the fullest moment.
        total: all that is there at the fullest moment, when some of the above may be gone or not there yet.
    Closed form:
        attention_flops_full, attention_flops_s2: of one forward pass, multiplications and additions of Q K^T and P V
            over the pairs (i, j) that attend, causality counted exactly, all layers and query heads. Backward: 2.5
            times that. attention_ratio is full / s2. Without groups s2 is the same as full.
        scores_full, scores_s2: those pairs as numbers in the dtype of the activations. No implementation here keeps
            them: they are what the eager attention of transformers would hold for full attention.

    Args:
        model: the adapted model.   adapter: the parameters that were added to it, wherever they are.
        groups: of shifted sparse attention, or None.   mixed_precision: "bf16", "fp16" or "fp32".

    Raises:
        TypeError, ValueError: seq_len or batch_size is not a whole number of at least 1.
    """
    seq_len, batch_size = whole_number("seq_len", seq_len, 1), whole_number("batch_size", batch_size, 1)
    base: Any = model
    text = base.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    element = {"bf16": 2, "fp16": 2}.get(mixed_precision) or next(model.parameters()).element_size()

    attention: list[Any] = attention_layers(base)
    layers: list[int] = [layer.layer_idx for layer in attention] or list(range(text.num_hidden_layers))
    full_pairs = len(layers) * heads * count_attended_pairs(seq_len)
    s2_pairs = full_pairs
    if groups is not None:
        s2_pairs = sum(_layer_pairs(groups, layer, seq_len, heads) for layer in layers)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    # a product and a sum, for Q K^T and for P V
    flops = 4 * head_dim * batch_size

    counted = training_footprint(model, adapter, seq_len, batch_size, mixed_precision)
    kept = {name: size for name, size in counted.kept.items() if name != LOGITS}
    known = {*counted.lasting, *counted.kept}
    return {
        **{name: counted.lasting[name] for name in ("weights", "adapter", "gradients", "optimizer")},
        "activations": sum(kept.values()) + counted.lasting["kept norms"],
        "logits": counted.kept.get(LOGITS, 0),
        "temporaries": sum(size for name, size in counted.at_peak.items() if name not in known),
        "total": counted.peak,
        "attention_flops_full": flops * full_pairs,
        "attention_flops_s2": flops * s2_pairs,
        "attention_ratio": full_pairs / s2_pairs,
        "scores_full": batch_size * full_pairs * element,
        "scores_s2": batch_size * s2_pairs * element,
    }


def count_attended_pairs(length: int, group_size: int | None = None, shift: int = 0, sink_tokens: int = 0) -> int:
    """How many pairs (i, j) attend causally, in full or in groups of `group_size` moved by `shift`, with sinks.

    A group [a, b) has n (n + 1) / 2 pairs of its own, n = b - a, and min(sinks, a) sinks before it for each token.
    """
    borders = [length] if group_size is None else [*range(shift or group_size, length, group_size), length]
    pairs, begin = 0, 0
    for end in borders:
        size = end - begin
        pairs += size * (size + 1) // 2 + size * min(sink_tokens, begin)
        begin = end
    return pairs


def _layer_pairs(groups: Groups, layer: int, length: int, heads: int) -> int:
    size = groups.chosen_size(length)
    rule = groups.rule(layer, size)
    shifted = {"none": 0, "half": heads - heads // 2, "all": heads}[rule["shifted_heads"]]
    sinks = rule["sink_tokens"]
    return shifted * count_attended_pairs(length, size, rule["shift"], sinks) + (
        heads - shifted
    ) * count_attended_pairs(length, size, 0, sinks)
