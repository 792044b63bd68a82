"""The lines of the code, read from the source as it stands, and which of them an event is.

A line is known by how it begins, within the body of its function. Where a line is not found, or is not the only one,
`listing` raises LookupError: then the source has changed, and what stands here must follow.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from ..full import backpropagate, full
from ..pipeline import pipeline_seco as step
from ..seco import fill, rebuild, seco
from ..spaco import spaco

Function = Callable[..., Any]
PIPELINE: list[Function] = [step.pipeline_spaco, fill, step.walk_back, step._backward]
LISTINGS: dict[str, list[Function]] = {
    "seco": [seco, fill, rebuild],
    "spaco": [spaco, fill, rebuild],
    "full": [full, backpropagate],
    "pipeline_seco": PIPELINE,
    "pipeline_spaco": PIPELINE,
}
LOOP = "    loss, written, received = rebuild("
ALIKE: dict[str, list[tuple[int, str]]] = {  # kind: function in the listing, and line, the outermost first
    "begin": [(0, "batch, chunks = prepare(")],
    "memory": [(0, "memory = new_memory(")],
    "fill": [(0, "fill("), (1, "    memory.write(")],
    "rebuild": [(0, LOOP), (2, "hidden, written = model.run(")],
    "loss": [(0, LOOP), (2, "loss = summed_loss(")],
    "relay": [(0, LOOP), (2, "made, sent = ")],
    "backward": [(0, "    torch.autograd.backward(")],
    "done": [(0, "    del loss, written, received")],
    "end": [(0, "return total")],
}
WALK_BACK = (0, "    total = walk_back(")
TURNS: dict[str, list[tuple[int, str]]] = {  # of a pipeline, where a chunk's turn comes at one of two lines of the loop
    "begin": [(0, "batch, chunks, links = ")],
    "draw": [(0, "weights, options, below_learns = agree(")],
    "memory": [(0, "memory: Any = new_memory(")],
    "fill": [(0, "fill("), (1, "    memory.write(")],
    "rebuild": [WALK_BACK, (2, "    y, written = stage.run(")],
    "loss": [WALK_BACK, (3, "    loss = summed_loss(")],
    "relay": [WALK_BACK, (3, "    made, sent = ")],
    "backward": [WALK_BACK, (3, "    torch.autograd.backward(")],
    "done": [WALK_BACK, (3, "return end.detach()")],
    "end": [(0, "return total")],
}
WHERE: dict[str, dict[str, list[tuple[int, str]]]] = {
    "seco": ALIKE,
    "pipeline_seco": TURNS,
    "pipeline_spaco": TURNS,
    "spaco": {**ALIKE, "draw": [(0, "weights = check_weights(sampler(")]},
    "full": {
        "begin": [(0, "return backpropagate(")],
        "forward": [(0, "return backpropagate("), (1, "hidden, _ = model.run(")],
        "loss": [(0, "return backpropagate("), (1, "loss = losses / ")],
        "backward": [(0, "return backpropagate("), (1, "loss.backward()")],
        "done": [(0, "return backpropagate("), (1, "return loss.detach()")],
        "end": [(0, "return backpropagate(")],
    },
}
ALSO: dict[str, dict[str, list[tuple[int, str]]]] = {  # lines that an event is about, and that are not at work yet
    method: {} if method == "full" else {"relay": WHERE[method]["backward"]}  # it is handed over in the arguments
    for method in WHERE
}
REBUILT: list[tuple[int, str, str]] = [
    (1, "    memory.write(", "2, 3: run xⱼ without gradients, store m′ⱼ"),
    (2, "hidden, written = model.run(", "5: (Jⱼ, mⱼ) = f(xⱼ; m′₀ … m′ⱼ₋₁; Θ), with its graph"),
    (2, "made, sent = ", "6: give mⱼ the gradient collected at m′ⱼ"),
]
IN_TURNS: list[tuple[int, str, str]] = [
    (0, "fill(", "1–3: for j = 0 … k−1, fill"),
    (2, "for chunk, weight in ", "4: for j = k−1 … 0"),
    (2, "    y, written = stage.run(", REBUILT[1][2]),
    (2, "    waiting.append(", "and wait, while the ranks above work on it"),
    (3, "    made, sent = ", REBUILT[2][2]),
    (3, "    torch.autograd.backward(", "7: backpropagate from Jⱼ, or what came down, and mⱼ"),
]
PAPER: dict[str, list[tuple[int, str, str]]] = {  # function, line, and the paper's line beside it, in our words
    "seco": [
        (0, "fill(", "1–3: for j = 0 … k−1, fill"),
        (0, "for chunk in ", "4: for j = k−1 … 0"),
        (0, LOOP, "5, 6: rebuild chunk j, and relay"),
        (0, "    torch.autograd.backward(", "7: backpropagate from Jⱼ and mⱼ to Θ and m′₀ … m′ⱼ₋₁"),
        *REBUILT,
    ],
    "spaco": [
        (0, "weights = check_weights(sampler(", "Algorithm 2: draw the chunks I that are kept"),
        (0, "fill(", "fill, up to the last chunk of I"),
        (0, "for chunk, weight in ", "for j in I, from the last to the first"),
        (0, LOOP, "rebuild chunk j, and relay"),
        (0, "    loss, received = weight.loss", "factors that undo the chance of being kept"),
        (0, "    torch.autograd.backward(", "backpropagate from Jⱼ and mⱼ to Θ and m′ᵢ, i < j"),
        *((at, line, words.split(": ", 1)[1]) for at, line, words in REBUILT),
    ],
    "pipeline_seco": IN_TURNS,
    "pipeline_spaco": IN_TURNS,
    "full": [
        (1, "hidden, _ = model.run(", "naive parallel training: the whole text with its graph"),
        (1, "loss.backward()", "backpropagate through all of it"),
    ],
}


def body(function: Function) -> list[tuple[int, str]]:
    """The lines of a function behind its docstring, as (number in the file, text), moved to the left."""
    text, first = inspect.getsource(function), inspect.getsourcelines(function)[1]
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef)
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    start = statements[0].lineno - 1
    lines = textwrap.dedent("\n".join(text.splitlines()[start:])).splitlines()
    return [(first + start + i, line) for i, line in enumerate(lines)]


def find(function: Function, beginning: str) -> int:
    """Which line of `body` begins so. Raises LookupError unless it is exactly one."""
    found = [i for i, (_, line) in enumerate(body(function)) if line.startswith(beginning)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} lines of {function.__name__} begin with {beginning!r}, but one must")
    return found[0]


def listing(method: str) -> dict[str, Any]:
    """What the page shows of a method's code.

    functions: name, file, first line, lines (text, the paper's line) of each. where: for each kind of event, the
    lines that are at work, as [function, line], the outermost first. also: further lines, in the same way. Another
    method's is that of `seco`.
    """
    method = method if method in LISTINGS else "seco"
    functions = LISTINGS[method]
    paper = {(at, find(functions[at], line)): words for at, line, words in PAPER[method]}
    shown = [
        {
            "name": function.__name__,
            "file": f"{function.__module__.split('.', 1)[1].replace('.', '/')}.py",
            "first": body(function)[0][0],
            "lines": [[line, paper.get((at, i), "")] for i, (_, line) in enumerate(body(function))],
        }
        for at, function in enumerate(functions)
    ]

    def numbers(table: dict[str, list[tuple[int, str]]]) -> dict[str, list[list[int]]]:
        return {kind: [[at, find(functions[at], line)] for at, line in stack] for kind, stack in table.items()}

    return {"functions": shown, "where": numbers(WHERE[method]), "also": numbers(ALSO[method])}
