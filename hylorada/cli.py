"""The command line: every command reads its arguments, calls the library and writes what came of it."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .config import METHODS

if TYPE_CHECKING:
    from .model import HyLoRADAModel
    from .run_file import Run

# torch and transformers take seconds to import: commands import what they need
_DTYPES = ("fp32", "bf16", "fp16")


class _Commands(TyperGroup):
    """Commands whose expected errors are one line and the exit status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # behind a command too, where it comes to mind
        if "--debug" in args:
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, and end the process with its exit status. arguments: default: the process's own."""
    app(None if arguments is None else list(arguments), prog_name="hylorada")


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Log what happens, and show the traceback of an error.")
    ] = False,
):
    """Fine-tune language models with low-rank adapters: HyLoRADA, LoRA, rsLoRA, DoRA, LongLoRA."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(message)s")


_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run's output, an adapter's folder (PEFT's too), or a model's name.")
]
_Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A run's output, or an adapter's folder (PEFT's too).")
]
_Output = Annotated[Path, typer.Argument(help="The folder to write; it is made.")]
_Base = Annotated[
    str | None, typer.Option(help="The base model's name or folder; default: the one that the adapter names.")
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Of the base model's weights: {', '.join(_DTYPES)}; default: the run's, or fp32.",
        autocompletion=lambda: list(_DTYPES),
    ),
]
_Method = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(METHODS)}.",
        autocompletion=lambda: list(METHODS),
    ),
]


@app.command()
def train(
    file: Annotated[
        Path, typer.Argument(help="A YAML file with model, data, method, adapter, training and output.", metavar="FILE")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the file: training.learning_rate=1e-3. May be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be trained, and in how much memory; write nothing.")
    ] = False,
) -> None:
    """Train an adapter as a YAML file says."""
    from .run_file import Run

    run = Run.load(file, [*(changes or ()), *(("training.resume=latest",) if resume else ())])
    (_describe if dry_run else _train)(run)


def _describe(run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from .model import HyLoRADAModel
    from .plan import plan
    from .pretrained import DTYPES, load_config

    config = load_config(run.model.name)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[run.model.dtype])
        model = HyLoRADAModel(base, run.adapter)
    fields = run.adapter.to_dict()
    del fields["mixed_precision"]
    planned = plan(
        config,
        length=run.data.max_length,
        batch_size=run.batch_size,
        dtype=run.model.dtype,
        mixed_precision=run.precision,
        checkpointing=fields.pop("gradient_checkpointing"),
        **fields,
    )
    typer.echo(run.to_yaml())
    _write_table(
        ("component", "state", "parameters", "options"),
        [
            (name, part["state"], f"{part['parameters']:,}", ", ".join(f"{k}={v}" for k, v in part["options"].items()))
            for name, part in model.get_component_status().items()
        ],
    )
    counts = model.count_params()
    _write_table(("parameters", "number"), [(name, f"{number:,}") for name, number in counts.items() if number])
    typer.echo(f"Memory of a training step of {run.batch_size} x {run.data.max_length} tokens:\n\n{planned.table()}")


def _train(run: Run) -> None:
    import torch
    from accelerate import PartialState

    from .data import make_dataloader, pack_blocks, pad_token_id, token_blocks
    from .evaluation import check_packing
    from .model import HyLoRADAModel
    from .pretrained import DTYPES, load_pretrained
    from .run_file import ADAPTER_FOLDER
    from .trainer import HyLoRADATrainer

    data = run.data
    # the initial values too; a resumed run takes them from its checkpoint
    torch.manual_seed(run.training.seed)
    train_documents, test_documents = run.documents()
    base, tokenizer = load_pretrained(run.model.name, DTYPES[run.model.dtype])
    model = HyLoRADAModel(base, run.adapter)
    rows: Any = token_blocks(train_documents, tokenizer, data.max_length, data.num_train)
    if data.pack:
        check_packing(model)
        rows = pack_blocks(rows, data.max_length)
    padding = pad_token_id(tokenizer)
    held_out = token_blocks(test_documents, tokenizer, data.max_length, data.num_test) if test_documents else None
    trainer = HyLoRADATrainer(
        model,
        make_dataloader(rows, run.batch_size, padding, shuffle=True),
        make_dataloader(held_out, run.batch_size, padding) if held_out else None,
        run.training,
    )
    result = trainer.train()
    if not PartialState().is_main_process:
        return
    if result.ending == "terminated":
        typer.echo(f"terminated after step {len(result.steps)}; go on from {result.checkpoint} with --resume")
        raise typer.Exit(1)
    model.save_pretrained(run.output / ADAPTER_FOLDER)
    run.save()
    typer.echo(f"{result.ending} after {len(result.steps)} steps, loss {result.steps[-1].loss:.4f}")
    for step, loss in list(result.eval_losses.items())[-1:]:
        typer.echo(f"held-out loss after step {step}: {loss:.4f}")
    typer.echo(f"adapter: {run.output / ADAPTER_FOLDER}\ncheckpoint: {result.checkpoint}")


@app.command(name="eval")
def evaluate(
    model: _Model,
    data: Annotated[
        str | None,
        typer.Option(help="What load_documents takes: kjv, stdlib, a path; default: the run's held-out text."),
    ] = None,
    base: _Base = None,
    dtype: _Dtype = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a window; default: the run's, or 512.")] = None,
    stride: Annotated[int | None, typer.Option(help="Windows overlap, and begin so many tokens apart.")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Evaluate so many blocks, evenly spread; default: the run's, or all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    samples: Annotated[int | None, typer.Option(help="Of each retrieval of --full; default: 20.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Whole documents; lost in the middle and passkeys too, as JSON.")
    ] = False,
) -> None:
    """Measure perplexity on text, or everything that can be measured."""
    from .data import token_blocks
    from .evaluation import evaluate_perplexity, run_full_evaluation

    if full and blocks is not None:
        raise ValueError("--full reads whole documents: leave out --blocks")
    if samples is not None and not full:
        raise ValueError(f"--samples {samples} is for --full: leave it out, or give --full")
    loaded, tokenizer, run = _load(model, base, dtype)
    documents = _documents(data, run)
    length = max_length
    if length is None:
        length = run.data.max_length if run else 512
    shared: dict[str, Any] = {"stride": stride, "batch_size": batch_size, "show_progress": True}
    if full:
        import json

        texts = [document.text for document in documents]
        found = run_full_evaluation(
            loaded, texts, tokenizer, max_length=length, num_samples=20 if samples is None else samples, **shared
        )
        typer.echo(json.dumps(found, indent=2))
        return
    rows: list[Any] = [document.text for document in documents]
    if blocks is None and run is not None and data is None:
        blocks = run.data.num_test
    if blocks is not None:
        rows = token_blocks(documents, tokenizer, length, blocks)
    perplexity, loss = evaluate_perplexity(loaded, rows, tokenizer, length, **shared)
    what = f"{len(rows)} blocks" if blocks is not None else f"{len(rows)} documents"
    typer.echo(f"perplexity {perplexity:.4f}, loss {loss:.4f} ({what}, windows of {length} tokens)")


@app.command()
def generate(
    model: _Model,
    prompt: Annotated[str, typer.Argument(help='The text to go on from; "-" reads it from the standard input.')],
    base: _Base = None,
    dtype: _Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Go on from a text, and write it token by token."""
    import torch
    from transformers import TextStreamer

    if top_p < 1 and temperature == 0:
        raise ValueError(f"--top-p {top_p} does nothing at temperature 0: give --temperature too")
    loaded, tokenizer, _ = _load(model, base, dtype)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(next(loaded.parameters()).device)
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no token: give a longer one")
    torch.manual_seed(seed)
    drawing = {"temperature": temperature, "top_p": top_p} if temperature else {}
    loaded.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **drawing,
    )


