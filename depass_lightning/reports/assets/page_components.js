// The components as bars, the strongest first or in the order of the text.

PANELS.push({ fits: (prompt) => prompt.rows == null && prompt.views.tokens.scores.length > 0, draw: componentsPanel });

const FEW = 12;

function componentsPanel(prompt) {
  const view = viewOf(prompt);
  let rows = askedFor(view).sort((a, b) => Math.abs(view.scores[b]) - Math.abs(view.scores[a]));
  const left = rows.length - FEW;
  if (!state.all) rows = rows.slice(0, FEW);
  if (state.order === "text") rows.sort((a, b) => a - b);
  const shown = rows.map((i) => view.scores[i]);
  const low = Math.min(0, ...shown);
  const high = Math.max(0, ...shown);
  const long = rows.some((i) => nameOf(prompt, view, i).length > 18);
  const bars = element("ol", { class: long ? "bars long" : "bars" }, ...rows.map((i) => barRow(prompt, view, i, [low, high])));
  bars.addEventListener("pointerleave", hideTip);
  return element(
    "div",
    { class: "panel components-panel" },
    element("div", { class: "panel-head" }, element("h2", {}, "Components"), orderSwitch(view)),
    bars,
    left > 0 ? element("button", { type: "button", class: "more", onclick: showAll }, state.all ? "only the strongest" : `and ${left} more`) : null,
  );
}

function barRow(prompt, view, i, [low, high], hover = light) {
  const score = view.scores[i];
  const range = high - low || 1;
  const right = prompt.marks.some((mark) => mark.right && view.spans[i] && mark.tokens.some((t) => within(t, view.spans[i])));
  const bar = element("i", { class: score < 0 ? "negative" : "positive" });
  bar.style.left = `${(100 * (Math.min(score, 0) - low)) / range}%`;
  bar.style.width = `${(100 * Math.abs(score)) / range}%`;
  const axis = element("s", {});
  axis.style.left = `${(100 * -low) / range}%`;
  const row = element(
    "li",
    { "data-component": i },
    element("span", { class: `name${right ? " right" : ""}`, dir: "auto" }, element("span", {}, bare(nameOf(prompt, view, i))), indexOf(view, i)),
    element("span", { class: "track" }, bar, axis),
    element("span", { class: "score" }, signed(score)),
    noteOf(view.names[i]),
  );
  row.addEventListener("pointerenter", () => hover(i, row));
  return row;
}

// The number of a repeated word, in the order of the text.
const indexOf = (view, i) => (view.repeats?.[i] ? element("sub", { class: "index" }, String(view.repeats[i])) : null);

const noteOf = (name) => (DATA.notes[name] ? element("small", { class: "note", dir: "auto" }, DATA.notes[name]) : null);

function orderSwitch(view) {
  const button = (order, label) =>
    element("button", { type: "button", "aria-pressed": String(state.order === order), onclick: () => chooseOrder(order) }, label);
  return element("div", { class: "switch", role: "group", "aria-label": "Order" }, button("score", "by size"), button("text", inText(view) ? "by position" : "in order"));
}

function chooseOrder(order) {
  state.order = order;
  drawDetail();
  byId("detail").querySelector(".components-panel [aria-pressed=true]")?.focus();
}

function showAll() {
  state.all = !state.all;
  drawDetail();
  byId("detail").querySelector(".more")?.focus();
}
