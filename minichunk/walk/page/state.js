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

const LABELS = { full: "full", seco: "SeCO", spaco: "SpaCO" };
const PARTS = [
  ["weights", "weights"], ["gradients", "their gradients"], ["memory", "memory"],
  ["memory_gradients", "gradients sent to it"], ["activations", "activations, and all else"],
];

function runOf({ name, events }) {
  const [begin] = events;
  const entries = events.find((e) => e.kind === "draw")?.entries ?? null;
  const run = {
    begin, entries, events, layers: begin.layers, chunks: begin.chunks, method: begin.method,
    label: name ?? (LABELS[begin.method] ?? begin.method) + (begin.recompute ? ", recomputed" : ""),
    address: begin.method === "full" && begin.recompute ? "full-recompute" : begin.method,
    kept: begin.chunks.map((_, i) => !entries || entries[i] !== null),
    recompute: Boolean(begin.recompute), whole: begin.method === "full",
    size: Math.max(...begin.chunks.map(([start, stop]) => stop - start)),
    remembers: events.find((e) => e.kind === "memory")?.remembers ?? [],
    code: data.code[begin.method] ?? data.code.seco,
  };
  run.states = statesOf(run);
  run.largest = Math.max(1e-300, ...run.states.map((s) => Math.max(...s.held.flat())));
  run.peak = events.reduce((best, e, i) => ((e.peak ?? -1) > (events[best].peak ?? -1) ? i : best), 0);
  return run;
}

// At each step: what the body of every cell is (none, run, graph, input, done), whether its memory is filled, the norm
// of what has been sent back to it, and whether that has been relayed.
function statesOf(run) {
  const table = (value) => Array.from({ length: run.layers }, () => run.chunks.map(() => value));
  let state = { body: table("none"), filled: table(false), held: table(0), relayed: table(false), gradient: null };
  const all = [];
  for (const event of run.events) {
    state = structuredClone(state);
    for (const row of state.body) row.forEach((body, i) => { if (body === "run") row[i] = "none"; });
    const column = (what, i, value) => state[what].forEach((row) => { row[i] = value; });
    if (event.kind === "fill") {
      for (const i of event.chunks) { column("body", i, "run"); column("filled", i, true); }
    } else if (event.kind === "rebuild" || event.kind === "forward") {
      column("body", event.chunk, run.recompute ? "input" : "graph");
    } else if (event.kind === "relay") {
      event.received.forEach((norms, l) => { state.held[l][event.chunk] = norm(norms); state.relayed[l][event.chunk] = true; });
    } else if (event.kind === "backward") {
      state.body[event.layer][event.chunk] = "done";
      const sums = new Map((event.held ?? []).map(([i, ...norms]) => [i, norm(norms)]));
      for (const [i, ...norms] of event.sent) state.held[event.layer][i] = sums.get(i) ?? Math.hypot(state.held[event.layer][i], norm(norms));
    } else if (event.kind === "done") {
      column("body", event.chunk, "done");
    } else if (event.kind === "end") { // the memory goes with the step
      state.filled = table(false);
      state.held = table(0);
    }
    state.gradient = event.gradient_norm ?? state.gradient;
    all.push(state);
  }
  return all;
}

const runs = data.runs.map(runOf);
const here = { run: runs[0], step: 0, playing: null };
const eventNow = () => here.run.events[here.step];
const stateNow = () => here.run.states[here.step];
const isState = (run, layer) => run.remembers[layer] === "state";
const lost = (run, i, layer) => !run.kept[i] && !isState(run, layer); // a state's adjoint passes a skipped chunk, decayed
const drawn = (run) => run.entries && here.step >= run.events.findIndex((e) => e.kind === "draw");
const whatIsRemembered = (run) => [...new Set(run.remembers.length ? run.remembers : ["keys and values"])].map((kind) => (kind === "state" ? "states" : kind)).join(", ");