@app.command()
def merge(
    adapter: _Adapter,
    output: _Output,
    base: _Base = None,
    dtype: _Dtype = None,
    data: Annotated[
        str | None, typer.Option(help="Compare with the adapted model on this text; default: the run's held-out text.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Compare on so many blocks.")] = 8,
) -> None:
    """Put an adapter into its base model, and save the whole in transformers' format with a report."""
    from .data import token_blocks
    from .export import export_merged
    from .pretrained import DTYPES

    model, tokenizer, run = _load_adapter(adapter, base, "fp32")
    length = run.data.max_length if run else 512
    rows = token_blocks(_documents(data, run), tokenizer, length, blocks)
    kind = DTYPES[_known_dtype(dtype or (run.model.dtype if run else "fp32"))]
    report = export_merged(model, output, rows, tokenizer, dtype=kind, max_length=length, show_progress=True)
    for parity in report:
        typer.echo(
            f"merged beside adapted in {parity.dtype}: largest difference of a logit "
            f"{parity.logits_max_difference:.2e}, same next token {parity.argmax_agreement:.2%}, perplexity "
            f"{parity.merged_perplexity:.4f} beside {parity.adapted_perplexity:.4f} ({parity.tokens} tokens)"
        )
    typer.echo(f"merged model: {output}")


