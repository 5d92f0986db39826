// The worker of a browser's row in `python -m benchmarks edge`: the folder's engine is opened, reads and writes. It is sent
// {description, prompt, tokens, steps} and answers {logits, first}, then {reading, writing, bytes} in milliseconds.

import { Engine, choose } from "./engine.js";

const LIVE = 0, BLANK = 1, WARM = 4; // the browser compiles what runs often while it runs

self.onmessage = async ({ data: { description, prompt, tokens, steps } }) => {
  const { name, threads } = choose(), own = Object.keys(description.files).filter((file) => !file.endsWith(".wasm"));
  const fetched = async (file) => new Uint8Array(await (await fetch(file)).arrayBuffer());
  const [module, ...contents] = await Promise.all([name, ...own].map(fetched));
  const files = Object.fromEntries(own.map((file, n) => [file.replace(/^model\//, ""), contents[n]]));
  const engine = await Engine.open(module, threads, files, 2);
  const ids = Array.from({ length: tokens }, (_, n) => (n + 1) % engine.vocabulary);
  self.postMessage({ logits: Array.from(engine.read(LIVE, ids.slice(0, prompt))), threads: threads || 1 });
  let reading = Infinity, writing = Infinity;
  for (let turn = 0; turn < WARM + 2; turn++) {
    await new Promise((resolve) => setTimeout(resolve)); // threads that were started come meanwhile
    engine.copy(LIVE, BLANK);
    let began = performance.now();
    engine.read(LIVE, ids);
    if (turn >= WARM) reading = Math.min(reading, performance.now() - began);
    engine.pace.again();
    for (let n = 0; n < 16; n++) engine.read(LIVE, [n]); // it has chosen how many threads write
    began = performance.now();
    for (let n = 0; n < steps; n++) engine.read(LIVE, [n % engine.vocabulary]);
    if (turn >= WARM) writing = Math.min(writing, performance.now() - began);
  }
  self.postMessage({ reading, writing, bytes: engine.memory.buffer.byteLength });
};
