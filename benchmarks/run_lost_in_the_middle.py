"""What a model finds at which depth of its context, and whether that measure can be trusted.

    python benchmarks/run_lost_in_the_middle.py control --results benchmarks/results
    python benchmarks/run_lost_in_the_middle.py model --results benchmarks/results

`control` trains a small model from scratch on key-value retrieval, which then must beat chance at every depth (positive
control), and measures the same model before its training, which must not (negative control). `model` measures a
pretrained model: UUIDs by their keys, evidence in held-out text, and perplexity by position.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hylorada.data import IGNORED_LABEL, collate, load_documents, split_documents, token_blocks
from hylorada.evaluation import KeyValueTask, evaluate_lost_in_the_middle, key_value_retrieval
from hylorada.pretrained import DTYPES, SMOLLM2, load_pretrained
from hylorada.provenance import provenance
from hylorada.tables import markdown_table
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

# symbols of either kind, and pairs of one list
SYMBOLS = 64
PAIRS = 32
TASK = KeyValueTask(
    num_pairs=PAIRS,
    # of one length: no symbol is a part of another one
    keys=[f"k{i:02d}" for i in range(SYMBOLS)],
    values=[f"v{i:02d}" for i in range(SYMBOLS)],
    header="",
    pair="{key} {value}",
    separator=" ",
    question=" {key}",
    answer=" {value}",
)
# lists grow while the model learns: short ones teach it to look up at all
LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32)


class Lists(Dataset):
    """Lists of pairs, then all of their keys in another order with their values, which alone are learned.

    All lists of a batch are equally long. Every row is random, by its number.
    """

    def __init__(self, tokenizer: Any, steps: int, batch_size: int, seed: int):
        self.keys, self.values = (tokenizer.convert_tokens_to_ids(list(pool)) for pool in (TASK.keys, TASK.values))
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        if number >= len(self):
            raise IndexError(number)
        step = number // self.batch_size
        known = LENGTHS[: 1 + len(LENGTHS) * step // self.steps]
        pairs = random.Random(f"{self.seed} {step}").choice(known)
        generator = random.Random(f"{self.seed} row {number}")
        listed = list(zip(generator.sample(self.keys, pairs), generator.sample(self.values, pairs), strict=True))
        asked = generator.sample(listed, pairs)
        return {
            "input_ids": [token for pair in listed + asked for token in pair],
            "labels": [IGNORED_LABEL] * 2 * pairs + [label for _, value in asked for label in (IGNORED_LABEL, value)],
        }


def make_tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(TASK.keys or ()), *(TASK.values or ())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # words come back with spaces between them
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_small_model(tokenizer: Any, seed: int) -> Any:
    """A Llama of two layers, 64 wide: one to attend to the word before, one to look a word up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).eval()


def control(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the small model before and after its training."""
    tokenizer = make_tokenizer()
    model = make_small_model(tokenizer, options.seed)

    def measure() -> dict[str, Any]:
        return key_value_retrieval(
            model,
            tokenizer,
            options.num_samples,
            task=TASK,
            num_depths=options.num_depths,
            batch_size=options.num_depths,
            # never the lists of the training, whose seed is a text
            seed=options.seed,
            show_progress=True,
        )

    untrained = measure()
    lists = Lists(tokenizer, options.steps, options.batch_size, options.seed)
    loader = DataLoader(
        lists, batch_size=options.batch_size, collate_fn=lambda rows: collate(rows, tokenizer.pad_token_id)
    )
    training = TrainingConfig(
        max_steps=options.steps, learning_rate=3e-3, warmup_ratio=0.03, mixed_precision="fp32", seed=options.seed
    )
    begun = time.perf_counter()
    result = HyLoRADATrainer(model=model, train_dataloader=loader, config=training).train()
    seconds = time.perf_counter() - begun
    return {
        "what": f"Llama, 2 layers, 64 wide, trained for {options.steps} steps of {options.batch_size} lists",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "last_loss": result.steps[-1].loss,
        "trained": measure(),
        "untrained": untrained,
    }


def pretrained(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a pretrained model as it is."""
    documents = load_documents(options.dataset)
    _, held_out = split_documents(documents)
    model, tokenizer = load_pretrained(options.model, DTYPES[options.dtype])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = token_blocks(held_out, tokenizer, options.max_length, options.num_blocks)
    begun = time.perf_counter()
    found = evaluate_lost_in_the_middle(
        model=model,
        dataset=blocks,
        tokenizer=tokenizer,
        num_samples=options.num_samples,
        max_length=options.max_length,
        num_depths=options.num_depths,
        generate=options.generate,
        seed=options.seed,
        show_progress=True,
    )
    return {
        "what": f"{options.model}, {options.dtype}, as it is, contexts of {options.max_length} tokens",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": options.dataset,
        "held_out_documents": len(held_out),
        "blocks": len(blocks),
        "seconds": round(time.perf_counter() - begun, 1),
        **found,
    }


def curves(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, dict[str, Any]]], dict[str, float]]]:
    """Return what is drawn and listed: (quantity, curves by depth, levels to compare them with)."""
    if "trained" in found:
        # a continuation of several words hits more often than one guess: that level is of the candidates only
        levels = {"candidate_accuracy": {"chance": found["trained"]["chance"]}, "best_subspan_em": {}}
        return [
            (quantity, [(name, found[name][quantity]) for name in ("trained", "untrained")], level)
            for quantity, level in levels.items()
        ]
    key_value, evidence = found["key_value"], found["evidence"]
    drawn = [("candidate_accuracy", [("key-value", key_value["candidate_accuracy"])], {"chance": key_value["chance"]})]
    if key_value["best_subspan_em"]:
        drawn.append(("best_subspan_em", [("key-value", key_value["best_subspan_em"])], {}))
    levels = {"no evidence": evidence["no_evidence"]["mean"], "oracle": evidence["oracle"]["mean"]}
    return [*drawn, ("nll", [("evidence", evidence["nll"])], levels)]