@app.command()
def export(
    adapter: _Adapter,
    output: _Output,
    to: Annotated[
        str,
        typer.Option(
            help="peft: LoRA, rsLoRA or DoRA as it is; lora: the nearest plain LoRA of --rank.",
            autocompletion=lambda: ["peft", "lora"],
        ),
    ] = "peft",
    rank: Annotated[int | None, typer.Option(help="Of --to lora.")] = None,
    base: _Base = None,
) -> None:
    """Write an adapter for stock PEFT."""
    from .integrations.peft_files import export_adapter, export_lora

    if to not in ("peft", "lora"):
        raise ValueError(f"--to must be peft or lora, got {to!r}")
    if (rank is None) == (to == "lora"):
        raise ValueError("--to lora needs --rank" if to == "lora" else f"--rank {rank} needs --to lora")
    model, _, _ = _load_adapter(adapter, base, None)
    if to == "peft":
        _say_missing(export_adapter(model, output))
    else:
        assert rank is not None
        typer.echo(f"relative error of the updates: {export_lora(model, output, rank):.2e}")
    typer.echo(f"PEFT adapter: {output}")


@app.command()
def convert(adapter: _Adapter, output: _Output, base: _Base = None) -> None:
    """Turn PEFT's adapter into HyLoRADA's, and HyLoRADA's into PEFT's."""
    from .integrations.peft_files import CONFIG_FILE, export_adapter

    is_peft = (Path(adapter) / CONFIG_FILE).is_file()
    model, _, _ = _load_adapter(adapter, base, None)
    if is_peft:
        model.save_pretrained(output)
    else:
        _say_missing(export_adapter(model, output))
    typer.echo(f"{'HyLoRADA' if is_peft else 'PEFT'} adapter: {output}")


