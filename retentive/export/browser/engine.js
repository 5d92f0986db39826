// The engine in C, compiled to WebAssembly: retentive/native/c/retentive.h from JavaScript. Numbers of 64 bits are BigInt
// there. Its functions look for files by name, and find them in memory. Of its threads the caller is one, the others are
// workers in the same memory (thread.js), which only isolated pages may have.

import { Files } from "./files.js";

const ERROR_BYTES = 256, SAMPLING_BYTES = 32, ALIGNED = 64, MEMORY = "memory.safetensors";
// a function that only adds two vectors of four numbers: what does not take it has no SIMD
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 123, 1, 123, 3, 2, 1, 0, 10, 11, 1, 9, 0, 32, 0, 32, 0, 253, 174, 1, 11];
const PAGES = 512, MOST_PAGES = [65535, 32768, 16384, 8192]; // of 64 KiB: at first, and as many as a device may promise
const STACK_BYTES = 1 << 20, MOST_THREADS = 16, TRIES = 3;

export function canRun() {
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(SIMD));
}

// The engine for this page, and how many threads it may have.
export function choose() {
  const threads = Math.min(navigator.hardwareConcurrency ?? 1, MOST_THREADS);
  return globalThis.crossOriginIsolated ? { name: "engine-threads.wasm", threads } : { name: "engine.wasm", threads: 0 };
}

function sharedMemory() {
  for (const maximum of MOST_PAGES) {
    try {
      return new WebAssembly.Memory({ initial: PAGES, maximum, shared: true });
    } catch { /* as much cannot be promised */ }
  }
  throw new Error("There is not enough memory for the engine.");
}

export class Engine {
  // `bytes`: of engine.wasm, or of engine-threads.wasm where `threads` is not 0; `model`: {name: bytes} of config.json,
  // model.safetensors and tokenizer.json; `sequences`: how many states it keeps, all of them blank at first.
  static async open(bytes, threads, model, sequences) {
    const files = new Files();
    for (const [name, bytes] of Object.entries(model)) files.content.set(name, bytes);
    let memory = threads ? sharedMemory() : undefined;
    const module = await WebAssembly.compile(bytes);
    const { exports } = await WebAssembly.instantiate(module, { env: { memory }, wasi_snapshot_preview1: files.imports(() => memory) });
    memory ??= exports.memory;
    const engine = new Engine(exports, memory, files);
    if (threads) exports.__wasm_init_tls(engine.ownVariables());
    exports._initialize();
    engine.model = engine.checked(exports.retentive_open(engine.string(""), 1, engine.error));
    for (let thread = 1; thread < threads; thread++) engine.start(module);
    engine.pace = new Pace(threads || 1);
    for (const name of Object.keys(model)) files.content.delete(name); // the engine has packed what it needs
    engine.states = exports.retentive_states(engine.model, BigInt(sequences));
    engine.vocabulary = Number(exports.retentive_vocabulary(engine.model));
    engine.end = Number(exports.retentive_end(engine.model));
    engine.logits = exports.malloc(4 * engine.vocabulary);
    engine.sampling = exports.malloc(SAMPLING_BYTES + 8); // RetentiveSampling, and the generator behind it
    if (!engine.states || !engine.logits || !engine.sampling) throw new Error("There is not enough memory for this model's state.");
    return engine;
  }

  constructor(exports, memory, files) {
    this.c = exports;
    this.memory = memory;
    this.files = files;
    this.error = exports.malloc(ERROR_BYTES);
  }

  // Room for the variables that each thread has to itself.
  ownVariables() {
    return Math.ceil(this.c.malloc(this.c.__tls_size.value + ALIGNED) / ALIGNED) * ALIGNED;
  }

  // One thread more: it joins when it can, and the others work without it until then.
  start(module) {
    const stack = Math.floor((this.c.malloc(STACK_BYTES) + STACK_BYTES) / ALIGNED) * ALIGNED; // it grows downwards
    const worker = new Worker("thread.js", { type: "module" });
    worker.postMessage({ module, memory: this.memory, model: this.model, stack, variables: this.ownVariables() });
  }

  // Logits after more ids of a sequence: valid until the next call.
  read(sequence, ids) {
    const room = this.c.malloc(8 * ids.length);
    new BigInt64Array(this.memory.buffer, room, ids.length).set(ids.map(BigInt));
    const threads = ids.length > 1 ? this.pace.most : this.pace.threads(), began = performance.now();
    this.c.retentive_use_threads(this.model, threads);
    // a single token goes through the ring of the state, which then is seldom written
    const good = this.c.retentive_read(this.states, BigInt(sequence), room, BigInt(ids.length), this.logits);
    if (ids.length === 1) this.pace.note(threads, performance.now() - began);
    this.c.free(room);
    if (!good) throw new Error("The engine could not read these tokens: its memory may be full.");
    return new Float32Array(this.memory.buffer, this.logits, this.vocabulary);
  }

