"use strict";
// The page "Attack it yourself": a form, a worker that computes (layers.js), and what it found.
(() => {
  const cell = document.querySelector(".cell.tag_still");  // what stands there without JavaScript
  const MEANING = {
    none: "none (no defense)", "one random step": "one random step (trained on its images)",
    PGD: "PGD (trained on its images)",
  };
  // What the sections below "What to try" set up, in their order, and what then becomes of it.
  const EXPERIMENTS = [
    [{ network: "none", digit: 3, attack: "FGSM", loss: "exact", eps: 0.2, steps: 40 }, "falls"],
    [{ network: "compact, soft labels", digit: 7, attack: "PGD", loss: "exact", eps: 0.3,
      steps: 40 }, "falls"],
    [{ network: "none", digit: 3, attack: "FGSM", loss: "textbook", eps: 0.3, steps: 40,
      loud: true }, "holds"],
    [{ network: "prototypes", digit: 3, attack: "FGSM", loss: "textbook", eps: 0.3, steps: 40 },
      "holds"],
    [{ network: "PGD", digit: 3, attack: "PGD", loss: "exact", eps: 0.3, steps: 100 }, "holds"],
  ];

  const percent = p => p === 1 ? "exactly 1" : p === 0 ? "exactly 0" : `${(100 * p).toFixed(1)}%`;
  const options = pairs => pairs.map(([v, text]) => `<option value="${v}">${text}</option>`).join("");
  const digits = [...Array(10).keys()];
  const networks = Object.entries(ZOO.networks).map(([name]) => [name, MEANING[name] || name]);

  const lab = document.createElement("form");
  lab.className = "lab";
  lab.id = "laboratory";
  lab.setAttribute("aria-label", "Attack it yourself");
  lab.innerHTML = `
    <p class="lab-task" hidden></p>
    <fieldset class="lab-digits"><legend>The digit</legend>
      ${digits.map(d => `<label><input type="radio" name="digit" value="${d}"><canvas width="28"
        height="28" aria-hidden="true"></canvas><span>${d}</span></label>`).join("")}
      <label><input type="radio" name="digit" value="draw"><span>draw one</span></label>
    </fieldset>
    <div class="lab-draw" hidden>
      <canvas width="28" height="28" tabindex="0" role="application" aria-label="Paper. Draw with
        a finger or the mouse; or move the pen with the arrow keys, and put it down or lift it with
        the space bar."></canvas>
      <div><p>Draw with a finger or the mouse. With the keyboard: arrow keys move the pen, the space
        bar puts it down and lifts it. <span role="status"></span></p>
        <label>It is meant to be a <select name="label">${options(digits.map(d => [d, d]))}</select>
        </label> <button type="button" name="clear">Clear</button></div>
    </div>
    <div class="lab-settings">
      <label>Network <select name="network">${options(networks)}</select></label>
      <p class="lab-known"></p>
      <label>Attack <select name="attack">${options([["FGSM", "FGSM: one step"],
        ["PGD", "PGD: many steps, from a random start"]])}</select></label>
      <label>Loss <select name="loss">${options([["exact", "exact"],
        ["textbook", "textbook cross-entropy"]])}</select></label>
      <label>Size ε <span><input type="range" name="eps" min="0" max="0.5" step="0.01" value="0.2">
        <output></output></span></label>
      <label>Steps <span><input type="range" name="steps" min="1" max="100" value="40">
        <output></output></span></label>
      <label class="lab-loud"><input type="checkbox" name="loud"> Make it loud: logits × 100</label>
    </div>
    <fieldset class="lab-guess"><legend>Your guess, and the attack</legend>
      <button type="submit" name="guess" value="holds"></button>
      <button type="submit" name="guess" value="falls">It will say something else</button>
    </fieldset>
    <p class="lab-answer" role="status" aria-live="polite"></p>
    <div class="lab-pictures">${["Before", "The change", "After"].map(title => `
      <figure><canvas width="28" height="28" role="img"></canvas><figcaption>${title}</figcaption>
      </figure>`).join("")}</div>
    <div class="lab-numbers">
      <table><caption>Probabilities</caption>
        <thead><tr><th scope="col">digit</th><th scope="col">before</th><th scope="col">after</th>
        </tr></thead>
        <tbody>${digits.map(d => `<tr><th scope="row">${d}</th><td></td><td></td></tr>`).join("")}
        </tbody></table>
      <figure class="lab-path"><svg viewBox="0 0 300 170" role="img" aria-label=""></svg>
        <figcaption></figcaption></figure>
    </div>`;
  cell.after(lab);
  cell.hidden = true;

  const $ = selector => lab.querySelector(selector), field = lab.elements;
  const images = ZOO.images.map(({ pixels }) =>
    Float32Array.from(atob(pixels), c => c.charCodeAt(0) / 255));
  const score = { right: 0, all: 0 };

  // What is asked for

  function state() {
    const drawn = field.digit.value === "draw", name = field.network.value;
    const at = ZOO.images.findIndex(({ label }) => String(label) === field.digit.value);
    return {
      name, drawn, image: drawn ? centered(paper) : images[at],
      y: Number(drawn ? field.label.value : field.digit.value),
      settings: {
        attack: field.attack.value, loss: field.loss.value, loud: field.loud.checked,
        eps: Number(field.eps.value), steps: Number(field.steps.value),
      },
    };
  }

  function set(settings) {
    for (const [name, value] of Object.entries({ loud: false, ...settings })) {
      if (name === "loud") field.loud.checked = value;
      else field[name].value = value;
    }
    changed();
  }

  // The worker: whoever asks again before it has answered gets the last answer only.

  const work = `"use strict"; ${laboratory}
    const { network, look, attack } = laboratory(), ready = {};
    onmessage = ({ data: { id, name, layers, task, image, y, settings } }) => {
      ready[name] = ready[name] || network(layers);
      const before = look(ready[name], image, settings.loud);
      postMessage({ id, before, after: task === "look" ? null
        : attack(ready[name], image, y, settings) });
    };`;
  const worker = new Worker(URL.createObjectURL(new Blob([work], { type: "text/javascript" })));
  let last = 0, then = null;
  const sent = new Set();

  function ask(task, asked, answered) {
    const { name, image, y, settings } = asked;
    const layers = sent.has(name) ? null : ZOO.networks[name].layers;
    sent.add(name);
    [last, then] = [last + 1, answered];
    lab.setAttribute("aria-busy", "true");
    worker.postMessage({ id: last, name, layers, task, image, y, settings });
  }

  worker.onmessage = ({ data }) => {
    if (data.id !== last) return;
    lab.removeAttribute("aria-busy");
    then(data);
  };
  worker.onerror = ({ message }) => say(`The page cannot compute here: ${message}`);

  // What is shown

  const say = text => { $(".lab-answer").textContent = text; };

  function paint(canvas, image, label, shade = v => v) {
    const context = canvas.getContext("2d"), picture = context.createImageData(28, 28);
    image.forEach((v, i) => {
      const gray = Math.round(255 * shade(v));
      picture.data.set([gray, gray, gray, 255], 4 * i);
    });
    context.putImageData(picture, 0, 0);
    if (label) canvas.setAttribute("aria-label", label);
  }

  function bars(column, p) {
    lab.querySelectorAll("tbody tr").forEach((row, d) => {
      const place = row.children[column];
      place.textContent = p ? percent(p[d]) : "";
      place.style.setProperty("--share", p ? `${100 * p[d]}%` : "0%");
    });
  }

  function curve(path, y, { loss }) {
    const svg = $("svg"), values = path.map(({ value }) => value);
    const [low, high] = [Math.min(...values), Math.max(...values)], span = high - low || 1;
    const x = t => 44 + 246 * t / (path.length - 1), h = v => 145 - 130 * (v - low) / span;
    const first = path.findIndex(({ answer }) => answer !== y), short = v => v.toPrecision(3);
    svg.innerHTML = `<path class="axis" d="M44 10V150H294"/>
      <text x="40" y="${h(low) + 4}" text-anchor="end">${short(low)}</text>
      ${high > low ? `<text x="40" y="${h(high) + 4}" text-anchor="end">${short(high)}</text>` : ""}
      <text x="44" y="166">0</text><text x="294" y="166" text-anchor="end">${path.length - 1}
      step${path.length > 2 ? "s" : ""}</text>
      <path class="line" d="M${values.map((v, t) => `${x(t)} ${h(v)}`).join("L")}"/>
      ${first < 0 ? "" : `<circle cx="${x(first)}" cy="${h(values[first])}" r="5"/>`}`;
    const where = first < 0 ? "The answer never changed." : first === 0
      ? "The answer was wrong at the start." : `The circle: the answer changed at step ${first}.`;
    svg.setAttribute("aria-label", `The ${loss} loss at each step, from ${short(values[0])} to ` +
      `${short(values.at(-1))}. ${where}`);
    $(".lab-path figcaption").textContent = `The ${loss} loss along the way. ${where}`;
  }

  function changed() {
    const asked = state(), { eps, steps, attack } = asked.settings, form = field;
    $(".lab-draw").hidden = !asked.drawn;
    form.steps.disabled = attack === "FGSM";
    form.eps.nextElementSibling.textContent = eps.toFixed(2);
    form.steps.nextElementSibling.textContent = attack === "FGSM" ? "1" : steps;
    $("[value=holds]").textContent = `It will still say ${asked.y}`;
    const known = ZOO.networks[asked.name].accuracies, at = c => c in known
      ? `${known[c].toFixed(1)}%` : "not measured";
    $(".lab-known").textContent = `Stored for this recipe and seed: ${at("clean")} clean; under all attacks ` +
      `${at("worst 0.1")} at ε = 0.1, ${at("worst 0.3")} at ε = 0.3.`;
    const [image, change, attacked] = lab.querySelectorAll(".lab-pictures canvas");
    paint(image, asked.image, `The image: a ${asked.y}.`);
    for (const canvas of [change, attacked]) {
      canvas.getContext("2d").clearRect(0, 0, 28, 28);
      canvas.setAttribute("aria-label", "Nothing yet: guess first.");
    }
    bars(2, null);
    $("svg").innerHTML = $(".lab-path figcaption").textContent = "";
    $("svg").setAttribute("aria-label", "No loss yet: guess first.");
    const empty = asked.drawn && !paper.some(v => v > 0);
    $(".lab-guess").disabled = empty;
    if (empty) {
      bars(1, null);
      last += 1;  // nobody waits for an answer
      lab.removeAttribute("aria-busy");
      say("The paper is empty: draw a digit.");
      return;
    }
    ask("look", asked, ({ before: { p, answer } }) => {
      bars(1, p);
      say(`The network says ${answer} (${percent(p[answer])}). ` + (answer === asked.y
        ? "What will it say after the attack?" : `That is wrong already: it is a ${asked.y}.`));
    });
  }

  function attacked(event) {
    event.preventDefault();
    const asked = state(), { attack, eps, steps } = asked.settings;
    const guess = event.submitter ? event.submitter.value : "falls";
    say("Computing …");
    ask("attack", asked, ({ before, after: { image, path, p, answer } }) => {
      const fate = answer === asked.y ? "holds" : "falls", moved = path[0].moved;
      score.all += 1;
      score.right += guess === fate;
      const [, change, picture] = lab.querySelectorAll(".lab-pictures canvas");
      paint(change, image.map((v, i) => v - asked.image[i]), "The change, gray where there is none;" +
        ` at most ${eps.toFixed(2)} at a pixel.`, v => 0.5 + v);
      paint(picture, image, `The attacked image, which the network reads as ${answer}.`);
      bars(1, before.p);
      bars(2, p);
      curve(path, asked.y, asked.settings);
      const how = attack === "FGSM" ? "one step" : `${steps} steps`;
      say(`After ${how} of ε = ${eps.toFixed(2)} it says ${answer} (${percent(p[answer])}): ` +
        `it ${fate}. ${guess === fate ? "You guessed right" : "You guessed otherwise"}, ` +
        `${score.right} of ${score.all} so far. ` + (moved
        ? `The first gradient moves ${moved} of 784 pixels.`
        : "The gradient is exactly 0 at all 784 pixels: the attack has nothing to follow."));
    });
  }

  // The paper to draw on

  const paper = new Float32Array(784), sheet = $(".lab-draw canvas");
  const pen = { x: 14, y: 14, down: false };

  function ink(x, y) {
    paper.forEach((v, i) => {
      const d = Math.hypot(i % 28 + 0.5 - x, Math.floor(i / 28) + 0.5 - y);
      paper[i] = Math.max(v, Math.min(1, Math.max(0, 1.9 - d)));
    });
  }

  function stroke(x, y) {  // from where the pen was, without gaps
    const n = Math.ceil(2 * Math.hypot(x - pen.x, y - pen.y)) || 1;
    for (let i = 1; i <= n; i++) ink(pen.x + (x - pen.x) * i / n, pen.y + (y - pen.y) * i / n);
  }

  function show_paper() {
    paint(sheet, paper);
    if (document.activeElement === sheet) {
      const context = sheet.getContext("2d");
      context.fillStyle = pen.down ? "#ffb000" : "#56b4e9";
      context.fillRect(Math.floor(pen.x), Math.floor(pen.y), 1, 1);
    }
  }

  function centered(image) {  // the middle of its mass in the middle, as MNIST's digits are
    let mass = 0, right = 0, down = 0;
    image.forEach((v, i) => { mass += v; right += v * (i % 28); down += v * Math.floor(i / 28); });
    const dx = Math.round(right / mass - 13.5) || 0, dy = Math.round(down / mass - 13.5) || 0;
    return image.map((_, i) => {
      const x = i % 28 + dx, y = Math.floor(i / 28) + dy;
      return x >= 0 && x < 28 && y >= 0 && y < 28 ? image[y * 28 + x] : 0;
    });
  }

  const place = event => {
    const box = sheet.getBoundingClientRect();
    return [28 * (event.clientX - box.left) / box.width, 28 * (event.clientY - box.top) / box.height];
  };

  sheet.addEventListener("pointerdown", event => {
    sheet.setPointerCapture(event.pointerId);
    [pen.x, pen.y] = place(event);
    ink(pen.x, pen.y);
    show_paper();
  });
  sheet.addEventListener("pointermove", event => {
    if (!sheet.hasPointerCapture(event.pointerId)) return;
    const [x, y] = place(event);
    stroke(x, y);
    [pen.x, pen.y] = [x, y];
    show_paper();
  });
  sheet.addEventListener("pointerup", changed);
  sheet.addEventListener("keydown", event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === " ") {
      pen.down = !pen.down;
      $(".lab-draw [role=status]").textContent = pen.down ? "The pen is down." : "The pen is up.";
    } else if (!step[event.key]) {
      return;
    }
    event.preventDefault();
    const [x, y] = [0, 1].map(i => Math.min(26, Math.max(2, [pen.x, pen.y][i] +
      (step[event.key] || [0, 0])[i])));
    if (pen.down) stroke(x, y);
    [pen.x, pen.y] = [x, y];
    show_paper();
    if (pen.down) changed();
  });
  for (const event of ["focus", "blur"]) sheet.addEventListener(event, show_paper);
  field.clear.addEventListener("click", () => {
    paper.fill(0);
    show_paper();
    changed();
  });

  // The experiments below

  document.querySelectorAll("#what-to-try > section").forEach((section, i) => {
    const button = document.createElement("button"), fold = section.querySelector(".admonition");
    button.type = "button";
    button.className = "lab-set-up";
    button.textContent = "Set it up";
    section.insertBefore(button, fold);
    button.addEventListener("click", () => {
      set(EXPERIMENTS[i][0]);
      $(".lab-task").textContent = section.querySelector("p").textContent;
      $(".lab-task").hidden = false;
      lab.scrollIntoView();
      $(".lab-guess button").focus({ preventScroll: true });
    });
  });

  lab.querySelectorAll(".lab-digits canvas").forEach((canvas, d) =>
    paint(canvas, images[ZOO.images.findIndex(({ label }) => label === d)]));
  lab.addEventListener("input", changed);
  lab.addEventListener("submit", attacked);
  globalThis.EXPERIMENTS = EXPERIMENTS;  // the tests perform them
  show_paper();
  set(EXPERIMENTS[0][0]);
})();
