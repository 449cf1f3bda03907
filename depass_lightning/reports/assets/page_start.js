// Choosing a prompt, by click, key or address; the theme; and the first drawing.

function choose(i, { remember = true, show = false } = {}) {
  state.chosen = i;
  state.all = false;
  if (remember) {
    // A page inside a frame may not be allowed to change its address.
    try {
      history.replaceState(null, "", `#${encodeURIComponent(PROMPTS[i].id)}`);
    } catch {}
  }
  scrollToChosen();
  drawList();
  drawDetail();
  drawTimeline();
  // On a narrow screen the prompt is above the list, out of sight.
  if (show && byId("detail").getBoundingClientRect().bottom < 120) byId("detail").scrollIntoView();
}

function move(by) {
  const count = state.visible.length;
  if (!count) return;
  const chosen = leading(state.chosen);
  const place = state.visible.indexOf(chosen);
  const next = place < 0 ? 0 : Math.min(Math.max(place + by, 0), count - 1);
  if (state.visible[next] !== chosen) choose(state.visible[next]);
}

function chooseFromAddress() {
  let wanted = "";
  try {
    wanted = decodeURIComponent(location.hash.slice(1));
  } catch {}
  const index = PROMPTS.findIndex((prompt) => prompt.id === wanted);
  choose(Math.max(index, 0), { remember: false });
}

function onListKey(event) {
  const page = Math.max(Math.floor(byId("list").clientHeight / ROW) - 1, 1);
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
  if (!by) return;
  event.preventDefault();
  move(by);
}

function onPageKey(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") move(event.key === "ArrowRight" ? 1 : -1);
  else if (event.key === "Escape") hideTip();
}

const THEME_KEY = "depass-theme";

function useTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  readTheme();
  drawMean();
  drawList();
  drawDetail();
  drawTimeline();
}

function otherTheme() {
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? preferred;
  const next = now === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(THEME_KEY, next);
  } catch {}
  useTheme(next);
}

function rememberedTheme() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
}

function start() {
  const several = DATA.matrices.length ? `, ${PROMPTS.length.toLocaleString("en")} targets` : "";
  byId("count").textContent = (LEADING.length === 1 ? "1 prompt" : `${LEADING.length.toLocaleString("en")} prompts`) + several;
  byId("browser").hidden = LEADING.length === 1;
  document.querySelector(".explorer").classList.toggle("single", LEADING.length === 1);
  fillControls();
  startTimeline();
  useTheme(rememberedTheme());
  arrange();
  drawCurves();
  chooseFromAddress();
  for (const id of ["search", "filter", "sort"]) byId(id).addEventListener("input", () => {
    byId("list").scrollTop = 0;
    arrange();
    if (!state.visible.includes(leading(state.chosen)) && state.visible.length) choose(state.visible[0]);
    else drawDetail();
  });
  byId("direction").addEventListener("click", () => {
    descending = !descending;
    arrange();
    drawDetail();
  });
  byId("list").addEventListener("scroll", drawList, { passive: true });
  byId("list").addEventListener("keydown", onListKey);
  byId("theme").addEventListener("click", otherTheme);
  addEventListener("keydown", onPageKey);
  addEventListener("hashchange", chooseFromAddress);
  addEventListener("resize", drawList);
  addEventListener("scroll", hideTip, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => useTheme(null));
}

start();
