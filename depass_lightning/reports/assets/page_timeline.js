// The timeline: a slider over the steps of a training, or over several models, and what changed from the first.

const TIMELINE = DATA.timeline;
const timeline = { at: TIMELINE ? TIMELINE.labels.length - 1 : 0, timer: null };
const LINE = { width: 300, height: 96, left: 8, right: 8, top: 10, bottom: 8 };

PANELS.push({ fits: () => TIMELINE != null && timeline.at > 0, draw: changesPanel });

// One scale over all steps, so that what grows is seen to grow.
function startTimeline() {
  byId("timeline").hidden = !TIMELINE;
  if (!TIMELINE) return;
  PROMPTS.forEach((prompt, i) => {
    for (const [name, view] of Object.entries(prompt.views)) {
      const last = view.scores;
      let most = 0;
      for (const frame of TIMELINE.prompts[i]) {
        view.scores = frame.scores[name];
        most = Math.max(most, strongest(view));
      }
      Object.assign(view, { scores: last, most });
    }
  });
  byId("timeline").append(
    element("div", { class: "timeline-bar" },
      element("button", { type: "button", id: "timeline-play", "aria-label": "Play", onclick: playTimeline }, "▶"),
      element("input", { type: "range", id: "timeline-slider", min: 0, max: TIMELINE.labels.length - 1, step: 1, value: timeline.at, "aria-label": "Step", oninput: (event) => { stopTimeline(); showFrame(Number(event.target.value)); } }),
      element("output", { id: "timeline-label", for: "timeline-slider" }),
    ),
    element("div", { class: "timeline-lines", id: "timeline-lines" }),
  );
}

function showFrame(at) {
  timeline.at = at;
  PROMPTS.forEach((prompt, i) => {
    const { scores, ...facts } = TIMELINE.prompts[i][at];
    Object.assign(prompt, facts);
    for (const [name, own] of Object.entries(scores)) prompt.views[name].scores = own;
  });
  drawList();
  drawDetail();
  drawTimeline();
}

function playTimeline() {
  if (timeline.timer) return stopTimeline();
  byId("timeline-play").textContent = "❚❚";
  byId("timeline-play").setAttribute("aria-label", "Stop");
  const next = () => (timeline.at + 1 < TIMELINE.labels.length ? showFrame(timeline.at + 1) : stopTimeline());
  if (timeline.at === TIMELINE.labels.length - 1) showFrame(0);
  timeline.timer = setInterval(next, Math.max(120, Math.min(700, 9000 / TIMELINE.labels.length)));
}

function stopTimeline() {
  clearInterval(timeline.timer);
  timeline.timer = null;
  byId("timeline-play").textContent = "▶";
  byId("timeline-play").setAttribute("aria-label", "Play");
}

function drawTimeline() {
  if (!TIMELINE) return;
  byId("timeline-slider").value = timeline.at;
  byId("timeline-slider").setAttribute("aria-valuetext", TIMELINE.labels[timeline.at]);
  byId("timeline-label").textContent = TIMELINE.labels[timeline.at];
  const own = TIMELINE.prompts[state.chosen];
  const of = (name) => own.map((frame, k) => [TIMELINE.at[k], frame[name]]).filter(([, y]) => y != null);
  const lines = {
    ...TIMELINE.lines,
    "this prompt: probability of the target": of("probability"),
    "this prompt: value": of("value"),
    "this prompt: score on the right tokens": of("share"),
  };
  byId("timeline-lines").replaceChildren(...Object.entries(lines).filter(([, points]) => points.length > 1).map(([name, points]) => line(name, points)));
}

function line(name, points) {
  const xs = [...TIMELINE.at, ...points.map(([x]) => x)];
  const ys = points.map(([, y]) => y);
  const parts = ys.every((y) => y >= 0 && y <= 1) && /probability|share|right tokens/.test(name);
  const [low, high] = parts ? [0, 1] : [Math.min(0, ...ys), Math.max(0, ...ys)];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const across = (x) => LINE.left + ((x - first) / (last - first || 1)) * (LINE.width - LINE.left - LINE.right);
  const down = (y) => LINE.top + ((high - y) / (high - low || 1)) * (LINE.height - LINE.top - LINE.bottom);
  const here = TIMELINE.at[timeline.at];
  const near = points.reduce((best, point) => (Math.abs(point[0] - here) < Math.abs(best[0] - here) ? point : best));
  const picture = drawing("svg", { viewBox: `0 0 ${LINE.width} ${LINE.height}`, role: "img", "aria-label": `${name} over the steps` },
    drawing("line", { class: "grid", x1: across(first), x2: across(last), y1: down(low), y2: down(low) }),
    drawing("polyline", { class: "line", points: points.map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" "), style: "stroke: var(--positive)" }),
    drawing("line", { class: "timeline-cursor", x1: across(here), x2: across(here), y1: LINE.top, y2: LINE.height - LINE.bottom }),
    drawing("circle", { cx: across(near[0]), cy: down(near[1]), r: 3.5, style: "fill: var(--positive)" }),
  );
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * LINE.width;
    stopTimeline();
    showFrame(TIMELINE.at.reduce((best, at, k) => (Math.abs(across(at) - x) < Math.abs(across(TIMELINE.at[best]) - x) ? k : best), 0));
  });
  return element("figure", {}, element("figcaption", {}, name, element("b", {}, parts ? percent(near[1]) : plain(near[1]))), picture);
}

// Which components gained and lost most since the first step.
function changesPanel(prompt) {
  const view = viewOf(prompt);
  const name = prompt.views[state.view] ? state.view : "tokens";
  const before = TIMELINE.prompts[state.chosen][0].scores[name];
  const changes = view.scores.map((score, i) => ({ i, before: before[i], by: score - before[i] })).filter(({ by }) => by);
  changes.sort((a, b) => Math.abs(b.by) - Math.abs(a.by));
  const row = ({ i, before, by }) =>
    element("li", { "data-component": i, onpointerenter: (event) => light(i, event.currentTarget), onpointerleave: hideTip },
      element("span", { class: "name", dir: "auto" }, bare(nameOf(prompt, view, i))),
      element("span", { class: "from" }, `${signed(before)} → ${signed(view.scores[i])}`),
      element("span", { class: by < 0 ? "against" : "for" }, signed(by)),
    );
  return element("div", { class: "panel changes-panel" },
    element("h2", {}, `What changed since ${TIMELINE.labels[0]}`),
    element("ol", { class: "changes" }, ...changes.slice(0, 8).map(row)),
  );
}
