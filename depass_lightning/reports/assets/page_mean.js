// The mean over prompts, where their components are the same heads, modules, neurons or subspaces.

function drawMean() {
  byId("mean").hidden = !DATA.mean || PROMPTS.length < 2;
  if (byId("mean").hidden) return;
  const { view, value } = DATA.mean;
  const over = `mean value ${signed(value)}`;
  const name = PROMPTS[0].rows ? "Mean change over prompts " : "Mean over prompts ";
  const head = element("div", { class: "panel-head" }, element("h2", {}, name, element("small", {}, over)));
  const hover = (i, cell) => {
    unlight();
    lit = [...byId("mean").querySelectorAll(`[data-component="${i}"]`)];
    for (const node of lit) node.classList.add("lit");
    showTip(cell, view.names[i], view, i);
  };
  byId("mean").replaceChildren(head, element("div", { class: "mean-body" }, view.grid == null ? null : heatMap(view, { hover }), meanBars(view, hover)));
}

function meanBars(view, hover) {
  const rows = askedFor(view).sort((a, b) => Math.abs(view.scores[b]) - Math.abs(view.scores[a])).slice(0, 8);
  const shown = rows.map((i) => view.scores[i]);
  const range = [Math.min(0, ...shown), Math.max(0, ...shown)];
  const bars = element("ol", { class: "bars" }, ...rows.map((i) => barRow({ marks: [], tokens: [] }, view, i, range, hover)));
  bars.addEventListener("pointerleave", hideTip);
  return bars;
}
