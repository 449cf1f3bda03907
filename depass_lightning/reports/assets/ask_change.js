// Words that are removed from the prompt or replaced, and the change of the target: predicted and real.

PANELS.push({ fits: () => true, draw: changePanel });

const spanText = (prompt, span) => prompt.tokens.slice(...span).join("");

function changePanel(prompt) {
  queueMicrotask(() => markRemoved(prompt)); // the prompt is drawn, but not yet on the page
  const hint = prompt.answer_start != null ? "Words can be removed where the answer is one token, or compared with one: without a word, the tokens of a longer answer would follow other text."
    : !inText(prompt.views.tokens) ? "To remove words, choose a source that splits the text, such as tokens or words: heads and layers are no part of it."
    : asked.edits.length ? null : "Click words of the prompt to remove them, and see what really changes.";
  if (hint) return element("p", { class: "change-panel elsewhere" }, hint);
  const panel = element("div", { class: "panel change-panel", "aria-live": "polite" },
    element("div", { class: "panel-head" }, element("h2", {}, "Without these words"), element("button", { type: "button", class: "more", onclick: () => edit([]) }, "restore all")),
    element("ul", { class: "edits" }, ...asked.edits.map((one) => editRow(prompt, one))));
  if (change) panel.append(...compared());
  return panel;
}

function editRow(prompt, one) {
  const text = spanText(prompt, [one.start, one.end]);
  const field = element("input", { type: "text", value: one.text, placeholder: "replace with", "aria-label": `Replace ${text} with`, spellcheck: "false" });
  field.addEventListener("change", () => edit(asked.edits.map((other) => (other === one ? { ...one, text: field.value } : other))));
  return element("li", {}, element("s", { dir: "auto" }, bare(text)), field,
    element("button", { type: "button", class: "quiet", "aria-label": `Restore ${text}`, onclick: () => edit(asked.edits.filter((other) => other !== one)) }, "×"));
}

function compared() {
  const rows = [["predicted", change.predicted], ["real", change.real]];
  const known = rows.map(([, value]) => value ?? 0);
  const low = Math.min(0, ...known);
  const range = Math.max(0, ...known) - low || 1;
  const cells = rows.flatMap(([name, value]) => {
    const bar = element("i", { class: value < 0 ? "negative" : "positive", hidden: value == null });
    bar.style.left = `${(100 * (Math.min(value ?? 0, 0) - low)) / range}%`;
    bar.style.width = `${(100 * Math.abs(value ?? 0)) / range}%`;
    const axis = element("s", {});
    axis.style.left = `${(100 * -low) / range}%`;
    return [element("dt", {}, `${name} change`), element("span", { class: "track" }, bar, axis), element("dd", {}, value == null ? "not predicted" : signed(value))];
  });
  const likely = change.next.slice(0, 3).map((token) => `${bare(token.text)} ${percent(token.probability)}`).join(", ");
  const reason = asked.edits.some((one) => one.text) ? "a word's score is its contribution, and says nothing about a word in its place" : "the removed words are a part of a component, which has one score";
  return [element("dl", { class: "compared" }, ...cells),
    change.predicted == null ? element("p", { class: "after" }, `Not predicted: ${reason}.`) : null,
    element("p", { class: "after" }, `${PROMPTS[0].target}: ${signed(change.before)} → ${signed(change.after)}; the next token is now ${likely}`)].filter(Boolean);
}

const isRemoved = (span) => asked.edits.some((one) => one.start < span[1] && span[0] < one.end);

function markRemoved(prompt) {
  const view = viewOf(prompt);
  for (const piece of byId("detail").querySelectorAll(".piece[data-component]")) {
    const span = view.spans[Number(piece.dataset.component)];
    piece.classList.toggle("removed", span != null && isRemoved(span));
  }
}

function toggleRemoved(piece) {
  const span = viewOf(PROMPTS[0]).spans[Number(piece.dataset.component)];
  if (!span || PROMPTS[0].answer_start != null) return;
  const kept = asked.edits.filter((one) => !(one.start < span[1] && span[0] < one.end));
  if (kept.length < asked.edits.length) return edit(kept);
  edit([...kept, { start: span[0], end: span[1], text: "" }].sort((a, b) => a.start - b.start));
}

// What the form calls of the drawn result.
function showResult() {
  drawn = { toggleRemoved, redraw: () => (readTheme(), drawDetail()), hideTip };
  drawn.redraw();
}
