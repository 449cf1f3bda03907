// Models by tasks, and the table of all runs.

const RUNS = DATA.runs;
const SCRIBES = { percent, plain };
const distinct = (values) => [...new Set(values)];

function fillSelect(id, names) {
  byId(id).append(...names.map((name, i) => element("option", { value: i }, name || "all")));
  byId(id).hidden = names.length < 2;
}

const SETTINGS = distinct(RUNS.map((run) => run.setting));
const written = (number, value) => (value == null ? "" : SCRIBES[number.write](value));

function chance(run, number) {
  const value = run.numbers[number.key]?.chance;
  return value == null ? null : element("small", {}, `at random ${written(number, value)}`);
}

function drawMatrix() {
  const number = DATA.numbers[byId("number").value];
  const runs = RUNS.filter((run) => run.setting === SETTINGS[byId("setting").value]);
  const [models, tasks] = [distinct(runs.map((run) => run.model)), distinct(runs.map((run) => run.task))];
  if (!number) return byId("matrix-body").replaceChildren(element("p", { class: "hint-line" }, "No run has results yet."));
  const known = runs.map((run) => run.numbers[number.key]?.value).filter((value) => value != null);
  const range = [Math.min(...known), Math.max(...known)];
  const head = element("tr", {}, element("th", {}), ...tasks.map((task) => element("th", { scope: "col" }, task)));
  const rows = models.map((model) =>
    element("tr", {}, element("th", { scope: "row" }, model), ...tasks.map((task) => matrixCell(runs.filter((run) => run.model === model && run.task === task), number, range))),
  );
  byId("matrix-body").replaceChildren(element("table", { class: "numbers" }, element("thead", {}, head), element("tbody", {}, ...rows)));
  byId("matrix-hint").textContent = `${number.name}, ${number.small ? "lower is better" : "higher is better"}; click a number to open its run's report.`;
  if (["prompts", "seconds", "seconds_per_prompt"].includes(number.key)) byId("matrix-hint").textContent = `${number.name}; click a number to open its run's report.`;
}

// Of runs with the same settings, as in two folders of one sweep, the matrix has the first and the table all.
function matrixCell(runs, number, [low, high]) {
  const run = runs.find((candidate) => candidate.numbers[number.key] != null);
  if (!run) return element("td", { class: "none" }, runs.length ? "no number" : "");
  const value = run.numbers[number.key].value;
  const part = high > low ? (value - low) / (high - low) : 0.5;
  const ground = shade(0.06 + 0.5 * (number.small ? 1 - part : part));
  const cell = element("td", {}, element("a", { href: run.page }, written(number, value)), chance(run, number));
  cell.style.background = css(ground);
  cell.style.color = ink(ground);
  return cell;
}

const order = { by: null, down: false };

function drawRuns() {
  const asked = DATA.axes.map((axis) => ({ name: axis.name, of: (run) => run.asked[axis.key] ?? "", show: (run) => run.asked[axis.key] ?? "" }));
  const figures = DATA.numbers.map((number) => ({
    name: number.name,
    figure: true,
    of: (run) => run.numbers[number.key]?.value,
    show: (run) => [written(number, run.numbers[number.key]?.value), chance(run, number)],
  }));
  const first = { name: "run", of: (run) => RUNS.indexOf(run), show: (run) => (run.page ? element("a", { href: run.page }, run.run) : run.run) };
  const columns = [first, ...asked, ...figures];
  const sorted = [...RUNS];
  if (order.by != null) {
    const key = columns[order.by].of;
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    sorted.sort((a, b) => (key(a) == null ? 1 : key(b) == null ? -1 : (order.down ? -1 : 1) * compare(key(a), key(b))));
  }
  const head = columns.map((column, i) => {
    const sort = order.by === i ? (order.down ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", class: column.figure ? "figure" : null, "aria-sort": sort },
      element("button", { type: "button", onclick: () => sortRuns(i) }, column.name));
  });
  const rows = sorted.map((run) =>
    element("tr", { class: run.page ? null : "none" }, ...columns.map((column) => element("td", { class: column.figure ? "figure" : null }, ...[column.show(run)].flat().filter(Boolean)))),
  );
  byId("runs").replaceChildren(element("table", { class: "runs" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

function sortRuns(by) {
  order.down = order.by === by && !order.down;
  order.by = by;
  drawRuns();
  byId("runs").querySelectorAll("thead button")[by].focus();
}
