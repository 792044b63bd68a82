// What the page knows: the runs, and what a run has come to at each of its steps.
// Chunks and layers count from 0, as in the log and in the code.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const norm = (numbers) => Math.hypot(...numbers);
const chunkName = (i) => `chunk ${i}`;
const layerName = (i) => `layer ${i}`;
const blockOf = (run, event) => run.blocks[event.block ?? 0]; // its layers, [start, stop)

const number = (x) => (x && (Math.abs(x) >= 1000 || Math.abs(x) < 0.0001) ? x.toExponential(2) : String(Number(x.toPrecision(3))));
const mebibytes = (bytes) => (bytes && bytes < 2 ** 18 ? `${(bytes / 2 ** 10).toFixed(1)} KiB` : `${(bytes / 2 ** 20).toFixed(2)} MiB`);

const LABELS = { full: "full", seco: "SeCO", spaco: "SpaCO" };
const PARTS = [
  ["weights", "weights"], ["gradients", "their gradients"], ["memory", "memory"],
  ["memory_gradients", "gradients sent to it"], ["activations", "activations, and all else"],
];

function runOf({ events }) {
  const [begin] = events;
  const entries = events.find((e) => e.kind === "draw")?.entries ?? null, blocks = begin.blocks ?? [[0, begin.layers]];
  const parts = begin.blocks ? "-blocks" : "", remembered = (b) => events.find((e) => e.kind === "memory" && (e.block ?? 0) === b);
  const run = {
    begin, entries, events, blocks, layers: begin.layers, chunks: begin.chunks, method: begin.method,
    label: LABELS[begin.method] + (begin.recompute ? ", recomputed" : "") + (parts && ", in blocks"),
    address: begin.method === "full" && begin.recompute ? "full-recompute" : begin.method + parts,
    kept: begin.chunks.map((_, i) => !entries || entries[i] !== null),
    recompute: Boolean(begin.recompute), whole: begin.method === "full",
    size: Math.max(...begin.chunks.map(([start, stop]) => stop - start)),
    remembers: blocks.flatMap((_, b) => remembered(b)?.remembers ?? []),
    code: data.code[begin.method + parts] ?? data.code.seco,
  };
  run.states = statesOf(run);
  run.largest = Math.max(1e-300, ...run.states.map((s) => Math.max(...s.held.flat())));
  run.peak = events.reduce((best, e, i) => ((e.peak ?? -1) > (events[best].peak ?? -1) ? i : best), 0);
  return run;
}

const heldOf = (event, i) => event.held?.filter(([chunk]) => chunk === i).map(([, ...norms]) => norm(norms))[0];

// At each step: what the body of every cell is (none, run, graph, input, done), whether its memory is filled, the norm
// of what has been sent back to it, whether that has been relayed, and what is kept between blocks, its input or a gradient.
function statesOf(run) {
  const table = (value) => Array.from({ length: run.layers }, () => run.chunks.map(() => value));
  let state = { body: table("none"), filled: table(false), held: table(0), relayed: table(false), input: table(""), gradient: null };
  return run.events.map((event) => {
    const [first, stop] = blockOf(run, event);
    state = structuredClone(state);
    for (const row of state.body) row.forEach((body, i) => { if (body === "run") row[i] = "none"; });
    const column = (what, i, value) => state[what].slice(first, stop).forEach((row) => { row[i] = value; });
    if (event.kind === "fill") {
      for (const i of event.chunks) { column("body", i, "run"); column("filled", i, true); }
    } else if (event.kind === "rebuild" || event.kind === "forward") {
      column("body", event.chunk, run.recompute ? "input" : "graph");
    } else if (event.kind === "relay") {
      event.received.forEach((norms, l) => { state.held[first + l][event.chunk] = norm(norms); state.relayed[first + l][event.chunk] = true; });
    } else if (event.kind === "backward") {
      state.body[event.layer][event.chunk] = "done";
      for (const [i, ...norms] of event.sent) state.held[event.layer][i] = heldOf(event, i) ?? Math.hypot(state.held[event.layer][i], norm(norms));
    } else if (event.kind === "done") {
      column("body", event.chunk, "done");
    } else if (event.kind === "keep") {
      for (const i of event.chunks) state.input[event.layer][i] = event.up ? "kept" : "sent";
    } else if (event.kind === "memory" || event.kind === "end") { // the one before has gone, with its block or the step
      Object.assign(state, { filled: table(false), held: table(0), relayed: table(false) });
      state.input.forEach((row, l) => { if (l > stop || event.kind === "end") row.fill(""); });
    }
    state.gradient = event.gradient_norm ?? state.gradient;
    return state;
  });
}

const runs = data.runs.map(runOf);
const here = { run: runs[0], step: 0, playing: null };
const eventNow = () => here.run.events[here.step];
const stateNow = () => here.run.states[here.step];
const isState = (run, layer) => run.remembers[layer] === "state";
const lost = (run, i, layer) => !run.kept[i] && !isState(run, layer); // a state's adjoint passes a skipped chunk, decayed
const drawn = (run) => run.entries && here.step >= run.events.findIndex((e) => e.kind === "draw");
const whatIsRemembered = (run) => [...new Set(run.remembers.length ? run.remembers : ["keys and values"])].map((kind) => (kind === "state" ? "states" : kind)).join(", ");
