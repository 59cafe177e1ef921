"use strict";
// The page's numbers come from the blocks of data in it; nothing is fetched. Names are only ever set as text.
(async () => {
  const $ = (id) => document.getElementById(id);
  const NEVER = 255, MISSING = -2;
  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array, f4: Float32Array };
  const data = JSON.parse($("data").textContent);
  const count = (value) => value.toLocaleString("en-US");

  function bytesOf(text) {
    const raw = atob(text.trim()), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  async function block(name) {
    const element = $("block-" + name);
    if (!element) return null;
    const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new ARRAYS[element.dataset.kind](await new Response(stream).arrayBuffer());
  }
  function split(bytes) { // names, each followed by a NUL byte -> [start, end] of each
    const ends = [];
    for (let i = bytes.indexOf(0); i >= 0; i = bytes.indexOf(0, i + 1)) ends.push(i);
    return ends;
  }
  if (typeof DecompressionStream === "undefined") {
    $("trouble").textContent = "This browser is too old for the page's data (it lacks DecompressionStream).";
    $("trouble").hidden = false;
    return;
  }

  const [first, label, cluster, score, xy, thumb, names, histogram, megabytes] = await Promise.all(
    ["first", "label", "cluster", "score", "xy", "thumb", "names", "histogram", "bytes"].map(block));
  const nameEnds = split(names), decoder = new TextDecoder();
  const name = (at) => decoder.decode(names.subarray(at ? nameEnds[at - 1] + 1 : 0, nameEnds[at]))
    .replace(/[\u0000-\u001f\u007f]/g, (c) => "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0"));
  const sprites = [...document.querySelectorAll("script.sprite")].map(
    (element) => URL.createObjectURL(new Blob([bytesOf(element.textContent)], { type: "image/webp" })));
  const tables = {};
  for (const group of Object.keys(data.groups)) tables[group] = await block(group + "_table");
  const last = data.stops.length - 1;
  let stop = data.initial;

  // --- pictures ---
  const side = data.side, across = data.across, cell = across * across;
  const kept = (at) => first[at] <= stop && first[at] !== NEVER;
  const shown = new Set(); // tiles on the page, whose state follows the slider
  function tile(at) {
    const item = document.createElement("li"), one = document.createElement("div");
    const place = thumb[at];
    one.className = "tile";
    one.tabIndex = 0;
    one.setAttribute("role", "img");
    if (place >= 0) {
      const inside = place % cell;
      one.style.backgroundImage = `url(${sprites[Math.floor(place / cell)]})`;
      one.style.backgroundPosition = `${-(inside % across) * side}px ${-Math.floor(inside / across) * side}px`;
    } else one.classList.add("blank");
    item.append(one);
    const entry = { at, one };
    shown.add(entry);
    mark(entry);
    return item;
  }
  function about(at) {
    const parts = [name(at)];
    if (data.classes.length && label[at] >= 0) parts.push("class " + data.classes[label[at]]);
    if (cluster && cluster[at] >= 0) parts.push("cluster " + cluster[at]);
    if (!Number.isNaN(score[at])) parts.push("score " + score[at].toPrecision(4));
    parts.push(kept(at) ? "kept" : "left out");
    if (thumb[at] === MISSING) parts.push("the image could not be read any more, or changed since");
    return parts.join(" · ");
  }
  function mark({ at, one }) {
    one.classList.toggle("kept", kept(at));
    one.classList.toggle("removed", !kept(at));
    one.title = about(at);
    one.setAttribute("aria-label", one.title);
  }
  function gallery(element, rows) {
    if (!element) return;
    for (const entry of shown) if (element.contains(entry.one)) shown.delete(entry);
    element.replaceChildren(...rows.map(tile));
    if (!rows.length) {
      const none = document.createElement("li");
      none.className = "small";
      none.textContent = "None.";
      element.append(none);
    }
  }

  // --- what follows the slider ---
  const bars = [];
  const largest = Math.max(1, ...data.bins.all);
  data.bins.all.forEach((whole) => {
    const bar = document.createElement("div"), fill = document.createElement("div");
    bar.style.height = (100 * whole / largest) + "%";
    bar.append(fill);
    $("histogram").append(bar);
    bars.push({ fill, whole });
  });
  $("low").textContent = data.bins.low.toPrecision(3);
  $("high").textContent = data.bins.high.toPrecision(3);

  const pool = []; // random images with pictures, kept and left out
  for (let at = 0; at < first.length; at++) if (thumb[at] >= 0 && first[at] !== NEVER) pool.push(at);
  for (let i = pool.length - 1, state = 12345; i > 0; i--) { // a fixed shuffle
    state = (state * 1103515245 + 12345) % 2147483648;
    const j = state % (i + 1);
    [pool[i], pool[j]] = [pool[j], pool[i]];
  }
  function near(from, to, step, most) {
    const rows = [];
    for (let at = from; at !== to && rows.length < most; at += step) rows.push(...(data.border[at] || []));
    return rows.slice(0, most);
  }
  const percent = (text) => {
    const [whole, fraction = ""] = text.split("."); // exact: no binary fraction is rounded on the way
    if (text.includes("e")) return String(100 * Number(text));
    const digits = (whole + fraction.padEnd(2, "0").slice(0, 2)).replace(/^0+(?=\d)/, "");
    const rest = fraction.slice(2).replace(/0+$/, "");
    return rest ? digits + "." + rest : digits;
  };
  let drawing = 0, onScreen = false;
  function update() {
    const number = data.counts[stop], whole = data.usable, out = whole - number;
    $("percent").textContent = percent(data.stops[stop]) + " %";
    $("counts").textContent = `${count(number)} kept, ${count(out)} left out`;
    $("keep").setAttribute("aria-valuetext", `${percent(data.stops[stop])} per cent, ${count(number)} images kept`);
    $("card-kept").textContent = count(number);
    $("card-removed").textContent = count(out);
    const size = megabytes[stop], all = megabytes[last];
    const unit = (value) => value >= 1e6 ? (value / 1e6).toFixed(2) + " TB" : value >= 1e3 ? (value / 1e3).toFixed(2) + " GB" : value.toFixed(1) + " MB";
    $("card-bytes").textContent = all ? `${unit(size)} of ${unit(all)}` : "not known";
    $("card-saved").textContent = whole ? `${(100 * out / whole).toFixed(1)} % less` : "";
    if (data.command) $("command").textContent = data.command[0] + data.stops[stop] + data.command[1];
    $("save").disabled = !data.saves || !number;
    bars.forEach(({ fill, whole }, bin) => { fill.style.height = whole ? (100 * histogram[stop * bars.length + bin] / whole) + "%" : "0"; });
    for (const entry of shown) mark(entry);
    for (const group of Object.keys(data.groups)) fillTable(group);
    if ($("just-kept")) {
      gallery($("just-kept"), near(stop, -1, -1, 10));
      gallery($("just-removed"), near(stop + 1, last + 1, 1, 10));
      gallery($("some-kept"), take((at) => kept(at)));
      gallery($("some-removed"), take((at) => !kept(at)));
    }
    cancelAnimationFrame(drawing);
    if (onScreen) drawing = requestAnimationFrame(draw);
  }
  function take(wanted) {
    const rows = [];
    for (const at of pool) {
      if (wanted(at)) rows.push(at);
      if (rows.length === 10) break;
    }
    return rows;
  }

  // --- classes and clusters ---
  const ROWS = 50, rowsOf = {}, whole = {}; // a table has 50 rows, which are filled anew; "Show all" adds the others
  function addRows(group, number) {
    const body = $(group + "-table").tBodies[0];
    rowsOf[group] ||= [];
    while (rowsOf[group].length < number) {
      const row = document.createElement("tr"), head = document.createElement("th"), button = document.createElement("button");
      head.scope = "row";
      button.type = "button";
      const entry = { row, button, number: -1, cells: [] };
      button.addEventListener("click", () => detail(group, entry.number));
      head.append(button);
      row.append(head);
      for (let i = 0; i < 4; i++) {
        const cell = document.createElement("td");
        cell.className = "number";
        row.append(cell);
        entry.cells.push(cell);
      }
      rowsOf[group].push(entry);
      body.append(row);
    }
  }
  const chosen = {};
  function fillTable(group) {
    const one = data.groups[group], table = tables[group], wide = one.sizes.length;
    addRows(group, whole[group] ? wide : Math.min(ROWS, wide));
    const share = one.sizes.map((size, number) => table[stop * wide + number] / size);
    const order = share.map((_, number) => number).sort((a, b) => share[a] - share[b] || a - b);
    rowsOf[group].forEach((entry, at) => {
      const number = entry.number = order[at];
      entry.button.textContent = one.names[number];
      entry.row.classList.toggle("chosen", number === chosen[group]);
      [count(one.sizes[number]), count(table[stop * wide + number]), (100 * share[number]).toFixed(1) + " %",
        one.spread[number].toPrecision(3)].forEach((text, i) => { entry.cells[i].textContent = text; });
    });
    const all = data.usable ? data.counts[stop] / data.usable : 0;
    $(group + "-note").textContent = `Least kept first; ${(100 * all).toFixed(1)} % are kept in all.`
      + (one.left_out ? ` The largest ${count(wide)} are known here, ${count(one.left_out)} more are not.` : "");
    $(group + "-all").hidden = whole[group] || wide <= ROWS;
  }
  function detail(group, number) {
    const one = data.groups[group], place = $(group + "-detail");
    for (const entry of shown) if (place.contains(entry.one)) shown.delete(entry);
    chosen[group] = number;
    for (const entry of rowsOf[group]) entry.row.classList.toggle("chosen", entry.number === number);
    const title = document.createElement("h3");
    title.textContent = `${one.names[number]}: ${count(one.sizes[number])} images`;
    place.replaceChildren(title);
    for (const [end, words] of [["easy", "Easiest"], ["hard", "Hardest"]]) {
      const head = document.createElement("p"), list = document.createElement("ul");
      head.className = "small";
      head.textContent = words;
      list.className = "gallery";
      place.append(head, list);
      gallery(list, one.ends[`${number} ${end}`] || []);
    }
    if (one.nearest && one.nearest[number].length) {
      const near = document.createElement("p");
      near.className = "small";
      near.append("Nearest: ");
      one.nearest[number].forEach((other) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = one.names[other];
        button.addEventListener("click", () => detail(group, other));
        near.append(button, " ");
      });
      place.append(near);
    }
  }

  // --- map ---
  const canvas = $("map"), points = xy.length / 2;
  new IntersectionObserver((seen) => { // out of sight it is not drawn
    onScreen = seen.some((one) => one.isIntersecting);
    if (onScreen) draw();
  }, { rootMargin: "200px" }).observe(canvas);
  let zoom = 1, centre = [0.5, 0.5];
  const hue = (number) => `hsl(${(number * 137.508) % 360} 65% 50%)`;
  const scale = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"];
  function colours() {
    const style = getComputedStyle(document.documentElement), by = $("colour").value;
    const on = style.getPropertyValue("--accent"), off = style.getPropertyValue("--bar");
    if (by === "class") return (at) => label[at] >= 0 ? hue(label[at]) : off;
    if (by === "cluster") return (at) => cluster[at] >= 0 ? hue(cluster[at]) : off;
    if (by === "score") {
      const { low, high } = data.bins, wide = Math.max(high - low, 1e-12);
      return (at) => Number.isNaN(score[at]) ? off : scale[Math.max(0, Math.min(5, Math.floor(6 * (score[at] - low) / wide)))];
    }
    return (at) => kept(at) ? on : off;
  }
  const left = new Float32Array(points), top = new Float32Array(points); // on the canvas, in CSS pixels
  let placed = "";
  function place(wide, high) {
    const key = [wide, high, zoom, ...centre].join();
    if (key === placed) return;
    placed = key;
    for (let at = 0; at < points; at++) {
      left[at] = ((xy[2 * at] / 65535 - centre[0]) * zoom + 0.5) * (wide - 20) + 10;
      top[at] = ((centre[1] - xy[2 * at + 1] / 65535) * zoom + 0.5) * (high - 20) + 10;
    }
  }
  function draw() {
    const ratio = Math.min(2, devicePixelRatio || 1), wide = canvas.clientWidth, high = canvas.clientHeight;
    if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(high * ratio)) {
      canvas.width = Math.round(wide * ratio);
      canvas.height = Math.round(high * ratio);
    }
    const pen = canvas.getContext("2d"), colour = colours(), size = points > 5000 ? 2 : 3;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, wide, high);
    place(wide, high);
    const byColour = new Map();
    for (let at = 0; at < points; at++) {
      const one = colour(at);
      if (!byColour.has(one)) byColour.set(one, []);
      byColour.get(one).push(at);
    }
    for (const [one, rows] of byColour) {
      pen.fillStyle = one;
      for (const at of rows) {
        const x = left[at], y = top[at];
        if (x > -size && y > -size && x < wide + size && y < high + size) pen.fillRect(x - size / 2, y - size / 2, size, size);
      }
    }
  }
  function nearest(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = 100;
    place(canvas.clientWidth, canvas.clientHeight);
    for (let at = 0; at < points; at++) {
      const dx = left[at] - x, dy = top[at] - y, far = dx * dx + dy * dy;
      if (far < least) { least = far; best = at; }
    }
    return { best, x, y, box };
  }
  const hover = $("hover");
  function point(event) {
    const { best, x, y, box } = nearest(event);
    hover.hidden = best < 0;
    if (best < 0) return;
    for (const entry of shown) if (hover.contains(entry.one)) shown.delete(entry);
    const list = document.createElement("ul"), text = document.createElement("div");
    list.className = "gallery";
    list.append(tile(best));
    text.textContent = about(best);
    hover.replaceChildren(...(thumb[best] === -1 ? [text] : [list, text]));
    hover.style.left = Math.max(0, Math.min(x + 12, box.width - 250)) + "px";
    hover.style.top = Math.max(0, Math.min(y + 12, box.height - 150)) + "px";
  }
  function move(factor, dx = 0, dy = 0) {
    zoom = Math.max(1, Math.min(200, zoom * factor));
    centre = centre.map((value, axis) => Math.max(0, Math.min(1, value + [dx, dy][axis] / zoom)));
    if (zoom === 1) centre = [0.5, 0.5];
    draw();
  }
  let held = null;
  canvas.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; });
  addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!held) return point(event);
    move(1, (held[0] - event.clientX) / canvas.clientWidth, (event.clientY - held[1]) / canvas.clientHeight);
    held = [event.clientX, event.clientY];
  });
  canvas.addEventListener("pointerleave", () => { hover.hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls; with Ctrl the map zooms
    event.preventDefault();
    move(event.deltaY < 0 ? 1.25 : 0.8);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [1, -.1, 0], ArrowRight: [1, .1, 0], ArrowUp: [1, 0, .1], ArrowDown: [1, 0, -.1], "+": [1.25], "=": [1.25], "-": [0.8] };
    if (!steps[event.key]) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
  $("zoom-in").addEventListener("click", () => move(1.5));
  $("zoom-out").addEventListener("click", () => move(1 / 1.5));
  $("zoom-all").addEventListener("click", () => { zoom = 1; move(1); });
  $("colour").addEventListener("change", draw);
  addEventListener("resize", draw);

  // --- lists that do not change ---
  gallery($("easiest"), data.ends.easiest);
  gallery($("hardest"), data.ends.hardest);
  if ($("duplicates")) {
    $("duplicates").append(...data.duplicates.map((one) => {
      const item = document.createElement("li"), text = document.createElement("p"), list = document.createElement("ul");
      text.textContent = `${one.size} images` + (one.mixed ? ", different classes" : "");
      list.className = "gallery";
      item.append(text, list);
      gallery(list, one.rows);
      return item;
    }));
  }
  if ($("disagreements")) {
    for (const one of data.disagreements) {
      const head = document.createElement("h3"), list = document.createElement("ul");
      head.textContent = one.title;
      list.className = "gallery";
      $("disagreements").append(head, list);
      gallery(list, one.rows);
    }
  }

  // --- saving and copying ---
  async function listBytes() { // what `protoprune select` writes, byte for byte: the kept names, each with a line break
    const [entry, text] = await Promise.all([block("list_first"), block("list_names")]);
    let start = 0, row = 0, length = 0;
    const out = new Uint8Array(text.length);
    for (let end = text.indexOf(0); end >= 0; end = text.indexOf(0, start)) {
      if (entry[row] <= stop && entry[row] !== NEVER) {
        out.set(text.subarray(start, end), length);
        length += end - start;
        out[length++] = 10;
      }
      start = end + 1;
      row++;
    }
    return out.subarray(0, length);
  }
  async function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await listBytes()], { type: "text/plain" }));
    link.download = "kept.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
  $("save").addEventListener("click", save);
  $("copy")?.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("command").textContent);
      $("copy").textContent = "Copied";
    } catch { // not allowed from a file: select it instead
      const range = document.createRange();
      range.selectNodeContents($("command"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      $("copy").textContent = "Selected";
    }
    setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    $("theme").textContent = dark ? "Dark" : "Light";
    $("theme").setAttribute("aria-pressed", String(!dark));
    draw();
  });
  const slider = $("keep");
  slider.max = last;
  slider.value = stop;
  slider.disabled = false;
  slider.addEventListener("input", () => { stop = Number(slider.value); update(); });
  for (const group of Object.keys(data.groups)) {
    $(group + "-all").addEventListener("click", () => { whole[group] = true; fillTable(group); });
  }
  update();
  for (const group of Object.keys(data.groups)) if (data.groups[group].names.length) detail(group, 0);
  globalThis.protoprune = { listBytes, ready: true }; // for whoever drives the page by a script
  document.documentElement.dataset.ready = "yes";
})();
