// One sentence for each step, for those who read and those who listen.

function phaseOf(event) {
  const names = {
    begin: "Begin", draw: "Draw", memory: "Make room", fill: "Fill", rebuild: "Rebuild", forward: "Forward", loss: "Loss",
    relay: "Relay", backward: "Backward", done: "Done", end: "End",
  };
  return names[event.kind] ?? event.kind;
}

function sentenceOf(run, event, state) {
  const k = run.chunks.length;
  const j = event.chunk;
  const earlier = readBy(run, j ?? 0);
  const what = whatIsRemembered(run);
  const kept = run.kept.flatMap((yes, i) => (yes ? [i] : []));
  const words = {
    begin: () => beginning(run),
    draw: () => (kept.length ? drawing(run, kept) : "No chunk is kept, and the step is over."),
    memory: () => `Room is made for the ${what} that all chunks but the last${run.entries ? " kept one" : ""} leave behind, and for the gradients that later chunks will send back to those${run.entries ? " that are kept" : ""}.`,
    fill: () => `${sentenceCase(chunksNamed(event.chunks))} ${event.chunks.length > 1 ? "are" : "is"} run without a graph${event.chunks[0] ? `, on top of what ${chunksNamed(readBy(run, event.chunks[0]))} left behind` : ""}. Only the ${what} of every layer are kept, in the memory.${event.chunks.every((i) => !run.kept[i]) ? " It will be skipped on the way back: it is run because later chunks read it." : ""}`,
    rebuild: () => `${sentenceCase(chunkName(j))} is run again, now with its graph${j ? `, on top of the stored ${what} of ${chunksNamed(earlier)}: plain numbers, without a graph` : ""}. ${event.rank === undefined ? "Its activations are alive, and no other chunk’s." : waits(run, event)}`,
    forward: () => (run.recompute
      ? "The whole text is run, but only the input of each layer is kept. The layers will be run again on the way back."
      : "The whole text is run with its graph: the activations of all tokens in all layers are alive at once."),
    loss: () => `${run.whole ? "The loss" : `${sentenceCase(chunkName(j))}’s share of the loss`} is ${timesFactor(event, number)}${number(event.loss)}.`,
    relay: () => (event.received.length
      ? `The relay. The stored ${what} have no graph, so what later chunks found out about those of ${chunkName(j)} must be handed over by hand: gradients of norm ${number(norm(event.received.flat()))} in all${event.factor === undefined || event.factor === 1 ? "" : `, times ${number(event.factor)}`}, as the gradient of what it wrote. So its backward pass carries its own loss and theirs.`
      : `Nothing to relay: no chunk ${run.entries ? `after ${chunkName(j)} is kept` : "comes after the last"}, so nobody has sent anything back to ${chunkName(j)}.`),
    backward: () => `The backward pass has left ${layerName(event.layer)} of ${run.whole ? "the text" : chunkName(j)}: ` +
      (run.whole ? `its activations are freed${run.recompute ? " (it was run again just before)" : ""}.` : sending(run, event, what)),
    done: () => (run.whole
      ? `The graph is gone. The parameters’ gradient has the norm ${number(event.gradient_norm ?? NaN)}.`
      : `${sentenceCase(chunkName(j))} is done: its graph is gone, and its part of the gradient is in the parameters.${following(run, kept, j)}`),
    end: () => `The step is over: loss ${number(event.loss)}${event.gradient_norm === undefined ? "" : `, gradient of norm ${number(event.gradient_norm)}`}${run.entries ? ", an estimate of both" : ""}. ${comparison(run, event)}${growth(run, kept)}`,
  };
  const rank = event.rank === undefined ? "" : `Rank ${event.rank}. `;
  return rank + (words[event.kind]?.() ?? event.kind) + (run.peaks.includes(event) ? ` ${["backward", "done"].includes(event.kind) ? `Just before ${run.whole && event.kind === "backward" ? "they were freed" : "that"} came the peak` : "This is the peak"}: ${mebibytes(event.peak)} alive at once, with ${whyPeak(run, event)}.` : "");
}

function whyPeak(run, event) {
  const graph = run.recompute ? "a layer that is run again" : run.whole ? "the graph of the whole text" : "the whole graph of one chunk";
  const beside = { loss: "and what the loss needs beside it", done: "and the end of the backward pass beside it", backward: "and what the backward pass needs beside it" };
  if (event.rank !== undefined) return "all graphs that this rank holds";
  return `${graph} ${beside[event.kind] ?? "and little beside it"}`;
}

// On all ranks but the last a chunk is rebuilt some time before its backward pass.
const waits = (run, event) => (event.rank === Math.max(...run.rankOf) ? "Above it are no layers, so its turn comes at once."
  : `It goes to rank ${event.rank + 1}, and its activations wait here until the gradient comes back from there.`);

const timesFactor = (event, show) => (!event.factor || event.factor === 1 ? "" : `${number(event.factor)} × ${show(event.loss / event.factor)} = `);
const sentenceCase = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function beginning(run) {
  const tokens = `${run.begin.tokens ?? run.size} tokens`, cut = `${tokens} are cut into ${run.chunks.length} chunks.`;
  if (run.whole) return run.recompute
    ? `Backpropagation of ${tokens} in one piece, with gradient checkpointing: only the input of each layer is kept, and every layer will be run twice.`
    : `Ordinary backpropagation of ${tokens} in one piece: the baseline. The graph of the whole text will be alive at once.`;
  return run.entries
    ? `${cut} All are run forward as in SeCO, but only a random few are gone back through: an estimate of the gradient, in less time.`
    : `${cut} The exact gradient of all of them together is wanted, but the graph of only one chunk shall be alive at a time.${run.begin.ranks ? ` The layers are on ${run.begin.ranks.length} ranks: hidden states go up from rank to rank, their gradients come down.` : ""}`;
}

