// The list of all prompts, with search, filters and sorting. Only visible rows are in the page, so that thousands
// of prompts are as fast as ten.

const ROW = 70;

const listName = (prompt) => (prompt.matrix == null ? prompt.id : DATA.matrices[prompt.matrix].name);

const HAYSTACK = PROMPTS.map((p) => [listName(p), p.id, p.tokens.join(""), p.target, p.prediction, p.answer].join("\n").toLowerCase());

const FILTERS = {
  "all prompts": () => true,
  "the model is right": (p) => p.right === true,
  "the model is wrong": (p) => p.right === false,
  "the target is the model's first choice": (p) => firstChoice(p) === true,
  "the target is not the model's first choice": (p) => firstChoice(p) === false,
  "evidence ranked first": (p) => p.first === true,
  "evidence not ranked first": (p) => p.first === false,
};

const SORTS = {
  ...(PROMPTS[0].rows ? { "change of the scores": (p) => p.change, "change of the value": (p) => Math.abs(p.value) } : {}),
  "as given": null,
  id: (p) => p.id,
  value: (p) => p.value,
  "rank of the target": (p) => (p.rank == null ? null : -p.rank),
  "evidence ranked first": (p) => (p.first == null ? null : Number(p.first)),
  "score on the evidence": (p) => p.share,
  "completeness error": (p) => p.completeness,
};

let descending = true;

function fillControls() {
  const filters = Object.keys(FILTERS).filter((name) => PROMPTS.some(FILTERS[name]));
  const sorts = Object.keys(SORTS).filter((name) => !SORTS[name] || PROMPTS.some((p) => SORTS[name](p) != null));
  byId("filter").append(...filters.map((name) => element("option", {}, name)));
  byId("sort").append(...sorts.map((name) => element("option", {}, name)));
  byId("filter").hidden = filters.length < 2;
}

function arrange() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const keep = FILTERS[byId("filter").value];
  const key = SORTS[byId("sort").value];
  const collator = new Intl.Collator("en", { numeric: true });
  state.visible = LEADING.filter((i) => keep(PROMPTS[i]) && words.every((word) => HAYSTACK[i].includes(word)));
  if (key) {
    const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
    const known = state.visible.filter((i) => key(PROMPTS[i]) != null);
    const turn = descending === (byId("sort").value !== "id") ? -1 : 1;
    known.sort((a, b) => turn * compare(key(PROMPTS[a]), key(PROMPTS[b])) || a - b);
    state.visible = [...known, ...state.visible.filter((i) => key(PROMPTS[i]) == null)];
  } else if (!descending) state.visible.reverse();
  byId("direction").textContent = descending ? "↓" : "↑";
  byId("shown").textContent = state.visible.length === LEADING.length ? "" : `${state.visible.length.toLocaleString("en")} of ${LEADING.length.toLocaleString("en")}`;
  drawList();
}

function drawList() {
  const list = byId("list");
  const first = Math.max(Math.floor(list.scrollTop / ROW) - 4, 0);
  const count = Math.ceil(list.clientHeight / ROW) + 8;
  const rows = byId("rows");
  rows.style.height = `${state.visible.length * ROW}px`;
  rows.replaceChildren(...state.visible.slice(first, first + count).map((i, k) => listRow(i, first + k)));
  if (!state.visible.length) rows.replaceChildren(element("p", { class: "nothing" }, "No prompt matches."));
  const chosen = byId(`prompt-${leading(state.chosen)}`);
  chosen ? list.setAttribute("aria-activedescendant", chosen.id) : list.removeAttribute("aria-activedescendant");
}

function listRow(i, place) {
  const prompt = PROMPTS[i];
  const strip = element("i", { class: "strip", "aria-hidden": "true" });
  strip.style.background = stripes(prompt);
  const rows = DATA.matrices[prompt.matrix]?.rows;
  const good = rows ? null : prompt.right ?? firstChoice(prompt);
  const title = prompt.right == null ? "whether the target is the model's first choice" : "whether the model is right";
  const row = element(
    "div",
    { id: `prompt-${i}`, class: "item", role: "option", "aria-selected": String(i === leading(state.chosen)), "aria-setsize": state.visible.length, "aria-posinset": place + 1, onclick: () => choose(i, { show: true }) },
    element("span", { class: "item-head" }, element("b", {}, listName(prompt)), element("span", { class: good ? "good" : "bad", title }, good == null ? "" : good ? "✓" : "✗"),
      element("span", { class: "item-value" }, rows ? `${rows[1] - rows[0]} targets` : prompt.rows ? plain(prompt.change) : signed(prompt.value))),
    element("span", { class: "item-text", dir: "auto" }, snippet(prompt)),
    strip,
  );
  row.style.top = `${place * ROW}px`;
  return row;
}

const snippet = (prompt) =>
  prompt.tokens.slice(0, 60).filter((_, k) => !prompt.special.includes(k)).join("").replaceAll("↵", "↵ ").trim();

// The whole prompt as a band of colours, one stripe per token, or per component where none is in the text.
function stripes(prompt) {
  const view = prompt.views.tokens;
  const scale = strongest(view);
  const asked = inText(view) ? null : askedFor(view).map((i) => view.scores[i] / scale);
  const strength = asked ?? new Array(prompt.tokens.length).fill(0);
  view.spans.forEach((span, i) => span && strength.fill(view.scores[i] / scale, span[0], span[1]));
  const stride = Math.ceil(strength.length / 200);
  const shown = Array.from({ length: Math.ceil(strength.length / stride) }, (_, k) =>
    strength.slice(k * stride, (k + 1) * stride).reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)));
  const stops = shown.map((part, k) => `${css(shade(part))} ${(100 * k) / shown.length}% ${(100 * (k + 1)) / shown.length}%`);
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

function scrollToChosen() {
  const place = state.visible.indexOf(leading(state.chosen));
  const list = byId("list");
  if (place < 0) return;
  const top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}
