"""What the benchmarks run over: layer shapes (tokens, in-features, out-features), dtypes, the device."""

import torch

# SmolLM2-135M's layers, a 2k and a 4k hidden size, Qwen2-0.5B's square layer; from a short prompt to a long batch
LAYERS = (
    (64, 2048, 2048),
    (256, 576, 1536),
    (512, 576, 576),
    (512, 1536, 576),
    (512, 2048, 2048),
    (1024, 4096, 4096),
    (2048, 896, 896),
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# layers of models: on the CPU with few tokens, so that a round stays short; a 70B model's on a GPU only
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MODELS = {
    "gpt2 c_fc": (768, 3072),
    "smollm2-135m o_proj": (576, 576),
    "smollm2-135m down_proj": (1536, 576),
    "qwen2-0.5b up_proj": (896, 4864),
    "llama-3-8b q_proj": (4096, 4096),
}
_LARGE = {"llama-3-8b down_proj": (14336, 4096), "llama-3-70b up_proj": (8192, 28672)}
TOKENS = 4096 if DEVICE == "cuda" else 256
MODEL_LAYERS = {
    name: (TOKENS, columns, rows)
    for name, (columns, rows) in (_MODELS if DEVICE == "cpu" else _MODELS | _LARGE).items()
}
