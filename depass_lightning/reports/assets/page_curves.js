// The run's curves: deletion and insertion of tokens, and masking of heads or neurons.

const CURVE = { width: 460, height: 260, left: 46, right: 96, top: 14, bottom: 40 };
const CURVE_MEANING = {
  patch_top: "probability of the answer as the tokens with the highest scores are removed",
  recover_top: "probability of the answer as only the tokens with the highest scores are kept",
  kept_patch_top: "the same, but the last token is never removed",
  kept_recover_top: "the same, but the last token is always kept",
  mask_top: "accuracy as the components with the highest scores are masked",
  mask_bottom: "accuracy as the components with the lowest scores are masked",
};
const CURVE_COLOURS = ["--positive", "--muted", "--negative", "--good", "--bad"];

function drawCurves() {
  const entries = Object.entries(DATA.curves);
  byId("curves").hidden = !entries.length;
  byId("curves").replaceChildren(...entries.map(([name, curve]) => curveFigure(name, curve)));
}

function curveFigure(name, curve) {
  const { fraction, ...lines } = curve;
  const all = Object.values(lines).flat().filter((y) => y != null);
  const low = Math.min(0, ...all);
  const parts = low >= 0 && Math.max(...all) <= 1; // probabilities
  const high = parts ? niceTop(Math.max(...all)) : Math.max(...all);
  const last = Math.max(...fraction) || 1;
  const across = (x) => CURVE.left + (x / last) * (CURVE.width - CURVE.left - CURVE.right);
  const down = (y) => CURVE.top + ((high - y) / (high - low)) * (CURVE.height - CURVE.top - CURVE.bottom);
  const picture = drawing("svg", { viewBox: `0 0 ${CURVE.width} ${CURVE.height}`, role: "img", "aria-label": `${DATA.measures[name]}: ${Object.keys(lines).join(", ")}` });
  for (let i = 0; i <= 4; i++) {
    const y = low + ((high - low) * i) / 4;
    picture.append(
      drawing("line", { class: "grid", x1: across(0), x2: across(last), y1: down(y), y2: down(y) }),
      drawing("text", { class: "tick", x: CURVE.left - 8, y: down(y) + 4, "text-anchor": "end" }, parts ? percent(y) : plain(y)),
      drawing("text", { class: "tick", x: across((last * i) / 4), y: CURVE.height - CURVE.bottom + 18, "text-anchor": "middle" }, percent((last * i) / 4)),
    );
  }
  const heights = labelHeights(Object.values(lines).map((ys) => down(ys.at(-1) ?? low)), down(low) - 4);
  Object.entries(lines).forEach(([label, ys], i) => {
    const stroke = `var(${CURVE_COLOURS[i % CURVE_COLOURS.length]})`;
    const points = ys.map((y, k) => (y == null ? null : `${across(fraction[k]).toFixed(1)},${down(y).toFixed(1)}`)).filter(Boolean);
    picture.append(
      drawing("polyline", { class: "line", points: points.join(" "), style: `stroke: ${stroke}`, "stroke-dasharray": label === "random" ? "5 4" : "none" }),
      drawing("text", { class: "label", x: across(last) + 8, y: heights[i] + 4, style: `fill: ${stroke}` }, label.replaceAll("_", " ")),
    );
  });
  picture.append(drawing("text", { class: "axis", x: across(last / 2), y: CURVE.height - 4, "text-anchor": "middle" }, axisName(name)));
  picture.append(drawing("line", { class: "cursor", y1: CURVE.top, y2: CURVE.height - CURVE.bottom }));
  const reading = element("p", { class: "reading" }, "\u00a0");
  picture.addEventListener("pointermove", (event) => read(event, { picture, reading, fraction, lines, across }));
  const meaning = CURVE_MEANING[name] ? element("small", {}, CURVE_MEANING[name]) : null;
  return element("figure", {}, element("figcaption", {}, DATA.measures[name], meaning), picture, reading);
}

function axisName(name) {
  if (name.startsWith("mask")) return "masked";
  return name.includes("recover") ? "tokens kept" : "tokens removed";
}

const niceTop = (y) => [0.01, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1].find((top) => y <= top);

// Labels at the ends of the lines, moved apart where they would overlap, the lowest no lower than `ground`.
function labelHeights(heights, ground) {
  const placed = [...heights];
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  for (let k = 1; k < order.length; k++) placed[order[k]] = Math.max(placed[order[k]], placed[order[k - 1]] + 15);
  for (let k = order.length - 1, most = ground; k >= 0; k--, most -= 15) placed[order[k]] = Math.min(placed[order[k]], most);
  return placed;
}

function read(event, { picture, reading, fraction, lines, across }) {
  const box = picture.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * CURVE.width;
  const near = fraction.reduce((best, part, k) => (Math.abs(across(part) - x) < Math.abs(across(fraction[best]) - x) ? k : best), 0);
  const cursor = picture.querySelector(".cursor");
  cursor.setAttribute("x1", across(fraction[near]));
  cursor.setAttribute("x2", across(fraction[near]));
  cursor.classList.add("on");
  const values = Object.entries(lines).map(([label, ys]) => `${label.replaceAll("_", " ")} ${plain(ys[near])}`);
  reading.textContent = `at ${percent(fraction[near])}: ${values.join(", ")}`;
}
