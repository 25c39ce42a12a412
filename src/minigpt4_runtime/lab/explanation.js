// Draws the heat of words on pictures, and maps of attention. Its numbers are in the page.
"use strict";

(() => {
  const { words, bands, heat, looks, heads, map, columns, rows } = read("numbers");
  const texts = read("texts");
  // Cividis (Nuñez et al., 2018): it grows lighter evenly, and looks alike to colour-blind people.
  const STOPS = [
    [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
    [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
  ];
  const CELL = 14; // In CSS pixels, of the maps.
  const $ = (id) => document.getElementById(id);
  let chosen = 0;

  function read(id) {
    return JSON.parse(document.getElementById(id).textContent);
  }

  // --- numbers and colours -----------------------------------------------------------------------

  // {shape, most, levels} → shares, row by row.
  function sharesOf({ most, levels }) {
    return Float64Array.from(atob(levels), (level) => (level.charCodeAt(0) / 255) * most);
  }

  function percent(share) {
    if (share > 0 && share < 0.00005) return "<\u00a00.01\u00a0%";
    return `${(100 * share).toFixed(share < 0.01 ? 2 : 1)}\u00a0%`;
  }

  function colour(share, most) {
    const at = Math.min(1, most ? share / most : 0) * (STOPS.length - 1);
    const low = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[low].map((from, i) => from + (at - low) * (STOPS[low + 1][i] - from));
  }

  function paint(canvas, shares, [height, width], most, alpha = 1) {
    [canvas.width, canvas.height] = [width, height];
    const pixels = new ImageData(width, height);
    shares.forEach((share, i) => pixels.data.set([...colour(share, most), 255 * alpha], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // --- heat on pictures --------------------------------------------------------------------------

  const band = () => Number($("band").value);
  const mostOf = (word) => Math.max(...heat[word][band()].map(({ most }) => most));
  const scaleOf = (word) =>
    $("common").checked ? Math.max(...words.map((_, each) => mostOf(each))) : mostOf(word);

  function heatOn(stack, word, picture) {
    let canvas = stack.querySelector("canvas");
    if (!canvas) stack.append((canvas = document.createElement("canvas")));
    const grid = heat[word][band()][picture];
    paint(canvas, sharesOf(grid), grid.shape, scaleOf(word), $("strength").value / 100);
    return grid;
  }

  function choose(word) {
    chosen = word;
    [...$("words").children].forEach((button, i) => {
      button.setAttribute("aria-pressed", i === word);
      button.tabIndex = i === word ? 0 : -1;
    });
    describe(texts[word]);
    draw();
  }

  function draw() {
    stacks.forEach((stack, picture) => heatOn(stack, chosen, picture));
    $("most").textContent = percent(scaleOf(chosen));
    $("cell").textContent = "";
    stacks.forEach((stack) => stack.querySelector(".cell")?.remove());
  }

  function drawAll() {
    draw();
    [...$("all").children].forEach((figure, word) =>
      figure.querySelectorAll(".stack").forEach((stack, picture) => heatOn(stack, word, picture)),
    );
  }

  function describe({ text, probability, on_pictures, since, places, pieces }) {
    const facts = element("dl", { className: "facts" });
    const most = $("pictures") ? [["On the picture", on_pictures], ["Most at", places]] : [];
    for (const [name, value] of [["Word", text], ["Probability", probability], ...most, ["Since layer", since]]) {
      facts.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    }
    const likely = element("table", { className: "likely" });
    for (const piece of pieces) {
      for (const [other, share] of [[piece.text, piece.probability], ...piece.others]) {
        const bar = element("span", { className: "bar" });
        bar.style.width = `${Math.max(0.1, 8 * (parseFloat(share) / 100 || 0))}rem`;
        const row = likely.insertRow();
        row.insertCell().append(other === piece.text ? element("strong", { textContent: other }) : other);
        row.insertCell().append(share);
        row.insertCell().append(bar);
      }
    }
    $("details").replaceChildren(facts, likely);
  }

  // --- places of a picture, by pointer and by keys -----------------------------------------------

  function show(stack, picture, [row, column]) {
    const { shape: [height, width], ...grid } = heat[chosen][band()][picture];
    [row, column] = [clamp(row, height), clamp(column, width)];
    const share = sharesOf(grid)[row * width + column];
    let cell = stack.querySelector(".cell");
    if (!cell) stack.append((cell = element("div", { className: "cell" })));
    Object.assign(cell.style, {
      left: `${(100 * column) / width}%`, top: `${(100 * row) / height}%`,
      width: `${100 / width}%`, height: `${100 / height}%`,
    });
    stack.dataset.at = `${row} ${column}`;
    const name = stack.dataset.name ? `${stack.dataset.name}, ` : "";
    $("cell").textContent = `${name}row ${row + 1}, column ${column + 1}: ${percent(share)}`;
  }

  const clamp = (at, count) => Math.min(count - 1, Math.max(0, at));
  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function watch(stack, picture) {
    stack.tabIndex = 0;
    stack.setAttribute("role", "application");
    stack.setAttribute("aria-label", `${stack.dataset.name ?? "picture"}: shares by place, with the arrow keys`);
    stack.addEventListener("pointermove", (event) => {
      const area = stack.getBoundingClientRect();
      const [height, width] = heat[chosen][band()][picture].shape;
      show(stack, picture, [
        Math.floor(((event.clientY - area.top) / area.height) * height),
        Math.floor(((event.clientX - area.left) / area.width) * width),
      ]);
    });
    stack.addEventListener("keydown", (event) => {
      const move = MOVES[event.key];
      if (!move) return;
      const [row, column] = (stack.dataset.at ?? "0 0").split(" ").map(Number);
      show(stack, picture, [row + move[0], column + move[1]]);
      event.preventDefault();
    });
  }

  // --- maps --------------------------------------------------------------------------------------

  // Cells with names of rows and columns. What is pointed at, or reached by keys, is read out.
  function drawMap(place, grid, names, say, most = grid.most) {
    const [height, width] = grid.shape;
    const shares = sharesOf(grid);
    const canvas = document.createElement("canvas");
    paint(canvas, shares, grid.shape, most);
    const longest = (texts) => Math.min(16, Math.max(...texts.map((text) => text.length)));
    const [left, top] = [7 * longest(names.rows) + 10, names.turned ? 7 * longest(names.columns) + 10 : 18];
    const svg = vector("svg", { width: left + width * CELL + 8, height: top + height * CELL + 8, tabindex: 0, role: "img" });
    svg.setAttribute("viewBox", `0 0 ${left + width * CELL + 8} ${top + height * CELL + 8}`);
    svg.setAttribute("aria-label", place.parentElement.querySelector("h2").textContent + ": arrow keys read out cells");
    svg.append(vector("image", {
      x: left, y: top, width: width * CELL, height: height * CELL, preserveAspectRatio: "none", href: canvas.toDataURL(),
    }));
    const cut = (text) => (text.length > 16 ? text.slice(0, 15) + "…" : text);
    names.rows.forEach((text, row) =>
      svg.append(label(cut(text), { x: left - 5, y: top + row * CELL + 11, "text-anchor": "end" })),
    );
    names.columns.forEach((text, column) => {
      const [x, y] = [left + column * CELL + (names.turned ? 11 : CELL / 2), top - 5];
      const how = names.turned ? { transform: `rotate(-90 ${x} ${y})` } : { "text-anchor": "middle" };
      svg.append(label(cut(text), { x, y, ...how }));
    });
    const frame = vector("rect", { width: CELL, height: CELL, visibility: "hidden" });
    svg.append(frame);
    const readout = element("p", { className: "readout soft" });
    let at = [0, 0];
    function point(row, column) {
      at = [clamp(row, height), clamp(column, width)];
      set(frame, { x: left + at[1] * CELL, y: top + at[0] * CELL, visibility: "visible" });
      readout.textContent = say(...at, percent(shares[at[0] * width + at[1]]));
    }
    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const [x, y] = [event.clientX - area.left - left, event.clientY - area.top - top];
      if (x >= 0 && y >= 0) point(Math.floor(y / CELL), Math.floor(x / CELL));
    });
    svg.addEventListener("keydown", (event) => {
      const move = MOVES[event.key];
      if (!move) return;
      point(at[0] + move[0], at[1] + move[1]);
      frame.scrollIntoView?.({ block: "nearest", inline: "nearest" });
      event.preventDefault();
    });
    readout.setAttribute("aria-live", "polite");
    const scale = element("p", { className: "scale" });
    scale.style.maxWidth = "26rem";
    scale.append(
      element("span", { textContent: percent(0) }), element("i", {}), element("span", { textContent: percent(most) }),
    );
    const drawn = element("div", { className: "drawn" });
    drawn.append(svg);
    place.append(drawn, scale, readout);
  }

  function drawMaps() {
    const numbers = (count) => Array.from({ length: count }, (_, i) => String(i));
    const [numLayers, numHeads] = heads.shape;
    if ($("heads-map")) {
      drawMap($("heads-map"), heads,
        { rows: numbers(numLayers).map((n) => `layer ${n}`), columns: numbers(numHeads) },
        (layer, head, share) => `layer ${layer}, head ${head}: ${share} on the picture`);
      drawMap($("layers-map"), looks, { rows: words, columns: numbers(numLayers) },
        (word, layer, share) => `“${words[word]}”, layer ${layer}: ${share} on the picture`);
    }
    // The first token would leave no colours for the others.
    const others = sharesOf(map).filter((_, i) => i % map.shape[1]);
    drawMap($("tokens-map"), map, { rows, columns, turned: true },
      (row, column, share) => `“${rows[row]}” read “${columns[column]}”: ${share}`,
      others.reduce((most, share) => Math.max(most, share), 0) || map.most);
  }

  // --- elements ----------------------------------------------------------------------------------

  function element(name, properties) {
    return Object.assign(document.createElement(name), properties);
  }

  function vector(name, attributes) {
    return set(document.createElementNS("http://www.w3.org/2000/svg", name), attributes);
  }

  function label(text, attributes) {
    const node = vector("text", attributes);
    node.textContent = text;
    return node;
  }

  function set(node, attributes) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  // --- the page ----------------------------------------------------------------------------------

  const stacks = [...document.querySelectorAll("#pictures .stack")];

  function layOutWords() {
    bands.forEach((name, i) => $("band").append(new Option(name, i)));
    words.forEach((text, i) => {
      const button = element("button", { type: "button", textContent: text, onclick: () => choose(i) });
      $("words").append(button, " ");
      const figure = element("figure", {});
      stacks.forEach((stack) => {
        const small = element("div", { className: "stack" });
        small.append(element("img", { src: stack.querySelector("img").src, alt: "" }));
        figure.append(small);
      });
      const caption = element("figcaption", {});
      caption.append(element("strong", { textContent: text }), ` ${texts[i].on_pictures}`);
      figure.append(caption);
      $("all").append(figure);
    });
    $("words").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      choose((chosen + step + words.length) % words.length);
      $("words").children[chosen].focus();
      event.preventDefault();
    });
    stacks.forEach(watch);
    $("band").addEventListener("change", drawAll);
    $("common").addEventListener("change", drawAll);
    $("strength").addEventListener("input", drawAll);
  }

  document.querySelectorAll("[data-drawn]").forEach((part) => part.removeAttribute("hidden"));
  drawMaps();
  if (stacks.length) {
    layOutWords();
    choose(0);
    drawAll();
  }
})();
