"use strict";
// The page itself: the remaining charts, the theme, where the reader is.

function scoreCharts() {
  const series = Object.fromEntries(
    Object.entries(data.itc).map(([origin, counts]) => [
      origin,
      share(counts.map((n, i) => ({ from: Number((-1 + i / 50).toFixed(2)), to: Number((-1 + (i + 1) / 50).toFixed(2)), n }))),
    ]),
  );
  if (!Object.keys(series).length) document.getElementById("chart-itc").remove();
  const seen = Object.values(series).flatMap((bins) => bins.filter((bin) => bin.n));
  const domain = [d3.min(seen, (bin) => bin.from) - 0.04, d3.max(seen, (bin) => bin.to) + 0.04];
  chart("itc", {
    label: `Histogram of ITC scores. ${said(series)}.`,
    legend: legendOf(Object.keys(series)),
    table: tableOf(series, "Score"),
    draw: () => ({
      x: { label: "cosine similarity", domain },
      y: axisY,
      marks: [baseline(), ...Object.entries(series).flatMap(([origin, bins]) => {
        const inside = bins.filter((bin) => bin.from >= domain[0] - 1e-9 && bin.to <= domain[1] + 1e-9);
        return [area(inside, colour(origin)), line(inside, colour(origin))];
      })],
    }),
  });
  if (!data.before) return;
  const unit = data.before.unit === data.unit ? data.unit : null;
  const upTo = Math.max(unit ? end : 1, endOf(unit, data.before.itm, data.before.thresholds));
  const now = Object.fromEntries(Object.entries(data.itm).map(([origin, counts]) => [origin, share(scoreBins(counts, thresholds, upTo))]));
  const was = Object.fromEntries(
    Object.entries(data.before.itm).map(([origin, counts]) => [origin, share(scoreBins(counts, data.before.thresholds, upTo))]),
  );
  chart("drift", {
    label: `ITM scores before and now. Now, ${said(now)}. Before, ${said(was)}.`,
    legend: [...legendOf(Object.keys(now)), ...Object.keys(was).map((origin) => [`${named(origin)} before`, colour(origin), true])],
    table: tableOf({ ...now, ...Object.fromEntries(Object.entries(was).map(([origin, bins]) => [`${named(origin)} before`, bins])) }, "Score"),
    draw: () => ({
      x: { label: unitOf(unit), domain: [0, upTo] },
      y: { ...axisY, type: "sqrt" },
      marks: [
        baseline(),
        ...Object.entries(was).map(([origin, bins]) => line(bins, colour(origin), { strokeDasharray: "4 3", strokeWidth: 1.4 })),
        ...Object.entries(now).map(([origin, bins]) => line(bins, colour(origin))),
      ],
    }),
  });
}

function captionCharts() {
  const series = Object.fromEntries(
    Object.entries(data.captions).map(([origin, own]) => [origin, share(own.lengths.map((n, i) => ({ from: i - 0.5, to: i + 0.5, n, name: i })))]),
  );
  const longest = d3.max(Object.values(series).flat().filter((bin) => bin.n), (bin) => bin.to) ?? 50;
  chart("lengths", {
    label: `Histogram of words a text. ${Object.entries(data.captions).map(([origin]) => named(origin)).join(", ")}.`,
    legend: legendOf(Object.keys(series)),
    table: tableOf(series, "Words"),
    draw: () => ({
      x: { label: "words", domain: [0, longest] },
      y: axisY,
      marks: [baseline(), ...Object.entries(series).flatMap(([origin, bins]) => {
        const inside = bins.filter((bin) => bin.to <= longest && bin.from > 0);
        return [area(inside, colour(origin)), line(inside, colour(origin))];
      })],
    }),
  });
  const kinds = ["2-grams", "3-grams", "4-grams", "loops"];
  const bars = Object.entries(data.captions).flatMap(([origin, own]) =>
    kinds.map((kind) => ({ origin, kind, fraction: kind === "loops" ? own.loops : own.repeated[kind[0]] })),
  );
  chart("repeated", {
    label: `Repetition: ${bars.map((bar) => `${named(bar.origin)}, ${bar.kind} ${percent(bar.fraction)}`).join("; ")}.`,
    legend: legendOf(Object.keys(data.captions)),
    table: () => ({ columns: ["", ...kinds], rows: Object.keys(data.captions).map((origin) => [named(origin), ...bars.filter((bar) => bar.origin === origin).map((bar) => percent(bar.fraction))]) }),
    draw: () => ({
      fx: { label: null, domain: kinds },
      x: { axis: null, domain: Object.keys(data.captions) },
      y: { ...axisY, tickFormat: (value) => `${+(100 * value).toFixed(2)}%`, domain: [0, Math.max(0.01, d3.max(bars, (bar) => bar.fraction) ?? 0)] },
      marks: [Plot.barY(bars, { fx: "kind", x: "origin", y: "fraction", fill: (bar) => colour(bar.origin), fillOpacity: 0.85, insetLeft: 1, insetRight: 1 }), baseline()],
      color: { type: "identity" },
    }),
  });
}