function drawing(run, kept) {
  const skipped = run.kept.flatMap((yes, i) => (yes ? [] : [i])), last = kept.at(-1);
  const [between, after] = [skipped.filter((i) => i < last), skipped.filter((i) => i > last)];
  const rates = run.events.find((e) => e.kind === "draw").rates, same = rates?.every((rate) => rate === rates[0]);
  const start = same ? `A coin for each chunk, which says keep with probability ${number(rates[0])}` : rates ? "A coin for each chunk" : "The draw";
  const is = (list) => (list.length > 1 ? "are" : "is");
  return `${start}: ${chunksNamed(kept)} ${is(kept)} kept.` +
    (between.length ? ` ${sentenceCase(chunksNamed(between))} will be run forward, but skipped on the way back.` : "") +
    (after.length ? ` ${sentenceCase(chunksNamed(after))}, after the last that is kept, ${is(after)} not run at all.` : "") +
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
    (gone.length ? ` ${sentenceCase(chunksNamed(gone.map(([i]) => i)))} ${gone.length > 1 ? "were" : "was"} skipped: ${named(gone.map(size))} ${gone.length > 1 ? "are" : "is"} thrown away, and every chain through ${gone.length > 1 ? "them" : "it"} dies: any path of the gradient from a later loss through those ${what} to earlier chunks and to Θ. The others are weighted up.` : "");
}

function following(run, kept, j) {
  const next = kept[kept.indexOf(j) - 1];
  if (next === undefined) return "";
  return ` ${sentenceCase(chunkName(next))} comes next${next && j === kept.at(-1) ? `, not ${chunkName(kept[0])}` : ""}, because only now have all its ${run.entries ? "kept " : ""}readers reported.`;
}

function comparison(run, event) {
  const whole = runs.find((other) => other.whole && !other.recompute && other.begin.tokens === run.begin.tokens);
  const peaks = [run, whole].map((r) => r && r.events[r.peak].peak);
  const peak = peaks[0] === undefined ? "" : `Peak: ${mebibytes(peaks[0])} here${peaks[1] === undefined || whole === run ? "" : `, ${mebibytes(peaks[1])} for full`}. `;
  if (!whole || run.whole) return peak;
  const theirs = whole.events.at(-1);
  const off = Math.abs(theirs.gradient_norm - event.gradient_norm) / theirs.gradient_norm;
  if (run.entries) return `${run.events.some((e) => e.rates) ? `The mean over all draws is exactly the full gradient, of norm ${number(theirs.gradient_norm)}.` : `The full gradient has the norm ${number(theirs.gradient_norm)}.`} ${peak}`;
  return `${off < 1e-3 ? "That is what backpropagation of the whole text has, too." : `Backpropagation of the whole text has ${number(theirs.gradient_norm)}.`} ${peak}`;
}

// What would grow with the text: the colours are those of the bytes.
function growth(run, kept) {
  if (!run.events.every((e) => e.bytes)) return "";
  if (run.whole) return `Twice the text would double orange (${run.recompute ? "the layers’ inputs, and one layer’s graph" : "the graph of the whole text"}).`;
  const memory = run.remembers.every((kind) => kind !== "state");
  const longer = memory ? " Twice the text would double blue and green (keys, values, their gradients), not orange (one chunk’s graph)." : "";
  return (run.entries ? `What the coins save is time, ${kept.length} of ${run.chunks.length} chunks rebuilt, and room for gradients (green).` : "") + longer;
}

const PAPER = "https://arxiv.org/abs/2505.16710";

function aboutText() {
  const { begin } = runs[0];
  const model = begin.model ? `${escaped(begin.model)}, ` : "";
  return `A real step of training (${model}${begin.layers} layers, ${begin.tokens ?? "?"} tokens), recorded while it ran. <b>SeCO</b> (Sequential Chunk-wise Optimization) finds the gradient of the whole text with the ` +
    "activations of one chunk: it runs all chunks once, keeps only what later ones read of them, and walks back, chunk by chunk. <b>SpaCO</b> (Sparse Chunk-wise Optimization) walks back through a random few. " +
    `Both are of Li et al., <a href="${PAPER}">arXiv 2505.16710</a>.`;
}

// Each letter of the page, once.
function lettersText() {
  const letters = [
    ["x<sub>j</sub>", "the tokens of chunk j; chunks and layers count from 0"], ["Θ", "the parameters"], ["f", "the model"],
    ["J<sub>j</sub>", "chunk j’s share of the loss J"], ["m<sub>j</sub>", "what chunk j leaves for later ones: keys and values, or a state"],
    ["m′<sub>j</sub>", "the same numbers, stored without a graph"],
    ["g<sub>j</sub>", "how the losses of later chunks depend on m′<sub>j</sub>: the gradient that the relay hands to chunk j"],
  ];
  if (runs.some((run) => run.entries)) letters.push(["a, b", "SpaCO’s factors on a kept chunk’s loss and on its relay"],
    ["chain", "a path of the gradient from a later loss through the keys and values of chunk j to earlier chunks and to Θ; it dies where chunk j is skipped, and those that survive are weighted up by a and b"]);
  return letters.map(([letter, words]) => `<div><dt>${letter}</dt><dd>${words}</dd></div>`).join("");
}
