"""What a training step needs, counted in closed form from a model, before anything runs."""

from typing import Any

from torch import nn

from hylorada_kernels.nn import HybridLinear, is_conv1d

from .config import whole_number
from .s2_attention import Groups, attention_layers

# bytes of one number
FP32 = 4
AUTOCAST_BYTES = {"bf16": 2, "fp16": 2, "fp32": None}


def memory_estimate(
    base_model: nn.Module,
    adapter: list[nn.Parameter],
    groups: Groups | None,
    mixed_precision: str,
    seq_len: int,
    batch_size: int = 1,
) -> dict[str, float]:
    """Bytes and floating-point operations of one training step on (batch_size, seq_len) tokens without padding.

    Exact:
        weights: every parameter of the base model.   adapter: every other parameter of the model.
        gradients: of what is trainable, each in its parameter's dtype.   optimizer: AdamW's two moments of the same.
        logits: (batch, seq_len, vocabulary) in fp32, twice: the values and their gradient.
        attention_flops_full, attention_flops_s2: of one forward pass, multiplications and additions of Q K^T and P V
            over the pairs (i, j) that attend, causality counted exactly, all layers and query heads. Backward: 2.5
            times that. attention_ratio is full / s2. Without groups s2 is the same as full.
        scores_full, scores_s2: those pairs as numbers in the dtype of the activations. No implementation here keeps
            them: they are what the eager attention of transformers would hold for full attention.
    Estimated:
        activations: what the backward keeps of the layers: the inputs and outputs of every linear layer, in the dtype
            that mixed_precision or the weights give. With gradient checkpointing the input of every layer, and
            one layer's activations.
        total: weights + adapter + gradients + optimizer + activations + logits.
    Not counted: temporary buffers of single operations, the allocator's fragments, what autocast casts and keeps of the
    weights, dropout masks, the copy of the original weights that a merge keeps on the CPU, the data.

    Args:
        base_model: the adapted model.   adapter: the parameters that were added to it, wherever they are.
        groups: of shifted sparse attention, or None.   mixed_precision: "bf16", "fp16" or "fp32".

    Raises:
        TypeError, ValueError: seq_len or batch_size is not a whole number of at least 1.
    """
    seq_len, batch_size = whole_number("seq_len", seq_len, 1), whole_number("batch_size", batch_size, 1)
    base: Any = base_model
    added = {id(parameter) for parameter in adapter}
    own = [parameter for parameter in base.parameters() if id(parameter) not in added]
    trainable = sum(_bytes(parameter) for parameter in [*own, *adapter] if parameter.requires_grad)
    text = base.config.get_text_config(decoder=True)
    tokens, heads = seq_len * batch_size, text.num_attention_heads
    element = AUTOCAST_BYTES[mixed_precision] or own[0].element_size()

    attention: list[Any] = attention_layers(base)
    layers: list[int] = [layer.layer_idx for layer in attention] or list(range(text.num_hidden_layers))
    full_pairs = len(layers) * heads * attended_pairs(seq_len)
    s2_pairs = full_pairs
    if groups is not None:
        s2_pairs = sum(_layer_pairs(groups, layer, seq_len, heads) for layer in layers)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    # a product and a sum, for Q K^T and for P V
    flops = 4 * head_dim * batch_size

    estimate: dict[str, float] = {
        "weights": sum(map(_bytes, own)),
        "adapter": sum(map(_bytes, adapter)),
        "gradients": trainable,
        "optimizer": 2 * trainable,
        "activations": _activations(base, text, tokens) * element,
        "logits": 2 * tokens * text.vocab_size * FP32,
    }
    return estimate | {
        "total": sum(estimate.values()),
        "attention_flops_full": flops * full_pairs,
        "attention_flops_s2": flops * s2_pairs,
        "attention_ratio": full_pairs / s2_pairs,
        "scores_full": batch_size * full_pairs * element,
        "scores_s2": batch_size * s2_pairs * element,
    }


def attended_pairs(length: int, group_size: int | None = None, shift: int = 0, sink_tokens: int = 0) -> int:
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
    return shifted * attended_pairs(length, size, rule["shift"], sinks) + (heads - shifted) * attended_pairs(
        length, size, 0, sinks
    )


def _activations(base: nn.Module, text: Any, tokens: int) -> int:
    """Numbers that the backward keeps."""
    linears: list[Any] = [
        module for module in base.modules() if isinstance(module, (HybridLinear, nn.Linear)) or is_conv1d(module)
    ]
    head = base.get_output_embeddings()  # type: ignore[operator]
    kept = sum(sum(linear.weight.shape) for linear in linears if linear is not head)
    if getattr(base, "is_gradient_checkpointing", False):
        layers = text.num_hidden_layers
        kept = layers * text.hidden_size + kept // layers
    return kept * tokens


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
