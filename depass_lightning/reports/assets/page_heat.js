// Heads and modules of all layers as a heat map: one row per layer, one column per head, and the rest of the state.

PANELS.push({ fits: (prompt) => prompt.rows == null && viewOf(prompt).grid != null, draw: heatPanel });

const NUMBERED = 8; // columns; with at most this number, cells show their scores

function heatPanel(prompt) {
  const view = viewOf(prompt);
  const map = heatMap(view, { hover: light });
  return element("div", { class: "panel heat-panel" }, element("div", { class: "panel-head" }, element("h2", {}, "Layer by layer")), map);
}

// hover(i, cell) is called with the component that the pointer enters.
function heatMap(view, { hover, scale = strongest(view) }) {
  const grid = DATA.grids[view.grid];
  const width = grid.columns.length;
  const kind = commonWord(grid.cells.map((column) => grid.columns[column]));
  const rows = grid.layers.map((layer, row) => [
    element("span", { class: "layer" }, String(layer)),
    ...grid.cells.map((column) => heatCell(view, row * width + column, scale, grid.cells.length <= NUMBERED)),
    ...grid.remainders.map((column) => element("span", { class: "left", "data-component": row * width + column }, signed(view.scores[row * width + column]))),
  ]);
  const size = grid.layers.length > 40 ? " dense" : grid.layers.length > 14 ? " close" : grid.cells.length <= NUMBERED ? " large" : "";
  const cells = element("div", { class: `heat${size}`, role: "img", "aria-label": describeHeat(view, grid) }, ...heatHead(grid, kind), ...rows.flat());
  cells.style.gridTemplateColumns = `max-content repeat(${grid.cells.length}, minmax(4px, ${grid.cells.length === 1 ? 160 : grid.cells.length <= NUMBERED ? 96 : 60}px)) repeat(${grid.remainders.length || 1}, max-content)`;
  cells.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("[data-component]");
    cell ? hover(Number(cell.dataset.component), cell) : hideTip();
  });
  cells.addEventListener("pointerleave", hideTip);
  const meaning = "Every row is a separate split: with the rest of the state, it sums to the value.";
  return element("div", { class: "heat-frame" }, cells, element("div", { class: "legend" }, scaleLegend(scale), element("span", {}, meaning)));
}

function heatCell(view, i, scale, numbered) {
  const ground = shade(view.scores[i] / scale);
  const cell = element("span", { class: "cell", "data-component": i }, numbered ? element("span", {}, signed(view.scores[i])) : null);
  cell.style.background = css(ground);
  cell.style.color = ink(ground);
  return cell;
}

// The columns' numbers, thinned out where they are many, under the first word of their names.
function heatHead(grid, kind) {
  const stride = Math.ceil(grid.cells.length / 32) * (grid.cells.length > 16 ? 4 : 1);
  const names = grid.cells.map((column, k) => element("span", { class: "column" }, k % stride ? "" : kind ? grid.columns[column].slice(kind.length) : grid.columns[column]));
  const over = element("span", { class: "over" }, kind.trim());
  over.style.gridColumn = `2 / span ${grid.cells.length}`;
  const first = [element("span", { class: "layer" }, kind ? "" : "layer"), ...(kind ? [over, ...grid.remainders.map(() => element("span", {}))] : [])];
  const second = kind ? [element("span", { class: "layer" }, "layer")] : [];
  return [...first, ...second, ...names, ...grid.remainders.map((column) => element("span", { class: "column left" }, grid.columns[column]))];
}

// "head " of "head 0", "head 1", ...; "" where the names share no first word.
function commonWord(names) {
  const word = names[0].match(/^\S+ /)?.[0] ?? "";
  return names.every((name) => name.startsWith(word)) ? word : "";
}

function describeHeat(view, grid) {
  const top = askedFor(view).sort((a, b) => Math.abs(view.scores[b]) - Math.abs(view.scores[a])).slice(0, 3);
  return `${grid.layers.length} layers; the strongest are ${top.map((i) => `${grid.names[i]} ${signed(view.scores[i])}`).join(", ")}`;
}
