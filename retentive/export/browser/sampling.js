// A token from logits, as retentive/infer/sample.py picks it but for the random numbers.

// Numbers in [0, 1) that a seed repeats: a counter, well mixed (Mulberry32).
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

export function pick(logits, { temperature = 1, top_p = 1 }, next) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!Number.isFinite(logits[best])) throw new Error("The model's logits are not finite: are there NaN in its weights?");
  if (temperature === 0) return best;
  const weight = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  const sum = weight.reduce((a, b) => a + b);
  let order = [...weight.keys()];
  if (top_p < 1) {
    // only what is likely needs sorting: the others together may not be missed
    for (let least = 1e-3; ; least /= 100) {
      order = [...weight.keys()].filter((i) => weight[i] >= least).sort((a, b) => weight[b] - weight[a] || a - b);
      if (least < 1e-12 || order.reduce((a, i) => a + weight[i], 0) >= top_p * sum) break;
    }
    let before = 0;
    order = order.filter((i) => {
      const kept = before < top_p * sum;
      before += weight[i];
      return kept;
    });
  }
  let left = next() * order.reduce((a, i) => a + weight[i], 0);
  return order.find((i) => (left -= weight[i]) < 0) ?? order[0];
}
