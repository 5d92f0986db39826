// The page of `retentive serve`, and of folders by `retentive export --to browser`, where server.js runs the model in
// the browser itself. The server keeps each conversation's state under a session name, so a request holds only what
// the state has not read yet. The number of tokens read grows, the state's bytes do not.

import * as media from "./media.js";
import { answer, ready } from "./server.js";

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const HINTS = {
  chat: "Ask something. The model keeps the conversation in a state of constant size.",
  write: "Start a text. The model continues it, and so can you.",
};

let session; // name of this conversation on the server
let unread; // [{role, content}] that the state has not read: the message being sent, and stopped answers
let read; // tokens in the state
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
  const before = unread, had = read, items = media.take();
  const content = items.length ? [...items.map(({ part }) => part), { type: "text", text }] : text;
  unread = [...unread, { role: "user", content }];
  const mine = show("you", text);
  mine.prepend(...items.map(({ shown }) => shown));
  const answer = show("model", "");
  $("input").value = "";
  busy(new AbortController());
  answer.classList.add("running");
  try {
    await listen(answer, performance.now());
    unread = [];
  } catch (error) {
    remembered(had); // the state has not changed
    if (answer.textContent) {
      unread.push({ role: "assistant", content: answer.textContent }); // read with the next message
    } else { // no answer: restore everything as before sending
      unread = before;
      mine.remove();
      answer.remove();
      media.restore(items);
      $("input").value = text;
    }
    if (error.name !== "AbortError") say(error.message);
  }
  answer.classList.remove("running");
  busy(null);
  $("input").focus();
}

async function listen(answer, began) {
  const [path, body] = question();
  const response = await call(path, { method: "POST", body, signal: running.signal });
  const already = read;
  let pieces = 0, forgotten = false, first, last, finished;
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
      remembered(already + pieces);
      speed(first - began, pieces, last - first);
    }
    if (event.usage && first) speed(first - began, event.usage.completion_tokens, last - first);
    if (event.session) {
      const { prompt_tokens, completion_tokens } = event.usage;
      // tokens of a stop string were generated but dropped; if more are missing, the session is a new one
      forgotten = event.session.tokens + 64 < already + prompt_tokens + completion_tokens;
      remembered(event.session.tokens, event.session.bytes);
    }
  }
  if (!finished) throw new Error("The connection broke in the middle of the answer.");
  if (forgotten) say("The server had lost this conversation's state, and started again with your last message.");
}

// Display

const mode = () => document.querySelector("input[name=mode]:checked").value;

function say(message) {
  $("error").textContent = message;
}

function show(kind, text) {
  const block = document.createElement(kind === "model" ? "div" : "p");
  block.className = kind;
  block.textContent = text;
  $("log").append(block);
  $("mode").disabled = true; // a conversation has one mode
  $("log").scrollTop = $("log").scrollHeight;
  return block;
}

function append(block, piece) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40; // do not scroll while the user reads above
  block.append(piece);
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

function remembered(tokens, size) {
  $("read").textContent = count.format(tokens);
  if (size) $("bytes").textContent = bytes(size);
  read = tokens;
}

function speed(wait, tokens, ms) {
  $("first").textContent = wait < 1000 ? `${Math.round(wait)} ms` : `${(wait / 1000).toFixed(1)} s`;
  const rate = ms > 0 ? (tokens - 1) / ms : tokens / wait; // an answer that arrives all at once, as behind a proxy
  if (tokens > 1) $("speed").textContent = count.format(Math.round(rate * 1000));
}

// Conversations and their states

function begin() {
  if (read) call(`v1/sessions/${session}`, { method: "DELETE" }).catch(() => {}); // otherwise it expires on the server
  session = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  unread = [];
  $("log").replaceChildren();
  $("log").dataset.hint = HINTS[mode()];
  $("log").classList.toggle("write", mode() === "write");
  $("mode").disabled = false;
  $("first").textContent = $("speed").textContent = "–";
  $("send").textContent = mode() === "chat" ? "Send" : "Continue";
  offer();
  remembered(0);
  say("");
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

// Reload: the display is kept in the tab's storage, the state on the server

function keep() {
  const blocks = [...$("log").children];
  const part = running ? blocks.at(-1).textContent : ""; // the server drops an answer when its reader leaves
  const stopped = part ? [{ role: "assistant", content: part }] : [];
  const log = blocks.map((block) => [block.classList[0], block.textContent]);
  const kept = { session, read, log, unread: [...unread, ...stopped], mode: mode(), bytes: $("bytes").textContent };
  try {
    sessionStorage.setItem("conversation", JSON.stringify(kept));
  } catch { // an unread picture exceeds the tab's storage
    sessionStorage.setItem("conversation", JSON.stringify({ ...kept, unread: [] }));
  }
}

function resume() {
  const kept = JSON.parse(sessionStorage.getItem("conversation"));
  if (kept?.log.length) document.querySelector(`input[value=${kept.mode}]`).checked = true;
  begin();
  if (!kept?.log.length) return;
  ({ session, unread } = kept);
  for (const [kind, text] of kept.log) show(kind, text);
  $("bytes").textContent = kept.bytes;
  remembered(kept.read);
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
}

function row(state) {
  const item = document.createElement("li");
  const about = document.createElement("small");
  about.textContent = `${count.format(state.tokens)} tokens in ${bytes(state.bytes)}`;
  const name = document.createElement("span");
  name.append(state.name, about);
  const action = (text, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.ariaLabel = `${text} ${state.name}`;
    button.disabled = Boolean(running);
    button.onclick = () => attempt(act);
    return button;
  };
  item.append(
    name,
    action("Download", async () => {
      const file = await (await call(`v1/states/${state.name}`)).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(file);
      link.download = `${state.name}.safetensors`;
      link.click();
      URL.revokeObjectURL(link.href);
    }),
    action("Restore", async () => {
      begin();
      const restored = await call(`v1/states/${state.name}/restore`, { method: "POST", body: { session } });
      const { tokens, bytes } = await restored.json();
      remembered(tokens, bytes);
      show("note", `Restored ${state.name}. The model remembers the ${count.format(tokens)} tokens it had read; their text is not kept.`);
      leaveSettings();
      $("input").focus();
    }),
    action("Delete", async () => {
      await call(`v1/states/${state.name}`, { method: "DELETE" });
      await listStates();
      $("name").focus();
    }),
  );
  return item;
}

async function save() {
  const name = $("name").value;
  await call("v1/states", { method: "POST", body: { session, name } });
  show("note", `Saved as ${name}${unread.length ? ", without the stopped answer" : ""}.`);
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

async function open() {
  const loading = (share) => { $("model").textContent = `loading ${Math.round(share * 100)} %`; };
  await ready(loading);
  const info = await (await call("v1/info")).json();
  $("model").textContent = info.model;
  document.title = `${info.model} – Retentive`;
  $("kind").textContent = info.kind === "RetNet" ? "State, constant" : "Cache, growing";
  if (!read) $("bytes").textContent = bytes(info.state_bytes);
  $("max_tokens").max = info.max_tokens;
  offered = info.media ?? [];
  offer();
  if (!$("log").childElementCount) {
    document.querySelector(`input[value=${info.chat ? "chat" : "write"}]`).checked = true;
    begin();
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
window.onpagehide = keep;

resume();
attempt(open);
