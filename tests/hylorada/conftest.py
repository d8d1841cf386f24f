"""Tiny random models of several families, and adapted ones whose adapter is not at its start values."""

import pytest
import torch
import transformers
from torch import nn

from hylorada import HyLoRADAConfig, HyLoRADAModel
from hylorada_kernels.ops.column_norm import eager

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "gpt2": (
        "GPT2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        ("c_attn", "c_proj", "c_fc"),
    ),
    "gpt_neox": ("GPTNeoX", LLAMA_LIKE, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "llama": ("Llama", LLAMA_LIKE, LLAMA_TARGETS),
    "mistral": ("Mistral", LLAMA_LIKE, LLAMA_TARGETS),
    "opt": (
        "OPT",
        SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "dropout": 0.0},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "qwen2": ("Qwen2", LLAMA_LIKE, LLAMA_TARGETS),
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """Every family in turn."""
    return request.param


@pytest.fixture
def make_base():
    """make_base(family, dtype) -> a tiny causal language model in eval mode, with the same random weights each time."""
    return build_base


@pytest.fixture
def make_model():
    """make_model(family, **config fields) -> an adapted model whose parameters are not at their start values."""
    return build_model


class NormsMade(list):
    """Of every call that made norms on the eager path, the shapes of the weights."""

    def are_of(self, *counts: int) -> bool:
        """Whether there were so many calls, each of so many norms."""
        return [len(shapes) for shapes in self] == list(counts)

    def are_together(self, count: int) -> bool:
        """Whether there were so many norms, and one call for each shape."""
        return sum(map(len, self)) == count and len(self) == len({shape for shapes in self for shape in shapes})


@pytest.fixture
def norms_made(monkeypatch):
    """What norms were made since the test began."""
    made = NormsMade()
    make = eager.norms_and_bases

    def counted(weights, *rest, **options):
        made.append([weight.shape for weight in weights])
        return make(weights, *rest, **options)

    monkeypatch.setattr(eager, "norms_and_bases", counted)
    return made


@pytest.fixture
def saved_model(make_base, tokenizer, tmp_path):
    """A folder with a tiny model and its tokenizer."""
    directory = tmp_path / "model"
    make_base().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    """Ten documents whose lengths differ and whose words repeat: there is something to learn."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for i in range(10):
        (directory / f"{i}.txt").write_text("and the word was good; " * (5 + i) + chr(ord("a") + i))
    return directory


@pytest.fixture
def text():
    """(2, 23) token ids without special tokens; no group size divides 23."""
    return torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def token_ids():
    """(2, 12) token ids without special tokens."""
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))


# large enough to matter, small enough that a tiny network stays well conditioned
NOISE = {"lora_a": 0.05, "lora_b": 0.03, "magnitude": 0.05, "residual_weight": 0.5, "table": 0.5, "weight": 0.5}
NOISE |= {"temperature": 0.3, "distance_bias": 0.5}
NOISE |= {"landmarks": 0.5, "gate": 0.5, "gamma": 1.0, "position": 0.5, "bias": 0.1}


def disturb(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.add_(NOISE[name.rpartition(".")[2]] * torch.randn_like(parameter))
    return model


def build_base(family="llama", dtype=torch.float32, **changes):
    prefix, options, _ = FAMILIES[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{prefix}Config")(**options | tokens | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM" if prefix != "GPT2" else "GPT2LMHeadModel")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def build_model(family="llama", dtype=torch.float32, start=False, **fields):
    defaults = {"lora_rank": 4, "lora_dropout": 0.0, "gradient_checkpointing": False}
    fields = defaults | {"lora_target_modules": FAMILIES[family][2]} | fields
    model = HyLoRADAModel(build_base(family, dtype), HyLoRADAConfig(**fields))
    return model if start else disturb(model)
