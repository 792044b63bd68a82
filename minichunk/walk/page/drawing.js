// The two drawings: chunks by layers, and the bytes that are alive.

const DEFS = `<defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" class="graph-fill"/><line x1="0" y1="0" x2="0" y2="6" class="graph-line"/></pattern>
<pattern id="skip" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)"><line x1="0" y1="0" x2="0" y2="7" class="skip-line"/></pattern>
${["green", "blue", "red"].map((c) => `<marker id="tip-${c}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" class="tip-${c}"/></marker>`).join("")}
</defs>`;
const STRIP = 0.5, GRADIENT = 0.76, THIN = 0.23; // of a cell's height: where the memory and what is sent to it begin, how high they are

const rect = (x, y, w, h, kind, extra = "") => `<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${Math.max(0, w).toFixed(1)}" height="${h.toFixed(1)}" class="${kind}" ${extra}/>`;
const text = (x, y, words, kind = "", anchor = "middle") => `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" class="${kind}" text-anchor="${anchor}">${escaped(words)}</text>`;
const thickness = (size, run) => (1.2 + 4 * Math.sqrt(size / run.largest)).toFixed(1);

function paint(svg, width, height, label, content) {
  for (const [name, value] of [["viewBox", `0 0 ${width} ${height}`], ["width", width], ["height", height], ["aria-label", label]]) svg.setAttribute(name, value);
  svg.innerHTML = content;
}

// A column is as wide as its chunk is long, so that the orange area is what is alive as activations.
// A cell has its graph above, below it what it left in the memory, and what has been sent back to that.
function drawGrid() {
  const { run } = here, event = eventNow(), state = stateNow(), svg = $("grid");
  const width = Math.max(300, svg.parentElement.clientWidth - 24);
  const narrow = width < 420, left = narrow ? 44 : 66, gap = narrow ? 4 : 8, head = 40, tall = innerHeight > 950 && !narrow;
  const height = Math.max(24, Math.min(tall ? 72 : narrow ? 38 : 45, (tall ? 450 : 290) / run.layers));
  const total = run.chunks.at(-1)[1] - run.chunks[0][0];
  const free = width - left - gap * (run.chunks.length - 1) - 10; // and room for an arrow on the right
  const columns = run.chunks.map(([start, stop], i) => ({ x: left + (start / total) * free + gap * i, w: ((stop - start) / total) * free }));
  const row = height + (run.begin.blocks ? 11 : 5), top = (layer) => head + (run.layers - 1 - layer) * row, bottom = head + run.layers * row;
  const at = { columns, top, height, bottom, left, width, narrow, run, event, state };
  const label = `${run.chunks.length} chunks by ${run.layers} layers. ${sentenceOf(run, event)}`;
  const arrows = { fill: reads, rebuild: reads, relay: relays, backward: sends }[event.kind] ?? (() => "");
  paint(svg, width, bottom + 34, label, DEFS + heads(at) + columns.map((_, i) => cells(at, i)).join("") + theta(at) + arrows(at));
}

function heads({ columns, run, event, top, height, left, narrow }) {
  const coin = drawn(run), tight = columns.some(({ w }) => w < 66) && !run.whole;
  const parts = columns.map(({ x, w }, i) => {
    const active = event.kind !== "begin" && (event.chunk === i || event.chunks?.includes(i));
    const tokens = run.chunks[i][1] - run.chunks[i][0], times = `×${number(run.entries?.[i]?.[0] ?? 1)}`;
    const below = !coin ? (tight ? tokens : `${tokens} tokens`) : run.kept[i] ? (w < 50 ? times : `kept ${times}`) : w < 50 ? "skip" : "skipped";
    return text(x + w / 2, 14, run.whole ? "the whole text" : tight ? i : chunkName(i), active ? "head active" : "head") +
      text(x + w / 2, 29, below, coin && !run.kept[i] ? "small skipped" : "small");
  });
  if (tight) parts.push(text(left - 6, 14, "chunk", "small", "end"));
  if (narrow) parts.push(text(left - 6, 31, "layer", "small", "end"));
  for (let l = 0; l < run.layers; l++) parts.push(text(left - 6, top(l) + height / 2 + 4, narrow ? l : layerName(l), "small", "end"));
  return parts.join("");
}

