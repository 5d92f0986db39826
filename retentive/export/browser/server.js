// Who answers the page: here the model in this browser, in a worker. The requests are those of `retentive serve`.

import { canRun, choose } from "./engine.js";

const waiting = new Map(); // number of a message -> what to do with its answers
let count = 0, worker, model, progress = () => {};

// Asks the worker; `onpart` is given what comes before the end.
function ask(what, more = {}, onpart) {
  const id = count++;
  worker.postMessage({ id, what, ...more });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject, onpart }));
}

function heard({ data }) {
  if (!waiting.has(data.id)) return; // it was given up
  const { resolve, reject, onpart } = waiting.get(data.id);
  if (data.piece !== undefined) return onpart(data);
  waiting.delete(data.id);
  if (data.done) resolve(data.done);
  else reject(Object.assign(new Error(data.error), { status: data.status }));
}

// ---- loading ----

async function fetched(name, size, onbytes) {
  const response = await fetch(name).catch(() => { throw new Error(`${name} cannot be fetched: is the server still there?`); });
  if (!response.ok) throw new Error(`${name} cannot be fetched (${response.status}): the folder is not complete.`);
  const parts = [];
  let had = 0;
  const reader = response.body.getReader();
  for (let part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    onbytes((had += part.value.length));
  }
  if (size !== undefined && had !== size) throw new Error(`${name} has ${had} bytes, ${size} were expected: it was cut short, copy the folder anew.`);
  const whole = new Uint8Array(had);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

// Where the folder is another than the one that the browser has kept: that is replaced, and the page begins anew.
async function renewed(version) {
  const kept = navigator.serviceWorker?.controller?.scriptURL.split("?")[1];
  if (kept === undefined || kept === version) return;
  const taken = new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
  const { installing } = await navigator.serviceWorker.register(`offline.js?${version}`);
  await Promise.race([taken, new Promise((_, reject) => installing?.addEventListener("statechange", () => {
    if (installing.state === "redundant") reject(new Error("The folder has become another one, and is not complete: copy it anew."));
  }))]);
  location.reload();
  await new Promise(() => {}); // nothing more is loaded here
}

async function load() {
  if (!canRun()) throw new Error("This browser runs no WebAssembly with SIMD: it needs one from 2023 or later.");
  const description = JSON.parse(new TextDecoder().decode(await fetched("model.json", undefined, () => {})));
  await renewed(description.version);
  const engine = choose();
  const sizes = Object.entries(description.files).filter(([name]) => !name.endsWith(".wasm") || name === engine.name);
  const all = sizes.reduce((sum, [, size]) => sum + size, 0), had = {};
  const contents = await Promise.all(sizes.map(([name, size]) => fetched(name, size, (bytes) => {
    had[name] = bytes;
    progress(Object.values(had).reduce((a, b) => a + b) / all);
  })));
  const files = Object.fromEntries(sizes.map(([name], n) => [name.replace(/^model\//, ""), contents[n]]));
  const { [engine.name]: module, ...rest } = files;
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = heard;
  worker.onerror = () => { // it could not be started, or failed outside of a request
    for (const { reject } of waiting.values()) reject(new Error("The engine's worker failed: reload the page."));
    waiting.clear();
  };
  await ask("open", { module, threads: engine.threads, files: rest, description });
  model = description;
  if ("serviceWorker" in navigator) navigator.serviceWorker.register(`offline.js?${model.version}`).catch(() => {}); // it runs without
}

let loaded = null;

export function ready(onprogress) {
  progress = onprogress;
  return (loaded ??= load());
}

// ---- requests ----

const json = (body, status = 200) => new Response(JSON.stringify(body), { status, headers: { "Content-Type": "application/json" } });

const routes = [
  ["GET", "v1/info", () => {
    const { name, kind, parameters, state_bytes, state_bounded, kv_cache_bytes_per_token } = model;
    return json({
      model: name, kind, parameters, state_bytes, state_bounded, kv_cache_bytes_per_token,
      max_tokens: 1_000_000, chat: model.teaches, media: [],
    });
  }],
  ["GET", "v1/states", async () => json({ data: (await ask("list")).states })],
  ["POST", "v1/states", async ({ body }) => json((await ask("save", body)).state)],
  ["POST", "v1/states/NAME/restore", async ({ name, body }) => json(await ask("restore", { ...body, name }))],
  ["GET", "v1/states/NAME", async ({ name }) => new Response((await ask("file", { name })).bytes)],
  ["PUT", "v1/states/NAME", async ({ name, body }) => json((await ask("add", { name, bytes: new Uint8Array(await body.arrayBuffer()) })).state)],
  ["DELETE", "v1/states/NAME", async ({ name }) => json(await ask("delete", { name }))],
  ["DELETE", "v1/sessions/NAME", async ({ name }) => json(await ask("forget", { session: name }))],
  ["POST", "v1/chat/completions", complete],
  ["POST", "v1/completions", complete],
];

function complete({ body, signal }) {
  const events = new ReadableStream({
    async start(stream) {
      const send = (event) => stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`));
      const stop = () => worker.postMessage({ what: "stop" });
      signal?.addEventListener("abort", stop);
      try {
        const counted = ({ prompt, made, tokens }) => ({
          usage: { prompt_tokens: prompt, completion_tokens: made }, session: { tokens, bytes: model.state_bytes },
        });
        const done = await ask("complete", body, (part) => send({ choices: [{ text: part.piece }], ...counted(part) }));
        send({ choices: [{ text: "", finish_reason: done.reason }], ...counted(done) });
        stream.close();
      } catch (error) {
        if (signal?.aborted) return stream.error(signal.reason);
        send({ error: { message: error.message } });
        stream.close();
      } finally {
        signal?.removeEventListener("abort", stop);
      }
    },
  });
  return new Response(events);
}

// As fetch has it.
export async function answer(path, { method = "GET", body, signal } = {}) {
  for (const [of, pattern, act] of routes) {
    const found = of === method && path.match(`^${pattern.replace("NAME", "([^/]+)")}$`);
    if (!found) continue;
    try {
      await ready(progress); // whoever asks earlier waits for the model
      return await act({ name: found[1], body: typeof body === "string" ? JSON.parse(body) : body, signal });
    } catch (error) {
      return json({ error: { message: error.message } }, error.status ?? 500);
    }
  }
  return json({ error: { message: `no such path: ${method} ${path}` } }, 404);
}
