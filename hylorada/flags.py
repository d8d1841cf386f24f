"""The flags of `hylorada benchmark` and `hylorada ablate`, which share most of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .assets import SMOLLM2
from .config import METHODS

ABLATION_NAMES = ("parts", "attention", "author")
# the first documents' own way to measure: GPT-2 on lines of WikiText-2, each padded to max_length, the padding learned,
# and perplexity as the mean of every line's own
AUTHOR = {
    "model": "openai-community/gpt2",
    "dataset": "wikitext",
    "max_length": 512,
    "num_train": 500,
    "num_test": 500,
    "epochs": 1,
    "batch_size": 4,
    "grad_accum": 16,
}


def benchmark_parser() -> argparse.ArgumentParser:
    """The flags of `hylorada benchmark`."""
    parser = argparse.ArgumentParser(
        prog="hylorada benchmark",
        description="Compare fine-tuning methods on one model and one text: held-out perplexity with intervals, time, "
        "memory. Every run is in a process of its own, from the same weights, on the same layers and, by seed, on the "
        "same batches.",
    )
    default = ["baseline", "lora", "dora", "hylorada"]
    parser.add_argument("--methods", nargs="+", default=default, help=f"of {', '.join(METHODS)}")
    _add_flags(parser)
    return parser


def ablation_parser() -> argparse.ArgumentParser:
    """The flags of `hylorada ablate`."""
    parser = argparse.ArgumentParser(
        prog="hylorada ablate",
        description="Take HyLoRADA apart: what each of its parts does to held-out perplexity, over several seeds. "
        "Everything but the list of methods is as in hylorada benchmark.",
    )
    parser.add_argument(
        "--ablation",
        choices=ABLATION_NAMES,
        help='"parts" of the method (default); "attention", the same in full and shifted groups; "author", the table '
        "of the first documents (default with --protocol author)",
    )
    parser.add_argument("--arms", nargs="+", help="these of its arms only; default: all")
    _add_flags(parser)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse flags; those of a protocol take its values by default."""
    if parser.parse_known_args(arguments)[0].protocol == "author":
        parser.set_defaults(**AUTHOR)
    options = parser.parse_args(arguments)
    if options.warmup_ratio is None:
        options.warmup_ratio = 0.0 if options.lr_scheduler == "constant" else 0.1
    options.seeds = list(dict.fromkeys(options.seeds or [options.seed]))
    if options.lr_grid and options.lr != parser.get_default("lr"):
        parser.error("--lr and --lr_grid exclude each other: rates are given, or searched for")
    return options


def completions(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """What may follow words on a command line: the choices of the flag that they end with, else every flag."""
    flags = parser._option_string_actions
    last = flags.get(words[-1]) if words else None
    return [str(choice) for choice in last.choices] if last is not None and last.choices else list(flags)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every comparison has."""
    add = parser.add_argument
    add("--model", default=SMOLLM2, help=f'"{SMOLLM2}" (default), a directory with a saved model, or the id of a hub')
    add(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the base model's weights; adapters are always fp32",
    )
    add("--dataset", default="kjv", help='"kjv" (default), another name that load_documents knows, or a path')
    add(
        "--max_length",
        type=int,
        default=512,
        help="tokens of a block, in training and in evaluation; a shorter table of positions is made longer",
    )
    add("--num_train", type=int, help="training blocks, evenly spread; default: all")
    add("--num_test", type=int, default=64, help="held-out blocks, evenly spread")
    add("--validation", action="store_true", help="hold out training documents instead: to choose settings")
    add("--epochs", type=int, default=1)
    add("--steps", type=int, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=int, default=1)
    add("--grad_accum", type=int, default=1, help="batches of one optimizer step")
    add("--lr", nargs="+", default=["2e-4"], help="of every method, or by method: --lr lora=4e-3 hylorada=1e-3")
    add("--lr_grid", nargs="+", help="search every method's rate among these, on validation documents, first seed")
    add("--lr_scheduler", default="linear", help="a name of transformers' schedules")
    add("--warmup_ratio", type=float, help='default: 0.1; 0 for a scheduler that is "constant"')
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of initial values, dropout and the order of the data")
    seeds.add_argument("--seeds", type=int, nargs="+", help="several: every method runs with each")
    add("--lora_rank", type=int, default=8)
    add("--lora_alpha", type=float, default=16.0)
    add("--lora_dropout", type=float, default=0.05)
    add("--target_modules", nargs="+", help="names of the layers to adapt; default: HyLoRADAConfig's")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--s2_attn", action="store_true", help="train with shifted sparse attention; evaluation has full attention")
    add("--s2_group_size", type=_group_size, help='tokens of a group of --s2_attn, or "auto"; default: 2048')
    add("--sink_tokens", type=int, help="tokens that every group of --s2_attn sees; default: none")
    add("--train_embeddings", nargs="?", const=True, default=False, choices=("positions", "tokens", "all"))
    add("--train_norms", action="store_true")
    add("--rope_scaling_type", choices=("linear", "dynamic", "yarn", "auto"), help='"auto" extends position tables too')
    add("--rope_scaling_factor", type=float, default=1.0, help="target length / original length")
    add("--original_length", type=int, help="declare that the model was trained for so many positions")
    add(
        "--protocol",
        choices=("tokens", "author"),
        default="tokens",
        help='"author": as the first documents measured, GPT-2 on lines of WikiText-2; both come from a hub',
    )
    add("--output_dir", default="results", help="a folder named after the time is made in it")


def _group_size(text: str) -> int | str:
    return text if text == "auto" else int(text)
