// What the page knows: the runs, and what a run has come to at each of its steps.
// Chunks and layers count from 0, as in the log and in the code.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const norm = (numbers) => Math.hypot(...numbers);
const chunkName = (i) => `chunk ${i}`;
const layerName = (i) => `layer ${i}`;

const number = (x) => {
  if (x === 0) return "0";
  return Math.abs(x) >= 1000 || Math.abs(x) < 0.0001 ? x.toExponential(2) : Number(x.toPrecision(3)).toString();
};
const mebibytes = (bytes) => (bytes && bytes < 2 ** 18 ? `${(bytes / 2 ** 10).toFixed(1)} KiB` : `${(bytes / 2 ** 20).toFixed(2)} MiB`);
const named = (items) => (items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`);
const chunksNamed = (list) => (list.length === 1 ? chunkName(list[0]) : list.length > 3 && list.at(-1) - list[0] === list.length - 1
  ? `chunks ${list[0]} to ${list.at(-1)}` : `chunks ${named(list)}`);

const LABELS = { full: "full", seco: "SeCO", spaco: "SpaCO", pipeline_seco: "SeCO", pipeline_spaco: "SpaCO" };
const PARTS = [
  ["weights", "weights"], ["gradients", "their gradients"], ["memory", "memory"],
  ["memory_gradients", "gradients sent to it"], ["activations", "activations, and all else"],
];

function runOf(entry, index) {
  const [begin] = entry.events;
  const label = entry.name ?? (LABELS[begin.method] ?? begin.method) + (begin.recompute ? ", recomputed" : "") + (begin.ranks ? `, ${begin.ranks.length} ranks` : "");
  const drawn = entry.events.find((e) => e.kind === "draw");
  const kept = drawn ? drawn.entries.map((e) => e !== null) : begin.chunks.map(() => true);
  const room = entry.events.find((e) => e.kind === "memory");
  const sizes = begin.chunks.map(([start, stop]) => stop - start);
  const run = {
    index, label, begin, kept, entries: drawn?.entries ?? null, events: entry.events,
    method: begin.method, recompute: Boolean(begin.recompute), size: Math.max(...sizes), chunks: begin.chunks,
    layers: begin.layers, remembers: room?.remembers ?? [], whole: begin.method === "full",
    code: data.code[begin.method] ?? data.code.seco, rankOf: ranksOf(entry.events),
  };
  run.states = statesOf(run);
  run.largest = Math.max(1e-300, ...run.states.map((s) => Math.max(...s.held.flat())));
  run.peak = run.events.reduce((best, e, i) => ((e.peak ?? -1) > (run.events[best].peak ?? -1) ? i : best), 0);
  const { kind, peak } = run.events[run.peak];
  run.peaks = peak === undefined ? [] : run.events.filter((e) => e.kind === kind && e.peak > 0.999 * peak); // of each chunk
  return run;
}

// The rank of each layer, where several processes take the step, each with some of the layers.
function ranksOf(events) {
  const ranks = [];
  (events[0].ranks ?? []).forEach(([start, stop], rank) => ranks.splice(start, 0, ...Array(stop - start).fill(rank)));
  if (!ranks.length) for (const e of events) if (e.kind === "backward" && e.rank !== undefined) ranks[e.layer] = e.rank;
  return ranks;
}
const isOf = (run, event, layer) => event.rank === undefined || run.rankOf[layer] === undefined || run.rankOf[layer] === event.rank;

// At each step: what the body of every cell is (none, run, graph, input, done), whether its memory is filled, the norm
// of what has been sent back to it, and whether that has been relayed.
function statesOf(run) {
  const table = (value) => Array.from({ length: run.layers }, () => run.chunks.map(() => value));
  let state = { body: table("none"), filled: table(false), held: table(0), relayed: table(false), gradient: null, loss: null };
  const all = [];
  for (const event of run.events) {
    const next = structuredClone(state);
    for (const row of next.body) row.forEach((body, i) => { if (body === "run") row[i] = "none"; });
    const column = (body) => next.body.forEach((row, l) => { if (isOf(run, event, l)) row[event.chunk] = body; });
    if (event.kind === "fill") {
      for (const i of event.chunks) next.body.forEach((row, l) => { if (isOf(run, event, l)) { row[i] = "run"; next.filled[l][i] = true; } });
    } else if (event.kind === "rebuild" || event.kind === "forward") {
      column(run.recompute ? "input" : "graph");
    } else if (event.kind === "relay") {
      event.received.forEach((norms, l) => { if (isOf(run, event, l)) { next.held[l][event.chunk] = norm(norms); next.relayed[l][event.chunk] = true; } });
    } else if (event.kind === "backward") {
      next.body[event.layer][event.chunk] = "done";
      const sums = new Map((event.held ?? []).map(([i, ...norms]) => [i, norm(norms)]));
      for (const [i, ...norms] of event.sent)
        next.held[event.layer][i] = sums.get(i) ?? Math.hypot(next.held[event.layer][i], norm(norms));
    } else if (event.kind === "done") {
      column("done");
    } else if (event.kind === "end") { // the memory goes with the step
      next.filled = table(false);
      next.held = table(0);
    }
    next.gradient = event.gradient_norm ?? next.gradient;
    next.loss = event.kind === "end" || event.kind === "done" ? event.loss ?? next.loss : next.loss;
    all.push(next);
    state = next;
  }
  return all;
}

const runs = data.runs.map(runOf);
const here = { run: runs[0], step: 0, playing: null, ghosts: true, constant: true, left: new Map(), arrived: null };
const eventNow = () => here.run.events[here.step];
const stateNow = () => here.run.states[here.step];
const isState = (run, layer) => run.remembers[layer] === "state";
const lost = (run, i, layer) => !run.kept[i] && !isState(run, layer); // an adjoint passes a skipped chunk, decayed
const readBy = (run, j) => [...Array(j).keys()].filter((i) => i === j - 1 || !run.remembers.length || run.remembers.some((kind) => kind !== "state"));
const whatIsRemembered = (run) => {
  const kinds = [...new Set(run.remembers.length ? run.remembers : ["keys and values"])];
  return kinds.map((kind) => (kind === "state" ? "states" : kind)).join(", ");
};

// A phase begins where something else happens, or the same to another chunk: only the layers of a backward pass are one.
const phases = (run) => [...run.events.keys()].filter((i) => i === 0 || run.events[i].kind !== "backward" || run.events[i - 1].kind !== "backward");
