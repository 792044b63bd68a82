// The code with the current line, the equation with the current term, and the table of numbers.

function drawCode() {
  const { run } = here, { kind } = eventNow(), stack = run.code.where[kind] ?? [], also = run.code.also[kind] ?? [];
  const mark = (f, l) => {
    const depth = stack.findIndex(([at, line]) => at === f && line === l);
    return depth === stack.length - 1 && depth >= 0 ? "current" : also.some(([at, line]) => at === f && line === l) ? "also" : depth < 0 ? "" : "caller";
  };
  const asleep = (at) => at > 0 && stack.length > 1 && !stack.some(([f]) => f === at); // called by no line that is marked
  $("code").innerHTML = run.code.functions.map((f, at) =>
    `<div class="function"><h3>${escaped(f.name)} <small>${escaped(f.file)}${asleep(at) ? " …" : ""}</small></h3><ol start="${f.first}">` +
    (asleep(at) ? [] : f.lines).map(([line, paper], l) => {
      const kind = mark(at, l);
      return `<li class="${kind}" ${kind === "current" ? 'aria-current="step"' : ""} value="${f.first + l}"><code>${escaped(line)}</code>${paper ? `<span class="paper">${escaped(paper)}</span>` : ""}</li>`;
    }).join("") + "</ol></div>").join("");
  const line = $("code").querySelector(".current");
  if (line && $("code").scrollHeight > $("code").clientHeight) $("code").scrollTop = line.offsetTop - $("code").clientHeight / 2;
}

const mi = (x) => `<mi>${x}</mi>`, mo = (x) => `<mo>${x}</mo>`, row = (...x) => `<mrow>${x.join("")}</mrow>`;
const sub = (x, i) => `<msub>${x}<mrow>${i}</mrow></msub>`, frac = (a, b) => `<mfrac><mrow>${a}</mrow><mrow>${b}</mrow></mfrac>`;
const stored = (i) => `<msubsup>${mi("m")}<mrow>${i}</mrow>${mo("′")}</msubsup>`;
const term = (name, ...x) => `<mrow data-term="${name}">${x.join("")}</mrow>`;

// Which terms of the equations each kind of event is about.
const TERMS = {
  fill: ["fill"], rebuild: ["rebuild", "chunk"], loss: ["loss"], relay: ["relay"], backward: ["sum", "send"], done: ["sum"],
  end: ["whole"], forward: ["chunk", "loss"],
};

function equations(run) {
  const j = mi("j"), J = mi("J"), theta = mi("Θ"), d = mo("∂"), [a, b] = run.entries ? [sub(mi("a"), j), sub(mi("b"), j)] : ["", ""];
  const past = row(stored(`<mn>0</mn>`), mo("…"), stored(row(j, mo("−"), "<mn>1</mn>")));
  if (run.whole) return [
    row(term("chunk", term("loss", J), mo("="), mi("f"), mo("("), mi("x"), mo(";"), theta, mo(")"))),
    row(term("whole", term("sum", frac(row(mi("d"), J), row(mi("d"), theta))))),
  ];
  const i = mi("i"), f = row(mi("f"), mo("("), sub(mi("x"), j), mo(";"), past, mo(";"), theta, mo(")"));
  const bi = run.entries ? sub(mi("b"), i) : "", ai = run.entries ? sub(mi("a"), i) : "";
  return [
    row(term("fill", stored(j), mo("="), sub(mi("m"), j))),
    row(term("rebuild", mo("("), term("loss", sub(J, j)), mo(","), sub(mi("m"), j), mo(")")), mo("="), term("chunk", f)),
    row(term("relay", sub(mi("g"), j)), mo("="), `<munder>${mo("∑")}${row(i, mo("&gt;"), j)}</munder>`,
      mo("("), term("send", ai, frac(row(d, sub(J, i)), row(d, stored(j))), mo("+"), bi, sub(mi("g"), i), frac(row(d, sub(mi("m"), i)), row(d, stored(j)))), mo(")")),
    row(term("whole", frac(row(mi("d"), J), row(mi("d"), theta))), mo(run.entries ? "≈" : "="), `<munder>${mo("∑")}${run.entries ? row(j, mo("∈"), mi("I")) : j}</munder>`, mo("("),
      term("sum", a, frac(row(d, sub(J, j)), row(d, theta)), mo("+"), b, sub(mi("g"), j), frac(row(d, sub(mi("m"), j)), row(d, theta))), mo(")")),
  ];
}

const NOTES = ["stored without a graph", "eq. 1: again, with its graph", "the relay: sent by later chunks", "the gradient, chunk by chunk"];

