// The model in a thread of its own: one conversation, its state, and the states that are saved. It answers messages
// {id, what, …} with {id, done} or {id, error}; while a text is written, with {id, piece, …} again and again before.

import { Engine, about } from "./engine.js";
import { Store } from "./store.js";
import { Text } from "./text.js";

const LIVE = 0, BEFORE = 1, BLANK = 2; // sequences: as it stands, as it stood before this turn, nothing read
const READ_AT_ONCE = 64; // tokens of a prompt between two looks at whether to stop
const TURN = 40; // milliseconds of writing between them, and between two pieces of text

let engine, store, model;
let conversation = { session: null, pending: [], tokens: 0, sources: [] };
let stopping = false;

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const actions = {
  async open({ module, threads, files, description }) {
    model = description;
    engine = await Engine.open(module, threads, files, 3);
    store = new Store(model.fingerprint);
  },

  async complete(request, say) {
    await begin(request.session);
    const ids = [...conversation.pending, ...encoded(request)];
    if (!ids.length) throw new Refused(400, "the prompt is empty");
    engine.copy(BEFORE, LIVE);
    try {
      const { reason, pending, made } = await write(ids, request, say);
      remember(pending);
      await store.put("session", conversation.session, await file(), conversation.tokens).catch(() => {}); // for a reload
      return { reason, prompt: ids.length, made, ...described() };
    } catch (error) {
      engine.copy(LIVE, BEFORE); // as if it had not been asked
      throw error;
    }
  },

  async forget({ session }) {
    if (conversation.session === session) blank(null);
    await store.delete("session", session).catch(() => {});
  },

  async list() {
    return { states: (await store.list("saved")).map(shown) };
  },

  async save({ session, name }) {
    await begin(session);
    if (!conversation.tokens && !conversation.pending.length) throw new Refused(409, "the session has read nothing yet");
    await store.put("saved", name, await file(), conversation.tokens);
    return { state: shown(await found(name)) };
  },

  async restore({ session, name }) {
    take(session, (await found(name)).bytes);
    await store.put("session", session, await file(), conversation.tokens).catch(() => {});
    return described();
  },

  async delete({ name }) {
    await found(name);
    await store.delete("saved", name);
  },

  async file({ name }) {
    return { bytes: (await found(name)).bytes };
  },

  async add({ name, bytes }) {
    const before = conversation;
    engine.copy(BEFORE, LIVE);
    try {
      take(null, bytes); // looked at by loading it
      await store.put("saved", name, bytes, conversation.tokens);
    } finally {
      engine.copy(LIVE, BEFORE);
      conversation = before;
    }
    return { state: shown(await found(name)) };
  },
};

// ---- the conversation ----

function blank(session) {
  engine.copy(LIVE, BLANK);
  conversation = { session, pending: [], tokens: 0, sources: [] };
}

// Goes on with a session: the one under way, one that a reload left behind, or a new one.
async function begin(session) {
  if (conversation.session === session) return;
  blank(session);
  const kept = await store.get("session", session).catch(() => null);
  if (kept) take(session, kept.bytes);
}

function take(session, bytes) {
  const said = about(bytes);
  if (!said) throw new Refused(409, "this is no file of a saved state");
  if (said.model !== model.fingerprint) {
    throw new Refused(409, `this state is another model's (${String(said.model).slice(0, 12)}; this one is ${model.fingerprint.slice(0, 12)})`);
  }
  const known = (id) => Number.isInteger(id) && id >= 0 && id < engine.vocabulary;
  if (!Array.isArray(said.pending) || !said.pending.every(known)) throw new Refused(409, "this file's tokens are not the model's");
  try {
    engine.load(LIVE, bytes);
  } catch (error) {
    throw new Refused(409, error.message.replace("memory.safetensors", "this file"));
  }
  const { pending, tokens, sources } = said;
  conversation = { session, pending, tokens, sources };
}

// Tokens read in this turn.
const moved = () => engine.position(LIVE) - engine.position(BEFORE);

