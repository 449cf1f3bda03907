// Several targets over the same components: one row per target, one column per component. The text above shows the
// chosen row.

PANELS.push({ fits: (prompt) => prompt.matrix != null, draw: matrixPanel });

const NARROW = 15; // px, minimum width of a column
const WIDE = 36;
const PARTED = 150; // columns; up to this number, they are separated by lines

// The matrix is not drawn again when another row is chosen: it may be large.
let matrix = { key: null };

function matrixPanel(prompt) {
  const key = [prompt.matrix, state.view, ...theme.ground].join();
  if (matrix.key !== key) matrix = drawMatrix(prompt, key);
  const { panel, frame, rows, top, left } = matrix;
  rows.forEach((row, k) => row.setAttribute("aria-selected", String(matrix.first + k === state.chosen)));
  frame.setAttribute("aria-activedescendant", rows[state.chosen - matrix.first].id);
  // An element that is removed and inserted again loses its scroll position.
  queueMicrotask(() => frame.scrollTo(left, top));
  return panel;
}

function drawMatrix(prompt, key) {
  const [first, end] = DATA.matrices[prompt.matrix].rows;
  const views = PROMPTS.slice(first, end).map(viewOf);
  const reach = Math.max(...PROMPTS.slice(first, end).map((row) => row.position));
  const shown = inText(views[0])
    ? views[0].spans.flatMap((span, i) => (span && span[0] <= reach ? [i] : []))
    : askedFor(views[0]);
  const drawn = { key, first, views, shown, top: 0, left: 0, column: -1 };
  drawn.mark = element("i", { class: "matrix-mark" });
  drawn.rows = views.map((view, k) => matrixRow(PROMPTS[first + k], view, shown, first + k));
  drawn.columns = shown.map((i) => element("span", { dir: "auto" }, bare(nameOf(prompt, views[0], i))));
  drawn.frame = element(
    "div",
    { class: "matrix", role: "listbox", tabindex: "0", "aria-label": "Targets; up and down choose one, left and right choose a component" },
    element("div", { class: "matrix-head", role: "presentation" }, element("span", { class: "matrix-name" }), element("div", { class: "matrix-columns", "aria-hidden": "true" }, ...drawn.columns)),
    ...drawn.rows,
  );
  const style = drawn.frame.style;
  style.setProperty("--least", `${shown.length * NARROW}px`);
  style.setProperty("--most", `${shown.length * WIDE}px`);
  drawn.frame.addEventListener("pointermove", pointAt);
  drawn.frame.addEventListener("pointerleave", () => pointTo(-1, -1));
  drawn.frame.addEventListener("click", chooseRow);
  drawn.frame.addEventListener("keydown", walkMatrix);
  drawn.frame.addEventListener("scroll", () => Object.assign(drawn, { top: drawn.frame.scrollTop, left: drawn.frame.scrollLeft }), { passive: true });
  const keys = element("span", { class: "keys" }, element("kbd", {}, "↑"), " ", element("kbd", {}, "↓"), " change row");
  const legend = element("div", { class: "legend" }, element("span", {}, "Each row has its own scale: the full colour is its strongest score. Click a row to show it in the text above; point at a token of the answer there to see its row."), keys);
  const title = views.length === 1 ? "1 target" : `${views.length} targets`;
  drawn.panel = element("div", { class: "panel matrix-panel" }, element("div", { class: "panel-head" }, element("h2", {}, `${title} over ${shown.length.toLocaleString("en")} components`)), drawn.frame, legend);
  return drawn;
}

// One row is one element: its cells are the stops of a gradient, so that thousands of them are fast.
function matrixRow(prompt, view, shown, number) {
  const scale = strongest(view);
  const part = 100 / shown.length;
  const parted = shown.length <= PARTED;
  const stops = shown.map((i, k) => {
    const reached = !view.spans[i] || view.spans[i][0] <= prompt.position;
    const cell = reached ? css(shade(view.scores[i] / scale)) : "transparent";
    const to = `${part * (k + 1)}%`;
    return `${cell} ${part * k}% ` + (parted ? `calc(${to} - 1px), transparent calc(${to} - 1px) ${to}` : to);
  });
  const band = element("div", { class: "matrix-band" });
  band.style.backgroundImage = `linear-gradient(90deg, ${stops.join(", ")})`;
  const top = [...shown].sort((a, b) => Math.abs(view.scores[b]) - Math.abs(view.scores[a])).slice(0, 3);
  const label = `${prompt.row} ${signed(prompt.value)}, relies most on ${top.map((i) => `${bare(nameOf(prompt, view, i))} ${signed(view.scores[i])}`).join(", ")}`;
  return element("div", { id: `row-${number}`, class: "matrix-row", role: "option", "aria-label": label }, element("span", { class: "matrix-name", dir: "auto" }, prompt.row), band);
}

function pointAt(event) {
  const band = event.target.closest(".matrix-band");
  if (!band) return pointTo(-1, -1);
  const box = band.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * matrix.shown.length);
  pointTo(matrix.rows.indexOf(band.parentElement), Math.min(Math.max(column, 0), matrix.shown.length - 1));
}

// Marks a cell, its column's name and its component in the text, and shows its tip.
function pointTo(row, column) {
  if (row === matrix.row && column === matrix.column) return;
  Object.assign(matrix, { row, column });
  hideTip();
  matrix.mark.remove();
  if (row < 0 || column < 0) return;
  const view = matrix.views[row];
  const prompt = PROMPTS[matrix.first + row];
  const i = matrix.shown[column];
  if (view.spans[i] && view.spans[i][0] > prompt.position) return;
  const part = 100 / matrix.shown.length;
  matrix.mark.style.left = `${part * column}%`;
  matrix.mark.style.width = `${part}%`;
  matrix.rows[row].lastChild.append(matrix.mark);
  const name = nameOf(prompt, view, i);
  lit = [matrix.columns[column], matrix.rows[row], ...byId("detail").querySelectorAll(`.prompt [data-component="${i}"]`)];
  for (const node of lit) node.classList.add("lit");
  const note = DATA.notes[name] ? [element("small", {}, DATA.notes[name])] : [];
  showTip(matrix.mark, `${bare(name)} → ${prompt.row}`, view, i, ...note);
}

function chooseRow(event) {
  const row = matrix.rows.indexOf(event.target.closest(".matrix-row"));
  if (row < 0) return;
  stepTo(row);
  matrix.row = null;
  pointAt(event);
}

function stepTo(row) {
  if (matrix.first + row !== state.chosen) choose(matrix.first + row);
  matrix.frame.focus({ preventScroll: true });
}

function walkMatrix(event) {
  const row = state.chosen - matrix.first;
  const last = matrix.rows.length - 1;
  const rows = { ArrowDown: row + 1, ArrowUp: row - 1, Home: 0, End: last };
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!(event.key in rows) && !by) return;
  event.preventDefault();
  event.stopPropagation();
  const column = Math.min(Math.max(matrix.column + (by ?? 0), 0), matrix.shown.length - 1);
  const next = by ? row : Math.min(Math.max(rows[event.key], 0), last);
  const walking = by || matrix.column >= 0;
  stepTo(next);
  queueMicrotask(() => {
    matrix.rows[next].scrollIntoView({ block: "nearest", inline: "nearest" });
    matrix.row = null;
    if (!walking) return;
    pointTo(next, column);
    if (matrix.mark.isConnected) matrix.mark.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}
