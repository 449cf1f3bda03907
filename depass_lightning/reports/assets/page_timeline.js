// The timeline: a slider over training steps, and the changes since the first.

const TIMELINE = DATA.timeline;
const timeline = { frame: TIMELINE ? TIMELINE.labels.length - 1 : 0, timer: null };
const LINE = { width: 300, height: 96, left: 8, right: 8, top: 10, bottom: 8 };

PANELS.push({ fits: () => TIMELINE != null && timeline.frame > 0, draw: changesPanel });

// All steps share one scale, so that growth is visible.
function startTimeline() {
  byId("timeline").hidden = !TIMELINE;
  if (!TIMELINE) return;
  PROMPTS.forEach((prompt, i) => {
    for (const [name, view] of Object.entries(prompt.views)) {
      const last = view.scores;
      let most = 0;
      for (const frame of TIMELINE.frames[i]) {
        view.scores = frame.scores[name];
        most = Math.max(most, strongest(view));
      }
      Object.assign(view, { scores: last, most });
    }
  });
  byId("timeline").append(
    element("div", { class: "timeline-bar" },
      element("button", { type: "button", id: "timeline-play", "aria-label": "Play", onclick: playTimeline }, "▶"),
      element("input", { type: "range", id: "timeline-slider", min: 0, max: TIMELINE.labels.length - 1, step: 1, value: timeline.frame, "aria-label": "Step", oninput: (event) => { stopTimeline(); showFrame(Number(event.target.value)); } }),
      element("output", { id: "timeline-label", for: "timeline-slider" }),
    ),
    element("div", { class: "timeline-lines", id: "timeline-lines" }),
  );
}

function showFrame(index) {
  timeline.frame = index;
  PROMPTS.forEach((prompt, i) => {
    const { scores, ...facts } = TIMELINE.frames[i][index];
    Object.assign(prompt, facts);
    for (const [name, values] of Object.entries(scores)) prompt.views[name].scores = values;
  });
  drawList();
  drawDetail();
  drawTimeline();
}

function playTimeline() {
  if (timeline.timer) return stopTimeline();
  byId("timeline-play").textContent = "❚❚";
  byId("timeline-play").setAttribute("aria-label", "Stop");
  const next = () => (timeline.frame + 1 < TIMELINE.labels.length ? showFrame(timeline.frame + 1) : stopTimeline());
  if (timeline.frame === TIMELINE.labels.length - 1) showFrame(0);
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
  byId("timeline-slider").value = timeline.frame;
  byId("timeline-slider").setAttribute("aria-valuetext", TIMELINE.labels[timeline.frame]);
  byId("timeline-label").textContent = TIMELINE.labels[timeline.frame];
  const frames = TIMELINE.frames[state.chosen];
  const of = (name) => frames.map((frame, k) => [TIMELINE.steps[k], frame[name]]).filter(([, y]) => y != null);
  const lines = {
    ...TIMELINE.lines,
    "this prompt: probability of the target": of("probability"),
    "this prompt: value": of("value"),
    "this prompt: score on the evidence": of("share"),
  };
  byId("timeline-lines").replaceChildren(...Object.entries(lines).filter(([, points]) => points.length > 1).map(([name, points]) => line(name, points)));
}

function line(name, points) {
  const xs = [...TIMELINE.steps, ...points.map(([x]) => x)];
  const ys = points.flatMap(([, ...y]) => y);
  const band = points.filter((point) => point.length > 2);
  const parts = ys.every((y) => y >= 0 && y <= 1) && /probability|share|evidence/.test(name);
  const [low, high] = parts ? [0, 1] : [Math.min(0, ...ys), Math.max(0, ...ys)];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const across = (x) => LINE.left + ((x - first) / (last - first || 1)) * (LINE.width - LINE.left - LINE.right);
  const down = (y) => LINE.top + ((high - y) / (high - low || 1)) * (LINE.height - LINE.top - LINE.bottom);
  const current = TIMELINE.steps[timeline.frame];
  const near = points.reduce((best, point) => (Math.abs(point[0] - current) < Math.abs(best[0] - current) ? point : best));
  const picture = drawing("svg", { viewBox: `0 0 ${LINE.width} ${LINE.height}`, role: "img", "aria-label": `${name} over the steps` },
    drawing("line", { class: "grid", x1: across(first), x2: across(last), y1: down(low), y2: down(low) }),
    drawing("polygon", { class: "band", points: [...band.map(([x, , y]) => [x, y]), ...band.map(([x, , , y]) => [x, y]).reverse()].map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" "), style: "fill: var(--positive); opacity: 0.18" }),
    drawing("polyline", { class: "line", points: points.map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" "), style: "stroke: var(--positive)" }),
    drawing("line", { class: "timeline-cursor", x1: across(current), x2: across(current), y1: LINE.top, y2: LINE.height - LINE.bottom }),
    drawing("circle", { cx: across(near[0]), cy: down(near[1]), r: 3.5, style: "fill: var(--positive)" }),
  );
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * LINE.width;
    stopTimeline();
    showFrame(TIMELINE.steps.reduce((best, step, k) => (Math.abs(across(step) - x) < Math.abs(across(TIMELINE.steps[best]) - x) ? k : best), 0));
  });
  return element("figure", {}, element("figcaption", {}, name, element("b", {}, parts ? percent(near[1]) : plain(near[1]))), picture);
}

// The components whose scores changed most since the first step.
function changesPanel(prompt) {
  const view = viewOf(prompt);
  const name = prompt.views[state.view] ? state.view : "tokens";
  const before = TIMELINE.frames[state.chosen][0].scores[name];
  const changes = view.scores.map((score, i) => ({ i, before: before[i], after: score, by: score - before[i] })).filter(({ by }) => by);
  return element("div", { class: "panel changes-panel" },
    element("h2", {}, `What changed since ${TIMELINE.labels[0]}`),
    changeRows(prompt, view, changes, 8),
  );
}