function cells({ columns, top, height, narrow, run, event, state }, i) {
  const { x, w } = columns[i], parts = [], thin = height * THIN, upper = run.whole ? height : height * 0.46, [first, stop] = blockOf(run, event);
  for (let l = 0; l < run.layers; l++) {
    const y = top(l), body = state.body[l][i], held = state.held[l][i];
    const atWork = event.chunk === i && (event.layer ?? l) === l && first <= l && l < stop && event.kind !== "done";
    parts.push(rect(x, y, w, upper, `body ${body}${atWork ? " at-work" : ""}`, `data-cell="${l},${i}" data-body="${body}"`));
    if (body === "input") parts.push(rect(x, y, 10, upper, "kept-input"));
    if (drawn(run) && !run.kept[i]) parts.push(rect(x, y, w, upper, "", 'fill="url(#skip)"'));
    const aside = event.kind === "relay" && event.chunk === i && event.received[l - first]?.length ? 14 : 0; // there stands an arrow
    if (w > 70 && upper > 15) parts.push(text(x + w / 2 + aside, y + upper / 2 + 4, { run: "run, not kept", graph: "graph", input: "input kept", done: "done", none: "" }[body], `small in-${body}`));
    if (state.input[l][i]) parts.push(rect(x, y + height + 2, w, 7, state.input[l][i] === "kept" ? "kept-input" : "sent", `data-input="${l},${i}"`));
    if (run.whole) continue;
    parts.push(rect(x, y + height * STRIP, w, thin, state.filled[l][i] ? "memory filled" : "memory empty", `data-memory="${l},${i}"`));
    parts.push(rect(x, y + height * GRADIENT, w, thin, "room"));
    if (!held) continue;
    const roomy = w > 80 && !narrow, length = Math.max(2, (roomy ? w - 56 : w) * Math.sqrt(held / run.largest));
    const kind = lost(run, i, l) ? "sent lost" : state.relayed[l][i] ? "sent relayed" : "sent";
    parts.push(rect(x, y + height * GRADIENT, length, thin, kind, `data-held="${l},${i}" data-norm="${held}"`));
    if (roomy) parts.push(text(x + w - 4, y + height * (GRADIENT + THIN) - thin / 2 + 3.5, number(held), "tiny", "end"));
  }
  return parts.join("");
}

function theta({ bottom, left, width, narrow, event, state, run }) {
  const words = state.gradient === null ? "parameters Θ" : `${narrow ? "Θ: " : "parameters Θ: gradient of "}norm ${number(state.gradient)} ${soFar(run, event)}`.trimEnd();
  return rect(left, bottom + 6, width - left - 2, 24, event.kind === "backward" || event.kind === "done" ? "theta active" : "theta") + text(left + (width - left) / 2, bottom + 22, words, "small");
}

// What a chunk reads: a line along the memory of the chunks before it.
function reads({ columns, top, height, run, event, state }) {
  const j = event.chunk ?? event.chunks[0];
  return state.filled.map((_, l) => {
    const y = top(l) + height * (STRIP + THIN / 2), from = isState(run, l) && j ? columns[j - 1].x + columns[j - 1].w : columns[0].x;
    return j && state.filled[l][0] ? `<path d="M${from} ${y}H${columns[j].x}" class="read flow" marker-end="url(#tip-blue)"/>` : "";
  }).join("");
}

function relays({ columns, top, height, event, run }) {
  const { x, w } = columns[event.chunk], [first] = blockOf(run, event);
  return event.received.map((norms, l) => {
    const size = norm(norms), half = 1 + Number(thickness(size, run)) / 2, middle = x + Math.min(w * 0.2, 18), y = top(first + l);
    const path = `M${middle - half} ${y + height * 0.95}V${y + 13}h-5L${middle} ${y + 2}L${middle + half + 5} ${y + 13}h-5V${y + height * 0.95}z`;
    return `<path d="${path}" class="handed" data-relayed="${first + l}" data-norm="${size}"/>` +
      (w > 60 ? text(middle + half + 8, y + height * (STRIP + THIN / 2) + 4, "relay", "on-memory", "start") : "");
  }).join("");
}

// Through the bodies of earlier chunks, which are empty now, down to where the gradient gathers; and into the parameters.
function sends({ columns, top, height, narrow, event, run, bottom }) {
  const y = top(event.layer), { x, w } = columns[event.chunk], count = event.sent.length;
  const arrows = event.sent.map(([i, ...norms], n) => {
    const to = columns[i], dead = lost(run, i, event.layer), end = to.x + to.w * (to.w > 80 ? 0.2 : 0.5), size = norm(norms);
    const lane = y + height * (0.04 + (0.4 * (n + 1)) / (count + 1));
    const path = `M${x} ${lane}H${end + 6}Q${end} ${lane},${end} ${lane + 6}V${y + height * 0.86}`;
    return `<path d="${path}" class="${dead ? "send dead" : "send flow"}" style="stroke-width:${thickness(size, run)}" marker-end="url(#tip-${dead ? "red" : "green"})" data-sent="${i}" data-norm="${size}"/>` +
      (to.w > 80 && !narrow ? text(to.x + to.w - 4, y + height * (STRIP + THIN / 2) + 3.5, dead ? `${number(size)}${to.w > 110 ? " lost" : ""}` : `+ ${number(size)}`, "tiny on-memory", "end") : "");
  });
  return arrows.join("") + `<path d="M${x + w} ${y + height * 0.25}h4V${bottom + 5}" class="send plain flow" marker-end="url(#tip-green)"/>`;
}

