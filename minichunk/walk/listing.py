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
from ..seco import fill, rebuild, seco
from ..spaco import spaco

Function = Callable[..., Any]
LISTINGS: dict[str, list[Function]] = {
    "seco": [seco, fill, rebuild],
    "spaco": [spaco, fill, rebuild],
    "full": [full, backpropagate],
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
WHERE: dict[str, dict[str, list[tuple[int, str]]]] = {
    "seco": ALIKE,
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
ALSO: dict[str, list[tuple[int, str]]] = {  # lines that an event is about, and that are not at work yet
    "relay": [(0, "    torch.autograd.backward(")]  # it is handed over in the arguments
}
REBUILT: list[tuple[int, str, str]] = [
    (1, "    memory.write(", "2, 3: run xⱼ without gradients, store m′ⱼ"),
    (2, "hidden, written = model.run(", "5: (Jⱼ, mⱼ) = f(xⱼ; m′₀ … m′ⱼ₋₁; Θ), with its graph"),
    (2, "made, sent = ", "6: give mⱼ the gradient collected at m′ⱼ"),
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

    return {"functions": shown, "where": numbers(WHERE[method]), "also": numbers({} if method == "full" else ALSO)}
