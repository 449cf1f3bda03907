// A conversation as bubbles with the speakers' roles, documents as titled blocks, and the best citations on top.

// The element that a token belongs in: a new one where a section or a stretch of the template begins; null to go on.
function placeOf(text, prompt, start) {
  const section = prompt.sections.find(({ tokens }) => within(start, tokens));
  if (section && start !== section.tokens[0]) return null;
  if (!section) {
    const begins = start === 0 || prompt.sections.some(({ tokens }) => tokens[1] === start);
    if (!prompt.sections.length || !begins) return null;
    text.append(element("div", { class: "template" }));
    return text.lastElementChild;
  }
  const bubble = section.kind === "turn" || section.kind === "answer";
  const side = section.name === "user" ? " user" : section.name === "system" || section.name === "developer" ? " system" : "";
  text.append(element("div", { class: `section ${bubble ? "bubble" : "document"}${side}` }, element("b", { class: "section-name" }, section.name)));
  return text.lastElementChild;
}

// The model's next token is the assistant's in a conversation.
function answerPlace(text, place, prompt) {
  if (!prompt.sections.some(({ kind }) => kind === "turn") || prompt.sections.some(({ kind }) => kind === "answer")) return place;
  text.append(element("div", { class: "section bubble" }, element("b", { class: "section-name" }, "assistant")));
  return text.lastElementChild;
}

function citations(prompt) {
  if (!prompt.citations.length) return null;
  const view = viewOf(prompt);
  const row = (cited) => {
    const i = view.spans.findIndex((span) => span && span[0] === cited.tokens[0] && span[1] === cited.tokens[1]);
    const item = element("li", { "data-component": i >= 0 ? i : null }, element("span", { class: "score" }, signed(cited.score)), element("span", { dir: "auto" }, cited.text, " ", element("small", {}, cited.document)));
    if (i >= 0) item.addEventListener("pointerenter", () => light(i, item));
    item.addEventListener("pointerleave", hideTip);
    return item;
  };
  return element("ol", { class: "citations", "aria-label": "The best citations" }, ...prompt.citations.map(row));
}