// Bytes at every event, stacked; above them, as a thin line, the most that was alive since the event before.
function drawMemory() {
  const { run, step } = here, svg = $("memory"), { events } = run;
  const counted = events.every((e) => e.bytes && e.peak !== undefined);
  svg.parentElement.classList.toggle("absent", !counted);
  if (!counted) return;
  const width = Math.max(300, svg.parentElement.clientWidth - 24), height = innerHeight > 950 && innerWidth > 860 ? 310 : 190, left = 34, right = 8, top = 30, base = height - 8;
  const ghosts = runs.filter((other) => other.whole && other !== run && other.events.every((e) => e.peak !== undefined));
  const most = Math.max(...[run, ...ghosts].map((r) => r.events[r.peak].peak)) * 1.02;
  const y = (bytes) => base - (bytes / most) * (base - top), slot = (width - left - right) / events.length;
  const shapes = events.map((e, n) => {
    let below = 0;
    const bars = PARTS.map(([name]) => {
      const size = Math.max(0, e.bytes[name]);
      below += size;
      return rect(left + n * slot, y(below), Math.max(0.6, slot - (slot > 5 ? 1 : 0)), y(below - size) - y(below), `bar ${name}`);
    });
    const tick = `<path d="M${left + n * slot} ${y(e.peak)}h${slot}" class="most"/>`;
    return `<g class="${n > step ? "ahead" : ""}" data-step="${n}">${rect(left + n * slot, top - 24, slot, base - top + 24, "hit")}${bars.join("")}${tick}</g>`;
  });
  const peak = events[run.peak], px = left + (run.peak + 0.5) * slot, side = px > width / 2 ? "end" : "start";
  const mark = `<path d="M${left + (step + 0.5) * slot} ${top - 4}V${base}" class="cursor"/>` +
    `<path d="M${px} ${top - 8}V${y(peak.peak) - 6}" class="leader"/><path d="M${px - 5} ${y(peak.peak) - 10}h10l-5 8z" class="peak" data-step="${run.peak}"/>` +
    text(side === "end" ? px + 5 : px - 5, top - 12, `peak ${mebibytes(peak.peak)}`, "peak-label", side);
  const place = { width, left, right, y, most };
  paint(svg, width, height, `Bytes alive at each of ${events.length} steps. The peak, ${mebibytes(peak.peak)}, is at step ${run.peak}: ${phaseOf(peak)}.`,
    axis(place) + ghosts.map((g, n) => ghost(g, n, place)).join("") + shapes.join("") + mark);
  const line = (kind, words) => `<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4h30" class="${kind}"/></svg> ${words}</li>`;
  $("ghost-legend").innerHTML = ghosts.map((g, n) => line(`ghost ghost-${n}`, `${escaped(g.label)} (stretched), peak <b>${mebibytes(g.events[g.peak].peak)}</b>`)).join("") + line("most", "most since the step before");
  drawBytes(eventNow(), peak);
}

function axis({ most, width, right, left, y }) {
  const [unit, size] = most < 2 ** 20 ? ["KiB", 2 ** 10] : most < 2 ** 30 ? ["MiB", 2 ** 20] : ["GiB", 2 ** 30];
  const least = most / size / 5, power = 10 ** Math.floor(Math.log10(least)), stride = power * [1, 2, 5, 10].find((f) => f * power >= least);
  return [...Array(Math.floor(most / size / stride) + 1).keys()].map((n) =>
    `<path d="M${left} ${y(n * stride * size)}H${width - right}" class="rule"/>` + text(left - 4, y(n * stride * size) + 4, String(Number((n * stride).toPrecision(3))), "small", "end")).join("") + text(2, 12, unit, "small", "start");
}

// Another method's step, from its first to its last event; a dot is its peak.
function ghost(run, n, { width, left, right, y }) {
  const slot = (width - left - right) / run.events.length;
  const points = run.events.map((e, i) => `${i ? "L" : "M"}${left + i * slot} ${y(e.peak)}h${slot}`).join("");
  return `<path d="${points}" class="ghost ghost-${n}"/><circle cx="${left + (run.peak + 0.5) * slot}" cy="${y(run.events[run.peak].peak)}" r="3" class="ghost-peak"/>`;
}

function drawBytes(event, peak) {
  const sum = PARTS.reduce((total, [name]) => total + event.bytes[name], 0);
  const rows = PARTS.map(([name, words]) => [`<i class="swatch bar ${name}"></i>${name === "memory" ? `memory (${whatIsRemembered(here.run)})` : words}`, event.bytes[name], name]);
  rows.push(["all that is alive now", sum, "sum"], ["most since the step before", event.peak, "peak-now"], ["peak of the step", peak.peak, "peak"]);
  const where = phaseOf(peak).toLowerCase() + (peak.chunk === undefined || here.run.whole ? "" : ` of ${chunkName(peak.chunk)}`);
  $("peak-note").innerHTML = `▼ The peak is reached at <a href="#" data-step="${here.run.peak}">step ${here.run.peak}</a>, ${where}, with ${graphOf(here.run)}.`;
  $("bytes").tBodies[0].innerHTML = rows.map(([words, bytes, name]) =>
    `<tr class="row-${name}"><th scope="row">${words}</th><td data-part="${name}" data-bytes="${bytes}" title="${bytes.toLocaleString("en")} bytes">${mebibytes(bytes)}</td></tr>`).join("");
}
