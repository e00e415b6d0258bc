"use strict";
// What the pages do beyond the theme; without a script everything is there, and folds open by hand.

// Where there is little room an equation begins at the left, and only its number is kept free.
if (window.MathJax && innerWidth < 720) {
  MathJax.chtml = { displayAlign: "left", displayIndent: "0" };
}

addEventListener("DOMContentLoaded", () => {
  // A link into a fold opens it.
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let place = target; place; place = place.parentElement) {
      if (place.tagName === "DETAILS") place.open = true;
      if (place.matches(".toggle-hidden")) place.querySelector(".toggle-button").click();
    }
    target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  addEventListener("load", reveal);

  // On paper nothing is folded.
  const closed = () => document.querySelectorAll("article details:not([open])");
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...closed()];
    for (const fold of opened) fold.open = true;
  });
  addEventListener("afterprint", () => {
    for (const fold of opened) fold.open = false;
  });

  // Excerpts of the search are prose: no code, and nothing that code has printed.
  if (typeof Search !== "undefined") {
    const text = Search.htmlToText;
    Search.htmlToText = (html, anchor) => {
      const page = new DOMParser().parseFromString(html, "text/html");
      const code = ".cell_input, .output.stream, details.hide > summary, .math, .tag_setup, pre";
      for (const element of page.querySelectorAll(code)) element.remove();
      return text(page.documentElement.outerHTML, anchor);
    };
  }

  // Pictures of which one is seen: a slider or a switch chooses.
  for (const figure of document.querySelectorAll("figure.frames")) {
    const frames = [...figure.querySelectorAll("img")], names = frames.map(f => f.dataset.frame);
    const show = k => frames.forEach((frame, i) => { frame.hidden = i !== k; });
    const control = document.createElement("div"), { of, kind } = figure.dataset;
    const start = frames.findIndex(frame => !frame.hidden);
    control.className = "frames-control";
    if (kind === "switch") {
      control.setAttribute("role", "radiogroup");
      control.setAttribute("aria-label", of);
      const group = `frames-${Math.random()}`;
      names.forEach((name, k) => {
        const label = document.createElement("label"), button = document.createElement("input");
        Object.assign(button, { type: "radio", name: group, checked: k === start });
        button.addEventListener("change", () => show(k));
        label.append(button, ` ${name}`);
        control.append(label);
      });
    } else {
      const label = document.createElement("label"), slider = document.createElement("input");
      const said = document.createElement("output");
      const tell = k => {
        said.textContent = names[k];
        slider.setAttribute("aria-valuetext", `${of} = ${names[k]}`);
      };
      Object.assign(slider, { type: "range", min: 0, max: names.length - 1, value: start });
      slider.addEventListener("input", () => { show(+slider.value); tell(+slider.value); });
      tell(start);
      label.append(`${of} `, slider, said);
      control.append(label);
    }
    frames[0].before(control);
  }
});
