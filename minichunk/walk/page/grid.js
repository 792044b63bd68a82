// Chunks by layers. A column is as wide as its chunk is long, so that the orange area is what is alive as activations.
// A cell has its graph above, below it what it left in the memory, and what has been sent back to that.

function drawGrid() {
  const { run } = here, event = eventNow(), state = stateNow();
  const svg = $("grid");
  const width = Math.max(300, svg.parentElement.clientWidth - 24);
  const narrow = width < 420, left = narrow ? 44 : 66, gap = narrow ? 4 : 8, head = 40;
  const tall = innerHeight > 950 && !narrow;
  const height = Math.max(24, Math.min(tall ? 72 : narrow ? 38 : 45, (tall ? 450 : 290) / run.layers));
  const total = run.chunks.reduce((sum, [start, stop]) => sum + stop - start, 0);
  const free = width - left - gap * (run.chunks.length - 1) - 10; // and room for an arrow on the right
  let x = left;
  const columns = run.chunks.map(([start, stop]) => {
    const column = { x, w: ((stop - start) / total) * free };
    x += column.w + gap;
    return column;
  });
  const top = (layer) => head + (run.layers - 1 - layer) * (height + 5);
  const bottom = head + run.layers * (height + 5);
  const at = { columns, top, height, bottom, left, width, narrow, run, event, state };
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 34}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", bottom + 34);
  svg.setAttribute("aria-label", gridLabel(run, event, state));
  svg.innerHTML = DEFS + [heads(at), ...columns.map((_, i) => cells(at, i)), theta(at), arrows(at)].join("");
}

const DEFS = `<defs>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" class="graph-fill"/><line x1="0" y1="0" x2="0" y2="6" class="graph-line"/></pattern>
<pattern id="skip" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)"><line x1="0" y1="0" x2="0" y2="7" class="skip-line"/></pattern>
${["green", "blue", "red"].map((c) => `<marker id="tip-${c}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" class="tip-${c}"/></marker>`).join("")}
</defs>`;

const rect = (x, y, w, h, kind, extra = "") => `<rect x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${Math.max(0, w).toFixed(1)}" height="${h.toFixed(1)}" class="${kind}" ${extra}/>`;
const text = (x, y, words, kind = "", anchor = "middle") => `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" class="${kind}" text-anchor="${anchor}">${escaped(words)}</text>`;

function heads({ columns, run, event, top, height, left }) {
  const coin = drawn(run), tight = columns.some(({ w }) => w < 66) && !run.whole;
  const parts = columns.map(({ x, w }, i) => {
    const active = event.kind !== "begin" && (event.chunk === i || event.chunks?.includes(i));
    const tokens = run.chunks[i][1] - run.chunks[i][0], factor = run.entries?.[i]?.[0];
    const below = !coin ? (tight ? tokens : `${tokens} tokens`) : run.kept[i] ? (w < 50 ? `×${number(factor)}` : `kept ×${number(factor)}`) : w < 50 ? "skip" : "skipped";
    return text(x + w / 2, 14, run.whole ? "the whole text" : tight ? i : chunkName(i), active ? "head active" : "head") +
      text(x + w / 2, 29, below, coin && !run.kept[i] ? "small skipped" : "small");
  });
  if (tight) parts.push(text(left - 6, 14, "chunk", "small", "end"));
  if (left < 50) parts.push(text(left - 6, 31, "layer", "small", "end"));
  const ranks = run.rankOf;
  for (let l = 0; l < run.layers; l++) {
    const name = left < 50 ? l : layerName(l);
    parts.push(text(left - 6, top(l) + height / 2 + 4, (ranks[l] === undefined ? "" : `rank ${ranks[l]}: `) + (ranks[l] === undefined ? name : l), "small", "end"));
  }
  return parts.join("");
}

const drawn = (run) => run.entries && here.step >= run.events.findIndex((e) => e.kind === "draw");

const STRIP = 0.5, GRADIENT = 0.76, THIN = 0.23; // of a cell's height

