// One prompt under several models, rules, methods or texts: stacked, each one's change from the first, and the components
// that changed most.

PANELS.push({ fits: (prompt) => prompt.rows != null, draw: comparePanel });

const CHANGED = 12;

function comparePanel(prompt) {
  const [first, ...others] = prompt.rows;
  const scale = Math.max(...prompt.rows.map((row) => strongest(viewOf(row))));
  const scaleOf = (row) => (prompt.relative ? strongest(viewOf(row)) : scale);
  const parts = others.flatMap((row) => {
    const change = changeOf(row);
    return [
      comparedRow(row, scaleOf(row), rowHead(row)),
      comparedRow(change, strongest(viewOf(change)), [element("b", {}, `change from ${first.label}`), element("span", { class: "equation" }, `value ${signed(first.value)} → ${signed(row.value)}`)], changeList(prompt, row)),
    ];
  });
  const names = element("div", { class: "legend" }, viewSwitch(prompt), marksLegend(prompt));
  return element("div", { class: "panel compare-panel" }, comparedRow(first, scaleOf(first), rowHead(first)), ...parts, names.children.length ? names : null);
}

// A row whose scores are its changes; it shows no answer.
const changeOf = (row) => ({
  ...row,
  change: true,
  views: Object.fromEntries(Object.entries(row.views).map(([name, view]) => [name, { ...view, scores: view.change }])),
});

function rowHead(row) {
  const likely = `${row.predicted} ${bare(row.prediction)}`;
  const place = row.probability == null ? null : `the target's probability ${percent(row.probability)}`;
  return [
    element("b", {}, row.label),
    element("span", { class: "equation" }, element("span", {}, row.target), " = ", element("b", {}, signed(row.value))),
    element("span", {}, [likely, place].filter(Boolean).join(", ")),
  ];
}

function comparedRow(row, scale, head, ...below) {
  const view = viewOf(row);
  const parts = view.grid != null ? [heatMap(view, { hover: light, scale })]
    : inText(view) ? [promptText(row, view, scale), elsewhere(row, view, scale), element("div", { class: "legend" }, scaleLegend(scale))] : [];
  return element("section", { class: row.change ? "compared-row change" : "compared-row" }, element("header", { class: "compared-head" }, ...head), ...parts.filter(Boolean), ...below);
}

// The components whose scores changed most, in the order of the change.
function changeList(prompt, row) {
  const [view, before, after] = [viewOf(prompt), viewOf(prompt.rows[0]), viewOf(row)];
  const left = new Set(view.remainders ?? []);
  const changes = after.change.flatMap((by, i) => (by && !left.has(i) ? [{ i, before: before.scores[i], after: after.scores[i], by }] : []));
  return changeRows(prompt, view, changes, CHANGED);
}

function changeRows(prompt, view, changes, most) {
  changes.sort((a, b) => Math.abs(b.by) - Math.abs(a.by));
  const row = ({ i, before, after, by }) =>
    element("li", { "data-component": i, onpointerenter: (event) => light(i, event.currentTarget), onpointerleave: hideTip },
      element("span", { class: "name", dir: "auto" }, bare(nameOf(prompt, view, i)), indexOf(view, i)),
      element("span", { class: "from" }, `${signed(before)} → ${signed(after)}`),
      element("span", { class: by < 0 ? "against" : "for" }, signed(by)),
    );
  return element("ol", { class: "changes", "aria-label": "The largest changes" }, ...changes.slice(0, most).map(row));
}
