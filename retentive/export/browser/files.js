// WASI for the engine: a folder of files in memory, whose names have no slash. Only what a C library's stdio asks for.

const GOOD = 0, BAD_FILE = 8, NOT_THERE = 44, NOT_SUPPORTED = 52;
const ROOT = 3; // the descriptor of the folder; 0, 1 and 2 are the program's own
const CREATE = 1, TRUNCATE = 8;

export class Files {
  constructor() {
    this.content = new Map(); // name -> Uint8Array
    this.open = new Map(); // descriptor -> {name, at}
    this.said = ""; // what the program wrote to its outputs
  }

  // A file's content, which is a file no longer.
  take(name) {
    const data = this.content.get(name);
    this.content.delete(name);
    return data;
  }

  // What the module imports; `memory()` is the instance's.
  imports(memory) {
    const view = () => new DataView(memory().buffer);
    const bytes = (at, length) => new Uint8Array(memory().buffer, at, length);
    const text = (at, length) => new TextDecoder().decode(bytes(at, length).slice()).replace(/^\.?\//, "");
    const pieces = (at, count) => Array.from({ length: count }, (_, i) =>
      bytes(view().getUint32(at + 8 * i, true), view().getUint32(at + 8 * i + 4, true)));
    const each = (descriptor, at, count, done, move) => {
      const file = this.open.get(descriptor);
      if (!file) return BAD_FILE;
      view().setUint32(done, pieces(at, count).reduce((sum, piece) => sum + move(file, piece), 0), true);
      return GOOD;
    };
    const known = {
      fd_prestat_get: (descriptor, at) => {
        if (descriptor !== ROOT) return BAD_FILE;
        view().setUint32(at, 0, true); // a folder
        view().setUint32(at + 4, 1, true); // bytes of its name
        return GOOD;
      },
      fd_prestat_dir_name: (descriptor, at) => (bytes(at, 1)[0] = "/".charCodeAt(), GOOD),
      fd_fdstat_get: (descriptor, at) => {
        const file = this.open.get(descriptor);
        if (!file && descriptor > ROOT) return BAD_FILE;
        bytes(at, 24).fill(0);
        view().setUint8(at, descriptor === ROOT ? 3 : file ? 4 : 2); // folder, file, terminal
        view().setBigUint64(at + 8, ~0n, true); // it may do everything,
        view().setBigUint64(at + 16, ~0n, true); // and so may what is opened in it
        return GOOD;
      },
      path_open: (folder, flags, path, length, how, rights, inherited, more, at) => {
        const name = text(path, length);
        if (!this.content.has(name) && !(how & CREATE)) return NOT_THERE;
        if (!this.content.has(name) || how & TRUNCATE) this.content.set(name, new Uint8Array(0));
        let descriptor = ROOT + 1;
        while (this.open.has(descriptor)) descriptor++;
        this.open.set(descriptor, { name, at: 0 });
        view().setUint32(at, descriptor, true);
        return GOOD;
      },
      fd_read: (descriptor, at, count, done) => each(descriptor, at, count, done, (file, piece) => {
        const part = this.content.get(file.name).subarray(file.at, file.at + piece.length);
        piece.set(part);
        file.at += part.length;
        return part.length;
      }),
      fd_write: (descriptor, at, count, done) => {
        if (descriptor > ROOT) return each(descriptor, at, count, done, (file, piece) => this.write(file, piece));
        for (const piece of pieces(at, count)) this.said += new TextDecoder().decode(piece.slice());
        view().setUint32(done, pieces(at, count).reduce((sum, piece) => sum + piece.length, 0), true);
        return GOOD;
      },
      fd_seek: (descriptor, offset, from, done) => {
        const file = this.open.get(descriptor);
        if (!file) return BAD_FILE;
        file.at = Number(offset) + [0, file.at, this.content.get(file.name).length][from];
        view().setBigUint64(done, BigInt(file.at), true);
        return GOOD;
      },
      fd_close: (descriptor) => (this.open.delete(descriptor) ? GOOD : BAD_FILE),
      path_rename: (folder, from, length, other, to, long) => {
        const [name, data] = [text(from, length), this.content.get(text(from, length))];
        if (!data) return NOT_THERE;
        this.content.delete(name);
        this.content.set(text(to, long), data);
        return GOOD;
      },
      path_unlink_file: (folder, path, length) => (this.content.delete(text(path, length)) ? GOOD : NOT_THERE),
      proc_exit: (code) => { throw new Error(`the engine ended (${code}): ${this.said}`); },
    };
    return new Proxy(known, { get: (all, name) => all[name] ?? (() => NOT_SUPPORTED), has: () => true });
  }

  write(file, piece) {
    let data = this.content.get(file.name);
    const end = file.at + piece.length;
    if (end > data.length) {
      const more = new Uint8Array(end);
      more.set(data);
      this.content.set(file.name, (data = more));
    }
    data.set(piece, file.at);
    file.at = end;
    return piece.length;
  }
}
