// Buttons, keys, the slider, and the address, which names what is shown: #method=seco&chunk=128&step=17

const methodOf = (run) => run.label;
const runFor = (label, size) => {
  const same = runs.filter((run) => methodOf(run) === label);
  return same.find((run) => run.size === size) ?? same[0];
};
const labels = [...new Set(runs.map(methodOf))];
const sizes = [...new Set(runs.filter((run) => !run.whole).map((run) => run.size))];
let wantedSize = sizes[0];

function draw() {
  const { run, step } = here, event = eventNow();
  $("slider").max = run.events.length - 1;
  $("slider").value = step;
  $("slider").setAttribute("aria-valuetext", `step ${step} of ${run.events.length - 1}, ${phaseOf(event)}`);
  $("count").textContent = `step ${step} of ${run.events.length - 1}`;
  $("phase").textContent = phaseOf(event) + (event.chunk === undefined || run.whole ? "" : ` · ${chunkName(event.chunk)}`) + (event.layer === undefined ? "" : ` · ${layerName(event.layer)}`);
  $("phase").className = `kind-${event.kind}`;
  $("sentence").textContent = sentenceOf(run, event, stateNow());
  if (step > 0 && !here.begun) $("intro").open = false; // once: who opens it again keeps it
  here.begun ||= step > 0;
  $("size-label").classList.toggle("idle", run.whole || sizes.length < 2);
  $("size").value = wantedSize;
  $("size").disabled = run.whole;
  for (const radio of document.querySelectorAll("#methods input")) radio.checked = radio.value === methodOf(run);
  const at = event.chunk ?? event.chunks?.[0];
  const words = event.kind !== "begin" && run.begin.text?.[at];
  $("words").innerHTML = words ? `<b>${run.whole ? "The text" : sentenceCase(chunkName(at))}:</b> ${escaped(words)}` : run.begin.text ? `<b>The text:</b> ${escaped(run.begin.text.join(""))}` : "";
  drawGrid();
  drawMemory();
  drawEquation();
  drawNumbers();
  drawCode(); // it has the room that the numbers leave
  const wanted = `#method=${encodeURIComponent(here.run.whole && run.recompute ? "full-recompute" : run.method)}${run.whole ? "" : `&chunk=${run.size}`}&step=${step}`;
  if (location.hash !== wanted) history.replaceState(null, "", wanted);
}

function go(step) {
  here.step = Math.max(0, Math.min(here.run.events.length - 1, step));
  draw();
}

// To where a run was left, if it is of another kind or nothing was done since. Or to the same place of it: its chunk and
// layer where it has them, or the first event of the kind.
const KINDRED = { rebuild: "forward", forward: "rebuild", relay: "loss" };
function choose(run) {
  if (run === here.run) return;
  stop();
  const old = eventNow(), known = here.left.get(run);
  here.left.set(here.run, here.step);
  const alike = (keys) => run.events.findIndex((e) => keys.every((key) => e[key] === old[key]));
  const found = [["kind", "chunk", "layer"], ["kind", "chunk"], ["kind"]].map(alike).find((i) => i >= 0) ?? Math.max(0, run.events.findIndex((e) => e.kind === KINDRED[old.kind]));
  const back = known !== undefined && (run.whole || here.run.whole || here.step === here.arrived);
  const step = back ? known : here.step === 0 ? 0 : found;
  here.run = run;
  go(step);
  here.arrived = here.step;
}

const phase = (by) => {
  const starts = phases(here.run);
  go(by > 0 ? starts.find((i) => i > here.step) ?? here.run.events.length - 1 : starts.findLast((i) => i < here.step) ?? 0);
};

function stop() {
  clearInterval(here.playing);
  here.playing = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-label", "Play");
  $("sentence").setAttribute("aria-live", "polite");
}