def report_text(found: dict[str, Any], facts: dict[str, Any], picture: str) -> str:
    """Return the results in Markdown."""
    machine = facts["machine"]
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [
        "# Lost in the middle",
        "",
        f"{found['what']}; {found['parameters']:,} parameters. {machine['cpu']}, {machine['threads']} threads; {used}; "
        f"commit {facts['commit']}; seed {facts['seed']}; `{facts['command']}`",
        "",
        *(f"{name.replace('_', ' ')}: {found[name]}  " for name in _SIZES if name in found),
        "",
        "Depth 0 is the beginning of the context, 1 its end. Square brackets: 95 % bootstrap intervals over samples. "
        "Gap: how much worse the depths in [1/3, 2/3] are than the mean of the first and the last.",
        "",
    ]
    for quantity, named, levels in curves(found):
        depths = named[0][1]["depths"]
        table = [[quantity, *(f"{depth:.2f}" for depth in depths), "worst depth", "gap"]]
        for name, curve in named:
            cells = [_cell(mean, interval) for mean, interval in zip(curve["mean"], curve["interval"], strict=True)]
            gap = _cell(curve["middle_gap"]["mean"], curve["middle_gap"]["interval"])
            table.append([name, *cells, f"{curve['worst_depth']:.2f}", gap])
        table += [[name, *[f"{level:.3f}"] * len(depths), "", ""] for name, level in levels.items()]
        lines += [markdown_table(table), ""]
    if "position_perplexity" in found:
        by_position = found["position_perplexity"]
        lines += [
            "Perplexity of running text by the position of the predicted token: no measure of retrieval.",
            "",
            markdown_table(
                [
                    ["from position", *map(str, by_position["start"])],
                    ["perplexity", *(f"{value:.2f}" for value in by_position["perplexity"])],
                ]
            ),
            "",
        ]
    return "\n".join([*lines, f"![by depth]({picture})", ""])


_SIZES = ("training_seconds", "seconds", "last_loss", "dataset", "held_out_documents", "blocks")


def _cell(mean: float, interval: Sequence[float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw every curve by depth with its interval, and the levels to compare it with."""
    from matplotlib.figure import Figure

    drawn = curves(found)
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axes, (quantity, named, levels) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for number, (name, curve) in enumerate(named):
            low, high = zip(*curve["interval"], strict=True)
            axes.fill_between(curve["depths"], low, high, color=f"C{number}", alpha=0.2)
            axes.plot(curve["depths"], curve["mean"], "o-", color=f"C{number}", label=name)
        for number, (name, level) in enumerate(levels.items()):
            axes.axhline(level, color="0.3", linestyle=("--", ":")[number], label=name)
        label = "nats a token of the answer" if quantity == "nll" else quantity.replace("_", " ")
        axes.set(xlabel="depth of the evidence in the context", ylabel=label)
        axes.set_ylim(0, None if quantity == "nll" else 1.05)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(found["what"], fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    threads = torch.get_num_threads()
    # of the code that runs, which may be edited while it does
    facts = {**provenance(), "seed": options.seed}
    try:
        if options.part == "control":
            # so small are its matrices that a second thread only waits; and one adds in one order on every machine
            torch.set_num_threads(1)
        found = control(options) if options.part == "control" else pretrained(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"run_lost_in_the_middle: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    name = f"lost_in_the_middle_{'control' if options.part == 'control' else Path(options.model).name}"
    print(report_text(found, facts, f"{name}.png"))
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**facts, **found}, indent=1) + "\n"
        (options.results / f"{name}.json").write_text(content, encoding="utf-8")
        (options.results / f"{name}.md").write_text(report_text(found, facts, f"{name}.png"), encoding="utf-8")
        draw(found, options.results / f"{name}.png")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--num_depths", type=int, default=5)
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--results", type=Path, help="a folder for JSON, Markdown and a picture")
    small = parts.add_parser("control", parents=[shared])
    small.add_argument("--num_samples", type=int, default=100)
    small.add_argument("--steps", type=int, default=1000)
    small.add_argument("--batch_size", type=int, default=64)
    model = parts.add_parser("model", parents=[shared])
    model.add_argument("--num_samples", type=int, default=16)
    model.add_argument("--model", default=SMOLLM2)
    model.add_argument("--dtype", choices=DTYPES, default="bf16")
    model.add_argument("--dataset", default="kjv", help="whose held-out documents are the text around the evidence")
    model.add_argument("--max_length", type=int, default=1024)
    model.add_argument("--num_blocks", type=int, default=24, help="held-out blocks of max_length tokens")
    model.add_argument("--generate", action="store_true", help="greedy continuations too, for best_subspan_em")
    return parser


if __name__ == "__main__":
    sys.exit(main())