class _FlagsPassedOn(TyperCommand):
    """A command whose flags are those of a parser of `flags`, and are words of its one argument to typer."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self.params[0].shell_complete(ctx, incomplete)


def _parser_of(command: str | None) -> ArgumentParser:
    from .flags import ablation_parser, benchmark_parser

    return ablation_parser() if command == "ablate" else benchmark_parser()


def _complete_flags(ctx: typer.Context, incomplete: str) -> list[str]:
    from .flags import completions

    return [word for word in completions(_parser_of(ctx.info_name), ctx.params["flags"]) if word.startswith(incomplete)]


_Flags = Annotated[list[str] | None, typer.Argument(hidden=True, autocompletion=_complete_flags)]
_PASSED_ON: dict[str, Any] = {
    "cls": _FlagsPassedOn,
    "context_settings": {"ignore_unknown_options": True},
    "add_help_option": False,
}


@app.command(**_PASSED_ON)
def benchmark(flags: _Flags = None) -> None:
    """Compare fine-tuning methods; --help lists the flags."""
    from .flags import parse

    options = parse(_parser_of("benchmark"), flags or [])
    from .benchmark import run

    with _progress_told():
        typer.echo("\n" + run(options))


@app.command(**_PASSED_ON)
def ablate(flags: _Flags = None) -> None:
    """Take HyLoRADA apart, part by part; --help lists the flags."""
    from .flags import parse

    options = parse(_parser_of("ablate"), flags or [])
    from .ablation import run

    with _progress_told():
        typer.echo("\n" + run(options))


@contextmanager
def _progress_told() -> Iterator[None]:
    """Show what the library logs of its progress."""
    library = logging.getLogger(__package__)
    before = library.level
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.setLevel(before)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model's name or folder; only its config is read.")],
    length: Annotated[int, typer.Option(help="Tokens of a text.")],
    method: _Method = "hylorada",
    batch_size: Annotated[int, typer.Option(help="Texts of a batch.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the base model's weights.", autocompletion=lambda: list(_DTYPES))
    ] = "bf16",
    mixed_precision: Annotated[
        str, typer.Option(help="Autocast over them; fp32 is none.", autocompletion=lambda: list(_DTYPES))
    ] = "fp32",
    checkpointing: Annotated[bool, typer.Option(help="Of the activations.")] = True,
    nf4: Annotated[bool, typer.Option("--nf4", help="Count the base as NF4 in 4 bits.")] = False,
    memory: Annotated[float | None, typer.Option(help="GiB that are there.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A field of HyLoRADAConfig: lora_rank=16. May be repeated.")
    ] = None,
    advice: Annotated[bool, typer.Option(help="Say what could be switched on, and what it saves.")] = True,
) -> None:
    """Count the memory of a training step without loading the model."""
    from .config import HyLoRADAConfig, check_names, parse_yaml
    from .plan import GIB
    from .plan import plan as count

    own = ("gradient_checkpointing", "mixed_precision")
    known = [name for name in HyLoRADAConfig().to_dict() if name not in own]
    overrides = {}
    for change in changes or ():
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"a change is written field=value, such as lora_rank=16, got {change!r}")
        check_names("--set", [name], known)
        overrides[name] = parse_yaml(text)
    planned = count(
        model,
        method,
        length=length,
        batch_size=batch_size,
        dtype=dtype,
        mixed_precision=mixed_precision,
        checkpointing=checkpointing,
        quantized_base="nf4" if nf4 else None,
        memory=None if memory is None else memory * GIB,
        **overrides,
    )
    typer.echo(f"{planned.trainable:,} of {planned.parameters:,} parameters are trained\n\n{planned.table()}")
    if planned.fits is not None:
        typer.echo(f"\n{'fits into' if planned.fits else 'does not fit into'} {memory:g} GiB")
    if advice:
        typer.echo("\n" + planned.advice(show_progress=True))


@app.command()
def doctor() -> None:
    """Say what was found here: versions, the GPU, the path of each op, and the extras."""
    import importlib.metadata

    from hylorada_kernels.doctor import findings

    lines = findings()
    for package, extra in (
        ("transformers", None),
        ("accelerate", None),
        ("peft", "peft"),
        ("datasets", "data"),
        ("bitsandbytes", "quantized"),
        ("tensorboard", "tensorboard"),
        ("gguf", "demo"),
        ("matplotlib", "demo"),
    ):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = f"not installed: pip install 'hylorada[{extra}]'" if extra else "not installed"
        lines.append(f"{package:<13} {found}")
    typer.echo("\n".join(lines))


def _load(name: str, base: str | None, dtype: str | None) -> tuple[Any, Any, Run | None]:
    """The model of a run's output, of an adapter's folder, or of a name; its tokenizer; and the run, if it is one's."""
    import torch

    from . import storage
    from .integrations.peft_files import CONFIG_FILE, import_adapter
    from .model import HyLoRADAModel
    from .pretrained import DTYPES, load_pretrained
    from .run_file import ADAPTER_FOLDER, RUN_FILE, Run

    folder, run = Path(name), None
    if (folder / RUN_FILE).is_file():
        run = Run.load(folder / RUN_FILE)
        folder, base, dtype = folder / ADAPTER_FOLDER, base or run.model.name, dtype or run.model.dtype
    weights = DTYPES[_known_dtype(dtype or "fp32")]
    model: Any
    if (folder / storage.RECORD_FILE).is_file():
        saved = storage.read_adapter(folder)
        base_model, tokenizer = load_pretrained(_base_of(folder, base, saved.base_model, saved.merged), weights)
        model = HyLoRADAModel.from_pretrained(base_model, folder)
    elif (folder / CONFIG_FILE).is_file():
        import json

        named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
        base_model, tokenizer = load_pretrained(_base_of(folder, base, named), weights)
        model = import_adapter(base_model, folder)
    elif base is not None:
        raise ValueError(f"--base {base} is for an adapter, and {name} holds none")
    else:
        model, tokenizer = load_pretrained(name, weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, run


def _load_adapter(name: str, base: str | None, dtype: str | None) -> tuple[HyLoRADAModel, Any, Run | None]:
    from . import storage
    from .integrations.peft_files import CONFIG_FILE
    from .run_file import RUN_FILE

    # before a model is loaded, or fetched, for nothing
    if not any((Path(name) / file).is_file() for file in (RUN_FILE, storage.RECORD_FILE, CONFIG_FILE)):
        raise ValueError(
            f"{name} is no folder of a run, nor of an adapter: there is none of {RUN_FILE}, "
            f"{storage.RECORD_FILE} and {CONFIG_FILE} in it"
        )
    return _load(name, base, dtype)


def _base_of(folder: Path, given: str | None, named: str | None, is_merged: bool = False) -> str:
    found = given or (str(folder) if is_merged else named)
    if not found:
        raise ValueError(f"the adapter in {folder} does not name its base model: give --base")
    return found


def _documents(data: str | None, run: Run | None) -> Sequence[Any]:
    from .data import load_documents

    if data is not None:
        return load_documents(data)
    if run is None:
        raise ValueError("there is no run whose held-out text could be taken: give --data, such as --data kjv")
    held_out = run.documents()[1]
    if not held_out:
        raise ValueError("the run holds nothing out (data.test_fraction is 0): give --data")
    return held_out


def _known_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return name


def _say_missing(parts: Sequence[str]) -> None:
    if parts:
        typer.echo(f"PEFT computes it without {', '.join(parts)}")


def _write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table, "")
