"use strict";
// The gallery: rows with all their texts, filtered, searched and ordered, by the verdicts that the sliders give.

const PAGE = 24;

/** What the chosen thresholds make of a row: kept, dropped or error. */
const verdict = (row) => (row.decided ? (margin(row) >= 0 ? "kept" : "dropped") : row.status);

/** By how much the best text passes its threshold; negative where none does. */
const margin = (row) => Math.max(over(row, "web"), over(row, "synthetic"));
const over = (row, source) => (row.best[source] == null ? -Infinity : row.best[source] - chosen[source]);

const highest = (row) => Math.max(row.best.web ?? -1, row.best.synthetic ?? -1);
const apart = (row) => (row.best.web == null || row.best.synthetic == null ? -1 : Math.abs(row.best.web - row.best.synthetic));

const ORDERS = {
  borderline: (row) => (row.decided ? Math.abs(margin(row)) : 9),
  worst: (row) => (row.decided ? highest(row) : 9),
  best: (row) => (row.decided ? -highest(row) : 9),
  apart: (row) => -apart(row),
  place: (row) => row.index,
};

const WHICH = {
  both: (row) => over(row, "web") >= 0 && over(row, "synthetic") >= 0,
  web: (row) => over(row, "web") >= 0 && over(row, "synthetic") < 0,
  synthetic: (row) => over(row, "web") < 0 && over(row, "synthetic") >= 0,
  none: (row) => over(row, "web") < 0 && over(row, "synthetic") < 0,
};

const spaced = (reason) => (reason ?? "").replaceAll("_", " ");

/** Why a row is what it is, by its record; where the sliders say otherwise, that. */
const why = (row) => (verdict(row) === row.status ? row.reason : verdict(row) === "kept" ? null : "no_match");

function setUpGallery() {
  const rows = data.gallery;
  [...rows].sort((a, b) => d3.ascending(a.shard, b.shard) || a.row - b.row).forEach((row, index) => (row.index = index));
  for (const row of rows) {
    row.searched = [row.shard, row.url, row.detail, row.note, row.format, ...row.texts.map((text) => text.text)]
      .filter(Boolean).join("\n").normalize("NFKC").toLowerCase();
  }
  const field = (name) => document.getElementById(name);
  const found = field("found");
  const more = field("more");
  const list = field("cards");
  if (!rows.length) {
    found.textContent = "There is no row.";
    return;
  }
  field("filters").hidden = false;
  const reasons = [...new Set(rows.map((row) => row.reason).concat(rows.some((row) => row.decided) ? "no_match" : []).filter(Boolean))].sort();
  field("reason").append(...reasons.map((reason) => element("option", { value: reason }, spaced(reason))));

  let shown = PAGE;
  const show = () => {
    const words = field("find").value.normalize("NFKC").toLowerCase().split(/\s+/).filter(Boolean);
    const [only, because, which] = ["verdict", "reason", "which"].map((name) => field(name).value);
    const matching = rows.filter(
      (row) =>
        (!only || verdict(row) === only) &&
        (!because || why(row) === because) &&
        (!which || (row.decided && WHICH[which](row))) &&
        words.every((word) => row.searched.includes(word)),
    );
    const key = ORDERS[field("order").value];
    matching.sort((a, b) => key(a) - key(b) || a.index - b.index);
    const counts = d3.rollup(matching, (own) => own.length, verdict);
    const parts = [["kept", "kept"], ["dropped", "dropped"], ["error", "errors"]].map(([name, word]) => `${counts.get(name) ?? 0} ${word}`);
    found.textContent = `${matching.length} of ${rows.length} examples: ${parts.join(", ")}`;
    list.replaceChildren(...matching.slice(0, shown).map(card));
    more.hidden = matching.length <= shown;
    more.textContent = `Show ${Math.min(PAGE, matching.length - shown)} more`;
  };
  const again = onceAFrame(show);
  const anew = () => {
    shown = PAGE;
    again();
  };
  field("filters").addEventListener("input", anew);
  field("filters").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = list.children.length;
    shown += PAGE;
    show();
    const next = list.children[first];
    next?.setAttribute("tabindex", "-1");
    next?.focus({ preventScroll: true });
  });
  followers.push(show);
}

function card(row) {
  const is = verdict(row);
  const reason = why(row);
  const picture = row.picture
    ? element("img", { src: row.picture, alt: `Picture of row ${row.row}`, decoding: "async" })
    : element("span", {}, row.noPicture);
  const about = [
    `row ${whole.format(row.row)}`,
    row.width ? `${row.width} × ${row.height} ${row.format ?? ""}` : null,
    row.image_bytes ? binary(row.image_bytes) : null,
  ];
  return element(
    "li",
    { class: "pair", "data-verdict": is },
    element("div", { class: "picture" }, picture),
    element(
      "div",
      { class: "texts" },
      element(
        "p",
        { class: "head" },
        element("span", { class: `tag ${is === "error" ? "errors" : is}` }, is === row.status ? is : `would be ${is}`),
        element("span", { class: "why" }, spaced(reason)),
      ),
      ...row.texts.map((text) => said_of(text)),
      row.detail || row.note ? element("p", { class: "why" }, element("bdi", {}, row.detail ?? row.note)) : null,
    ),
    element(
      "p",
      { class: "place" },
      element("span", {}, about.filter(Boolean).join(" · ")),
      element("bdi", {}, row.shard),
      row.url ? element("bdi", {}, row.url) : null,
    ),
  );
}

/** One text: what it says, who says it, its scores, and whether it matches at the chosen thresholds. */
function said_of(text) {
  const source = text.source === "web" ? "web" : "synthetic";
  const matches = text.reason !== "kept_out_word" && text.score != null && text.score >= chosen[source];
  const cut = text.cut ? ` … and ${whole.format(text.cut)} more characters` : "";
  const words = element("bdi", { class: "said", dir: "auto" }, text.text ?? "no text", cut);
  const about = element(
    "span",
    { class: "about" },
    element("bdi", {}, text.origin),
    text.score == null ? null : element("span", {}, "ITM ", element("b", {}, score(text.score))),
    text.itc == null ? null : element("span", {}, `ITC ${score(text.itc)}`),
    text.score == null || ["duplicate_text", "not_best", "kept_out_word"].includes(text.reason) ? element("span", {}, spaced(text.reason)) : null,
  );
  const made = element("div", { class: `text${matches ? " match" : ""}` }, words, about);
  if ((text.text ?? "").length > 140) {
    const button = element("button", { type: "button", "aria-expanded": "false" }, "all of it");
    button.addEventListener("click", () => {
      const open = made.classList.toggle("whole");
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "less of it" : "all of it";
    });
    about.append(button);
  }
  return made;
}
