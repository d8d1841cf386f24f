"""Perplexity of SmolLM2-135M by length of the context, with and without RoPE scaling, before any training.

    pytest benchmarks/bench_rope_scaling.py -n 0 --results benchmarks/results

The model was trained for 8192 positions. It runs at its own length, declared to be 2048 and scaled to 8192, and beyond
it, scaled to 16384. Every length sees the same text of held-out books, cut into windows of that length.
"""

import pytest
import torch

from hylorada.config import HyLoRADAConfig
from hylorada.data import load_documents, split_documents, token_blocks
from hylorada.evaluation import evaluate_perplexity
from hylorada.model import HyLoRADAModel
from hylorada.pretrained import SMOLLM2, load_pretrained

# original length -> (target length, lengths to measure, windows of the target length)
CASES = {2048: (8192, (512, 1024, 2048, 4096, 8192), 2), 8192: (16384, (8192, 16384), 1)}


@pytest.mark.parametrize("scaling", [None, "linear", "dynamic", "yarn"])
@pytest.mark.parametrize("original", CASES)
def test_perplexity_by_length(benchmark, record, original, scaling):
    target, lengths, windows = CASES[original]
    base, tokenizer = load_pretrained(SMOLLM2, torch.bfloat16)
    base.config.max_position_embeddings = original
    fields = {} if scaling is None else {"rope_scaling_type": scaling, "rope_scaling_factor": target / original}
    model = HyLoRADAModel(base, HyLoRADAConfig(gradient_checkpointing=False, **fields))
    _, documents = split_documents(load_documents("kjv"))
    blocks = token_blocks(documents, tokenizer, target, None)
    whole = [block for block in blocks if len(block["input_ids"]) == target]
    assert len(whole) >= windows, f"the held-out books have {len(whole)} windows of {target} tokens"
    text = whole[:windows]

    def perplexity(length: int) -> float:
        return evaluate_perplexity(model=model, dataset=text, tokenizer=tokenizer, max_length=length)[0]

    measured = {f"perplexity at {length}": perplexity(length) for length in lengths}
    record(f"rope scaling to {target}", {"declared length": original, "scaling": str(scaling)}, measured)
    benchmark.pedantic(perplexity, (lengths[0],))
