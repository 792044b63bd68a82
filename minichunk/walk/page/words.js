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
  const lastKept = kept.at(-1);
  const words = {
    begin: () => run.whole
      ? `Ordinary backpropagation of ${run.begin.tokens ?? run.size} tokens in one piece: the baseline. Nothing is cut.`
      : `${run.begin.tokens ?? ""} tokens are cut into ${k} chunks. The gradient of all of them together is wanted, but the graph of only one chunk shall be alive at a time.`,
    draw: () => (kept.length
      ? `A coin for each chunk: ${chunksNamed(kept)} ${kept.length > 1 ? "are" : "is"} kept, ${kept.length < k ? `${chunksNamed(run.kept.flatMap((yes, i) => (yes ? [] : [i])))} will be skipped` : "none skipped"}. What is kept counts by a factor that makes up for what is not.`
      : "A coin for each chunk: none is kept, and the step is over."),
    memory: () => `Room is made for the ${what} that all chunks but the last${run.entries ? " kept one" : ""} leave behind, and for the gradients that later chunks will send back to those${run.entries ? " that are kept" : ""}.`,
    fill: () => `${sentenceCase(chunksNamed(event.chunks))} ${event.chunks.length > 1 ? "are" : "is"} run without a graph${event.chunks[0] ? `, on top of what ${chunksNamed(readBy(run, event.chunks[0]))} left behind` : ""}. Only the ${what} of every layer are kept, in the memory.`,
    rebuild: () => `${sentenceCase(chunkName(j))} is run again, now with its graph${j ? `, on top of the stored ${what} of ${chunksNamed(earlier)}: plain numbers, without a graph` : ""}. Its activations are alive, and no other chunk’s.`,
    forward: () => (run.recompute
      ? "The whole text is run, but only the input of each layer is kept. The layers will be run again on the way back."
      : "The whole text is run with its graph: the activations of all tokens in all layers are alive at once."),
    loss: () => `${run.whole ? "The loss" : `${sentenceCase(chunkName(j))}’s share of the loss`} is ${number(event.loss)}${factor(event, " with its factor ")}.`,
    relay: () => (event.received.length
      ? `The relay. While they were backpropagated, later chunks have sent back how their losses depend on the ${what} of ${chunkName(j)}: gradients of norm ${number(norm(event.received.flat()))} in all. They are now handed to ${chunkName(j)}, as the gradient of what it wrote${factor(event, ", times ")}. So its own backward pass carries its own loss and theirs.`
      : `Nothing to relay: no chunk ${run.entries ? `after ${chunkName(j)} is kept` : "comes after the last"}, so nobody has sent anything back to ${chunkName(j)}.`),
    backward: () => {
      const start = `The backward pass has left ${layerName(event.layer)} of ${run.whole ? "the text" : chunkName(j)}: `;
      if (run.whole) return `${start}its activations are freed${run.recompute ? " (it was run again just before)" : ""}.`;
      const kind = isState(run, event.layer) ? "state that it was handed" : `${what} that it had read`;
      const parts = event.sent.map(([i, ...norms]) => `${number(norm(norms))} to ${chunkName(i)}${run.kept[i] ? "" : lost(run, i, event.layer) ? " (skipped: lost)" : " (skipped: it passes on to the chunk before, decayed)"}`);
      return start + (parts.length ? `the gradients of the ${kind} go into the memory, ${named(parts)}.` : "it had read nothing of earlier chunks.");
    },
    done: () => (run.whole
      ? `The graph is gone. The parameters’ gradient has the norm ${number(event.gradient_norm ?? NaN)}.`
      : `${sentenceCase(chunkName(j))} is done: its graph is gone, and its part of the gradient is in the parameters.${j === kept[0] ? "" : " The next chunk back takes its place."}`),
    end: () => `The step is over: loss ${number(event.loss)}${event.gradient_norm === undefined ? "" : `, gradient of norm ${number(event.gradient_norm)}`}${run.entries ? ", an estimate of both" : ""}. ${run.whole ? "" : comparison(run, event, lastKept)}`,
  };
  const rank = event.rank === undefined ? "" : `Rank ${event.rank}. `;
  return rank + (words[event.kind]?.() ?? event.kind) + (event === run.events[run.peak] && event.peak !== undefined ? ` This is the peak: ${mebibytes(event.peak)} were alive at once, because ${whyPeak(run, event)}.` : "");
}

function whyPeak(run, event) {
  const graph = run.recompute ? "a layer that is run again is alive" : run.whole ? "the graph of the whole text is alive" : "the whole graph of one chunk is alive";
  const beside = { loss: "and what the loss needs beside it", done: "and the end of the backward pass beside it", backward: "and what the backward pass needs beside it" };
  return `${graph}, ${beside[event.kind] ?? "and little beside it"}`;
}

const factor = (event, before) => (event.factor === undefined || event.factor === 1 ? "" : `${before}${number(event.factor)}`);
const sentenceCase = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function comparison(run, event) {
  const whole = runs.find((other) => other.whole && !other.recompute && other.begin.tokens === run.begin.tokens);
  if (!whole) return "";
  const theirs = whole.events.at(-1);
  const off = Math.abs(theirs.gradient_norm - event.gradient_norm) / theirs.gradient_norm;
  const gradient = run.entries
    ? `Backpropagation of the whole text has ${number(theirs.gradient_norm)}; the mean over all draws of the coins would be its very gradient`
    : off < 1e-3 ? "That is what backpropagation of the whole text has, too" : `Backpropagation of the whole text has ${number(theirs.gradient_norm)}`;
  const peaks = [whole, run].map((r) => r.events[r.peak].peak);
  return peaks.includes(undefined) ? `${gradient}.` : `${gradient}, at a peak of ${mebibytes(peaks[0])} instead of ${mebibytes(peaks[1])}.`;
}

function aboutText() {
  const { begin } = runs[0];
  const model = begin.model ? `${escaped(begin.model)}, ` : "";
  return `A real step of training (${model}${begin.layers} layers, ${begin.tokens ?? "?"} tokens), recorded while it ran. <b>SeCO</b> finds the gradient of the whole text with the ` +
    "activations of one chunk: it runs all chunks once, keeps only what later ones read of them, and walks back, chunk by chunk. <b>SpaCO</b> walks back through a random few.";
}