function remember(pending) {
  conversation = { ...conversation, pending, tokens: conversation.tokens + moved() };
}

function file() {
  const { pending, tokens, sources } = conversation;
  return engine.save(LIVE, { pending, tokens, model: model.fingerprint, sources, config: model.config, errors: [] });
}

const described = () => ({ tokens: conversation.tokens, bytes: model.state_bytes });
const shown = ({ name, bytes, tokens, created }) => ({ name, bytes: bytes.length, tokens, created });

async function found(name) {
  const state = await store.get("saved", name);
  if (!state) throw new Refused(404, `no saved state '${name}'`);
  return state;
}

// ---- from text to ids ----

// Texts and ids of special tokens in turn, as ids: a name of a special token that somebody writes is text.
function joined(pieces) {
  const ids = [];
  let text = "";
  for (const piece of [...pieces, null]) {
    if (typeof piece === "string") {
      text += piece;
    } else {
      if (text) for (const id of engine.encode(text)) ids.push(id); // they may be more than a call takes arguments
      text = "";
      if (piece !== null) ids.push(piece);
    }
  }
  return ids;
}

function encoded({ messages, prompt }) {
  const begun = conversation.tokens || conversation.pending.length;
  if (!messages) return [...(begun ? [] : [engine.end]), ...engine.encode(prompt)];
  if (!model.chat) throw new Refused(400, "this model's chat template cannot be followed here: choose Continue text");
  const { start, answer, question, end, trim } = model.chat; // before the first message, before answers and questions
  const pieces = [...(begun ? question : start)];
  messages.forEach(({ role, content }, n) => {
    if (n) pieces.push(...(role === "user" ? question : answer));
    pieces.push(trim ? content.trim() : content);
  });
  return joined([...pieces, ...end]);
}

// ---- writing ----

// Lets messages in, such as one to stop.
const look = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = resolve;
  port2.postMessage(null);
}).then(() => {
  if (stopping) throw new Refused(499, "stopped");
});

async function write(ids, request, say) {
  const text = new Text(engine, [...(request.stop ?? []), ...(request.messages ? model.chat.stop : [])]);
  const ends = new Set(request.messages ? model.chat.ends : [engine.end]);
  engine.seed(request.seed ?? crypto.getRandomValues(new BigUint64Array(1))[0]);
  let made = 0, looked = performance.now();
  stopping = false;
  engine.pace.again();
  for (let at = 0; at < ids.length; at += READ_AT_ONCE) {
    engine.read(LIVE, ids.slice(at, at + READ_AT_ONCE));
    await look();
  }
  let held = ""; // a page cannot show thousands of pieces in a second
  const give = (piece) => {
    if (held + piece) say({ piece: held + piece, prompt: ids.length, made, tokens: conversation.tokens + moved() });
    held = "";
  };
  for (;;) {
    const id = engine.sample(request);
    made++;
    if (ends.has(id)) {
      give(text.flush());
      return { reason: "stop", pending: [], made }; // the template writes the end itself
    }
    held += text.push(id);
    if (text.stopped) { // what was cut off must not be in the state
      give("");
      engine.copy(LIVE, BEFORE);
      return { reason: "stop", pending: [...ids, ...text.kept()], made };
    }
    if (made >= request.max_tokens) {
      give(text.flush());
      return { reason: "length", pending: [id], made };
    }
    if (made === 1 || performance.now() - looked > TURN) {
      give("");
      await look();
      looked = performance.now();
    }
    engine.read(LIVE, [id]);
  }
}

// ---- messages, one after the other but for "stop" ----

let last = Promise.resolve();

self.onmessage = ({ data }) => {
  if (data.what === "stop") {
    stopping = true;
    return;
  }
  last = last.then(async () => {
    try {
      const said = await actions[data.what](data, (part) => self.postMessage({ id: data.id, ...part }));
      self.postMessage({ id: data.id, done: said ?? {} });
    } catch (error) {
      self.postMessage({ id: data.id, error: error.message, status: error.status ?? 500 });
    }
  });
};
