// The code with the current line, the current terms of the equations, the numbers; then buttons, keys, and the address,
// which names what is shown: #method=seco&chunk=128&step=17

function drawCode() {
  const { code } = here.run, { kind, up } = eventNow(), stack = code.where[up ? `${kind} up` : kind] ?? [];
  const also = kind === "relay" ? code.where.backward.at(-1) : []; // the relay is handed over in that line
  const mark = (f, l) => {
    const depth = stack.findIndex(([at, line]) => at === f && line === l);
    return depth >= 0 ? (depth === stack.length - 1 ? "current" : "caller") : also[0] === f && also[1] === l ? "also" : "";
  };
  const shown = (line) => escaped(line).replace(/ {2}# .*/, (comment) => `<span class="paper">${comment}</span>`);
  $("code").innerHTML = code.functions.map(({ name, file, first, lines }, f) => {
    const awake = f === 0 || stack.some(([at]) => at === f);
    const items = lines.map((line, l) => `<li class="${mark(f, l)}" value="${first + l}"><code>${shown(line)}</code></li>`);
    return `<div class="function"><h3>${name} <small>${file}${awake ? "" : " …"}</small></h3><ol>${awake ? items.join("") : ""}</ol></div>`;
  }).join("");
  const line = $("code").querySelector(".current");
  if (line) $("code").scrollTop = line.offsetTop - $("code").clientHeight / 2;
}

// What the table shows at an event: heads and rows of cells.
function tableOf(run, event) {
  const [start] = blockOf(run, event), [first, second] = isState(run, event.layer ?? start) ? ["state", "decay"] : ["keys", "values"];
  if (event.written) return {
    head: ["layer", "shape", `‖${first}‖`, `‖${second}‖`],
    rows: event.written.map((norms, l) => [start + l, event.shapes?.[l].length ? `[${event.shapes[l][0].join(", ")}]` : "–", ...norms.slice(0, 2)]),
  };
  if (event.kind === "relay" && event.received.length) return {
    head: ["layer", `gradient of ${first}`, `of ${second}`, "in all"],
    rows: event.received.map((norms, l) => [start + l, norms[0], norms[1] ?? "–", norm(norms)]),
  };
  if (event.kind === "backward" && event.sent.length) return {
    head: ["sent to", `‖∂${first}‖`, ...(event.sent[0].length > 2 ? [`‖∂${second}‖`] : []), "sum so far"],
    rows: event.sent.map(([i, ...norms]) => [chunkName(i) + (lost(run, i, event.layer) ? " (lost)" : ""), ...norms, heldOf(event, i) ?? "–"]),
  };
  return { head: [], rows: [] };
}

const soFar = (run, event) => (event.kind === "end" || run.whole ? "" : ["done", "keep"].includes(event.kind) ? "so far " : "before this chunk ");

function valuesOf(run, event, state) {
  const parts = [];
  if (event.chunk !== undefined && !run.whole) parts.push(`j = ${event.chunk}`);
  if (event.kind === "begin" && event.parameters) parts.push(`${event.parameters.toLocaleString("en")} parameters`, `batch of ${event.batch}`);
  if (event.kind === "loss") parts.push(`${(event.factor ?? 1) === 1 ? "" : "a·"}J = ${timesFactor(event, (x) => x.toPrecision(6))}${event.loss.toPrecision(6)}`);
  if (event.kind === "relay" && event.received.length) parts.push(`‖g‖ = ${norm(event.received.flat()).toPrecision(6)}`);
  if (event.kind === "end" || event.kind === "done") parts.push(`loss${event.kind === "done" ? " so far" : ""} ${event.loss?.toPrecision(6) ?? "–"}`);
  if (state.gradient !== null) parts.push(`‖dJ/dΘ‖ ${soFar(run, event)}= ${state.gradient.toPrecision(6)}`);
  return parts.join(" · ");
}

function drawNumbers() {
  const { run } = here, event = eventNow(), { head, rows } = tableOf(run, event);
  $("equation").className = run.whole ? "whole" : run.entries ? "kept" : "all"; // which equations, and which of their terms
  for (const node of $("equation").querySelectorAll("[data-at]")) node.classList.toggle("marked", node.dataset.at.split(" ").includes(event.kind));
  $("values").textContent = valuesOf(run, event, stateNow());
  $("numbers").tHead.innerHTML = head.length ? `<tr>${head.map((h) => `<th scope="col">${escaped(h)}</th>`).join("")}</tr>` : "";
  const cell = (c) => (typeof c === "number" && !Number.isInteger(c) ? `<td data-value="${c}">${c.toPrecision(5)}</td>` : `<td>${escaped(c)}</td>`);
  $("numbers").tBodies[0].innerHTML = rows.map((r) => `<tr>${r.map(cell).join("")}</tr>`).join("");
}

const sizes = [...new Set(runs.filter((run) => !run.whole).map((run) => run.size))];
let wantedSize = sizes[0];
const ofSize = (same) => same.find((run) => run.size === wantedSize) ?? same[0];

function go(step) {
  here.step = Math.max(0, Math.min(here.run.events.length - 1, step));
  const { run } = here, event = eventNow(), last = run.events.length - 1;
  $("slider").max = last;
  $("slider").value = here.step;
  $("count").textContent = `step ${here.step} of ${last}`;
  $("phase").textContent = phaseOf(event) + (event.chunk === undefined || run.whole ? "" : ` · ${chunkName(event.chunk)}`) + (event.layer === undefined ? "" : ` · ${layerName(event.layer)}`);
  $("intro").open = here.step === 0;
  $("phase").className = `kind-${event.kind}`;
  $("sentence").textContent = sentenceOf(run, event);
  $("size").value = wantedSize;
  $("size").disabled = run.whole;
  for (const button of $("methods").children) button.ariaPressed = String(button.textContent === run.label);
  const words = run.begin.text, at = event.chunk ?? event.chunks?.[0];
  const all = run.whole || event.kind === "begin" || at === undefined;
  $("words").innerHTML = words ? `<b>${all ? "The text" : sentenceCase(chunkName(at))}:</b> ${escaped(all ? words.join("") : words[at])}` : "";
  drawGrid();
  drawMemory();
  drawNumbers();
  drawCode(); // it has the room that the numbers leave
  history.replaceState(null, "", `#method=${encodeURIComponent(run.address)}${run.whole ? "" : `&chunk=${run.size}`}&step=${here.step}`);
}

// Another run, at the same place: where the same happens to the same chunk and layer, or else something like it.
function choose(run) {
  if (run === here.run) return;
  stop();
  const old = eventNow();
  const alike = (keys) => run.events.findIndex((e) => keys.every((key) => e[key] === old[key]));
  here.run = run;
  go([["kind", "chunk", "layer"], ["kind", "chunk"], ["kind"]].map(alike).find((i) => i >= 0) ?? 0);
}

// A phase begins where something else happens, or the same to another chunk: only the layers of a backward pass are one.
function phase(by) {
  const { events } = here.run, starts = [...events.keys()].filter((i) => i === 0 || events[i].kind !== "backward" || events[i - 1].kind !== "backward");
  go(by > 0 ? starts.find((i) => i > here.step) ?? events.length - 1 : starts.findLast((i) => i < here.step) ?? 0);
}

function stop() {
  clearInterval(here.playing);
  here.playing = null;
  $("play").textContent = "Play";
}

function play() {
  if (here.step === here.run.events.length - 1) go(0);
  stop();
  $("play").textContent = "Pause";
  here.playing = setInterval(() => {
    go(here.step + 1);
    if (here.step === here.run.events.length - 1) stop();
  }, Number($("speed").value));
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), size = Number(asked.get("chunk"));
  stop();
  if (sizes.includes(size)) wantedSize = size;
  here.run = ofSize(runs.filter((run) => run.address === (asked.get("method") ?? runs[0].address))) ?? runs[0];
  go(Number(asked.get("step")) || 0);
}