function imageCharts() {
  const { sides, from, perOctave, bytes, bytesFrom } = data.images;
  if (!sides.length) return;
  const cells = sides.map(([w, h, n]) => ({ w: from + w / perOctave, h: from + h / perOctave, n }));
  const pixels = (octave) => whole.format(2 ** octave);
  const [low, high] = d3.extent(cells.flatMap((cell) => [cell.w, cell.h]));
  const domain = [Math.floor(low), Math.ceil(high + 1 / perOctave + 1e-9)];
  const largest = d3.greatest(cells, (cell) => cell.n);
  chart("sides", {
    label: `Images by width and height. The most, ${whole.format(largest.n)}, are about ${pixels(largest.w)} by ${pixels(largest.h)} pixels.`,
    table: () => ({ columns: ["Width from", "Height from", "Images"], rows: d3.sort(cells, (cell) => -cell.n).map((cell) => [pixels(cell.w), pixels(cell.h), whole.format(cell.n)]) }),
    draw: (width) => ({
      height: Math.min(380, Math.round(width * 0.8)),
      x: { label: "width", domain, ticks: d3.range(domain[0], domain[1] + 1), tickFormat: pixels, grid: true },
      y: { label: "height", domain, ticks: d3.range(domain[0], domain[1] + 1), tickFormat: pixels, grid: true },
      opacity: { type: "sqrt", domain: [0, largest.n], range: [0.08, 1] },
      marks: [
        Plot.line([[domain[0], domain[0]], [domain[1], domain[1]]], { stroke: "currentColor", strokeOpacity: 0.25 }),
        Plot.rect(cells, { x1: "w", x2: (cell) => cell.w + 1 / perOctave, y1: "h", y2: (cell) => cell.h + 1 / perOctave, fill: "var(--origin-0)", fillOpacity: "n" }),
      ],
    }),
  });
  const sized = share(bytes.map((n, i) => ({ from: bytesFrom + i / 2, to: bytesFrom + (i + 1) / 2, n, name: binary(2 ** (bytesFrom + i / 2)) })));
  const used = sized.filter((bin) => bin.n);
  if (!used.length) return;
  const span = [Math.floor(used[0].from), Math.ceil(used.at(-1).to)];
  chart("bytes", {
    label: `Encoded sizes, from ${binary(2 ** used[0].from)} to ${binary(2 ** used.at(-1).to)}.`,
    table: () => ({ columns: ["From", "Images"], rows: used.map((bin) => [bin.name, whole.format(bin.n)]) }),
    draw: (width) => ({
      height: 190,
      x: { label: null, domain: span, ticks: d3.range(span[0], span[1] + 1, Math.max(1, Math.ceil((span[1] - span[0]) / (width / 80)))), tickFormat: (octave) => binary(2 ** octave) },
      y: axisY,
      marks: [baseline(), area(sized.filter((bin) => bin.from >= span[0] && bin.to <= span[1]), "currentColor"), line(sized.filter((bin) => bin.from >= span[0] && bin.to <= span[1]), "currentColor")],
    }),
  });
}

