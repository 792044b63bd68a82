// One sentence for each step, for those who read and those who listen.

const sentenceCase = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const named = (items) => (items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`);
const chunksNamed = (list) => `chunk${list.length > 1 ? "s" : ""} ${named(list)}`;
const are = (list) => (list.length > 1 ? "are" : "is");
const timesFactor = (event, show) => (!event.factor || event.factor === 1 ? "" : `${number(event.factor)} × ${show(event.loss / event.factor)} = `);
const phaseOf = (event) => (event.kind === "memory" ? "Make room" : sentenceCase(event.kind)) + (event.up === undefined ? "" : event.up ? " ↑" : " ↓");

function sentenceOf(run, event) {
  const j = event.chunk, what = whatIsRemembered(run), kept = run.kept.flatMap((yes, i) => (yes ? [i] : []));
  const before = (i) => (run.remembers.length && run.remembers.every((kind) => kind === "state") ? [i - 1] : [...Array(i).keys()]);
  const next = kept[kept.indexOf(j) - 1], [first, stop] = blockOf(run, event), layers = named([...run.remembers.keys()].slice(first, stop));
  const inBlock = event.up === undefined ? "" : ` in layer${stop - first > 1 ? "s" : ""} ${layers}`;
  const words = {
    begin: () => beginning(run),
    draw: () => (kept.length ? drawing(run, kept) : "No chunk is kept, and the step is over."),
    memory: () => event.up ? `Up through another block of layers: room is made for the ${what} that the chunks leave behind${inBlock}. Nothing will be sent back to them here.` : `${inBlock && "Down again: "}${inBlock ? "room" : "Room"} is made for the ${what} that all chunks but the last${run.entries ? " kept one" : ""} leave behind${inBlock}, and for the gradients that later chunks will send back to those${run.entries ? " that are kept" : ""}.`,
    fill: () => `${sentenceCase(chunksNamed(event.chunks))} ${are(event.chunks)} run${inBlock} without a graph${event.chunks[0] ? `, on top of what ${chunksNamed(before(event.chunks[0]))} left behind` : ""}. Only the ${what} of ${inBlock ? "these layers" : "every layer"} are kept, in the memory.${event.chunks.every((i) => !run.kept[i]) ? " It will be skipped on the way back: it is run because later chunks read it." : ""}`,
    rebuild: () => `${sentenceCase(chunkName(j))} is run again${inBlock}, now with its graph${j ? `, on top of the stored ${what} of ${chunksNamed(before(j))}: plain numbers, without a graph` : ""}. Its activations are alive, and no other chunk’s.`,
    forward: () => (run.recompute
      ? "The whole text is run, but only the input of each layer is kept. The layers will be run again on the way back."
      : "The whole text is run with its graph: the activations of all tokens in all layers are alive at once."),
    loss: () => `${run.whole ? "The loss" : `${sentenceCase(chunkName(j))}’s share of the loss`} is ${timesFactor(event, number)}${number(event.loss)}.`,
    relay: () => (event.received.length
      ? `The relay. The stored ${what} have no graph, so what later chunks found out about those of ${chunkName(j)} must be handed over by hand: gradients of norm ${number(norm(event.received.flat()))} in all${event.factor === undefined || event.factor === 1 ? "" : `, times ${number(event.factor)}`}, as the gradient of what it wrote. So its backward pass carries ${stop === run.layers ? "its own loss" : "what the block above has handed down"} and theirs.`
      : `Nothing to relay: no chunk ${run.entries ? `after ${chunkName(j)} is kept` : "comes after the last"}, so nobody has sent anything back to ${chunkName(j)}.`),
    backward: () => `The backward pass has left ${layerName(event.layer)} of ${run.whole ? "the text" : chunkName(j)}: ` +
      (run.whole ? `its activations are freed${run.recompute ? " (it was run again just before)" : ""}.` : sending(run, event, what)),
    done: () => (run.whole
      ? `The graph is gone. The parameters’ gradient has the norm ${number(event.gradient_norm ?? NaN)}.`
      : `${sentenceCase(chunkName(j))} is done: its graph is gone, and its part of the gradient is in the parameters.${next === undefined ? "" : ` ${sentenceCase(chunkName(next))} comes next${next && j === kept.at(-1) ? `, not ${chunkName(kept[0])}` : ""}, because only now have all its ${run.entries ? "kept " : ""}readers reported.`}`),
    keep: () => `${sentenceCase(chunksNamed(event.chunks))}: ${event.up ? `what goes into ${layerName(event.layer)} is kept, a hidden state of each token, until the block above has its turn, on the way up and on the way down` : `the gradient of what went into ${layerName(event.layer)}, of norm ${number(norm(event.norms))}, takes its place. The block below is given it instead of a loss`}.`,
    end: () => `The step is over: loss ${number(event.loss)}${event.gradient_norm === undefined ? "" : `, gradient of norm ${number(event.gradient_norm)}`}${run.entries ? ", an estimate of both" : ""}. ${comparison(run, event)}`,
  };
  const peak = event.peak !== undefined && event === run.events[run.peak];
  return words[event.kind]() + (peak ? ` Here is the peak: ${mebibytes(event.peak)} alive at once, with ${graphOf(run)} and what its loss or its backward pass needs beside it.` : "");
}

const graphOf = (run) => (run.recompute ? "the graph of a layer that is run again" : run.whole ? "the graph of the whole text" : run.begin.blocks ? "one chunk’s graph in one block" : "the whole graph of one chunk");

function beginning(run) {
  const tokens = `${run.begin.tokens ?? run.chunks.at(-1)[1]} tokens`, cut = `${tokens} are cut into ${run.chunks.length} chunks.`;
  if (run.whole) return run.recompute
    ? `Backpropagation of ${tokens} in one piece, with gradient checkpointing: only the input of each layer is kept, and every layer will be run twice.`
    : `Ordinary backpropagation of ${tokens} in one piece: the baseline. The graph of the whole text will be alive at once.`;
  return run.entries
    ? `${cut} All are run forward as in SeCO, but only a random few are gone back through: an estimate of the gradient, in less time.`
    : `${cut} The exact gradient of all of them together is wanted, but the graph of only one chunk shall be alive at a time${run.begin.blocks ? ", and the memory of only one block of layers: up through block after block, and down again" : ""}.`;
}

function drawing(run, kept) {
  const skipped = run.kept.flatMap((yes, i) => (yes ? [] : [i])), last = kept.at(-1);
  const between = skipped.filter((i) => i < last), after = skipped.filter((i) => i > last);
  const rates = run.events.find((e) => e.kind === "draw").rates, same = rates?.every((rate) => rate === rates[0]);
  return `${same ? `A coin for each chunk, which says keep with probability ${number(rates[0])}` : "The draw"}: ${chunksNamed(kept)} ${are(kept)} kept.` +
    (between.length ? ` ${sentenceCase(chunksNamed(between))} will be run forward, but skipped on the way back.` : "") +
    (after.length ? ` ${sentenceCase(chunksNamed(after))}, after the last that is kept, ${are(after)} not run at all.` : "") +
    (same ? ` What is kept counts times ${number(1 / rates[0])}, so that the mean over all draws is the full gradient.` : " What is kept counts by a factor that makes up for what is not.");
}

// What a layer sends back to the chunks that it has read: keys and values each to its own chunk, a state to the one before.
function sending(run, event, what) {
  if (!event.sent.length) return "it had read nothing of earlier chunks.";
  const size = ([, ...norms]) => number(norm(norms));
  if (isState(run, event.layer)) return `the gradients of the state that it was handed go into the memory, ${named(event.sent.map((s) =>
    `${size(s)} to ${chunkName(s[0])}${run.kept[s[0]] ? "" : " (skipped: it passes on to the chunk before, decayed)"}`))}.`;
  const [kept, gone] = [event.sent.filter(([i]) => run.kept[i]), event.sent.filter(([i]) => !run.kept[i])];
  return (kept.length ? `the gradient of the ${what} that it had read goes back, ${named(kept.map((s) => `${size(s)} to ${chunkName(s[0])}`))}.` : `it had read the ${what} of skipped chunks only.`) +
    (gone.length ? ` ${sentenceCase(chunksNamed(gone.map(([i]) => i)))} ${gone.length > 1 ? "were" : "was"} skipped: ${named(gone.map(size))} ${are(gone)} thrown away, and every chain through ${gone.length > 1 ? "them" : "it"} dies: any path of the gradient from a later loss through those ${what} to earlier chunks and to Θ. The others are weighted up.` : "");
}

// Beside ordinary backpropagation, where that is on the page; and what would grow with the text, by the colours of the bytes.
function comparison(run, event) {
  const whole = runs.find((other) => other.whole && !other.recompute && other.begin.tokens === run.begin.tokens);
  const peaks = [run, ...(whole && whole !== run ? [whole] : [])].map((r) => r.events[r.peak].peak);
  const peak = peaks.includes(undefined) ? "" : `Peak: ${peaks.map(mebibytes).join(" here, ")}${peaks.length > 1 ? " for full" : ""}. `;
  if (run.whole) return `${peak}Twice the text would double orange (${run.recompute ? "the layers’ inputs, and one layer’s graph" : "the graph of the whole text"}).`;
  const theirs = whole?.events.at(-1).gradient_norm, same = Math.abs(theirs - event.gradient_norm) < 1e-3 * theirs;
  const words = run.entries ? `The full gradient has the norm ${number(theirs ?? NaN)}.` : same ? "That is what backpropagation of the whole text has, too." : `Backpropagation of the whole text has ${number(theirs ?? NaN)}.`;
  const grows = run.remembers.includes("state") || run.begin.blocks ? "" : "Twice the text would double blue and green (keys, values, their gradients), not orange (one chunk’s graph).";
  return `${theirs === undefined ? "" : `${words} `}${peak}${grows}`;
}
