// Numbers of the chosen prompt.

PANELS.push({ fits: (prompt) => prompt.rows == null, draw: factsPanel });

function factsPanel(prompt) {
  const facts = [
    [prompt.predicted, bare(prompt.prediction)],
    ["answer", prompt.answer && bare(prompt.answer)],
    ["probability of the target", prompt.probability == null ? null : percent(prompt.probability)],
    ["rank of the target", prompt.rank == null ? null : prompt.rank.toLocaleString("en")],
    ...Object.entries(prompt.facts),
    ["score on the evidence", prompt.share == null ? null : percent(prompt.share)],
    ["completeness error", prompt.completeness == null ? null : plain(prompt.completeness), prompt.completeness > 1e-3 ? "bad" : null],
    ["tokens", prompt.tokens.length.toLocaleString("en")],
    ...Object.entries(prompt.settings),
  ];
  const list = facts.filter(([, value]) => value).map(([name, value, look]) => element("div", {}, element("dt", {}, name), element("dd", { class: [look, value.length < 24 ? "short" : null].filter(Boolean).join(" ") || null }, value)));
  return element("div", { class: "panel facts-panel" }, element("h2", {}, "In numbers"), element("dl", {}, ...list));
}
