"use strict";
// Charts: drawn by Observable Plot to the width there is, drawn again when it changes, each with its numbers as a table.

const charts = new Map();

/**
 * Puts a chart in its figure.
 * @param name of the figure, `chart-<name>`; nothing happens where the page has none.
 * @param options `label` says what it shows in a sentence; `legend` is [name, colour] pairs; `table` makes {columns,
 *   rows}; `draw` makes Plot's options.
 */
function chart(name, { label, legend = [], table, draw }) {
  const figure = document.getElementById(`chart-${name}`);
  if (!figure) return;
  const area = figure.querySelector(".plot-area");
  if (legend.length) {
    const items = legend.map(([text, shade, dashed]) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      line.setAttribute("width", 18);
      line.setAttribute("height", 8);
      line.setAttribute("aria-hidden", "true");
      const stroke = document.createElementNS(line.namespaceURI, "line");
      for (const [key, value] of Object.entries({ x2: 16, y1: 5, y2: 5, stroke: shade, "stroke-width": 3 })) {
        stroke.setAttribute(key, value);
      }
      if (dashed) stroke.setAttribute("stroke-dasharray", "4 3");
      line.append(stroke);
      return element("li", {}, line, element("bdi", {}, text));
    });
    figure.insertBefore(element("ul", { class: "legend" }, ...items), area);
  }
  const redraw = () => {
    const width = Math.max(240, Math.floor(area.clientWidth));
    const plot = Plot.plot({
      className: "plot",
      width,
      height: Math.round(Math.min(300, Math.max(190, width * 0.52))),
      marginLeft: 44,
      marginBottom: 36,
      style: "font-size: 12px; background: transparent",
      ...draw(width),
    });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", typeof label === "function" ? label() : label);
    area.replaceChildren(plot);
  };
  const details = figure.querySelector("details");
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    const { columns, rows } = table();
    details.querySelector(".scroll").replaceChildren(
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...columns.map((text, i) => element("th", { scope: "col", class: i ? "n" : null }, text)))),
        element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell, i) => element("td", { class: i ? "n" : null }, String(cell)))))),
      ),
    );
  });
  charts.set(name, redraw);
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width === drawn) return;
    drawn = width;
    redraw();
  }).observe(area);
}

const redraw = (...names) => names.forEach((name) => charts.get(name)?.());

/** Counts by how many of the thresholds are reached, as [{from, to, n}] in bins of 1/50, up to the `end` of an axis. */
function scoreBins(counts, thresholds, end) {
  const bins = new Array(50).fill(0);
  thresholds.forEach((threshold, i) => {
    bins[Math.min(49, Math.floor(threshold * 50 + 1e-9))] += counts[i + 1];
  });
  return bins.map((n, i) => ({ from: i / 50, to: (i + 1) / 50, n })).slice(0, Math.round(50 * end));
}

const share = (bins) => {
  const all = sum(bins.map((bin) => bin.n)) || 1;
  return bins.map((bin) => ({ ...bin, fraction: bin.n / all }));
};

/** The outline of a histogram: its corners, from left to right. */
const outline = (bins) => bins.flatMap(({ from, to, fraction }) => [{ x: from, y: fraction }, { x: to, y: fraction }]);

const area = (bins, shade) => Plot.areaY(outline(bins), { x: "x", y1: 0, y2: "y", fill: shade, fillOpacity: 0.16 });
const line = (bins, shade, more = {}) => Plot.lineY(outline(bins), { x: "x", y: "y", stroke: shade, strokeWidth: 1.8, ...more });
const axisY = { label: null, tickFormat: "%", grid: true, ticks: 5, nice: true };
const baseline = () => Plot.ruleY([0], { strokeOpacity: 0.5 });

/** What a histogram says in words. */
const said = (series) => Object.entries(series)
  .map(([name, bins]) => {
    const half = sum(bins.map((bin) => bin.n)) / 2;
    let below = 0;
    const median = bins.find((bin) => (below += bin.n) >= half) ?? bins[0];
    return `${named(name)}: half are below ${median.to.toLocaleString("en")}`;
  })
  .join("; ");

const tableOf = (series, first, cell = (bin) => whole.format(bin.n)) => () => {
  const names = Object.keys(series);
  const longest = Object.values(series)[0] ?? [];
  return {
    columns: [first, ...names.map(named)],
    rows: longest.map((bin, i) => [bin.name ?? `${bin.from} – ${bin.to}`, ...names.map((name) => cell(series[name][i]))]),
  };
};

const legendOf = (names) => names.map((name) => [named(name), colour(name)]);
