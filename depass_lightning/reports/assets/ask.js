// The form of the ask page: what is asked, its address, and the calls of the server.

const find = (id) => document.getElementById(id);
const TOKEN = new URLSearchParams(location.search).get("token") ?? "";
const THEME = "depass-theme";

const EMPTY = { prompt: "", messages: null, target: null, foil: null, source: "tokens", rule: "auto", edits: [], layers: false };
let asked = { ...EMPTY }; // the question of the drawn result
let change = null; // how the target changes under `asked.edits`
let drawn = null; // functions of the drawn result
let running = null; // the request in progress
let latest = 0; // the number of the last one
let chosen = { target: null, foil: null }; // next tokens that were clicked, by id; text that is typed replaces them
let chips = [];

function build(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// The server

async function call(path, question) {
  running?.abort();
  const control = (running = new AbortController());
  const headers = { "Content-Type": "application/json", "X-DePass-Token": TOKEN };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(question), signal: control.signal });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

// Runs a request, shows that it runs, and then its error or nothing.
async function busy(words, work) {
  const number = ++latest;
  const began = performance.now();
  const show = () => (find("status").textContent = `${words}, ${((performance.now() - began) / 1000).toFixed(0)} s`);
  find("status").className = find("result").dataset.state = "busy";
  show();
  const timer = setInterval(show, 1000);
  find("error").textContent = "";
  find("error").hidden = true;
  try {
    await work();
    find("status").textContent = "";
  } catch (error) {
    if (number !== latest) return; // a later request has taken over
    find("status").textContent = "";
    if (error.name === "AbortError") return;
    find("error").textContent = error instanceof TypeError ? "the server does not answer; is it still running?" : error.message;
    find("error").hidden = false;
  } finally {
    clearInterval(timer);
    if (number === latest) find("status").className = find("result").dataset.state = "";
  }
}

async function explain(question) {
  await busy("computing the scores", async () => {
    const result = await (await call("/scores", { ...question, edits: [] })).json();
    asked = question;
    change = null;
    find("data").textContent = JSON.stringify(withSettings(result));
    find("result").hidden = find("actions").hidden = false;
    showNext(result.next);
    drawResult();
    remember();
  });
  if (asked === question && asked.edits.length && find("error").hidden) await measure();
}

// One prompt has no settings of its own; its numbers name them.
function withSettings({ data, settings }) {
  const { rule, source } = settings;
  for (const prompt of data.prompts) prompt.settings = { source, rule, ...prompt.settings };
  return data;
}

async function edit(edits) {
  asked = { ...asked, edits };
  change = null;
  drawn.redraw();
  remember();
  if (edits.length) await measure();
  else running?.abort();
}

const measure = () =>
  busy("running the prompt without these words", async () => {
    change = await (await call("/change", asked)).json();
    drawn.redraw();
  });

