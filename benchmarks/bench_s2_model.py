"""SmolLM2-135M fine-tuned at 4096 tokens on the CPU, in shifted groups and in full attention.

    pytest benchmarks/bench_s2_model.py -n 0 --results benchmarks/results

Held-out loss is taken with full attention, before and after. Before anything is trained the adapted model's logits
are compared with the base model's, bit for bit.
"""

import statistics

import pytest
import torch

from hylorada.config import HyLoRADAConfig
from hylorada.data import load_documents, make_dataloader, pad_token_id, split_documents, token_blocks
from hylorada.evaluation import evaluate_perplexity
from hylorada.model import HyLoRADAModel
from hylorada.pretrained import SMOLLM2, load_pretrained
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

GROUP_SIZE = 1024
LEARNING_RATE = 1e-3


@pytest.mark.parametrize("attention", ["groups", "full"])
def test_training_at_4096_tokens(benchmark, record, attention):
    tokens, steps, held_out = (256, 1, 1) if benchmark.disabled else (4096, 12, 6)
    groups = {"s2_attn_enabled": True, "s2_group_size": tokens * GROUP_SIZE // 4096} if attention == "groups" else {}
    torch.manual_seed(0)
    base, tokenizer = load_pretrained(SMOLLM2, torch.bfloat16)
    train_documents, test_documents = split_documents(load_documents("kjv"))
    train_blocks = token_blocks(train_documents, tokenizer, tokens, steps)
    test_blocks = token_blocks(test_documents, tokenizer, tokens, held_out)
    ids = torch.tensor([test_blocks[0]["input_ids"]])

    with torch.no_grad():
        expected = base.eval()(input_ids=ids, use_cache=False).logits
        model = HyLoRADAModel(base, HyLoRADAConfig(lora_dropout=0.0, gradient_checkpointing=True, **groups))
        assert torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, expected)
    del expected

    def held_out_loss() -> float:
        return evaluate_perplexity(model=model, dataset=test_blocks, tokenizer=tokenizer, max_length=tokens)[1]

    before = held_out_loss()
    # the weights' own precision rules
    training = TrainingConfig(max_steps=steps, learning_rate=LEARNING_RATE, mixed_precision="fp32")
    loader = make_dataloader(train_blocks, 1, pad_token_id(tokenizer), shuffle=True)
    trainer = HyLoRADATrainer(model=model, train_dataloader=loader, config=training)
    result = benchmark.pedantic(trainer.train, rounds=1)
    after = held_out_loss()
    if not benchmark.disabled:
        assert after < before
    record(
        "training at 4096 tokens",
        {"": "SmolLM2-135M", "dtype": "bf16", "training attention": attention},
        {
            "seconds per step": statistics.median(step.seconds for step in result.steps),
            "held-out loss before": before,
            "held-out loss after": after,
        },
    )