function drawEquation() {
  const { run } = here, marked = TERMS[eventNow().kind] ?? [];
  const notes = run.whole ? ["the whole text at once", "its gradient"] : NOTES;
  $("equation").innerHTML = equations(run).map((line, n) => `<div><math displaystyle="true">${line}</math> <span class="small">${notes[n]}</span></div>`).join("");
  for (const node of $("equation").querySelectorAll("[data-term]")) if (marked.includes(node.dataset.term)) node.classList.add("marked");
}

const shape = (list) => `[${list.join(", ")}]`;
const columnsOf = (run, layer) => (isState(run, layer ?? 0) ? ["state", "decay"] : ["keys", "values"]);

// What the table shows at an event: heads and rows of cells.
function tableOf(run, event) {
  const [first, second] = columnsOf(run, event.layer);
  if (event.written) return {
    head: ["layer", "shape", `‖${first}‖`, `‖${second}‖`],
    rows: event.written.map((norms, l) => [l, event.shapes?.[l].length ? shape(event.shapes[l][0]) : "–", ...norms.slice(0, 2)]).filter(([l]) => isOf(run, event, l)),
  };
  if (event.kind === "relay" && event.received.length) return {
    head: ["layer", `gradient of ${first}`, `of ${second}`, "in all"],
    rows: event.received.map((norms, l) => [l, norms[0], norms[1] ?? "–", norm(norms)]).filter(([l]) => isOf(run, event, l)),
  };
  if (event.kind === "backward" && event.sent.length) {
    const sums = new Map((event.held ?? []).map(([i, ...norms]) => [i, norms]));
    return {
      head: ["sent to", ...(event.sent[0].length > 2 ? [`‖∂${first}‖`, `‖∂${second}‖`] : [`‖∂${first}‖`]), "sum so far"],
      rows: event.sent.map(([i, ...norms]) => [chunkName(i) + (lost(run, i, event.layer) ? " (lost)" : ""), ...norms, sums.has(i) ? { sum: norm(sums.get(i)), lost: lost(run, i, event.layer) } : "–"]),
    };
  }
  if (event.kind === "draw") return {
    head: ["chunk", "kept", "factor on its loss, a", "on its relay, b"],
    rows: event.entries.map((e, i) => [i, e ? "yes" : "no", e ? e[0] : "–", e ? e[1] : "–"]),
  };
  return { head: [], rows: [] };
}

const soFar = (run, event) => (event.kind === "end" || run.whole ? "" : event.kind === "done" ? "so far " : "before this chunk ");

function valuesOf(run, event, state) {
  const parts = [];
  if (event.chunk !== undefined && !run.whole) parts.push(`j = ${event.chunk}`);
  if (event.kind === "begin" && event.parameters) parts.push(`${event.parameters.toLocaleString("en")} parameters`, `batch of ${event.batch}`);
  if (event.kind === "loss") parts.push(`${(event.factor ?? 1) === 1 ? "" : "a·"}J = ${timesFactor(event, (x) => x.toPrecision(6))}${event.loss.toPrecision(6)}`);
  if (event.kind === "relay" && event.received.length) parts.push(`‖g‖ = ${norm(event.received.flat()).toPrecision(6)}`);
  if (event.kind === "relay" && event.received.length && event.factor !== undefined && event.factor !== 1) parts.push(`passed on times b = ${number(event.factor)}`);
  if (event.kind === "end" || event.kind === "done") parts.push(`loss${event.kind === "done" ? " so far" : ""} ${event.loss?.toPrecision(6) ?? "–"}`);
  if (state.gradient !== null) parts.push(`‖dJ/dΘ‖ ${soFar(run, event)}= ${state.gradient.toPrecision(6)}`);
  return parts.join(" · ");
}

function drawNumbers() {
  const { run } = here, event = eventNow(), { head, rows } = tableOf(run, event);
  $("values").textContent = valuesOf(run, event, stateNow());
  $("numbers").tHead.innerHTML = head.length ? `<tr>${head.map((h) => `<th scope="col">${escaped(h)}</th>`).join("")}</tr>` : "";
  const cell = (c) => (c.sum !== undefined ? `<td data-value="${c.sum}" class="${c.lost ? "would-be" : ""}">${c.sum.toPrecision(5)}</td>` : typeof c === "number" && !Number.isInteger(c) ? `<td data-value="${c}">${c.toPrecision(5)}</td>` : `<td>${escaped(c)}</td>`);
  $("numbers").tBodies[0].innerHTML = rows.map((r) => `<tr>${r.map(cell).join("")}</tr>`).join("");
}
