// Where a word of an answer looked: it is clicked, or chosen with the arrow keys and Enter, the
// server is asked, and its heat is drawn on the pictures before it.
"use strict";

const chatHeat = (() => {
  // Cividis (Nuñez et al., 2018), as on the page of `minigpt4 explain`.
  const STOPS = [
    [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
    [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
  ];
  const OPACITY = 0.65;
  let answers = []; // The raw text of each, as the page keeps it.
  let asked = null; // What the server is asked about, as text; each click is another.
  let numClicks = 0;
  let seen = null; // {word, on_pictures, heat}

  const isOffered = () => document.querySelector("#look") !== null;
  const bubbles = () => [...document.querySelectorAll("#dialogue .bot-row .prose")];
  const pictures = () => [...document.querySelectorAll("#dialogue .user-row .image-frame img")];

  // --- words -------------------------------------------------------------------------------------

  // The words of a bubble, each with its Range: they may reach over several text nodes.
  function wordsOf(bubble) {
    const walker = document.createTreeWalker(bubble, NodeFilter.SHOW_TEXT);
    const nodes = [];
    let text = "";
    while (walker.nextNode()) {
      nodes.push([text.length, walker.currentNode]);
      text += walker.currentNode.data;
    }
    const placed = (at, isEnd) => {
      const [start, node] = nodes.findLast(([start]) => (isEnd ? start < at : start <= at));
      return [node, at - start];
    };
    return [...text.matchAll(/[\p{L}\p{N}'’-]+|[^\s\p{L}\p{N}]/gu)].map((found) => {
      const range = document.createRange();
      range.setStart(...placed(found.index, false));
      range.setEnd(...placed(found.index + found[0].length, true));
      return { word: found[0], before: text.slice(0, found.index), range };
    });
  }

  // The answer is shown as Markdown: the same word is as many of its kind behind in the raw text.
  // The server counts characters, where a string here has two units for an emoji.
  function placeOf({ word, before }, answer) {
    const parts = answer.split(word);
    if (parts.length < 2) return -1;
    const count = Math.min(before.split(word).length, parts.length - 1);
    return [...parts.slice(0, count).join(word)].length;
  }

  function look(bubble, chosen) {
    const turn = bubbles().indexOf(bubble);
    const at = answers[turn] ? placeOf(chosen, answers[turn]) : -1;
    if (at < 0) return;
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(chosen.range);
    asked = JSON.stringify({ turn, at, click: ++numClicks });
    seen = null;
    document.querySelector("#dialogue").classList.add("looks");
    document.querySelector("#look").click();
    draw();
  }

  function wordAt(bubble, x, y) {
    return wordsOf(bubble).find(({ range }) =>
      [...range.getClientRects()].some(
        ({ left, right, top, bottom }) => left <= x && x <= right && top <= y && y <= bottom,
      ),
    );
  }

  addEventListener("click", (event) => {
    const bubble = event.target.closest?.("#dialogue .bot-row .prose");
    if (!isOffered() || event.target.closest?.("a, button")) return;
    // Who selects a text to copy it asks nothing.
    if (!bubble) return event.target.closest?.("#dialogue, #question") ? forget() : undefined;
    if (!getSelection().isCollapsed) return;
    const chosen = wordAt(bubble, event.clientX, event.clientY);
    if (chosen) look(bubble, chosen);
  });

  addEventListener("keydown", (event) => {
    const bubble = document.activeElement?.closest?.("#dialogue .bot-row .prose");
    if (event.key === "Escape") return forget();
    if (!bubble || !isOffered()) return;
    const step = { ArrowRight: 1, ArrowLeft: -1, Enter: 0 }[event.key];
    if (step === undefined) return;
    const words = wordsOf(bubble);
    const selection = getSelection();
    const now = selection.rangeCount ? selection.getRangeAt(0) : null;
    const at = words.findIndex(({ range }) => now && !range.compareBoundaryPoints(Range.START_TO_START, now));
    if (step === 0 && at >= 0) look(bubble, words[at]);
    if (step !== 0) {
      const next = words[Math.min(words.length - 1, Math.max(0, at + step))];
      selection.removeAllRanges();
      if (next) selection.addRange(next.range);
    }
    event.preventDefault();
  });

  // --- heat --------------------------------------------------------------------------------------

  function colour(share, most) {
    const at = (most ? share / most : 0) * (STOPS.length - 1);
    const low = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[low].map((from, i) => from + (at - low) * (STOPS[low + 1][i] - from));
  }

  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

  function draw() {
    const grids = seen?.heat ?? [];
    const most = Math.max(0, ...grids.flat(2));
    pictures().forEach((image, index) => drawOn(image, grids[index], most, index === grids.length - 1));
    // By keys words are reached in the answer itself.
    if (isOffered()) {
      bubbles().forEach((bubble) => {
        if (bubble.tabIndex !== 0) bubble.tabIndex = 0;
      });
    }
  }

  function drawOn(image, grid, most, isLast) {
    const frame = image.parentElement;
    const place = [image.offsetLeft, image.offsetTop, image.offsetWidth, image.offsetHeight];
    const wanted = grid ? JSON.stringify([asked, place, isLast]) : "";
    let layer = frame.querySelector(".heat");
    // What is as it should be is left alone: each change is seen by the observer, which draws.
    if ((layer?.dataset.drawn ?? "") === wanted) return;
    layer?.remove();
    frame.classList.toggle("heated", Boolean(grid));
    if (!grid) return;
    layer = document.createElement("div");
    layer.className = "heat";
    layer.dataset.drawn = wanted;
    ["left", "top", "width", "height"].forEach((side, at) => (layer.style[side] = `${place[at]}px`));
    layer.append(canvasOf(grid, most));
    if (isLast) {
      const note = document.createElement("span");
      note.setAttribute("role", "status");
      note.textContent = `“${seen.word}”: ${percent(seen.on_pictures)}, up to ${percent(most)} a place`;
      layer.append(note);
    }
    frame.append(layer);
    sizes.observe(image);
  }

  function canvasOf(grid, most) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [grid[0].length, grid.length];
    const pixels = new ImageData(canvas.width, canvas.height);
    grid.flat().forEach((share, i) => pixels.data.set([...colour(share, most), 255 * OPACITY], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  const sizes = new ResizeObserver(draw);

  // Takes what the server has answered, with what it was asked; the last click counts.
  function show(text) {
    const heat = text ? JSON.parse(text) : null;
    if (heat?.asked !== asked) return [];
    document.querySelector("#dialogue")?.classList.remove("looks");
    seen = heat;
    draw();
    pictures()[heat.heat.length - 1]?.scrollIntoView({ block: "nearest", behavior: "smooth" });
    return [];
  }

  function forget() {
    asked = seen = null;
    document.querySelector("#dialogue")?.classList.remove("looks");
    draw();
  }

  // Takes the dialogue as the page keeps it.
  function keep(kept) {
    if (kept !== null) answers = kept ? JSON.parse(kept).turns.map(({ answer }) => answer) : [];
    forget();
    return kept;
  }

  new MutationObserver(draw).observe(document, { childList: true, subtree: true });

  return { clicked: () => asked ?? "", keep, show };
})();