function truthCharts() {
  const sources = Object.entries(data.judged);
  if (!sources.length) return;
  const shade = (source) => (source === "web" ? "var(--origin-0)" : "var(--origin-1)");
  const legend = sources.map(([source]) => [`${source} texts`, shade(source)]);
  const points = sources.flatMap(([source, own]) => own.bins.map(([n, mean, fraction], i) => ({ source, n, mean, fraction, bin: i })).filter((point) => point.n));
  if (points.length) chart("calibration", {
    label: `Calibration: ${sources.map(([source, own]) => `${source} texts are off by ${score(own.calibration_error)} on average`).join("; ")}.`,
    legend,
    table: () => ({ columns: ["Score", "Source", "Texts", "True"], rows: points.map((point) => [`${point.bin / 10} – ${(point.bin + 1) / 10}`, point.source, whole.format(point.n), percent(point.fraction)]) }),
    draw: () => ({
      x: { label: "mean score", domain: [0, 1] },
      y: { ...axisY, domain: [0, 1] },
      r: { range: [2, 9] },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "currentColor", strokeOpacity: 0.35, strokeDasharray: "3 3" }),
        Plot.lineY(points, { x: "mean", y: "fraction", z: "source", stroke: (point) => shade(point.source), strokeWidth: 1.5 }),
        Plot.dot(points, { x: "mean", y: "fraction", r: "n", fill: (point) => shade(point.source), fillOpacity: 0.75 }),
      ],
      color: { type: "identity" },
    }),
  });
  const curves = sources.flatMap(([source, own]) =>
    own.kept.map((n, i) => ({ source, t: i / (own.kept.length - 1), precision: n ? own.kept_true[i] / n : NaN, recall: own.true ? own.kept_true[i] / own.true : NaN }))
      .filter((point) => Number.isFinite(point.precision) && Number.isFinite(point.recall)),
  );
  chart("precision", {
    label: `Precision and recall: ${sources.map(([source, own]) => `average precision of ${source} texts ${score(own.average_precision)}`).join("; ")}.`,
    legend,
    table: () => ({ columns: ["Threshold", "Source", "Precision", "Recall"], rows: curves.map((point) => [point.t.toFixed(2), point.source, percent(point.precision), percent(point.recall)]) }),
    draw: () => ({
      x: { label: "recall", domain: [0, 1], tickFormat: "%" },
      y: { ...axisY, label: "precision", domain: [Math.min(0.9, Math.floor(10 * (d3.min(curves, (point) => point.precision) ?? 0)) / 10), 1] },
      marks: [
        Plot.line(curves, { x: "recall", y: "precision", z: "source", stroke: (point) => shade(point.source), strokeWidth: 1.8 }),
        Plot.dot(curves.filter((point) => Math.abs(point.t - chosen[point.source]) < 0.005), { x: "recall", y: "precision", r: 5, fill: (point) => shade(point.source) }),
      ],
      color: { type: "identity" },
    }),
  });
}

function runCharts() {
  const bars = data.runs.flatMap((run) => Object.entries(run.seconds).map(([stage, seconds]) => ({ run: run.run, stage, seconds })));
  if (!bars.length) {
    document.getElementById("chart-stages")?.remove();
    return;
  }
  const stages = [...new Set(bars.map((bar) => bar.stage))];
  const shade = (stage) => `var(--origin-${stages.indexOf(stage) % 8})`;
  const spent = (run, stage) => {
    const seconds = run.seconds[stage] ?? 0;
    return seconds ? `${seconds.toFixed(2)} s, ${whole.format(run.rows / seconds)} rows/s` : "–";
  };
  const started = new Map(data.runs.map((run) => [run.run, (run.started ?? run.run).slice(0, 16).replace("T", " ")]));
  chart("stages", {
    label: `Seconds by stage of ${data.runs.length} runs. The newest: ${Object.entries(data.runs[0].seconds).map(([stage, seconds]) => `${stage} ${seconds.toFixed(1)}`).join(", ")}.`,
    legend: stages.map((stage) => [stage, shade(stage)]),
    table: () => ({ columns: ["Run", ...stages], rows: data.runs.map((run) => [run.run, ...stages.map((stage) => spent(run, stage))]) }),
    draw: () => ({
      height: 60 + 26 * data.runs.length,
      marginLeft: 118,
      x: { label: "seconds", grid: true },
      y: { label: null, domain: data.runs.map((run) => run.run), tickFormat: (run) => started.get(run) },
      marks: [Plot.barX(bars, { x: "seconds", y: "run", fill: (bar) => shade(bar.stage), insetTop: 3, insetBottom: 3, order: stages, z: "stage" }), Plot.ruleX([0])],
      color: { type: "identity" },
    }),
  });
}

/** A button that turns the page dark or light, whatever the system is. */
function setUpTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const dark = () => (root.classList.contains("dark") || root.classList.contains("light") ? root.classList.contains("dark") : system.matches);
  const name = () => (button.textContent = dark() ? "Light" : "Dark");
  button.hidden = false;
  button.addEventListener("click", () => {
    const to = dark() ? "light" : "dark";
    root.classList.remove("dark", "light");
    root.classList.add(to);
    name();
  });
  system.addEventListener("change", name);
  name();
}

/** Marks the section that is being read. */
function setUpSections() {
  const links = new Map([...document.querySelectorAll(".top nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70%" },
  );
  links.forEach((link, id) => observer.observe(document.getElementById(id)));
}

setUpTheme();
setUpSections();
thresholdCharts();
scoreCharts();
captionCharts();
imageCharts();
truthCharts();
runCharts();
setUpGallery();
setUpThresholds();
document.documentElement.dataset.ready = "true";
