"use strict";
// What the other scripts share: the data, elements made of text, numbers as people read them.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes and children; texts become text nodes, never markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const percent = (fraction) => (Number.isFinite(fraction) ? `${(100 * fraction).toFixed(1)}%` : "–");
const score = (value) => (value == null ? "–" : value.toFixed(3));

/** Bytes as people read them. */
function binary(bytes) {
  if (bytes >= 2 ** 20) return `${+(bytes / 2 ** 20).toFixed(1)} MiB`;
  return bytes >= 1024 ? `${+(bytes / 1024).toFixed(1)} KiB` : `${Math.round(bytes)} B`;
}

const sum = (numbers) => numbers.reduce((total, one) => total + one, 0);

/** Colour of a text's origin: the web's, then one for each captioner, those of the version before included. */
const colour = (origin) => `var(--origin-${data.origins.indexOf(origin) % 6})`;
/** What scores are, on an axis. */
const unitOf = (unit) => ({ probability: "P(match)", cosine: "cosine similarity" })[unit] ?? "score";
const named = (origin) => (origin === "web" ? "web texts" : origin);

/** Calls `work` once before the next frame, however often it is asked. */
function onceAFrame(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}