async function save() {
  await busy("writing the page", async () => {
    const page = await (await call("/page", { ...asked, edits: [] })).blob();
    const link = build("a", { href: URL.createObjectURL(page), download: "depass.html" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

// The form

const inConversation = () => find("as-messages").getAttribute("aria-pressed") === "true";

function useConversation(on) {
  find("as-messages").setAttribute("aria-pressed", String(on));
  find("as-prompt").setAttribute("aria-pressed", String(!on));
  find("messages").hidden = !on;
  find("prompt").hidden = on;
  if (on && !find("turns").children.length) addTurn("user", find("prompt").value);
}

function addTurn(role, content) {
  const roles = ["system", "user", "assistant"];
  const select = build("select", { "aria-label": "Role" }, ...roles.map((name) => build("option", {}, name)));
  const text = build("textarea", { rows: 1, dir: "auto", spellcheck: "false", "aria-label": "Turn", onkeydown: submitOnEnter });
  select.value = roles.includes(role) ? role : "user";
  text.value = content;
  const turn = build("li", {}, select, text);
  turn.append(build("button", { type: "button", class: "quiet", "aria-label": "Remove this turn", onclick: () => turn.remove() }, "×"));
  find("turns").append(turn);
  return text;
}

function nextRole() {
  const roles = [...find("turns").querySelectorAll("select")];
  return roles.at(-1)?.value === "user" ? "assistant" : "user";
}

function submitOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("question").requestSubmit();
}

function written(name) {
  const text = find(name).value;
  return chosen[name] ?? (text === "" ? null : text);
}

function question() {
  const turns = [...find("turns").children].map((turn) => ({ role: turn.querySelector("select").value, content: turn.querySelector("textarea").value }));
  const about = inConversation() ? { messages: turns, prompt: null } : { prompt: find("prompt").value, messages: null };
  return { ...about, target: written("target"), foil: written("foil"), source: find("source").value, rule: find("rule").value, edits: [], layers: find("layers").checked };
}

function showNext(next) {
  chips = next;
  find("next").hidden = false;
  const pressed = (name, token) => String([token.id, token.text].includes(asked[name]));
  find("tokens").replaceChildren(...next.map((token) => build("li", {},
    build("button", { type: "button", class: "token", "aria-pressed": pressed("target", token), onclick: () => take({ target: token }) }, token.text.trim() || token.text, build("small", {}, `${(100 * token.probability).toFixed(1)}%`)),
    build("button", { type: "button", class: "versus", "aria-pressed": pressed("foil", token), "aria-label": `compare with ${token.text}`, onclick: () => take({ foil: token }) }, "vs"))));
}

// A click on a next token makes it the answer, or the contrast of the answer, which is then the most likely one.
function take({ target, foil }) {
  const again = foil && chosen.foil === foil.id;
  if (target) choose("target", target);
  if (foil && written("target") == null) choose("target", chips.find((token) => token.id !== foil.id));
  if (foil) choose("foil", again ? null : foil);
  if (chosen.foil != null && chosen.foil === chosen.target) choose("foil", null);
  find("question").requestSubmit();
}

function choose(name, token) {
  chosen[name] = token?.id ?? null;
  find(name).value = token?.text ?? "";
}

// The address: everything that is asked, after the #.

function remember() {
  const fields = new URLSearchParams();
  if (asked.messages) fields.set("messages", JSON.stringify(asked.messages));
  else fields.set("prompt", asked.prompt);
  for (const name of ["target", "foil"]) {
    if (asked[name] == null) continue;
    fields.set(name, typeof asked[name] === "number" ? find(name).value : asked[name]);
    if (typeof asked[name] === "number") fields.set(`${name}_id`, asked[name]);
  }
  for (const name of ["source", "rule"]) if (asked[name] !== EMPTY[name]) fields.set(name, asked[name]);
  if (asked.layers) fields.set("layers", "true");
  if (asked.edits.length) fields.set("edits", JSON.stringify(asked.edits.map(({ start, end, text }) => [start, end, text])));
  history.replaceState(null, "", `#${fields}`);
}

function readAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (!fields.has("prompt") && !fields.has("messages")) return;
  let edits = [];
  try {
    edits = JSON.parse(fields.get("edits") ?? "[]").map(([start, end, text]) => ({ start, end, text })).sort((a, b) => a.start - b.start);
    if (fields.has("messages")) {
      find("turns").replaceChildren();
      for (const { role, content } of JSON.parse(fields.get("messages"))) addTurn(role, String(content));
    }
  } catch {
    find("error").textContent = "the address is damaged";
    find("error").hidden = false;
    return;
  }
  find("prompt").value = fields.get("prompt") ?? "";
  useConversation(fields.has("messages"));
  for (const name of ["target", "foil"]) {
    find(name).value = fields.get(name) ?? "";
    chosen[name] = fields.has(`${name}_id`) ? Number(fields.get(`${name}_id`)) : null;
  }
  for (const name of ["source", "rule"]) find(name).value = fields.get(name) ?? EMPTY[name];
  find("layers").checked = fields.get("layers") === "true";
  explain({ ...question(), edits });
}

function otherTheme() {
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (document.documentElement.dataset.theme ?? preferred) === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  drawn?.redraw();
}

find("question").addEventListener("submit", (event) => {
  event.preventDefault();
  explain(question());
});
find("prompt").addEventListener("keydown", submitOnEnter);
// Other prompts have other next tokens; an answer that was clicked is kept only as long as the prompt is.
find("question").addEventListener("input", (event) => {
  if (event.target.id in chosen) chosen[event.target.id] = null;
  else if (event.target.tagName === "TEXTAREA") for (const name of ["target", "foil"]) if (chosen[name] != null) choose(name, null);
});
for (const name of ["source", "rule", "layers"]) find(name).addEventListener("change", () => drawn && find("question").requestSubmit());
find("as-prompt").addEventListener("click", () => useConversation(false));
find("as-messages").addEventListener("click", () => useConversation(true));
find("add-turn").addEventListener("click", () => addTurn(nextRole(), "").focus());
find("theme").addEventListener("click", otherTheme);
find("save").addEventListener("click", save);
find("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(location.href);
  find("status").textContent = "copied; it works on this machine as long as the server runs";
});
find("detail").addEventListener("click", (event) => {
  const piece = event.target.closest(".piece[data-component]");
  if (piece) drawn.toggleRemoved(piece);
});
find("detail").addEventListener("keydown", (event) => {
  const piece = event.target.closest(".prompt")?.querySelector(".piece.lit");
  if (!piece || !["Enter", "Delete", " "].includes(event.key)) return;
  event.preventDefault();
  drawn.toggleRemoved(piece);
});
addEventListener("hashchange", readAddress);
addEventListener("scroll", () => drawn?.hideTip(), { passive: true });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn?.redraw());
document.documentElement.dataset.theme = localStorage.getItem(THEME) ?? "";
readAddress();
