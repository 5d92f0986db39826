// The engine in C, compiled to WebAssembly: retentive/native/c/retentive.h from JavaScript. Numbers of 64 bits are BigInt
// there. Its functions look for files by name, and find them in memory.

import { Files } from "./files.js";

const ERROR_BYTES = 256, MEMORY = "memory.safetensors";
// a function that only adds two vectors of four numbers: what does not take it has no SIMD
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 123, 1, 123, 3, 2, 1, 0, 10, 11, 1, 9, 0, 32, 0, 32, 0, 253, 174, 1, 11];

export function canRun() {
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(SIMD));
}

export class Engine {
  // `module`: bytes of engine.wasm; `model`: {name: bytes} of config.json, model.safetensors and tokenizer.json;
  // `sequences`: how many states it keeps, all of them blank at first.
  static async open(module, model, sequences) {
    const files = new Files();
    for (const [name, bytes] of Object.entries(model)) files.content.set(name, bytes);
    let exports;
    const { instance } = await WebAssembly.instantiate(module, { wasi_snapshot_preview1: files.imports(() => exports.memory) });
    exports = instance.exports;
    exports._initialize();
    const engine = new Engine(exports, files);
    engine.model = engine.checked(exports.retentive_open(engine.string(""), 1, engine.error));
    for (const name of Object.keys(model)) files.content.delete(name); // the engine has packed what it needs
    engine.states = exports.retentive_states(engine.model, BigInt(sequences));
    engine.vocabulary = Number(exports.retentive_vocabulary(engine.model));
    engine.end = Number(exports.retentive_end(engine.model));
    engine.logits = exports.malloc(4 * engine.vocabulary);
    if (!engine.states || !engine.logits) throw new Error("There is not enough memory for this model's state.");
    return engine;
  }

  constructor(exports, files) {
    this.c = exports;
    this.files = files;
    this.error = exports.malloc(ERROR_BYTES);
  }

  // Logits after more ids of a sequence: valid until the next call.
  read(sequence, ids) {
    const room = this.c.malloc(8 * ids.length);
    new BigInt64Array(this.c.memory.buffer, room, ids.length).set(ids.map(BigInt));
    // a single token goes through the ring of the state, which then is seldom written
    const good = this.c.retentive_read(this.states, BigInt(sequence), room, BigInt(ids.length), this.logits);
    this.c.free(room);
    if (!good) throw new Error("The engine could not read these tokens: its memory may be full.");
    return new Float32Array(this.c.memory.buffer, this.logits, this.vocabulary);
  }

  copy(to, from) {
    this.c.retentive_copy(this.states, BigInt(to), BigInt(from));
  }

  position(sequence) {
    return Number(this.c.retentive_position(this.states, BigInt(sequence)));
  }

  encode(text) {
    const bytes = new TextEncoder().encode(text), at = this.c.malloc(bytes.length + 1), room = this.c.malloc(8 * (bytes.length + 1));
    new Uint8Array(this.c.memory.buffer, at, bytes.length).set(bytes);
    const count = Number(this.c.retentive_encode(this.model, at, BigInt(bytes.length), room));
    const ids = Array.from(new BigInt64Array(this.c.memory.buffer, room, Math.max(count, 0)), Number);
    this.c.free(at);
    this.c.free(room);
    return ids;
  }

  // The bytes that a token stands for.
  bytes(id) {
    const length = this.c.malloc(8), at = this.c.retentive_text(this.model, BigInt(id), length);
    const count = Number(new BigInt64Array(this.c.memory.buffer, length, 1)[0]);
    this.c.free(length);
    return new Uint8Array(this.c.memory.buffer, at, count).slice();
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
    new Uint8Array(this.c.memory.buffer, at, bytes.length).set(bytes);
    return at;
  }

  checked(result) {
    if (result) return result;
    const said = new Uint8Array(this.c.memory.buffer, this.error, ERROR_BYTES);
    throw new Error(new TextDecoder().decode(said.slice(0, said.indexOf(0))));
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
