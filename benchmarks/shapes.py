"""Layer shapes that the benchmarks use: (tokens, in-features, out-features)."""

FIRST_LIGHT = ((512, 576, 1536), (512, 768, 3072), (512, 2048, 2048), (64, 2048, 2048), (512, 4096, 4096))
