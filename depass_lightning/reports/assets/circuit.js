// The page of a circuit: nodes by layer, the largest edges between them, and what is known of the chosen node.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const graph = byId("graph"), slider = byId("edges"), facts = byId("facts"), count = byId("count");
const INPUTS = ["token", "embedding", "bias"];
const last = DATA.nodes.length - 1;
let chosen = null, shown = [];

function make(tag, attributes, parent, text) {
  const names = ["svg", "path", "circle", "rect", "text", "title", "g"];
  const space = names.includes(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text != null) node.textContent = text; // always text, never markup: a token may contain anything
  if (parent) parent.append(node);
  return node;
}

const signed = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Math.abs(number).toPrecision(3);
const side = (number) => (number < 0 ? "against" : "for");

// The largest `limit` edges that reach the target. Edges lead to later nodes: the last sources are decided first.
function pruned(limit) {
  const kept = DATA.edges.slice(0, limit).sort((one, other) => other[0] - one[0]);
  const reaching = new Set([last]);
  const result = [];
  for (const edge of kept) {
    if (!reaching.has(edge[1])) continue;
    reaching.add(edge[0]);
    result.push(edge);
  }
  return result;
}

function places(width) {
  const tokens = DATA.nodes.filter((node) => INPUTS.includes(node.kind)).length;
  const used = new Set(shown.flatMap((edge) => [edge[0], edge[1]]));
  used.add(last);
  const layers = [...new Set([...used].map((i) => DATA.nodes[i].layer).filter((layer) => layer != null))];
  layers.sort((one, other) => one - other);
  const left = 34, step = (width - left - 12) / Math.max(tokens, 1);
  const row = Math.max(26, Math.min(64, 620 / (layers.length + 2)));
  const longest = Math.max(...DATA.nodes.filter((node) => INPUTS.includes(node.kind)).map((node) => node.label.length));
  const crowded = step < 16 + 6.5 * Math.min(longest, 14), bottom = crowded ? 84 : 34, height = row * (layers.length + 2) + bottom;
  const at = new Map();
  let input = 0;
  DATA.nodes.forEach((node, i) => {
    let x, y = height - bottom;
    if (INPUTS.includes(node.kind)) x = left + step * (input++ + 0.5);
    else if (i === last) [x, y] = [width / 2, row * 0.6];
    else {
      y = height - bottom - row * (layers.indexOf(node.layer) + (node.kind === "mlp" ? 1.35 : 1));
      const part = (node.kind === "mlp" ? DATA.heads : node.index ?? 0) + 0.5;
      x = node.position == null
        ? left + ((width - left - 12) * part) / (DATA.heads + 1)
        : left + step * (node.position + (part / (DATA.heads + 1)));
    }
    if (used.has(i) || INPUTS.includes(node.kind)) at.set(i, [x, y]);
  });
  return { at, height, layers, left, row, bottom, crowded, used };
}

function draw() {
  const width = graph.clientWidth || 800;
  shown = pruned(Math.round(DATA.edges.length ** (slider.value / 1000)));
  const { at, height, layers, left, row, bottom, crowded, used } = places(width);
  graph.setAttribute("viewBox", `0 0 ${width} ${height}`);
  graph.style.height = `${height}px`;
  graph.replaceChildren();
  layers.forEach((layer, i) => {
    make("text", { class: "layer", x: 0, y: height - bottom - row * (i + 1) + 4 }, graph, `L${layer}`);
  });
  const largest = Math.max(...DATA.edges.slice(0, 1).map((edge) => Math.abs(edge[3])), 1e-12);
  for (const edge of [...shown].reverse()) {
    const [from, to] = [at.get(edge[0]), at.get(edge[1])];
    const bend = (from[1] - to[1]) * 0.45, aside = from[0] === to[0] ? 14 + bend * 0.3 : 0;
    const line = make("path", {
      class: "edge", stroke: `var(--${edge[3] < 0 ? "negative" : "positive"})`, "data-from": edge[0],
      "data-to": edge[1], "stroke-width": 0.6 + (7 * Math.abs(edge[3])) / largest,
      "stroke-opacity": 0.25 + (0.6 * Math.abs(edge[3])) / largest,
      ...(DATA.paths[edge[2]] === "value" ? {} : { "stroke-dasharray": edge[2] === 1 ? "6 3" : "2 3" }),
      d: `M${from[0]},${from[1]}C${from[0] - aside},${from[1] - bend} ${to[0] - aside},${to[1] + bend} ${to[0]},${to[1]}`,
    }, graph);
    make("title", {}, line, `${name(edge[0])} → ${name(edge[1])}${path(edge)}: ${signed(edge[3])}`);
  }
  for (const [i, [x, y]] of at) node(i, x, y, crowded, used.has(i), width);
  count.textContent = `${shown.length} of ${DATA.total.toLocaleString("en")}`;
  light(chosen);
}

const path = (edge) => (DATA.paths.length > 1 && edge[1] !== last ? ` (${DATA.paths[edge[2]]})` : "");
// Repeated tokens are numbered, in the order of the text.
const names = DATA.nodes.map((node, i) => {
  const label = node.label.trim() || node.label;
  const same = (other) => other.kind === "token" && other.label.trim() === label;
  if (node.kind !== "token" || !/[\p{L}\p{N}]/u.test(label) || DATA.nodes.filter(same).length < 2) return label;
  const number = DATA.nodes.slice(0, i + 1).filter(same).length;
  return label + String(number).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);
});
const name = (i) => names[i];

