// What every part of the page needs: the data, elements, numbers and colours.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PROMPTS = DATA.prompts;
const byId = (id) => document.getElementById(id);

// Text is always set as text, never as markup: a token may contain anything.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function drawing(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// As `numbers.plain` writes them.
function plain(number) {
  if (number == null) return "unknown";
  const size = Math.abs(number);
  let written;
  if (size >= 1e9 || (size > 0 && size < 1e-3)) written = number.toExponential(1).replace(".0e", "e");
  else if (size >= 1000) written = Math.round(number).toLocaleString("en");
  else {
    const before = size ? Math.floor(Math.log10(size)) : 0;
    written = number.toFixed(Math.min(Math.max(2 - before, 0), 4));
    if (Number.isInteger(number)) written = String(number);
  }
  return written.replace("e+", "e").replaceAll("-", "−");
}

const signed = (number) => (number > 0 ? "+" : "") + plain(number);

function percent(part) {
  if (part == null) return "unknown";
  if (part > 0 && part < 0.001) return "<0.1%";
  return `${(100 * part).toFixed(1).replace(/\.0$/, "")}%`;
}

const bare = (name) => name.trim() || name;

function colour(name) {
  const written = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return [1, 3, 5].map((start) => parseInt(written.slice(start, start + 2), 16));
}

// The theme's colours, read again when the theme changes.
const theme = {};
function readTheme() {
  for (const name of ["ground", "positive", "negative"]) theme[name] = colour(name);
}

function shade(strength) {
  const full = strength > 0 ? theme.positive : theme.negative;
  const part = Math.min(Math.abs(strength), 1);
  return theme.ground.map((ground, i) => Math.round(ground + (full[i] - ground) * part));
}

// Near black or white, whichever has more contrast with a background.
function ink(ground) {
  const [r, g, b] = ground.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18 ? "#ffffff" : "#0e1014";
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;

// A row of a matrix takes the entries that it lacks from the matrix's first row.
for (const prompt of PROMPTS.filter((prompt) => prompt.like != null)) {
  const first = PROMPTS[prompt.like];
  for (const [name, view] of Object.entries(prompt.views)) prompt.views[name] = { ...first.views[name], ...view };
  Object.assign(prompt, { ...first, ...prompt });
}
// The prompt that represents another in the list: the first row of its matrix.
const leading = (i) => DATA.matrices[PROMPTS[i].matrix]?.rows[0] ?? i;
const LEADING = PROMPTS.map((_, i) => i).filter((i) => leading(i) === i);

// Prompts with the same grid share one list of names, and the components that are the rest of the state.
for (const grid of DATA.grids) {
  grid.names = grid.layers.flatMap((layer) => grid.columns.map((name) => `layer ${layer} ${name}`));
  grid.left = grid.layers.flatMap((_, row) => grid.remainders.map((column) => row * grid.columns.length + column));
  grid.spans = grid.names.map(() => null);
}
for (const view of [DATA.mean?.view, ...PROMPTS.flatMap((prompt) => [prompt, ...(prompt.rows ?? [])]).map((prompt) => prompt.views.tokens)]) {
  if (view?.grid == null) continue;
  const grid = DATA.grids[view.grid];
  Object.assign(view, { names: grid.names, spans: grid.spans, remainders: grid.left });
}

// The data leaves out a component's text where its tokens have it, and its name where that is its text.
const textOf = (prompt, view, i) => view.texts[i] ?? prompt.tokens.slice(...view.spans[i]).join("");
const nameOf = (prompt, view, i) => view.names[i] ?? textOf(prompt, view, i);

const inText = (view) => view.spans.some(Boolean);

// The components that were asked for, without the rest of the state, which may be larger than all of them.
function askedFor(view) {
  const left = new Set(view.remainders ?? []);
  return view.scores.map((_, i) => i).filter((i) => !left.has(i));
}

// The largest score of a component in the text. A bias is outside the text and may be larger than all others.
function strongest(view) {
  if (view.most) return view.most; // all steps of a training timeline share one scale
  const counted = inText(view) ? view.scores.filter((_, i) => view.spans[i]) : askedFor(view).map((i) => view.scores[i]);
  return counted.reduce((most, score) => Math.max(most, Math.abs(score)), 0) || 1;
}