function play() {
  if (here.step === here.run.events.length - 1) go(0);
  clearInterval(here.playing);
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-label", "Pause");
  $("sentence").setAttribute("aria-live", "off"); // a reader would be cut short at every step
  here.playing = setInterval(() => {
    go(here.step + 1);
    if (here.step === here.run.events.length - 1) stop();
  }, Number($("speed").value));
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const method = asked.get("method") ?? runs[0].method, size = Number(asked.get("chunk") ?? wantedSize);
  if (sizes.includes(size)) wantedSize = size;
  const whole = method.startsWith("full");
  const fits = runs.filter((run) => (whole ? run.whole && run.recompute === (method !== "full") : run.method === method));
  here.run = fits.find((run) => run.size === wantedSize) ?? fits[0] ?? runs[0];
  go(Number(asked.get("step")) || 0);
}

const actions = {
  first: () => go(0), back: () => go(here.step - 1), on: () => go(here.step + 1), last: () => go(here.run.events.length - 1),
  "back-chunk": () => phase(-1), "on-chunk": () => phase(1),
};
const keys = { Home: "first", End: "last", ArrowLeft: "back", ArrowRight: "on", PageUp: "back-chunk", PageDown: "on-chunk" };

// Keys that a control needs itself; all others are the page's, wherever the focus is.
const OWN = {
  range: ["Home", "End", "ArrowLeft", "ArrowRight"], radio: ["ArrowLeft", "ArrowRight"], "select-one": [" ", "Home", "End"],
  checkbox: [" "], button: [" "],
};

function pressed(e) {
  const field = e.target.closest("input, select, button, a, summary");
  if (e.altKey || e.ctrlKey || e.metaKey || (field && OWN[field.type || "button"]?.includes(e.key))) return;
  if (e.key === " ") $("play").click();
  else if (keys[e.key]) $(keys[e.key]).click();
  else return;
  e.preventDefault();
}

function start() {
  $("about").innerHTML = aboutText();
  $("letters").innerHTML = lettersText();
  $("methods").insertAdjacentHTML("beforeend", labels.map((label) => `<label><input type="radio" name="method" value="${escaped(label)}"> ${escaped(label)}</label>`).join(""));
  $("size").innerHTML = sizes.map((size) => `<option value="${size}">${size}</option>`).join("");
  drawLegend();
  for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", () => { stop(); action(); });
  $("play").addEventListener("click", () => (here.playing ? stop() : play()));
  $("speed").addEventListener("change", () => { if (here.playing) play(); });
  $("slider").addEventListener("input", () => { stop(); go(Number($("slider").value)); });
  $("methods").addEventListener("change", (e) => choose(runFor(e.target.value, wantedSize)));
  $("size").addEventListener("change", () => { wantedSize = Number($("size").value); choose(runFor(methodOf(here.run), wantedSize)); });
  $("ghosts").addEventListener("change", (e) => { here.ghosts = e.target.checked; draw(); });
  $("constant").addEventListener("change", (e) => { here.constant = e.target.checked; draw(); });
  $("memory-panel").addEventListener("click", (e) => {
    const step = e.target.closest("[data-step]")?.dataset.step;
    if (step === undefined) return;
    e.preventDefault();
    stop();
    go(Number(step));
  });
  $("log").addEventListener("click", () => {
    const lines = here.run.events.map((e) => `${JSON.stringify(e)}\n`).join("");
    $("log").download = `${here.run.method}${here.run.whole ? "" : `-${here.run.size}`}.jsonl`;
    $("log").href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  });
  // Who points at a method wants the keys for the steps again; who came to it by the keyboard stays there.
  let pointing = false;
  addEventListener("pointerdown", () => { pointing = true; }, true);
  addEventListener("keydown", () => { pointing = false; }, true);
  $("controls").addEventListener("click", (e) => { if (pointing && e.target.type === "radio") e.target.blur(); });
  $("controls").addEventListener("change", (e) => { if (pointing && e.target.matches("select")) e.target.blur(); });
  document.addEventListener("keydown", pressed);
  addEventListener("hashchange", () => { stop(); fromAddress(); });
  addEventListener("resize", draw);
  fromAddress();
}

start();
