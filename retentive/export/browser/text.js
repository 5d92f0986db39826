// From tokens to text: whole characters, up to a stop string (as `Text` of retentive/infer/text.py).

export class Text {
  constructor(engine, stops) {
    this.engine = engine;
    this.stops = stops;
    this.decoder = new TextDecoder();
    this.ids = [];
    this.ends = []; // characters decoded after each id
    this.decoded = this.given = 0;
    this.held = ""; // perhaps the beginning of a stop string
    this.text = "";
    this.stopped = false;
  }

  push(id) {
    const piece = this.release(this.decoder.decode(this.engine.bytes(id), { stream: true }));
    this.ids.push(id);
    this.ends.push(this.decoded);
    return piece;
  }

  flush() {
    const piece = this.release(this.decoder.decode()), rest = this.held;
    this.held = "";
    return piece + this.give(rest);
  }

  // Ids of exactly the text given out: the model's own as far as they fit, what is left of a token anew.
  kept() {
    const fit = this.ends.findLastIndex((end) => end <= this.given);
    const whole = fit < 0 ? 0 : this.ends[fit];
    const own = whole ? this.ids.slice(0, this.ends.indexOf(whole) + 1) : [];
    const rest = this.text.slice(whole);
    return rest ? [...own, ...this.engine.encode(rest)] : own;
  }

  release(piece) {
    this.decoded += piece.length;
    const held = this.held + piece, found = this.stops.map((stop) => held.indexOf(stop)).filter((at) => at >= 0);
    if (found.length) {
      this.held = "";
      this.stopped = true;
      return this.give(held.slice(0, Math.min(...found)));
    }
    let keep = 0; // the longest ending that a stop string begins with
    for (const stop of this.stops) {
      for (let n = 1; n < stop.length; n++) if (held.endsWith(stop.slice(0, n))) keep = Math.max(keep, n);
    }
    this.held = held.slice(held.length - keep);
    return this.give(held.slice(0, held.length - keep));
  }

  give(piece) {
    this.text += piece;
    this.given += piece.length;
    return piece;
  }
}