function node(i, x, y, crowded, used, width) {
  const of = DATA.nodes[i], input = INPUTS.includes(of.kind);
  const look = {
    class: "node", "data-node": i, tabindex: 0, "fill-opacity": used ? 1 : 0.3,
    fill: `var(--${of.score < 0 ? "negative" : "positive"})`,
  };
  const mark = of.kind === "mlp"
    ? make("rect", { ...look, x: x - 6, y: y - 6, width: 12, height: 12, rx: 2 }, graph)
    : make("circle", { ...look, cx: x, cy: y, r: i === last ? 9 : 6.5 }, graph);
  make("title", {}, mark, `${name(i)}: ${signed(of.score)}`);
  mark.addEventListener("pointerenter", () => light(i));
  mark.addEventListener("pointerleave", () => light(chosen));
  mark.addEventListener("click", () => choose(chosen === i ? null : i));
  mark.addEventListener("keydown", (event) => event.key === "Enter" && choose(i));
  if (input && crowded) {
    make("text", { x: 0, y: 0, "text-anchor": "end", transform: `translate(${x + 4},${y + 16}) rotate(-55)` },
      graph, name(i).slice(0, 15));
  } else if (input) make("text", { x, y: y + 22, "text-anchor": "middle" }, graph, name(i).slice(0, 15));
  else if (i === last) make("text", { x: x + 14, y: y + 4 }, graph, name(i).slice(0, width / 16));
  else if (!crowded || width > 700 || (of.position == null && width > 40 * (DATA.heads + 1))) {
    make("text", { class: "axis", x: x + 9, y: y - 6 }, graph, of.kind === "mlp" ? "MLP" : `H${of.index ?? ""}`);
  }
}

// What flows into a node and out of it, and so on to both ends.
function light(i) {
  graph.classList.toggle("chosen", i != null);
  if (i == null) return;
  const lit = new Set([i]), edges = new Set();
  for (const [start, end] of [[0, 1], [1, 0]]) {
    const open = [i], seen = new Set(open);
    while (open.length) {
      const current = open.pop();
      for (const edge of shown) {
        if (edge[start] !== current) continue;
        edges.add(`${edge[0]} ${edge[1]}`);
        lit.add(edge[end]);
        if (!seen.has(edge[end])) open.push(edge[end]);
        seen.add(edge[end]);
      }
    }
  }
  for (const line of graph.querySelectorAll(".edge")) {
    line.classList.toggle("lit", edges.has(`${line.dataset.from} ${line.dataset.to}`));
  }
  for (const mark of graph.querySelectorAll(".node")) {
    mark.classList.toggle("lit", lit.has(Number(mark.dataset.node)));
    mark.classList.toggle("picked", Number(mark.dataset.node) === i);
  }
}

function listed(title, edges, end) {
  if (!edges.length) return;
  make("h3", {}, facts, title);
  const list = make("ul", {}, facts);
  for (const edge of edges.slice(0, 8)) {
    const item = make("li", {}, list);
    make("span", {}, item, (end == null ? `${name(edge[0])} → ${name(edge[1])}` : name(edge[end])) + path(edge));
    make("span", { class: side(edge[3]) }, item, signed(edge[3]));
  }
}

function choose(i) {
  chosen = i;
  facts.replaceChildren();
  if (i == null) {
    make("h2", {}, facts, "Choose a node");
    make("p", { class: "subtitle" }, facts, "Click a node to see what it reads, what reads it, and what it promotes.");
    listed("The largest edges", DATA.edges, null);
  } else {
    const of = DATA.nodes[i];
    make("h2", {}, facts, name(i));
    make("p", {}, facts, `contributes ${signed(of.score)} of ${signed(DATA.value)}`);
    if (of.note) make("p", { class: "subtitle" }, facts, of.note);
    listed("Reads from", DATA.edges.filter((edge) => edge[1] === i), 0);
    listed("Contributes through", DATA.edges.filter((edge) => edge[0] === i), 1);
    if (of.pattern) pattern(of.pattern);
  }
  light(i);
}

function pattern(rows) {
  make("h3", {}, facts, "Attention: a row is a query");
  const size = rows.length, margin = 58, cell = (300 - margin) / size;
  const table = make("svg", { class: "pattern", viewBox: `0 0 300 ${300 - margin + 50}` }, facts);
  rows.forEach((row, query) => {
    if (size <= 40) {
      const word = DATA.tokens[query].trim().slice(0, 10);
      make("text", { x: margin - 4, y: cell * (query + 0.5) + 3, "text-anchor": "end" }, table, word);
      make("text", {
        x: 0, y: 0, "text-anchor": "end",
        transform: `translate(${margin + cell * (query + 0.5) + 3},${300 - margin + 8}) rotate(-60)`,
      }, table, word);
    }
    row.forEach((probability, key) => {
      const square = make("rect", {
        x: margin + cell * key, y: cell * query, width: cell, height: cell, fill: "var(--positive)",
        "fill-opacity": probability, stroke: "var(--line)", "stroke-width": 0.3,
      }, table);
      make("title", {}, square, `${DATA.tokens[query]} → ${DATA.tokens[key]}: ${probability.toFixed(2)}`);
    });
  });
}

const root = document.documentElement, key = "depass-theme";
try { const kept = localStorage.getItem(key); if (kept) root.dataset.theme = kept; } catch {}
byId("theme").addEventListener("click", () => {
  const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem(key, root.dataset.theme); } catch {}
});
slider.value = DATA.edges.length > 1 ? Math.round((1000 * Math.log(Math.min(60, DATA.edges.length))) / Math.log(DATA.edges.length)) : 1000;
slider.addEventListener("input", draw);
addEventListener("resize", draw);
draw();
choose(null);
