"use strict";
// The sliders: what any two thresholds keep, from the rows counted by how many of the thresholds their two scores reach.

const thresholds = data.thresholds;
const size = thresholds.length + 1;
const chosen = { ...data.inForce };

// below[i][j]: rows whose web score reaches fewer than i of the thresholds and whose synthetic one fewer than j.
const below = Array.from({ length: size + 1 }, () => new Float64Array(size + 1));
for (const [i, j, n] of data.decided) below[i + 1][j + 1] += n;
for (let i = 1; i <= size; i++) for (let j = 1; j <= size; j++) below[i][j] += below[i - 1][j] + below[i][j - 1] - below[i - 1][j - 1];
const decided = below[size][size];

/** Where a threshold stands in the list: the last that is not above it. */
const place = (threshold) => d3.bisectRight(thresholds, threshold + 1e-12) - 1;

/** A threshold as people read it: two digits, or three where it has so many. */
const digits = (threshold) => threshold.toFixed(3).replace(/0$/, "");

/** Rows that two thresholds keep: all but those both of whose scores reach too few. */
const kept = (web, synthetic) => decided - below[place(web) + 1][place(synthetic) + 1];

/** Texts of an origin that reach a threshold. */
const reaching = (counts, threshold) => sum(counts.slice(place(threshold) + 1));

/** Where an axis of scores ends: at 1, but for cosines, which stay far below, at the tenth that none is above. */
function endOf(unit, itm, thresholds) {
  if (unit !== "cosine") return 1;
  const reached = Object.values(itm).map((counts) => thresholds[counts.findLastIndex((n) => n > 0) - 1] ?? 0);
  return Math.min(1, Math.ceil(10 * Math.max(0.09, ...reached, ...Object.values(data.inForce)) + 0.1 - 1e-9) / 10);
}

const end = endOf(data.unit, data.itm, thresholds);

const followers = [];

function setUpThresholds() {
  const slides = { web: document.getElementById("slide-web"), synthetic: document.getElementById("slide-synthetic") };
  const together = document.getElementById("together");
  document.getElementById("dock").hidden = !decided;
  together.checked = data.inForce.web === data.inForce.synthetic;
  for (const slide of Object.values(slides)) slide.max = end;

  const tell = onceAFrame(() => {
    for (const source of ["web", "synthetic"]) {
      slides[source].value = chosen[source];
      slides[source].setAttribute("aria-valuetext", digits(chosen[source]));
      document.getElementById(`at-${source}`).value = digits(chosen[source]);
    }
    const now = kept(chosen.web, chosen.synthetic);
    const change = now - kept(data.inForce.web, data.inForce.synthetic);
    document.getElementById("would-keep").textContent = whole.format(now);
    document.getElementById("would-of").textContent = `of ${whole.format(decided)} judged images kept, ${percent(now / decided)}`;
    const moved = chosen.web !== data.inForce.web || chosen.synthetic !== data.inForce.synthetic;
    document.getElementById("would-differ").textContent = moved
      ? `${change < 0 ? "−" : "+"}${whole.format(Math.abs(change))} against the thresholds in force${precisionAt()}`
      : `the thresholds in force${precisionAt()}`;
    document.getElementById("reset").disabled = !moved;
    redraw("kept", "itm", "precision");
    followers.forEach((follow) => follow());
  });

  const move = (source, value) => {
    chosen[source] = value;
    if (together.checked) chosen.web = chosen.synthetic = value;
    tell();
  };
  for (const [source, slide] of Object.entries(slides)) {
    slide.addEventListener("input", () => move(source, Number(slide.value)));
  }
  together.addEventListener("change", () => together.checked && move("web", chosen.web));
  document.getElementById("reset").addEventListener("click", () => {
    Object.assign(chosen, data.inForce);
    together.checked = data.inForce.web === data.inForce.synthetic;
    tell();
  });
  tell();
}

/** What is true of the judged texts that the chosen thresholds keep. */
function precisionAt() {
  let texts = 0;
  let right = 0;
  for (const [source, own] of Object.entries(data.judged)) {
    const step = Math.min(own.kept.length - 1, Math.ceil(chosen[source] * (own.kept.length - 1) - 1e-9));
    texts += own.kept[step];
    right += own.kept_true[step];
  }
  return texts ? `; ${percent(right / texts)} of judged texts are true` : "";
}

function thresholdCharts() {
  const steps = d3.range(Math.round(100 * end) + 1).map((i) => i / 100);
  const lines = {
    "images kept": steps.map((t) => ({ t, fraction: kept(t, t) / decided, n: kept(t, t), name: t.toFixed(2) })),
    ...Object.fromEntries(
      Object.entries(data.itm).map(([origin, counts]) => {
        const all = sum(counts);
        return [origin, steps.map((t) => ({ t, n: reaching(counts, t), fraction: reaching(counts, t) / all, name: t.toFixed(2) }))];
      }),
    ),
  };
  const shade = (name) => (name === "images kept" ? "var(--kept)" : colour(name));
  const rules = () => [
    Plot.ruleX([chosen.web], { stroke: "var(--origin-0)", strokeDasharray: "4 3", strokeWidth: 1.5 }),
    Plot.ruleX([chosen.synthetic], { stroke: "var(--origin-1)", strokeDasharray: "4 3", strokeDashoffset: 3.5, strokeWidth: 1.5 }),
  ];
  if (decided) {
    chart("kept", {
      label: () => `Images kept at every threshold: ${[0.1, 0.5, 0.9].map((part) => +(part * end).toFixed(2)).map((t) => `${percent(kept(t, t) / decided)} at ${t}`).join(", ")}.`,
      legend: Object.keys(lines).map((name) => [name === "images kept" ? name : named(name), shade(name)]),
      table: () => ({
        columns: ["Threshold", ...Object.keys(lines).map((name) => (name === "images kept" ? name : named(name)))],
        rows: steps.map((t, i) => [t.toFixed(2), ...Object.values(lines).map((own) => `${whole.format(own[i].n)} (${percent(own[i].fraction)})`)]),
      }),
      draw: () => ({
        x: { label: "threshold", domain: [0, end] },
        y: { ...axisY, domain: [0, 1] },
        marks: [
          baseline(),
          ...Object.entries(lines).map(([name, own]) =>
            Plot.lineY(own, { x: "t", y: "fraction", stroke: shade(name), strokeWidth: name === "images kept" ? 2.6 : 1.5 }),
          ),
          ...rules(),
        ],
      }),
    });
  }
  const series = Object.fromEntries(Object.entries(data.itm).map(([origin, counts]) => [origin, share(scoreBins(counts, thresholds, end))]));
  chart("itm", {
    label: `Histogram of ITM scores. ${said(series)}.`,
    legend: legendOf(Object.keys(series)),
    table: tableOf(series, "Score"),
    draw: () => ({
      x: { label: unitOf(data.unit), domain: [0, end] },
      y: { ...axisY, type: "sqrt" },
      marks: [baseline(), ...Object.entries(series).flatMap(([origin, bins]) => [area(bins, colour(origin)), line(bins, colour(origin))]), ...rules()],
    }),
  });
}
