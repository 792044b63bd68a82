"""Preference pairs out of a novel: how it went on, against how the passage beside went on.

    python tutorials/make_pairs.py pairs.jsonl
    minichunk train --objective dpo --data pairs.jsonl --seq-len 512 --chunk-size 128 --lr 1e-3 --accumulate 4

The novel is cut into passages of a prompt and an answer. Two passages side by side exchange their answers: the own one
is chosen, the other one rejected. Each text is thus chosen once and rejected once, and both are of one scene, so that
only what was read before can tell them apart. Rows follow the novel: what is held out, the last tenth, is its end.
"""

import argparse
import json
from pathlib import Path

from minichunk.files.documents import EXTENDED_ON, novel

parser = argparse.ArgumentParser(description="Write preference pairs out of a shipped novel.")
parser.add_argument("output", type=Path, metavar="FILE")
parser.add_argument("--novel", default=EXTENDED_ON, help="one of assets/austen")
parser.add_argument("--prompt", type=int, default=600, metavar="N", help="characters of a prompt")
parser.add_argument("--answer", type=int, default=200, metavar="N", help="characters of an answer")
told = parser.parse_args()

text, size = novel(told.novel).read_text(), told.prompt + told.answer
places = [text[start : start + size] for start in range(0, len(text) // (2 * size) * 2 * size, size)]
rows = []
for i, place in enumerate(places):
    beside = places[i + 1 if i % 2 == 0 else i - 1]
    rows.append({"prompt": place[: told.prompt], "chosen": place[told.prompt :], "rejected": beside[told.prompt :]})
told.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
print(f"{len(rows)} pairs in {told.output}")
