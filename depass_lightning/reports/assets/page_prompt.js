// The prompt itself, its tokens coloured by score.

PANELS.push({ fits: (prompt) => prompt.rows == null, draw: promptPanel });

function promptPanel(prompt) {
  const view = viewOf(prompt);
  const scale = strongest(view);
  return element(
    "div",
    { class: "panel prompt-panel" },
    element("p", { class: "equation" }, element("span", {}, prompt.target), " = ", element("b", {}, signed(prompt.value))),
    citations(prompt),
    promptText(prompt, view, scale),
    elsewhere(prompt, view, scale),
    prompt.unread ? element("p", { class: "elsewhere" }, prompt.unread) : null,
    inText(view) || prompt.marks.length ? element("div", { class: "legend" }, viewSwitch(prompt), inText(view) ? scaleLegend(scale) : null, marksLegend(prompt)) : null,
  );
}

const LONG = 150; // tokens; longer prompts are set smaller, and their repeated words have no numbers

function promptText(prompt, view, scale) {
  const long = prompt.tokens.length > LONG ? " long" : "";
  const text = element("div", { class: `prompt${long}`, dir: "auto", tabindex: "0", role: "group", "aria-label": "The prompt; arrow keys choose a component" });
  const componentAt = new Array(prompt.tokens.length).fill(-1);
  const rows = answerRows(prompt);
  const pieces = [];
  view.spans.forEach((span, i) => span && componentAt.fill(i, span[0], span[1]));
  let place = text;
  for (let start = 0, end; start < prompt.tokens.length; start = end) {
    const i = componentAt[start];
    end = start + 1;
    while (i >= 0 && componentAt[end] === i) end++;
    const begun = placeOf(text, prompt, start);
    place = begun ?? place;
    const written = i < 0 ? prompt.tokens[start] : textOf(prompt, view, i);
    const row = rows.find((row) => start <= PROMPTS[row].target_position && PROMPTS[row].target_position < end);
    pieces.push({ i, start, end, row, node: appendPiece(place, prompt, { i, start, end, row, written, begins: begun != null }) });
    const given = prompt.change || prompt.target_position != null || prompt.answer_start != null;
    if (!given && start <= prompt.read && prompt.read < end) appendAnswer(answerPlace(text, place, prompt), prompt);
  }
  const shadeBy = (shown) => pieces.forEach((piece) => paint(piece, shown, viewOf(shown), shown === prompt ? scale : strongest(viewOf(shown))));
  shadeBy(prompt);
  // A token of the answer shades the text by what it rests on while it is pointed at, and stays so once chosen.
  text.addEventListener("pointerover", (event) => {
    const piece = event.target.closest("[data-component]");
    const row = piece?.dataset.row;
    shadeBy(row == null ? prompt : PROMPTS[row]);
    piece && row == null ? light(Number(piece.dataset.component), piece) : hideTip();
  });
  text.addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row != null) choose(Number(row));
  });
  text.addEventListener("pointerleave", () => (shadeBy(prompt), hideTip()));
  text.addEventListener("blur", hideTip);
  text.addEventListener("keydown", walk);
  return text;
}

// The rows of the prompt's matrix whose targets are tokens of the text.
function answerRows(prompt) {
  if (prompt.matrix == null) return [];
  const [first, end] = DATA.matrices[prompt.matrix].rows;
  return PROMPTS.map((_, row) => row).slice(first, end).filter((row) => PROMPTS[row].target_position != null);
}

// One component in the text, with its leading spaces before it, or without them where a section begins.
function appendPiece(text, prompt, { i, start, end, row, written, begins }) {
  const shown = written.replace(/^ +/, "");
  if (!begins) text.append(written.slice(0, written.length - shown.length));
  const marks = prompt.marks.filter((mark) => mark.tokens.some((t) => start <= t && t < end));
  const underline = marks.some((mark) => mark.right) ? " right" : marks.length ? " named" : "";
  const special = prompt.special.includes(start) ? " special" : "";
  const reply = prompt.answer_start != null && start >= prompt.answer_start ? " reply" : "";
  const piece = element("span", { class: `piece${underline}${special}${reply}`, "data-component": i >= 0 ? i : null, "data-row": row }, shown.replaceAll("↵", "↵\n"), i >= 0 && prompt.tokens.length <= LONG ? indexOf(viewOf(prompt), i) : null);
  if (row != null) piece.title = "point at it to see what it rests on, click to keep that";
  text.append(piece);
  return piece;
}

