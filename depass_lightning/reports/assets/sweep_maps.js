// One prompt in every run, one map below the other; the theme; and the first drawing.

const STRONGEST = 6; // components that are listed where none is in the text

function drawMaps() {
  hideTip();
  const chosen = DATA.maps[byId("prompt").value];
  if (!chosen) return;
  byId("maps-body").replaceChildren(...chosen.of.map(([run, place]) => mapOf(RUNS[run], place)));
}

function mapOf(run, place) {
  const prompt = PROMPTS[place];
  const view = prompt.views.tokens;
  const good = prompt.right ?? firstChoice(prompt);
  const yes = prompt.right == null ? "the target is the model's first choice" : "model is right";
  const article = element("article", { class: "map" },
    element("header", { class: "map-head" },
      element("b", {}, DATA.axes.some((axis) => axis.key === "model" || axis.key === "checkpoint") ? run.model : run.run),
      run.setting ? element("span", {}, run.setting) : null,
      element("span", { class: "equation" }, element("span", {}, prompt.target), " = ", element("b", {}, signed(prompt.value))),
      good == null ? null : element("span", { class: `badge ${good ? "good" : "bad"}` }, good ? `✓ ${yes}` : `✗ next token ${bare(prompt.prediction)}`),
      prompt.share == null ? null : element("span", {}, `${percent(prompt.share)} of the score on the evidence`),
    ),
    ...drawn(prompt, view),
  );
  // The other scripts use the chosen prompt and its element.
  article.addEventListener("pointerover", () => chooseMap(article, place), true);
  article.addEventListener("focusin", () => chooseMap(article, place));
  return article;
}

function drawn(prompt, view) {
  if (view.grid != null) return [heatMap(view, { hover: light })];
  const scale = strongest(view);
  if (inText(view)) return [promptText(prompt, view, scale), elsewhere(prompt, view, scale)].filter(Boolean);
  const rows = askedFor(view).sort((a, b) => Math.abs(view.scores[b]) - Math.abs(view.scores[a])).slice(0, STRONGEST);
  const shown = rows.map((i) => view.scores[i]);
  const bars = element("ol", { class: "bars" }, ...rows.map((i) => barRow(prompt, view, i, [Math.min(0, ...shown), Math.max(0, ...shown)])));
  bars.addEventListener("pointerleave", hideTip);
  return [bars];
}

function chooseMap(article, place) {
  state.chosen = place;
  byId("detail")?.removeAttribute("id");
  article.id = "detail";
}

const beginning = (prompt) => prompt.tokens.filter((_, k) => !prompt.special.includes(k)).join("").trim().slice(0, 60);

function step(by) {
  const select = byId("prompt");
  select.selectedIndex = Math.min(Math.max(select.selectedIndex + by, 0), DATA.maps.length - 1);
  drawMaps();
}

function draw() {
  readTheme();
  drawMatrix();
  drawMaps();
  drawRuns();
}

function otherTheme() {
  const root = document.documentElement;
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme ?? preferred) === "dark" ? "light" : "dark";
  draw();
}

function start() {
  fillSelect("number", DATA.numbers.map((number) => number.name));
  fillSelect("setting", SETTINGS);
  byId("prompt").append(...DATA.maps.map((map, i) => element("option", { value: i }, `${map.prompt}: ${beginning(PROMPTS[map.of[0][1]])}`)));
  byId("maps").hidden = !DATA.maps.length;
  for (const id of ["number", "setting"]) byId(id).addEventListener("input", drawMatrix);
  byId("prompt").addEventListener("input", drawMaps);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("theme").addEventListener("click", otherTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("scroll", hideTip, { passive: true });
  draw();
}

start();
