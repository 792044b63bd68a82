// Bytes at every event, stacked; above them, as a thin line, the most that was alive since the event before.

function drawMemory() {
  const { run } = here, now = eventNow();
  const svg = $("memory");
  const rank = now.rank ?? 0;
  const events = run.events.map((e, i) => ({ ...e, i })).filter((e) => e.bytes && (e.rank ?? 0) === rank);
  svg.parentElement.classList.toggle("absent", !events.length);
  if (!events.length) return;
  const width = Math.max(300, svg.parentElement.clientWidth - 24), height = innerHeight > 950 && innerWidth > 860 ? 310 : 190, left = 34, right = 8, top = 30, base = height - 8;
  const parts = here.constant ? PARTS : PARTS.slice(2);
  const without = (e) => (here.constant ? 0 : e.bytes.weights + e.bytes.gradients);
  const high = (e) => (e.peak ?? 0) - without(e);
  const ghosts = here.ghosts ? runs.filter((other) => other.whole && other !== run && other.events.every((e) => e.bytes)) : [];
  const most = Math.max(...events.map(high), ...ghosts.flatMap((g) => g.events.map(high))) * 1.02;
  const y = (bytes) => base - (bytes / most) * (base - top);
  const slot = (width - left - right) / events.length;
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
  const peak = events.find((e) => e.i === run.peak) ?? events.reduce((best, e) => ((e.peak ?? -1) > (best.peak ?? -1) ? e : best));
  const px = left + (events.indexOf(peak) + 0.5) * slot;
  const side = px > width / 2 ? "end" : "start";
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-label", `Bytes alive at each of ${events.length} steps. The peak, ${mebibytes(peak.peak)}, is at step ${peak.i}: ${phaseOf(peak)}.`);
  svg.innerHTML = axis({ most, width, right, left, y }) + ghosts.map((g, n) => ghost(g, n, { width, left, right, y, high })).join("") + shapes.join("") +
    (cursor < 0 ? "" : `<path d="M${left + (cursor + 0.5) * slot} ${top - 4}V${base}" class="cursor"/>`) +
    `<path d="M${px} ${top - 8}V${y(high(peak)) - 6}" class="leader"/><path d="M${px - 5} ${y(high(peak)) - 10}h10l-5 8z" class="peak" data-step="${peak.i}"/>` +
    text(side === "end" ? px + 5 : px - 5, top - 12, `peak ${mebibytes(high(peak))}`, "peak-label", side);
  $("ghost-legend").innerHTML = ghosts.map((g, n) => `<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4h30" class="ghost ghost-${n}"/></svg> ${escaped(g.label)}, peak <b>${mebibytes(high(g.events[g.peak]))}</b></li>`).join("") +
    `<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4h30" class="most"/></svg> most since the step before</li>` +
    (ghosts.length ? "<li>Other methods are stretched to the same width; a dot is their peak.</li>" : "");
  drawBytes(now, peak);
}

function axis({ most, width, right, left, y }) {
  const [unit, size] = most < 2 ** 20 ? ["KiB", 2 ** 10] : most < 2 ** 30 ? ["MiB", 2 ** 20] : ["GiB", 2 ** 30];
  const least = most / size / 5, power = 10 ** Math.floor(Math.log10(least)), stride = power * [1, 2, 5, 10].find((f) => f * power >= least);
  return [...Array(Math.floor(most / size / stride) + 1).keys()].map((n) =>
    `<path d="M${left} ${y(n * stride * size)}H${width - right}" class="rule"/>` + text(left - 4, y(n * stride * size) + 4, String(Number((n * stride).toPrecision(3))), "small", "end")).join("") + text(2, 12, unit, "small", "start");
}

// Another method's step, from its first to its last event.
function ghost(run, n, { width, left, right, y, high }) {
  const slot = (width - left - right) / run.events.length;
  const points = run.events.map((e, i) => `${i ? "L" : "M"}${left + i * slot} ${y(high(e))}h${slot}`).join("");
  const at = run.peak, x = left + (at + 0.5) * slot;
  return `<path d="${points}" class="ghost ghost-${n}"/>` + `<circle cx="${x}" cy="${y(high(run.events[at]))}" r="3" class="ghost-peak"/>`;
}

function drawBytes(event, peak) {
  const rows = PARTS.map(([name, words]) => [`<i class="swatch bar ${name}"></i>${name === "memory" ? `memory (${whatIsRemembered(here.run)})` : words}${name === "gradients" && event.kind === "begin" ? " (allocated before)" : ""}`, event.bytes?.[name], name]);
  const sum = event.bytes ? PARTS.reduce((total, [name]) => total + event.bytes[name], 0) : undefined;
  rows.push(["all that is alive now", sum, "sum"], ["passing, during the event", event.peak === undefined || sum === undefined ? undefined : event.peak - sum, "passing"], ["most since the step before", event.peak, "peak-now"], ["peak of the step", peak.peak, "peak"]);
  const many = here.run.peaks.length > 1 && here.run.peaks.every((e) => e.chunk !== undefined && e.layer === undefined);
  const each = here.run.peaks.length === here.run.chunks.length ? "every chunk" : chunksNamed(here.run.peaks.map((e) => e.chunk).reverse());
  const at = phaseOf(peak).toLowerCase() + (peak.chunk === undefined || here.run.whole ? "" : ` of ${many ? each : chunkName(peak.chunk)}`);
  const link = `<a href="#" data-step="${peak.i}">step ${peak.i}</a>`;
  $("peak-note").innerHTML = `▼ The peak is reached at ${many ? `the ${at}, first at ${link}` : `${link}, ${at}`}, with ${whyPeak(here.run, peak)}.`;
  $("bytes").tBodies[0].innerHTML = rows.map(([words, bytes, name]) =>
    `<tr class="row-${name}"><th scope="row">${words}</th><td data-part="${name}" data-bytes="${bytes ?? ""}" title="${bytes?.toLocaleString("en") ?? ""} bytes">${bytes === undefined ? "–" : mebibytes(bytes)}</td></tr>`).join("");
}
