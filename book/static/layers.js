"use strict";
// Networks, losses and attacks in plain JavaScript: one function a layer, each with its gradient
// written out. Numbers that stay are rounded to float32 (Float32Array, Math.fround), as on a GPU:
// what dies of rounding there dies of rounding here. `laboratory` uses nothing from outside itself,
// so that a worker can be made of its source.
function laboratory() {
  const round = Math.fround;

  // Layers. Each takes its weights and activations x, and returns what comes out and a function
  // that carries a gradient g of that back to a gradient of x.

  function center(_, x) {
    return [x.map(v => v - 0.5), g => g];
  }

  function relu(_, x) {
    return [x.map(v => Math.max(v, 0)), g => g.map((v, i) => x[i] > 0 ? v : 0)];
  }

  // y(n) = W x(n) + b at every patch x(n). A dense layer is this on a single patch: everything.
  function linear({ W, b, outputs, patches, at }, x) {
    const K = at.length / patches, patch = new Float32Array(K);
    const y = new Float32Array(outputs * patches);
    for (let n = 0; n < patches; n++) {
      for (let k = 0; k < K; k++) patch[k] = at[n * K + k] < 0 ? 0 : x[at[n * K + k]];
      for (let o = 0; o < outputs; o++) {
        let sum = b[o];
        for (let k = 0; k < K; k++) sum += W[o * K + k] * patch[k];
        y[o * patches + n] = sum;
      }
    }
    return [y, g => {
      const back = new Float32Array(x.length), sums = new Float64Array(K);
      for (let n = 0; n < patches; n++) {
        sums.fill(0);
        for (let o = 0; o < outputs; o++) {
          const v = g[o * patches + n];
          if (v !== 0) for (let k = 0; k < K; k++) sums[k] += W[o * K + k] * v;
        }
        for (let k = 0; k < K; k++) if (at[n * K + k] >= 0) back[at[n * K + k]] += sums[k];
      }
      return back;
    }];
  }

  // y(n) = α W x(n) / (‖x(n)‖ + δ) + b: Eq. 6 of Ranjan et al. (2017), as in `defenses.compact`.
  function compact(layer, x) {
    const { b, outputs, patches, at, alpha, delta } = layer, K = at.length / patches;
    const [u, through] = linear({ ...layer, b: new Float32Array(outputs) }, x);
    const r = new Float32Array(patches);
    for (let n = 0; n < patches; n++) {
      let squares = 0;
      for (let k = 0; k < K; k++) if (at[n * K + k] >= 0) squares += x[at[n * K + k]] ** 2;
      r[n] = Math.sqrt(squares);
    }
    const scale = r.map(v => alpha / (v + delta)), n_of = i => i % patches;
    const y = u.map((v, i) => v * scale[n_of(i)] + b[Math.floor(i / patches)]);
    return [y, g => {
      const back = through(g.map((v, i) => v * scale[n_of(i)]));
      const toScale = new Float64Array(patches);
      g.forEach((v, i) => { toScale[n_of(i)] += v * u[i]; });
      for (let n = 0; n < patches; n++) {  // ∂scale/∂x = −scale/(r + δ) · x/r; nothing at r = 0
        const slope = r[n] > 0 ? -toScale[n] * scale[n] / (r[n] + delta) / r[n] : 0;
        for (let k = 0; k < K; k++) {
          if (at[n * K + k] >= 0) back[at[n * K + k]] += slope * x[at[n * K + k]];
        }
      }
      return back;
    }];
  }

  const kinds = { center, relu, linear, compact };

  // Losses: of logits z and the label y, the value and its gradient. See `defenses.attacks.losses`.

  function softmax(z) {  // by way of its logarithm, every step rounded
    const top = Math.max(...z);
    const total = z.reduce((sum, v) => round(sum + round(Math.exp(round(v - top)))), 0);
    const logs = z.map(v => round(v - top) - round(Math.log(total)));
    return { logs, p: logs.map(Math.exp) };
  }

  // −log softmax(z)_y. Where p_y rounds to 1 and the others to 0, the gradient is 0: exactly.
  function textbook(z, y) {
    const { logs, p } = softmax(z);
    return [-logs[y], p.map((v, j) => v - (j === y))];
  }

  // log Σ_{j≠y} exp z_j − z_y: the same order, the same direction, nothing that could round to 0.
  function exact(z, y) {
    const top = Math.max(...z.filter((_, j) => j !== y));
    const e = z.map((v, j) => j === y ? 0 : Math.exp(v - top)), total = e.reduce((a, v) => a + v);
    return [top + Math.log(total) - z[y], e.map((v, j) => j === y ? -1 : v / total)];
  }

  const losses = { textbook, exact };

  // Networks, from what `book.zoo` has written.

  function numbers({ type, shape, data }) {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)).buffer;
    if (type === "int8") return Float32Array.from(new Int8Array(bytes));
    return type === "float16" ? Float32Array.from(new Uint16Array(bytes), half)
      : new Float32Array(bytes);
  }

  function half(bits) {
    const exponent = bits >> 10 & 31, fraction = (bits & 1023) / 1024;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction;
    return bits >> 15 ? -size : size;
  }

  function network(layers) {
    let size = 28;
    return layers.map(({ kind, weight, bias, stride, padding, delta, ...more }) => {
      if (!weight) return { kind };
      const [outputs, channels, k = 1] = weight.shape, dense = weight.shape.length === 2;
      const before = dense ? 1 : size, W = numbers(weight), b = numbers(bias), at = [];
      const scale = more["weight scale"] ? numbers(more["weight scale"]) : null;
      if (scale) W.forEach((v, i) => { W[i] = v * scale[Math.floor(i / (W.length / outputs))]; });
      size = Math.floor((before + 2 * padding - k) / stride) + 1;
      for (let top = 0; top < size; top++) for (let left = 0; left < size; left++) {
        for (let c = 0; c < channels; c++) for (let i = 0; i < k; i++) for (let j = 0; j < k; j++) {
          const h = top * stride - padding + i, w = left * stride - padding + j;
          const inside = h >= 0 && w >= 0 && h < before && w < before;
          at.push(inside ? (c * before + h) * before + w : -1);
        }
      }
      const alpha = more.alpha ? numbers(more.alpha)[0] : 0;
      const geometry = { outputs, patches: size * size, at: Int32Array.from(at) };
      return { kind, W, b, alpha, delta, ...geometry };
    });
  }

  function forward(layers, x, loud) {
    const back = [];
    for (const layer of layers) {
      const [y, through] = kinds[layer.kind](layer, x);
      x = y;
      back.unshift(through);
    }
    return [loud ? x.map(v => 100 * v) : x, g => {
      if (loud) g = g.map(v => 100 * v);
      return back.reduce((g, through) => through(g), g);
    }];
  }

  function gradient(layers, x, y, { loss, loud }) {
    const [logits, back] = forward(layers, x, loud);
    const [value, g] = losses[loss](logits, y);
    return { logits, value, gradient: back(g) };
  }

  // x ← clip(x + step · sign ∇) inside the box of half width ε: FGSM is one step of ε, PGD begins
  // at random and keeps the image of the highest loss. sign(0) = 0, as everywhere.
  function attack(layers, image, y, { attack, loss, loud, eps, steps }) {
    const one = attack === "FGSM", step = one ? eps : 2.5 * eps / steps, draw = random(1);
    const clip = (v, i) => Math.min(Math.max(v, image[i] - eps, 0), image[i] + eps, 1);
    let x = one ? image : image.map((v, i) => clip(v + eps * (2 * draw() - 1), i));
    let highest = -Infinity, best = x;
    const path = [];
    for (let t = 0; t <= (one ? 1 : steps); t++) {
      const { logits, value, gradient: g } = gradient(layers, x, y, { loss, loud });
      path.push({ value, answer: answer(logits), moved: g.reduce((n, v) => n + (v !== 0), 0) });
      if (one || value > highest) [highest, best] = [value, x];
      x = x.map((v, i) => clip(v + step * Math.sign(g[i]), i));
    }
    return { image: best, path, ...look(layers, best, loud) };
  }

  const answer = z => z.indexOf(Math.max(...z));

  function random(seed) {  // mulberry32
    return () => {
      seed = seed + 0x6D2B79F5 | 0;
      let t = Math.imul(seed ^ seed >>> 15, seed | 1);
      t ^= t + Math.imul(t ^ t >>> 7, t | 61);
      return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
    };
  }

  function look(layers, image, loud) {
    const [logits] = forward(layers, image, loud);
    return { p: softmax(logits).p, answer: answer(logits) };
  }

  return { network, gradient, attack, look };
}
