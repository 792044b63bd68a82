"""The options of `minichunk train`."""

from __future__ import annotations

import argparse

from .parser import Parser
from .partial_arguments import add_partial

TRAIN_HELP = """\
Train on documents longer than memory allows, chunk by chunk.

With no argument: takes the small Llama and the novels that ship with the package and extends the
model's context from 256 to 2,048 tokens with LoRA and SeCO, in under two minutes on two CPU cores.

  minichunk train
  minichunk train --model DIR --data notes.txt more.jsonl --seq-len 16384 --chunk-size 512
  minichunk train --model DIR --data book.txt --method spaco --budget 8
  minichunk train --model DIR --data book.txt --partial-context window --chunk-size 2048 --seq-len 65536
  minichunk train --output runs/1 --resume
  torchrun --nproc-per-node 4 -m minichunk train --pipeline 4 --model DIR --data book.txt

DIR is a Hugging Face checkpoint: config.json, tokenizer.json and safetensors. JSONL lines hold
{"text": …}; {"prompt": …, "completion": …}, where only the completion is learnt; or {"messages": …},
where only the assistant's are. The checkpoint's chat template is used where it has one.
"""


def add_train(commands: argparse._SubParsersAction[Parser]) -> None:
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
    how.add_argument("--cache-grad-dtype", help="of the gradients summed for the cache (default: float32, or wider "
                                                "with a wider model)")  # fmt: skip
    how.add_argument("--offload", action="store_true", help="keep the cache and its gradients in host memory")
    add_partial(train)
    loop = train.add_argument_group("training")
    loop.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: 60)")
    loop.add_argument("--batch-size", type=int, metavar="B", help="pieces at a time (default: 1)")
    loop.add_argument("--accumulate", type=int, metavar="N", help="batches per step, on all copies of the model "
                      "together (default: one for each copy)")  # fmt: skip
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
    lora.add_argument("--targets", nargs="+", metavar="NAME", help="layers with an adapter (default: all linear ones)")
    lora.add_argument("--load-in-4bit", action="store_true", help="store the frozen base in 4 bits (bitsandbytes)")
    lora.add_argument("--dropout", type=float, metavar="X", help="on the adapter's input (default: 0)")
    several = train.add_argument_group("several GPUs", "started by torchrun --nproc-per-node P -m minichunk train …")
    several.add_argument("--pipeline", type=int, metavar="N", help="let N processes share the layers; P / N copies "
                         "of them work on other documents (also with --resume: any N)")  # fmt: skip
    several.add_argument("--timeout", type=float, metavar="S", help="seconds after which a process that does not "
                         "answer is given up; one that ends is noticed at once (default: 7200)")  # fmt: skip
    run = train.add_argument_group("run")
    run.add_argument("--dtype", help="float32, bfloat16 or float64 (default: bfloat16 on CUDA, else float32)")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    run.add_argument("--seed", type=int, metavar="N", help="of adapter, order, dropout and sampler (default: 0)")
    run.add_argument("--deterministic", action="store_true", help="the same bits in every run on CUDA too, if slower")
    run.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 20)")
    run.add_argument("--output", metavar="DIR", help="where to write (default: the next free runs/N)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output (default: the newest)")
