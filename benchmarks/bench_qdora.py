"""SmolLM2-135M in 4 bits (NF4) fine-tuned on the CPU, by HyLoRADA as a method of PEFT and by PEFT's own DoRA.

    pytest benchmarks/bench_qdora.py -n 0 --results benchmarks/results

Every linear layer adapted, rank 8, the same texts and learning rate for all; held-out loss before and after.
"""

import gc
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hylorada.data import load_documents, make_dataloader, pad_token_id, split_documents, token_blocks
from hylorada.integrations.peft import HyLoRADAPeftConfig
from hylorada.model import get_lora_plus_param_groups
from hylorada.pretrained import SMOLLM2, load_pretrained

LEARNING_RATE = 2e-3
CONFIGS = {
    "hylorada": HyLoRADAPeftConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "peft dora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True, use_rslora=True),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_nf4_training(benchmark, record, method, tmp_path):
    tokens, steps, held_out = (64, 2, 1) if benchmark.disabled else (256, 10, 4)
    base, tokenizer = load_pretrained(SMOLLM2, torch.bfloat16)
    base.save_pretrained(tmp_path)
    del base
    gc.collect()
    train_documents, test_documents = split_documents(load_documents("kjv"))
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(model, CONFIGS[method])
    test_blocks = token_blocks(test_documents, tokenizer, tokens, held_out)

    def held_out_loss() -> float:
        # in train mode, which without dropout is the same: in eval mode bitsandbytes packs its weights for good
        model.train()
        with torch.no_grad():
            losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in test_ids]
        return statistics.fmean(losses)

    test_ids = [torch.tensor([block["input_ids"]]) for block in test_blocks]
    before = held_out_loss()
    optimizer = torch.optim.AdamW(get_lora_plus_param_groups(model, lr_lora=LEARNING_RATE, lr_magnitude=LEARNING_RATE))
    loader = make_dataloader(token_blocks(train_documents, tokenizer, tokens, steps), 1, pad_token_id(tokenizer))

    def train() -> None:
        for batch in loader:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    benchmark.pedantic(train, rounds=1)
    after = held_out_loss()
    if not benchmark.disabled:
        assert after < before
    record(
        "training in nf4",
        {"": f"SmolLM2-135M, {steps} steps of {tokens} tokens", "method": method},
        {"held-out loss before": before, "held-out loss after": after},
    )
