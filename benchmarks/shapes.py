"""Layer shapes that the benchmarks use: (tokens, in-features, out-features)."""

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
