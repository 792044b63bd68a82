"""Preference pairs out of a novel: where it went on, against where another place of it went on.

    python tutorials/make_pairs.py pairs.jsonl
    minichunk train --objective dpo --data pairs.jsonl --seq-len 512 --chunk-size 64

Each row's prompt is a passage, its chosen answer the words that follow, and its rejected answer words that follow a
passage far away: both of the same author and length, so that only what was read before tells them apart. Rows follow the
novel, and no text is in two of them; so the last tenth, which is held out, is the novel's end.
"""

import argparse
import json
from pathlib import Path

from minichunk.files.shipped import EXTENDED_ON, novel

parser = argparse.ArgumentParser(description="Write preference pairs out of a shipped novel.")
parser.add_argument("output", type=Path, metavar="FILE")
parser.add_argument("--novel", default=EXTENDED_ON, help="one of assets/austen")
parser.add_argument("--prompt", type=int, default=1200, metavar="N", help="characters of a passage")
parser.add_argument("--answer", type=int, default=240, metavar="N", help="characters of an answer")
told = parser.parse_args()

text, size = novel(told.novel).read_text(), told.prompt + told.answer
places = [text[start : start + size] for start in range(0, len(text) - size, size)]
answers = [place[told.prompt :] for place in places]
with told.output.open("w") as file:
    for i, place in enumerate(places):
        far = answers[i + 1] if i % 2 == 0 and i + 1 < len(answers) else answers[i - 1]
        file.write(json.dumps({"prompt": place[: told.prompt], "chosen": answers[i], "rejected": far}) + "\n")
print(f"{len(places)} pairs in {told.output}")
