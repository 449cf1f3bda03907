// Each token's part of the answer at every layer.

PANELS.push({ fits: (prompt) => prompt.layers?.length > 0 && prompt.rows == null && inText(prompt.views.tokens), draw: layersPanel });

// One row is one element, as in a matrix: its cells are the stops of a gradient.
function layersPanel(prompt) {
  const last = prompt.layers.length - 1;
  // Without the first layer, where all is the last token's embedding.
  const scale = prompt.layers.slice(1).flat().reduce((most, score) => Math.max(most, Math.abs(score)), 0) || 1;
  const count = prompt.layers[0].length;
  const layerName = (layer) => (layer === last ? "end" : String(layer));
  const rows = prompt.layers.map((scores, layer) => {
    const band = element("div", { class: "matrix-band" });
    const stops = scores.map((score, k) => `${css(shade(score / scale))} ${(100 * k) / count}% ${(100 * (k + 1)) / count}%`);
    band.style.backgroundImage = `linear-gradient(90deg, ${stops.join(", ")})`;
    return element("div", { class: "matrix-row" }, element("span", { class: "matrix-name" }, layerName(layer)), band);
  });
  const names = prompt.tokens.slice(0, count).map((token) => element("span", { dir: "auto" }, bare(token)));
  const frame = element("div", { class: "matrix layers", role: "img", tabindex: "0", "aria-label": describeLayers(prompt) },
    element("div", { class: "matrix-head" }, element("span", { class: "matrix-name" }, "layer"), element("div", { class: "matrix-columns" }, ...names)), ...rows);
  frame.style.setProperty("--least", `${count * NARROW}px`);
  frame.style.setProperty("--most", `${count * WIDE}px`);
  frame.addEventListener("pointermove", (event) => {
    const band = event.target.closest(".matrix-band");
    if (!band) return hideTip();
    const box = band.getBoundingClientRect();
    const token = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * count), 0), count - 1);
    const layer = rows.indexOf(band.parentElement);
    showCell(prompt, layer, token, layer === last ? "at the end" : `entering layer ${layer}`, event);
  });
  frame.addEventListener("pointerleave", hideTip);
  const legend = element("div", { class: "legend" }, scaleLegend(scale), element("span", {}, "What each token has added to the target up to a layer, if it is read there through the final norm and the unembedding (logit lens). The last row is the tokens' scores. One token's logit includes what is added to all tokens' logits; a contrast does not."));
  return element("div", { class: "panel matrix-panel" }, element("div", { class: "panel-head" }, element("h2", {}, "Layer by token")), frame, legend);
}

function showCell(prompt, layer, token, place, event) {
  unlight();
  const i = prompt.views.tokens.spans.findIndex((span) => span && within(token, span));
  lit = [...byId("detail").querySelectorAll(`.prompt [data-component="${i}"]`)];
  for (const node of lit) node.classList.add("lit");
  const score = prompt.layers[layer][token];
  const tip = byId("tip");
  tip.replaceChildren(element("b", {}, bare(prompt.tokens[token])), element("span", { class: score < 0 ? "against" : "for" }, signed(score)), element("small", {}, place));
  tip.hidden = false;
  placeTip(tip, new DOMRect(event.clientX, event.clientY, 1, 1));
}

function describeLayers(prompt) {
  const scores = prompt.layers.at(-1);
  const top = scores.map((_, k) => k).sort((a, b) => Math.abs(scores[b]) - Math.abs(scores[a])).slice(0, 3);
  const built = top.map((k) => {
    const first = prompt.layers.findIndex((layer) => Math.abs(layer[k]) >= Math.abs(scores[k]) / 2);
    return `${bare(prompt.tokens[k])} ${signed(scores[k])}, half of it from layer ${first}`;
  });
  return `Each token's part at ${prompt.layers.length} layers: ${built.join("; ")}`;
}