function cells({ columns, top, height, narrow, run, event, state }, i) {
  const { x, w } = columns[i], parts = [], skipped = drawn(run) && !run.kept[i], thin = height * THIN;
  for (let l = 0; l < run.layers; l++) {
    const y = top(l), body = state.body[l][i], upper = run.whole ? height : height * 0.46, held = state.held[l][i], dead = lost(run, i, l);
    const atWork = event.chunk === i && isOf(run, event, l) && (event.kind !== "backward" || event.layer === l) && !["done", "end"].includes(event.kind);
    parts.push(rect(x, y, w, upper, `body ${body}${atWork ? " at-work" : ""}`, `data-cell="${l},${i}" data-body="${body}"`));
    if (body === "input") parts.push(rect(x, y, 10, upper, "kept-input"));
    if (skipped) parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${upper}" fill="url(#skip)"/>`);
    const aside = event.kind === "relay" && event.chunk === i && event.received[l]?.length ? 14 : 0; // there stands an arrow
    if (w > 70 && upper > 15) parts.push(text(x + w / 2 + aside, y + upper / 2 + 4, { run: "run, not kept", graph: "graph", input: "input kept", done: "done", none: "" }[body], `small in-${body}`));
    if (run.whole) continue;
    parts.push(rect(x, y + height * STRIP, w, thin, state.filled[l][i] ? "memory filled" : "memory empty", `data-memory="${l},${i}"`));
    parts.push(rect(x, y + height * GRADIENT, w, thin, "room"));
    if (!held) continue;
    const roomy = w > 80 && !narrow, length = Math.max(2, (roomy ? w - 56 : w) * Math.sqrt(held / run.largest));
    parts.push(rect(x, y + height * GRADIENT, length, thin, dead ? "sent lost" : state.relayed[l][i] ? "sent relayed" : "sent", `data-held="${l},${i}" data-norm="${held}"`));
    if (roomy) parts.push(text(x + w - 4, y + height * (GRADIENT + THIN) - thin / 2 + 3.5, number(held), "tiny", "end"));
  }
  return parts.join("");
}

function theta({ bottom, left, width, narrow, event, state, run }) {
  const words = state.gradient === null ? "parameters Θ" : `${narrow ? "Θ: " : "parameters Θ: gradient of "}norm ${number(state.gradient)} ${soFar(run, event)}`.trimEnd();
  return rect(left, bottom + 6, width - left - 2, 24, event.kind === "backward" || event.kind === "done" ? "theta active" : "theta") + text(left + (width - left) / 2, bottom + 22, words, "small");
}

function arrows(at) {
  const { event } = at;
  if (event.kind === "fill" || event.kind === "rebuild") return reads(at, event.chunk ?? event.chunks[0]);
  if (event.kind === "relay") return relays(at);
  if (event.kind === "backward") return sends(at) + intoTheta(at);
  return "";
}

// What a chunk reads: a line along the memory of the chunks before it.
function reads({ columns, top, height, run, event }, j) {
  if (!j) return "";
  const lines = [];
  for (let l = 0; l < run.layers; l++) {
    if (!isOf(run, event, l)) continue;
    const y = top(l) + height * (STRIP + THIN / 2), from = isState(run, l) ? columns[j - 1].x + columns[j - 1].w : columns[0].x;
    lines.push(`<path d="M${from} ${y}H${columns[j].x}" class="read flow" marker-end="url(#tip-blue)"/>`);
  }
  return lines.join("");
}

function relays({ columns, top, height, event, run }) {
  const { x, w } = columns[event.chunk];
  return event.received.map((norms, l) => {
    if (!isOf(run, event, l)) return "";
    const size = norm(norms), half = 1 + Number(thickness(size, run)) / 2, middle = x + Math.min(w * 0.2, 18), y = top(l);
    const path = `M${middle - half} ${y + height * 0.95}V${y + 13}h-5L${middle} ${y + 2}L${middle + half + 5} ${y + 13}h-5V${y + height * 0.95}z`;
    return `<path d="${path}" class="handed" data-relayed="${l}" data-norm="${size}"/>` +
      (w > 60 ? text(middle + half + 8, y + height * (STRIP + THIN / 2) + 4, "relay", "on-memory", "start") : "");
  }).join("");
}

const thickness = (size, run) => (1.2 + 4 * Math.sqrt(size / run.largest)).toFixed(1);

// Through the bodies of earlier chunks, which are empty now, down to where the gradient gathers.
function sends({ columns, top, height, narrow, event, run }) {
  const y = top(event.layer), start = columns[event.chunk].x, count = event.sent.length;
  return event.sent.map(([i, ...norms], n) => {
    const to = columns[i], dead = lost(run, i, event.layer), end = to.x + to.w * (to.w > 80 ? 0.2 : 0.5), size = norm(norms);
    const lane = y + height * (0.04 + (0.4 * (n + 1)) / (count + 1));
    const path = `M${start} ${lane}H${end + 6}Q${end} ${lane},${end} ${lane + 6}V${y + height * 0.86}`;
    return `<path d="${path}" class="${dead ? "send dead" : "send flow"}" style="stroke-width:${thickness(size, run)}" marker-end="url(#tip-${dead ? "red" : "green"})" data-sent="${i}" data-norm="${size}"/>` +
      (to.w > 80 && !narrow ? text(to.x + to.w - 4, y + height * (STRIP + THIN / 2) + 3.5, dead ? `${number(size)}${to.w > 110 ? " lost" : ""}` : `+ ${number(size)}`, "tiny on-memory", "end") : "");
  }).join("");
}

function intoTheta({ columns, bottom, event, top, height }) {
  const { x, w } = columns[event.chunk];
  return `<path d="M${x + w} ${top(event.layer) + height * 0.25}h4V${bottom + 5}" class="send plain flow" marker-end="url(#tip-green)"/>`;
}

function gridLabel(run, event, state) {
  const count = (kind) => run.chunks.filter((_, i) => state.body.some((row) => row[i] === kind)).length;
  const filled = run.chunks.filter((_, i) => state.filled[0][i]).length;
  return `${run.chunks.length} chunks by ${run.layers} layers. ${filled} in the memory, graph of ${count("graph") + count("input")} alive. ${sentenceOf(run, event, state)}`;
}

const LEGEND = [
  ["graph", "graph and activations alive"], ["filled", "left in the memory: keys and values, or a state"], ["sent", "gradient sent back to it (bar: root of its norm)"],
  ["relayed", "the same, handed over"], ["run", "run, nothing kept but the memory"], ["done", "done"], ["read", "what it reads"],
  ["send", "gradients on their way: the thicker, the larger"], ["skipped", "skipped by a coin"], ["lost", "thrown away"],
];
function drawLegend() {
  const coins = runs.some((run) => run.entries);
  $("legend").innerHTML = LEGEND.filter(([kind]) => coins || !["skipped", "lost"].includes(kind)).map(([kind, words]) => `<li><i class="swatch ${kind}"></i>${words}</li>`).join("");
}
