// The boxes of answers on their picture, and a box that a person drags there, as a question.
// A box is written in the text as `<p>a red ball</p> {<5><6><50><60>}`, in hundredths.
"use strict";

const chatBoxes = (() => {
  // As text/boxes.py reads them.
  const NUMBER = "<\\s*(\\d{1,3})\\s*>";
  const PIECES = new RegExp(
    "<p>(?<label>(?:(?!</?p>)[^])*)</p>" +
      `|(?<box>\\{\\s*${Array(4).fill(NUMBER).join("\\s*")}\\s*\\})` +
      "|(?<delimiter><delim>)|[^\\s<{]+|\\S",
    "gu",
  );
  // As images/drawing.py paints them: each with the colour in which text can be read on it.
  const COLOURS = [
    ["#0072B2", "white"], ["#E69F00", "black"], ["#009E73", "white"], ["#CC79A7", "black"],
    ["#56B4E9", "black"], ["#D55E00", "white"], ["#F0E442", "black"],
  ];
  const LEAST_DRAG = 5; // In pixels of the screen: less is a click.
  let shown = new Map(); // Number of the picture in the dialogue → its boxes.
  let dragged = null; // {image, from, box}

  function find(text) {
    const boxes = [];
    let label = null;
    for (const piece of text.matchAll(PIECES)) {
      const { label: named, box, delimiter } = piece.groups;
      const numbers = piece.slice(3, 7).map(Number);
      if (named !== undefined) label = named.trim() || null;
      else if (box && Math.max(...numbers) <= 100) boxes.push(makeBox(label, numbers));
      else if (!box && !delimiter) label = null;
    }
    return boxes;
  }

  function makeBox(label, [x1, y1, x2, y2]) {
    const corners = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
    return { label, corners, asked: false };
  }

  // --- showing -----------------------------------------------------------------------------------

  // Only for a model that knows tasks do such texts mean boxes.
  const isKnown = () => document.querySelector("#task") !== null;
  const pictures = () => [...document.querySelectorAll("#dialogue .user-row .image-frame img")];

  // Takes the dialogue as the page keeps it. An answer is about the last picture before it.
  function show(kept) {
    if (kept === null) return; // Gradio's change to nothing, before the dialogue is restored.
    shown = new Map();
    let last = -1;
    for (const { question, answer, pictures } of kept ? JSON.parse(kept).turns : []) {
      last += pictures.length;
      const asked = find(question).map((box) => ({ ...box, asked: true }));
      const boxes = [...asked, ...find(answer)];
      if (boxes.length) shown.set(last, boxes);
    }
    draw();
  }

  function draw() {
    const images = isKnown() ? pictures() : [];
    images.forEach((image, index) => {
      const boxes = [...(shown.get(index) ?? [])];
      if (dragged?.image === image && dragged.box) boxes.push(dragged.box);
      image.parentElement.classList.toggle("takes-boxes", index === images.length - 1);
      drawOn(image, boxes);
    });
  }

  function drawOn(image, boxes) {
    const frame = image.parentElement;
    const place = [image.offsetLeft, image.offsetTop, image.offsetWidth, image.offsetHeight];
    const wanted = JSON.stringify([boxes, place]);
    let layer = frame.querySelector(".boxes");
    // What is as it should be is left alone: each change is seen by the observer, which draws.
    if ((layer?.dataset.drawn ?? JSON.stringify([[], place])) === wanted) return;
    layer?.remove();
    layer = document.createElement("div");
    layer.className = "boxes";
    layer.dataset.drawn = wanted;
    ["left", "top", "width", "height"].forEach((side, at) => (layer.style[side] = `${place[at]}px`));
    const names = [...new Set(boxes.map(({ label }) => label))];
    for (const box of boxes) layer.append(element(box, COLOURS[names.indexOf(box.label) % 7]));
    frame.append(layer);
    sizes.observe(image);
  }

  function element({ label, corners: [left, top, right, bottom], asked }, [colour, ink]) {
    const box = document.createElement("div");
    box.className = asked ? "box asked" : "box";
    Object.assign(box.style, {
      left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`,
    });
    box.style.setProperty("--colour", colour);
    if (label) {
      const name = document.createElement("span");
      name.textContent = label;
      name.style.color = ink;
      // Above its box, where there is room for it; from the right where it would be cut off.
      name.classList.toggle("inside", top < 12);
      name.classList.toggle("from-right", left > 50);
      box.append(name);
    }
    return box;
  }

  const sizes = new ResizeObserver(draw);

  // --- dragging ----------------------------------------------------------------------------------

  function hundredths(image, event) {
    const area = image.getBoundingClientRect();
    const share = (at, from, size) => Math.round(100 * Math.min(1, Math.max(0, (at - from) / size)));
    return [share(event.clientX, area.left, area.width), share(event.clientY, area.top, area.height)];
  }

  addEventListener("pointerdown", (event) => {
    const image = event.target.closest?.(".image-frame.takes-boxes")?.querySelector("img");
    if (!image || event.button !== 0) return;
    dragged = { image, from: [event.clientX, event.clientY], first: hundredths(image, event) };
  });

  addEventListener("pointermove", (event) => {
    if (!dragged || dragged.done) return;
    const [x, y] = dragged.from;
    const isDrag = Math.min(Math.abs(event.clientX - x), Math.abs(event.clientY - y)) >= LEAST_DRAG;
    const corners = [...dragged.first, ...hundredths(dragged.image, event)];
    dragged.box = isDrag ? { ...makeBox(null, corners), asked: true } : null;
    draw();
  });

  addEventListener("pointerup", () => {
    if (!dragged || dragged.done) return;
    if (!dragged.box) return void (dragged = null);
    dragged.done = true; // It stays until it is asked about, or another is dragged.
    const text = document.querySelector("#question textarea");
    const numbers = dragged.box.corners.map((number) => `<${number}>`).join("");
    text.value = `[identify] {${numbers}}`;
    text.dispatchEvent(new Event("input", { bubbles: true }));
    text.focus({ preventScroll: true });
  });

  addEventListener("pointercancel", () => {
    if (dragged && !dragged.done) dragged = null;
    draw();
  });

  // The browser would drag the picture itself.
  addEventListener("dragstart", (event) => {
    if (event.target.closest?.(".image-frame.takes-boxes")) event.preventDefault();
  });

  new MutationObserver(draw).observe(document, { childList: true, subtree: true });

  return { find, show: (kept) => ((dragged = null), show(kept), kept) };
})();
