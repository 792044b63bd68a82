// Bytes at every event, stacked; above them, as a thin line, the most that was alive since the event before.

function drawMemory() {
  const { run } = here, now = eventNow();
  const svg = $("memory");
  const rank = now.rank ?? 0;
  const events = run.events.map((e, i) => ({ ...e, i })).filter((e) => e.bytes && (e.rank ?? 0) === rank);
  svg.parentElement.classList.toggle("absent", !events.length);
  if (!events.length) return;
  const width = Math.max(300, svg.parentElement.clientWidth - 24), height = 210, left = 8, top = 30, base = height - 8;
  const parts = here.constant ? PARTS : PARTS.slice(2);
  const without = (e) => (here.constant ? 0 : e.bytes.weights + e.bytes.gradients);
  const high = (e) => (e.peak ?? 0) - without(e);
  const ghosts = here.ghosts ? runs.filter((other) => other.whole && other !== run && other.events.every((e) => e.bytes)) : [];
  const most = Math.max(...events.map(high), ...ghosts.flatMap((g) => g.events.map(high))) * 1.02;
  const y = (bytes) => base - (bytes / most) * (base - top);
  const slot = (width - 2 * left) / events.length;
  const shapes = events.map((e, n) => {
    let below = 0;
    const bars = parts.map(([name]) => {
      const size = Math.max(0, e.bytes[name]);
      const bar = rect(left + n * slot, y(below + size), Math.max(0.6, slot - (slot > 5 ? 1 : 0)), y(below) - y(below + size), `bar ${name}`);
      below += size;
      return bar;
    });
    const tick = `<path d="M${left + n * slot} ${y(high(e))}h${slot}" class="most"/>`;
    return `<g class="${e.i > here.step ? "ahead" : ""}" data-step="${e.i}">${rect(left + n * slot, top - 24, slot, base - top + 24, "hit")}${bars.join("")}${tick}</g>`;
  });
  const cursor = events.findIndex((e) => e.i === here.step);
  const peak = events.find((e) => e.i === run.peak) ?? events[0];
  const px = left + (events.indexOf(peak) + 0.5) * slot;
  const side = px > width / 2 ? "end" : "start";
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-label", `Bytes alive at each of ${events.length} steps. The peak, ${mebibytes(peak.peak)}, is at step ${peak.i}: ${phaseOf(peak)}.`);
  svg.innerHTML = ghosts.map((g, n) => ghost(g, n, { width, left, y, high })).join("") + shapes.join("") +
    (cursor < 0 ? "" : `<path d="M${left + (cursor + 0.5) * slot} ${top - 4}V${base}" class="cursor"/>`) +
    `<path d="M${px - 5} ${y(high(peak)) - 10}h10l-5 8z" class="peak" data-step="${peak.i}"/>` +
    text(side === "end" ? px - 8 : px + 8, y(high(peak)) - 4, `peak ${mebibytes(high(peak))}`, "peak-label", side);
  $("ghost-legend").innerHTML = ghosts.map((g, n) => `<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4h30" class="ghost ghost-${n}"/></svg> ${escaped(g.label)}, peak <b>${mebibytes(high(g.events[g.peak]))}</b></li>`).join("");
  drawBytes(now, peak);
}

// Another method's step, from its first to its last event.
function ghost(run, n, { width, left, y, high }) {
  const slot = (width - 2 * left) / run.events.length;
  const points = run.events.map((e, i) => `${i ? "L" : "M"}${left + i * slot} ${y(high(e))}h${slot}`).join("");
  const at = run.peak, x = left + (at + 0.5) * slot;
  return `<path d="${points}" class="ghost ghost-${n}"/>` + `<circle cx="${x}" cy="${y(high(run.events[at]))}" r="3" class="ghost-peak"/>`;
}

function drawBytes(event, peak) {
  const rows = PARTS.map(([name, words]) => [`<i class="swatch bar ${name}"></i>${name === "memory" ? `memory (${whatIsRemembered(here.run)})` : words}`, event.bytes?.[name], name]);
  const sum = event.bytes ? PARTS.reduce((total, [name]) => total + event.bytes[name], 0) : undefined;
  rows.push(["all that is alive now", sum, "sum"], ["most since the step before", event.peak, "peak-now"], ["peak of the step", peak.peak, "peak"]);
  const at = phaseOf(peak).toLowerCase() + (peak.chunk === undefined || here.run.whole ? "" : ` of ${chunkName(peak.chunk)}`);
  $("peak-note").innerHTML = `▼ The peak is at <a href="#" data-step="${peak.i}">step ${peak.i}</a>, ${at}, because ${whyPeak(here.run, peak)}.`;
  $("bytes").tBodies[0].innerHTML = rows.map(([words, bytes, name]) =>
    `<tr class="row-${name}"><th scope="row">${words}</th><td data-part="${name}" data-bytes="${bytes ?? ""}" title="${bytes?.toLocaleString("en") ?? ""} bytes">${bytes === undefined ? "–" : mebibytes(bytes)}</td></tr>`).join("");
}