  // Begins the random numbers of an answer: the same seed draws the same tokens.
  seed(seed) {
    new BigUint64Array(this.memory.buffer, this.sampling + SAMPLING_BYTES, 1)[0] = BigInt.asUintN(64, BigInt(seed));
  }

  // A token drawn from the logits of the last `read`.
  sample({ temperature = 1, top_k = 0, top_p = 1, min_p = 0 }) {
    new Float64Array(this.memory.buffer, this.sampling, 4).set([temperature, 0, top_p, min_p]);
    new BigInt64Array(this.memory.buffer, this.sampling, 2)[1] = BigInt(top_k);
    const [count, random] = [BigInt(this.vocabulary), this.sampling + SAMPLING_BYTES];
    const id = Number(this.c.retentive_sample(this.logits, count, this.sampling, random));
    if (id < 0) throw new Error("The model's logits are not finite: are there NaN in its weights?");
    return id;
  }

  copy(to, from) {
    this.c.retentive_copy(this.states, BigInt(to), BigInt(from));
  }

  position(sequence) {
    return Number(this.c.retentive_position(this.states, BigInt(sequence)));
  }

  encode(text) {
    const bytes = new TextEncoder().encode(text), at = this.c.malloc(bytes.length + 1), room = this.c.malloc(8 * (bytes.length + 1));
    new Uint8Array(this.memory.buffer, at, bytes.length).set(bytes);
    const count = Number(this.c.retentive_encode(this.model, at, BigInt(bytes.length), room));
    const ids = Array.from(new BigInt64Array(this.memory.buffer, room, Math.max(count, 0)), Number);
    this.c.free(at);
    this.c.free(room);
    return ids;
  }

  // The bytes that a token stands for.
  bytes(id) {
    const length = this.c.malloc(8), at = this.c.retentive_text(this.model, BigInt(id), length);
    const count = Number(new BigInt64Array(this.memory.buffer, length, 1)[0]);
    this.c.free(length);
    return new Uint8Array(this.memory.buffer, at, count).slice();
  }

  // A file of `retentive memory`, as the server has it; `about`: its fields.
  save(sequence, about) {
    const [path, said] = [this.string(MEMORY), this.string(padded(JSON.stringify(about)))];
    const good = this.c.retentive_save_memory(this.states, BigInt(sequence), path, said, this.error);
    this.c.free(path);
    this.c.free(said);
    this.checked(good);
    return this.files.take(MEMORY);
  }

  load(sequence, bytes) {
    const path = this.string(MEMORY);
    this.files.content.set(MEMORY, bytes);
    const good = this.c.retentive_load(this.states, BigInt(sequence), path, this.error);
    this.c.free(path);
    this.files.content.delete(MEMORY);
    this.checked(good);
  }

  string(text) {
    const bytes = new TextEncoder().encode(`${text}\0`), at = this.c.malloc(bytes.length);
    if (!at) throw new Error("The engine's memory is full.");
    new Uint8Array(this.memory.buffer, at, bytes.length).set(bytes);
    return at;
  }

  checked(result) {
    if (result) return result;
    const said = new Uint8Array(this.memory.buffer, this.error, ERROR_BYTES);
    throw new Error(new TextDecoder().decode(said.slice(0, said.indexOf(0))));
  }
}

// How many threads a token takes: more help only large models, and only where no other program needs their cores. So 1, 2,
// 4, … are tried with the first tokens of every answer, and the fastest writes the rest.
class Pace {
  constructor(most) {
    this.most = most;
    this.numbers = [most];
    for (let n = 1; n < most; n *= 2) this.numbers.push(n);
    this.again();
  }

  // A new answer begins.
  again() {
    this.best = this.most;
    this.least = Infinity;
    this.tries = this.numbers.length > 1 ? this.numbers.flatMap((n) => Array(TRIES).fill(n)) : [];
  }

  threads() {
    return this.tries.at(-1) ?? this.best;
  }

  note(threads, milliseconds) {
    if (!this.tries.length) return;
    this.tries.pop();
    if (milliseconds < this.least) [this.least, this.best] = [milliseconds, threads];
  }
}

// To whole KiB: the file keeps its size while counts gain digits.
function padded(text) {
  return text.padEnd(Math.ceil(text.length / 1024) * 1024);
}

// The fields of a memory's file; null of another file.
export function about(bytes) {
  try {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    const head = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + length)));
    return JSON.parse(head.__metadata__.memory);
  } catch {
    return null;
  }
}
