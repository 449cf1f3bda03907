// The chosen prompt, panel by panel.

// A panel is {fits(prompt), draw(prompt)}: whether it applies to a prompt, and its element.
// Panels appear on the page in the order in which the scripts add them.
const PANELS = [];

const state = { chosen: 0, view: "tokens", order: "score", all: false, visible: LEADING };

const viewOf = (prompt) => prompt.views[state.view] ?? prompt.views.tokens;

function drawDetail() {
  hideTip();
  const prompt = PROMPTS[state.chosen];
  byId("detail").replaceChildren(
    detailHead(prompt),
    ...PANELS.filter((panel) => panel.fits(prompt)).map((panel) => panel.draw(prompt)),
  );
}

function detailHead(prompt) {
  const place = state.visible.indexOf(leading(state.chosen));
  const count = state.visible.length;
  const step = (by, sign, label) =>
    element("button", { type: "button", class: "quiet", "aria-label": label, disabled: !count, onclick: () => move(by) }, sign);
  return element(
    "div",
    { class: "detail-head" },
    step(-1, "←", "Previous prompt"),
    step(1, "→", "Next prompt"),
    element("span", { class: "place" }, place < 0 ? "not in the list" : `${place + 1} of ${count}`),
    element("strong", {}, headingOf(prompt)),
    ...badges(prompt),
  );
}

// A row of a run's generation is named by the prompt and its place there.
function headingOf(prompt) {
  const name = listName(prompt);
  return prompt.id.startsWith(`${name}/`) ? `${name}, token ${Number(prompt.id.slice(name.length + 1)) + 1}` : prompt.id;
}

// Whether the target is the model's next token, which need not be the correct answer; null where that is not shown.
const firstChoice = (prompt) => (prompt.rank == null || prompt.matrix != null ? null : prompt.rank === 1);

// As `numbers.ordinal` writes them.
function ordinal(rank) {
  const ending = rank % 100 > 10 && rank % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[rank % 10] ?? "th";
  return rank === 1 ? "first" : `${rank.toLocaleString("en")}${ending}`;
}

function badges(prompt) {
  const badge = (good, yes, no) =>
    good == null ? null : element("span", { class: `badge ${good ? "good" : "bad"}` }, good ? `✓ ${yes}` : `✗ ${no}`);
  const first = prompt.right != null ? null : firstChoice(prompt);
  const choices = prompt.predicted === "the more likely answer" ? ["the chosen answer is more likely", "the rejected answer is more likely"] : ["the target is the model's first choice", `the target is the model's ${ordinal(prompt.rank ?? 0)} choice`];
  return [badge(prompt.right, "model is right", "model is wrong"), badge(first, ...choices), badge(prompt.first, "evidence ranked first", "evidence not ranked first")].filter(Boolean);
}

// The tip, and highlighting a component in the text and among the bars.

let lit = [];

function light(i, node) {
  unlight();
  const prompt = PROMPTS[state.chosen];
  const view = viewOf(prompt);
  lit = [...byId("detail").querySelectorAll(`[data-component="${i}"]`)];
  for (const part of lit) part.classList.add("lit");
  const marks = view.spans[i] ? prompt.marks.filter((mark) => mark.tokens.some((t) => within(t, view.spans[i]))) : [];
  const roles = marks.map((mark) => element("small", { class: "role" }, mark.name + (mark.right && mark.name !== "evidence" ? ", evidence" : "")));
  showTip(node, bare(nameOf(prompt, view, i)), view, i, ...scoresOf(prompt, i), ...roles, ...nextOf(prompt, view.spans[i]));
}

// Each row's score of a component, for the tip.
const scoresOf = (prompt, i) => (prompt.rows ?? []).map((row) => element("small", {}, `${row.label} ${viewOf(row).scores[i] == null ? "lacks it" : signed(viewOf(row).scores[i])}`));

// The likely next tokens after the last position of a component, for the tip.
function nextOf(prompt, span) {
  const likely = span && prompt.likely?.[span[1] - 1];
  if (!likely) return [];
  return [element("small", {}, `next token: ${likely.map(([text, part]) => `${bare(text)} ${percent(part)}`).join(" · ")}`)];
}

// A component's name and score, and its share of all supporting or opposing scores in its group.
function showTip(node, name, view, i, ...more) {
  const score = view.scores[i];
  const width = view.grid == null ? view.scores.length : DATA.grids[view.grid].columns.length;
  const first = Math.floor(i / width) * width;
  const side = view.scores.slice(first, first + width).filter((other) => other * score > 0).reduce((sum, other) => sum + other, 0);
  const part = `${percent(score / side)} of what ${score > 0 ? "supports" : "opposes"} it${view.grid == null ? "" : " in its layer"}`;
  const tip = byId("tip");
  tip.replaceChildren(
    element("b", {}, name),
    element("span", { class: score < 0 ? "against" : "for" }, signed(score)),
    ...(view.partial ? [] : [element("small", {}, score ? part : "no contribution")]),
    ...more,
    ...(DATA.notes[name] ? [element("small", {}, DATA.notes[name])] : []),
  );
  tip.hidden = false;
  placeTip(tip, node.getClientRects()[0] ?? node.getBoundingClientRect());
}

const within = (token, span) => span[0] <= token && token < span[1];

function placeTip(tip, box) {
  const wide = tip.offsetWidth;
  const left = Math.min(Math.max(box.left + box.width / 2 - wide / 2, 8), innerWidth - wide - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}

function unlight() {
  for (const node of lit) node.classList.remove("lit");
  lit = [];
}

function hideTip() {
  unlight();
  byId("tip").hidden = true;
}