// Colours a piece by a row's scores; the target itself and what follows it have none.
function paint({ i, start, end, node }, prompt, view, scale) {
  const target = prompt.target_position != null && start <= prompt.target_position && prompt.target_position < end;
  const scored = !target && i >= 0 && ((prompt.target_position == null && prompt.answer_start == null) || start <= prompt.position);
  const ground = scored ? shade(view.scores[i] / scale) : null;
  node.style.background = ground ? css(ground) : "";
  node.style.color = ground ? ink(ground) : "";
  node.classList.toggle("answer", target);
  node.classList.toggle("wrong", target && prompt.rank > 1);
  node.classList.toggle("mute", !target && !scored);
  node.classList.toggle("unmatched", scored && view.scores[i] == null);
}

// The model's prediction, after the position at which it is read.
function appendAnswer(text, prompt) {
  const wrong = prompt.rank != null && prompt.rank > 1;
  const title = `${prompt.predicted}${wrong ? ", not the target" : ""}`;
  if (!prompt.prediction) return;
  const begins = text.lastElementChild?.className === "section-name";
  text.append(begins ? "" : " ", element("span", { class: `answer${wrong ? " wrong" : ""}`, title }, bare(prompt.prediction)));
}

function walk(event) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  const pieces = [...event.currentTarget.querySelectorAll("[data-component]")];
  const current = pieces.findIndex((piece) => piece.classList.contains("lit"));
  const next = pieces[current < 0 ? (by > 0 ? 0 : pieces.length - 1) : current + by];
  if (next) light(Number(next.dataset.component), next);
}

// Components outside the text, such as the bias. Where no component is in the text, only the rest of the state.
function elsewhere(prompt, view, scale) {
  if (view.grid != null) return null;
  const left = inText(view) ? view.scores.map((_, i) => i) : view.remainders;
  const chips = left.flatMap((i) => {
    const score = view.scores[i];
    if (view.spans[i] || score == null || left.length > 40) return [];
    const ground = shade(score / scale);
    const chip = element("span", { class: "chip", "data-component": i, onpointerenter: (event) => light(i, event.target), onpointerleave: hideTip },
      `${nameOf(prompt, view, i)} ${signed(score)}`);
    chip.style.background = css(ground);
    chip.style.color = ink(ground);
    return [chip];
  });
  return chips.length ? element("p", { class: "elsewhere" }, inText(view) ? "not in the text " : "the rest of the state ", ...chips) : null;
}

function viewSwitch(prompt) {
  if (!prompt.views.words) return null;
  const button = (view) =>
    element("button", { type: "button", "aria-pressed": String(state.view === view), onclick: () => chooseView(view) }, view);
  return element("div", { class: "switch", role: "group", "aria-label": "Colour" }, button("tokens"), button("words"));
}

function chooseView(view) {
  state.view = view;
  drawDetail();
  byId("detail").querySelector(".switch [aria-pressed=true]")?.focus();
}

function scaleLegend(scale) {
  const ramp = element("i", { class: "ramp" });
  const stops = [-1, -0.5, 0, 0.5, 1].map((strength) => css(shade(strength)));
  ramp.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  return element("span", { class: "scale" }, element("span", {}, signed(-scale)), ramp, element("span", {}, signed(scale)));
}

function marksLegend(prompt) {
  if (!prompt.marks.length) return null;
  const entries = prompt.marks.map((mark) => element("span", { class: mark.right ? "right" : "named" }, mark.name));
  return element("span", { class: "marks" }, ...entries);
}
