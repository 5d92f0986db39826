// The page of `retentive serve`, and of folders by `retentive export --to browser`, where server.js runs the model in
// the browser itself. The server keeps each conversation's state under a session name, so a request holds only what
// the state has not read yet. The number of tokens read grows, the state's bytes do not.

import { drop, keep, place, recall } from "./kept.js";
import { render } from "./markdown.js";
import * as media from "./media.js";
import { answer, ready } from "./server.js";

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const date = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
const HINTS = {
  chat: "Ask something. The model keeps the conversation in a state of constant size.",
  write: "Start a text. The model continues it, and so can you.",
};

const LOST = "The server no longer has this conversation's state. You can still read the text above, but the model has forgotten it: a new conversation starts here.";

let model = null; // name of the model, when it is known
let started; // time at which the server started, which has lost the sessions from before
let cacheBytes; // bytes of a token in the KV cache of a Transformer of this size
let session; // name of this conversation on the server
let unread; // [{role, content}] that the state has not read: the message being sent, and stopped answers
let read; // tokens in the state, without those of an answer under way
let held; // bytes of the state
let running = null; // AbortController while the model answers
let sending = false; // true while a message waits for its pictures

// Requests to the server

async function call(path, { method = "GET", body, signal } = {}, tries = 30) {
  const headers = { "X-Session-Id": session }; // lets load balancers route to the server that holds the state
  const key = sessionStorage.getItem("api-key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const file = body instanceof Blob;
  if (body) headers["Content-Type"] = file ? "application/octet-stream" : "application/json";
  let response;
  try {
    response = await answer(path, { method, headers, body: file || !body ? body : JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const error = await refusal(response);
  if (error.code !== "session_busy" || !tries) throw error;
  await new Promise((later) => setTimeout(later, 100)); // until the server notices that its answer was stopped
  return call(path, { method, body, signal }, tries - 1);
}

async function refusal(response) {
  const { message, code } = (await response.json().catch(() => ({}))).error ?? {};
  if (response.status === 401) {
    if (!$("login").open) $("login").showModal();
    return new Error(sessionStorage.getItem("api-key") ? "The server refused the API key." : "The server needs an API key.");
  }
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) return new Error(`The server is full: try again in ${wait ?? "a few"} s.`);
  return Object.assign(new Error(message ?? `The server answered ${response.status} ${response.statusText}.`), { code });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The connection broke in the middle of the answer.");
    });
    if (done) return;
    const lines = (held + value).split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}

// One turn

function question() {
  const body = { session, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  const stops = $("stops").value.split("\n").filter(Boolean).map((stop) => stop.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  if (mode() === "chat") return ["v1/chat/completions", { ...body, messages: unread }];
  return ["v1/completions", { ...body, prompt: unread.map((part) => part.content).join("") }];
}

async function send() {
  if (running || sending) return;
  sending = true;
  await media.ready(); // include files dropped a moment ago
  sending = false;
  const text = $("input").value;
  const enough = text.trim() || !media.empty() || (mode() === "write" && read); // a started text needs no input
  if (!enough || !$("sampling").reportValidity()) return;
  say("");
  const items = media.take();
  const content = items.length ? [...items.map(({ part }) => part), { type: "text", text }] : text;
  unread = [...unread, { role: "user", content }];
  const mine = show("you", text);
  mine.prepend(...items.map(({ shown }) => shown));
  mine.source = items.map(({ part }) => (part.type === "image_url" ? "[picture] " : "[sound] ")).join("") + text;
  const answer = show("model", "");
  $("input").value = "";
  busy(new AbortController());
  answer.classList.add("running");
  try {
    await listen(mine, answer);
    unread = [];
  } catch (error) {
    counted(read); // the state has not changed
    if (answer.source) {
      unread.push({ role: "assistant", content: answer.source }); // read with the next message
    } else { // no answer: restore everything as before sending
      unread.pop();
      mine.remove();
      answer.remove();
      media.restore(items);
      $("input").value = text;
    }
    if (error.name !== "AbortError") say(error.message);
  }
  draw(answer);
  answer.classList.remove("running");
  busy(null);
  store();
  $("input").focus();
}

// Asks the question; a server that has evicted the session is asked again, in a new one.
async function ask(mine) {
  const asked = () => {
    const [path, body] = question();
    return call(path, { method: "POST", body, signal: running.signal });
  };
  try {
    return await asked();
  } catch (error) {
    if (error.code !== "session_gone") throw error;
    unread = unread.slice(-1);
    lose(mine);
    return asked();
  }
}

async function listen(mine, answer) {
  const began = performance.now(), response = await ask(mine), already = read;
  let pieces = 0, first, last, finished, end;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    finished = choice?.finish_reason ?? finished;
    if (piece) {
      last = performance.now();
      first ??= last;
      pieces += 1; // roughly one token; the server reports the exact number at the end
      append(answer, piece);
      counted(already + pieces);
      speed(first - began, pieces, last - first);
    }
    if (event.usage && first) speed(first - began, event.usage.completion_tokens, last - first);
    if (event.session) {
      end = event;
      counted(end.session.tokens);
    }
  }
  if (!finished) throw new Error("The connection broke in the middle of the answer.");
  if (!end) return;
  const { usage: { prompt_tokens, completion_tokens }, session: { tokens, bytes } } = end;
  // a session that holds this turn alone is a new one; one that holds no more than before will read the turn later
  if (already && tokens !== already && tokens <= prompt_tokens + completion_tokens) forget(mine);
  remembered(tokens, bytes);
}

// Display

const mode = () => document.querySelector("input[name=mode]:checked").value;

function say(message) {
  $("error").textContent = message;
}

function show(kind, text) {
  const block = document.createElement(kind.startsWith("model") ? "div" : "p");
  block.className = kind;
  block.source = text; // as the model wrote it
  draw(block);
  $("log").append(block);
  $("mode").disabled = true; // a conversation has one mode
  $("log").scrollTop = $("log").scrollHeight;
  return block;
}

let drawing = 0; // number of the animation frame that shows what has arrived

function append(block, piece) {
  block.source += piece;
  drawing ||= requestAnimationFrame(() => draw(block));
}

function draw(block) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40; // do not scroll while the user reads above
  cancelAnimationFrame(drawing);
  drawing = 0;
  if (block.className.startsWith("model") && mode() === "chat") render(block, block.source);
  else block.append(block.source.slice(block.textContent.length));
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function busy(controller) {
  running = controller;
  $("log").ariaBusy = String(Boolean(running)); // screen readers wait for the complete answer
  $("send").hidden = $("stop").hidden = false;
  (running ? $("send") : $("stop")).hidden = true;
  for (const button of document.querySelectorAll("#new, #saving button")) button.disabled = Boolean(running);
}

function bytes(n) {
  const power = Math.min(Math.floor(Math.log10(Math.max(n, 1)) / 3), 3);
  return `${(n / 1000 ** power).toPrecision(3)} ${["B", "kB", "MB", "GB"][power]}`;
}

function remembered(tokens, size = held) {
  [read, held] = [tokens, size];
  $("bytes").textContent = held === undefined ? "–" : bytes(held);
  counted(tokens);
}

// Shows a number of tokens, and what a Transformer would keep of them.
function counted(tokens) {
  $("read").textContent = count.format(tokens);
  if (!cacheBytes) return;
  $("cache").textContent = tokens
    ? `State ${bytes(held)} · a Transformer’s KV cache would hold ${bytes(tokens * cacheBytes)}`
    : `A Transformer’s KV cache would grow by ${bytes(cacheBytes)} with each token`;
}

function speed(wait, tokens, ms) {
  $("first").textContent = wait < 1000 ? `${Math.round(wait)} ms` : `${(wait / 1000).toFixed(1)} s`;
  const rate = ms > 0 ? (tokens - 1) / ms : tokens / wait; // an answer that arrives all at once, as behind a proxy
  if (tokens > 1) $("speed").textContent = count.format(Math.round(rate * 1000));
}

// Conversations and their states

const freshName = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

function begin() {
  if (read) call(`v1/sessions/${session}`, { method: "DELETE" }).catch(() => {}); // otherwise it expires on the server
  clear();
  if (model) drop(model);
}

// Shows an empty conversation; the one shown before stays as it is.
function clear() {
  session = freshName();
  unread = [];
  $("log").replaceChildren();
  $("log").dataset.hint = HINTS[mode()];
  $("log").classList.toggle("write", mode() === "write");
  $("mode").disabled = false;
  $("first").textContent = $("speed").textContent = "–";
  $("send").textContent = mode() === "chat" ? "Send" : "Continue";
  offer();
  remembered(0, blankBytes);
  say("");
}

// Goes on in a new session, as the server has lost this one. `mine`: the message that it was not read with, if any.
function lose(mine = null) {
  session = freshName();
  remembered(0, blankBytes);
  forget(mine);
}

// Marks all blocks before `mine` as text that the model does not know.
function forget(mine) {
  for (let block = mine ? mine.previousSibling : $("log").lastChild; block; block = block.previousSibling) {
    block.classList.add("lost");
  }
  const note = show("note", LOST);
  if (mine) mine.before(note);
  startTime().then((time) => { // of the server that has the session from now on
    started = time ?? started;
    store();
  });
}

// Pictures and sound, for models with encoders

let offered = []; // kinds that the model accepts

function offer() {
  const kinds = mode() === "chat" ? offered : [];
  media.setup($("given"), { media: kinds, onerror: say });
  $("attach").hidden = !kinds.length;
  $("record").hidden = !kinds.includes("audio") || !navigator.mediaDevices;
  $("files").accept = kinds.map((kind) => `${kind}/*`).join(",");
}

let stopRecording = null;

async function recording() {
  if (stopRecording) {
    stopRecording();
    stopRecording = null;
  } else {
    $("record").disabled = true; // while the browser asks for permission
    try {
      stopRecording = await media.record($("record"));
    } finally {
      $("record").disabled = false;
    }
  }
}

// Reload: the text is kept in this browser, the state on the server

function store() {
  const blocks = [...$("log").children];
  if (!model) return;
  if (!blocks.length) return drop(model);
  const part = running ? blocks.at(-1).source : ""; // the server drops an answer when its reader leaves
  const texts = [...unread.map(plain), ...(part ? [{ role: "assistant", content: part }] : [])];
  const log = blocks.map((block) => [block.className.replace(" running", ""), block.source]);
  const figures = { bytes: held, first: $("first").textContent, speed: $("speed").textContent };
  keep(model, { log, session, read, started, unread: texts, mode: mode(), ...figures });
}

// A message without its pictures and sound.
function plain({ role, content }) {
  if (typeof content === "string") return { role, content };
  return { role, content: content.filter((part) => part.type === "text").map((part) => part.text).join("") };
}

// Shows the conversation that this browser has kept, if there is one; returns when its server had started.
function resume() {
  const kept = recall(model);
  if (kept) document.querySelector(`input[value=${kept.mode}]`).checked = true;
  clear();
  if (!kept) return null;
  ({ session, unread } = kept);
  for (const [kind, text] of kept.log) show(kind, text);
  remembered(kept.read, kept.bytes);
  $("first").textContent = kept.first;
  $("speed").textContent = kept.speed;
  return kept.started;
}

// Time at which the server started: all sessions from before are lost. Null of a page that runs the model itself.
async function startTime() {
  const response = await call("v1/models").catch(() => null);
  return (await response?.json())?.data?.[0]?.created ?? null;
}

async function attempt(action) {
  say("");
  try {
    await action();
  } catch (error) {
    say(error.message);
    leaveSettings(); // shows the error
  }
}

async function listStates() {
  const { data } = await (await call("v1/states")).json();
  $("states").replaceChildren(...data.map(row));
  return data;
}

function row(state) {
  const item = document.createElement("li");
  const about = document.createElement("small");
  about.textContent = `${count.format(state.tokens)} tokens in ${bytes(state.bytes)}, ${date.format(state.created * 1000)}`;
  const name = document.createElement("span");
  name.append(state.name, about);
  const action = (text, act, label = `${text} ${state.name}`) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.ariaLabel = label;
    button.disabled = Boolean(running);
    button.onclick = () => attempt(act);
    return button;
  };
  item.append(
    name,
    action("Continue", async () => {
      const { tokens, bytes } = await restore(state.name);
      remembered(tokens, bytes);
      show("note", `Continuing from ${state.name}. The model remembers the ${count.format(tokens)} tokens it had read; their text is not kept.`);
      store();
      leaveSettings();
      $("input").focus();
    }, `Continue from ${state.name}`),
    action("Download", async () => {
      const file = await (await call(`v1/states/${state.name}`)).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(file);
      link.download = `${state.name}.safetensors`;
      link.click();
      URL.revokeObjectURL(link.href);
    }),
    action("Delete", async () => {
      if (!(await sure(`Delete the saved state “${state.name}”? This cannot be undone.`, "Delete"))) return;
      await call(`v1/states/${state.name}`, { method: "DELETE" });
      await listStates();
      $("name").focus();
    }),
  );
  return item;
}

// Restores a state into a new session, and begins a conversation with it; a failure leaves the present one as it is.
async function restore(name) {
  const before = session, fresh = session = freshName(); // the request's header names the session
  let restored;
  try {
    restored = await (await call(`v1/states/${name}/restore`, { method: "POST", body: { session } })).json();
  } finally {
    session = before;
  }
  begin();
  session = fresh;
  return restored;
}

// Asks the user; true if they agree.
function sure(text, action) {
  $("question").textContent = text;
  $("yes").textContent = action;
  $("sure").returnValue = ""; // Escape leaves it as it is
  $("sure").showModal();
  return new Promise((resolve) => { $("sure").onclose = () => resolve($("sure").returnValue === "yes"); });
}

async function save() {
  const name = $("name").value;
  if (!read) throw new Error("There is nothing to save yet: send a message first.");
  const known = (await listStates()).some((state) => state.name === name);
  if (known && !(await sure(`Replace the saved state “${name}”?`, "Replace"))) return;
  try {
    await call("v1/states", { method: "POST", body: { session, name } });
  } catch (error) {
    if (!["session_gone", "session_not_found"].includes(error.code)) throw error;
    unread = [];
    lose();
    throw new Error("Nothing was saved: the server no longer has this conversation's state.");
  }
  show("note", `Saved as ${name}${unread.length ? ", without the stopped answer" : ""}.`);
  store();
  $("name").value = "";
  await listStates();
}

// Uploads a state file, downloaded here or from another server of the same model, under its file name.
async function add(file) {
  const name = file.name.replace(/\.safetensors$/, "").replace(/[^A-Za-z0-9._-]/g, "_").replace(/^[.-]/, "_").slice(0, 64);
  await call(`v1/states/${name}`, { method: "PUT", body: file });
  await listStates();
}

// Start and controls

let blankBytes; // bytes of a state that has read nothing

async function open() {
  const loading = (share) => { $("model").textContent = `loading ${Math.round(share * 100)} %`; };
  await ready(loading);
  const info = await (await call("v1/info")).json();
  started = await startTime();
  document.title = `${info.model} – Retentive`;
  const bounded = info.state_bounded ? "State, bounded" : "Cache, growing"; // of attention with or without a window
  $("kind").textContent = info.kind === "RetNet" ? "State, constant" : bounded;
  cacheBytes = info.kv_cache_bytes_per_token;
  $("cache").hidden = !cacheBytes;
  blankBytes = info.state_bytes;
  $("max_tokens").max = info.max_tokens;
  for (const [name, value] of Object.entries(info.sampling ?? {})) { // as its makers recommend
    if ($(name) && $(name).value === $(name).defaultValue) $(name).value = value;
  }
  offered = info.media ?? [];
  offer();
  $("model").textContent = model = info.model;
  if ($("log").childElementCount) { // a message was sent meanwhile
    remembered(read, held ?? blankBytes);
  } else {
    document.querySelector(`input[value=${info.chat ? "chat" : "write"}]`).checked = true;
    const before = resume();
    if (read && before !== started) {
      unread = [];
      lose();
    }
  }
  await listStates();
}

function leaveSettings() {
  if (document.body.classList.contains("settings")) $("more").click();
}

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("input").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
$("attach").onclick = () => $("files").click();
$("files").onchange = async () => {
  await media.add($("files").files);
  $("files").value = "";
};
$("record").onclick = () => attempt(recording);
$("input").onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  media.add(event.clipboardData.files);
};
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault(); // otherwise the browser would open the file instead of the page
    if (kind === "drop") media.add(event.dataTransfer.files);
  });
}
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
$("stop").onclick = () => running?.abort();
$("new").onclick = () => { begin(); leaveSettings(); $("input").focus(); };
$("mode").onchange = begin;
$("sampling").onsubmit = (event) => event.preventDefault();
$("upload").onclick = () => $("state").click();
$("state").onchange = () => attempt(async () => {
  const [file] = $("state").files;
  $("state").value = "";
  if (file) await add(file);
});
$("saving").onsubmit = (event) => { event.preventDefault(); attempt(save); };
$("more").onclick = () => {
  const shown = document.body.classList.toggle("settings");
  $("more").ariaExpanded = String(shown);
  $("more").textContent = shown ? "Back" : "Settings";
};
$("login").onclose = () => {
  if (!$("key").value) return;
  sessionStorage.setItem("api-key", $("key").value);
  $("key").value = "";
  attempt(open);
};
$("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  localStorage.setItem("theme", (document.documentElement.dataset.theme = dark ? "light" : "dark"));
};
if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
window.onpagehide = store;
document.onvisibilitychange = () => { if (document.hidden) store(); }; // phones end pages without a pagehide
window.onstorage = ({ key }) => { // another tab went on with the conversation, or began a new one
  const shared = model && started !== null; // where the page runs the model itself, each tab has a state of its own
  if (shared && key === place(model) && !running && !sending) started = resume() ?? started;
};

clear();
attempt(open);