const actions = {
  first: () => go(0), back: () => go(here.step - 1), on: () => go(here.step + 1), last: () => go(Infinity),
  "back-chunk": () => phase(-1), "on-chunk": () => phase(1),
};
const KEYS = { Home: "first", End: "last", ArrowLeft: "back", ArrowRight: "on", PageUp: "back-chunk", PageDown: "on-chunk", " ": "play" };

function pressed(e) {
  const own = e.target.matches("select, input") || (e.key === " " && e.target.matches("#transport button, a, summary"));
  if (own || e.altKey || e.ctrlKey || e.metaKey || !KEYS[e.key]) return;
  $(KEYS[e.key]).click();
  e.preventDefault();
}

const { model, layers, tokens } = runs[0].begin;
$("of").textContent = `${model ? `${model}, ` : ""}${layers} layers, ${tokens ?? "?"} tokens`;
$("methods").innerHTML = [...new Set(runs.map((run) => run.label))].map((label) => `<button type="button">${escaped(label)}</button>`).join("");
$("size").innerHTML = sizes.map((size) => `<option>${size}</option>`).join("");
for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", () => { stop(); action(); });
for (const button of $("methods").children) button.addEventListener("click", () => choose(ofSize(runs.filter((run) => run.label === button.textContent))));
$("play").addEventListener("click", () => (here.playing ? stop() : play()));
$("speed").addEventListener("change", () => { $("speed").blur(); if (here.playing) play(); });
$("slider").addEventListener("input", () => { stop(); go(Number($("slider").value)); });
$("size").addEventListener("change", () => {
  $("size").blur(); // the keys are for the steps again
  wantedSize = Number($("size").value);
  choose(ofSize(runs.filter((run) => run.label === here.run.label)));
});
$("memory-panel").addEventListener("click", (e) => {
  const place = e.target.closest("[data-step]");
  if (!place) return;
  e.preventDefault();
  stop();
  go(Number(place.dataset.step));
});
$("log").addEventListener("click", () => {
  $("log").download = `${here.run.address}${here.run.whole ? "" : `-${here.run.size}`}.jsonl`;
  $("log").href = URL.createObjectURL(new Blob(here.run.events.map((e) => `${JSON.stringify(e)}\n`), { type: "application/jsonl" }));
});
document.addEventListener("keydown", pressed);
addEventListener("hashchange", fromAddress);
addEventListener("resize", () => go(here.step));
fromAddress();
