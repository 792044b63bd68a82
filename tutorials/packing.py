"""Short documents, trained on by themselves, packed apart, and packed open: python tutorials/packing.py

Passages of two novels, each 20 to 200 tokens long, in an order without sense. The shipped model trains on 2,048 tokens
of the one novel a step, and is measured on passages of the other, each by itself.
"""

import argparse
import time
from itertools import pairwise

import torch
from tqdm import tqdm

import minichunk as mc
from minichunk.files.documents import (
    EXTENDED_ON,
    MEASURED_ON,
    SHIPPED_MODEL,
    Document,
    collate,
    load_tokenizer,
    novel,
    pack_documents,
    step_documents,
)

ROW, CHUNK = 2048, 512
WAYS = ("each by itself", "packed, apart", "packed, open")


def passages(name: str, count: int, seed: int) -> list[Document]:
    """So many out of a shipped novel."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(load_tokenizer(SHIPPED_MODEL).encode(novel(name).read_text()).ids)
    found = []
    for number in range(count):
        length = int(torch.randint(20, 201, (), generator=generator))
        start = int(torch.randint(len(ids) - length, (), generator=generator))
        found.append(Document(f"{name} {number}", ids[start : start + length], ids[start : start + length]))
    return found


def trained(way: str, documents: list[Document], steps: int) -> tuple[mc.Llama, float]:
    """The model after so many steps, and CPU seconds per step; with each way a step has the same documents."""
    torch.manual_seed(0)
    model = mc.Llama.from_pretrained(SHIPPED_MODEL)
    mc.add_lora(model, rank=8, alpha=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    rows, _ = pack_documents(documents, ROW, apart=True)
    began = time.process_time()
    for step in tqdm(range(steps), way, leave=False):
        (row,) = step_documents(rows, 1, step, seed=0)
        (ids, labels), starts = collate([row]), row.starts
        if way == WAYS[0]:
            for begin, end in pairwise([*starts, len(row)]):
                alone = ids[:, begin:end], labels[:, begin:end]
                mc.seco(model, *alone, CHUNK, num_targets=row.num_targets())
        elif way == WAYS[1]:
            mc.seco(model, ids, labels, CHUNK, starts=starts)
        else:
            mc.seco(model, ids, ids, CHUNK)
        optimizer.step()
        optimizer.zero_grad()
    return model, (time.process_time() - began) / steps


def loss(model: mc.Llama, documents: list[Document], first: int, last: int) -> float:
    """Of the tokens at these positions of a document, which the model reads by itself."""
    found = []
    for document in documents:
        found.append(-mc.log_probs(model, *collate([document]), CHUNK)[0, first:last])
    return float(torch.cat(found).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--documents", type=int, default=1000, metavar="N", help="to train on")
    told = parser.parse_args()
    documents, held = passages(EXTENDED_ON, told.documents, 1), passages(MEASURED_ON, 200, 2)
    print("                  CPU seconds a step   loss at tokens 1 to 20   at 20 to 200")
    for way in WAYS:
        model, seconds = trained(way, documents, told.steps)
        print(
            f"{way:16} {seconds:19.2f} {loss(model, held, 1, 20):24.3f} {loss(model, held, 20, 200):14.3f}", flush=True
        )
