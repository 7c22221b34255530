// The status page: asks for /status.json every two seconds and draws it. No library, nothing from elsewhere.
"use strict";

const EVERY_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

let chosen = "";      // the tenant whose experts are shown
let drawn = "";       // the map that is drawn, as text, so that an unchanged one stays
let timer = 0;

const MEMORY = { pool: "expert copies", residual: "corrections", non_expert: "non-expert weights", kv: "caches in use" };
const KINDS = {
  o: ["own", "own copy"],
  s: ["shared", "a tenant's copy, shared"],
  m: ["merged", "merged copy"],
  "-": ["missed", "missed: fetched when needed"],
};

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return (value / 1000).toFixed(value >= 10000 ? 1 : 2) + " s";
  return (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " ms";
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return (unit && value < 100 ? value.toFixed(value < 10 ? 2 : 1) : Math.round(value)) + " " + units[unit];
}

function count(value) {
  return value.toLocaleString("en");
}

function rate(value) {
  return value >= 100 ? value.toFixed(0) : value.toFixed(1);
}

function time(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = Math.max(0, parts.findIndex(([size]) => seconds >= size));
  const [size, unit] = seconds < 1 ? [1, "s"] : parts[at];
  return Math.floor(seconds / size) + " " + unit;
}

// Lines.

function line(id, values, write, about) {
  const svg = $(id), width = 240, height = 38;
  const known = values.filter((v) => v !== null);
  const top = Math.max(...known, 0);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-label", known.length ? `${about}, last minute: at most ${write(top)}` : `${about}: none yet`);
  svg.replaceChildren(shape("line", { x1: 0, x2: width, y1: height - 1, y2: height - 1, stroke: "currentColor", opacity: 0.25 }));
  const x = (i) => (i / (values.length - 1)) * width;
  const y = (v) => height - 2 - (top ? v / top : 0) * (height - 6);
  // Runs of seconds in which something was measured; a single one is a short dash.
  let run = [];
  const finish = () => {
    if (run.length) {
      if (run.length === 1) run.push([run[0][0] + 3, run[0][1]]);
      svg.append(shape("polyline", {
        points: run.map((p) => p.map((n) => n.toFixed(1)).join(",")).join(" "),
        fill: "none", stroke: "currentColor", "stroke-width": 1.8, "vector-effect": "non-scaling-stroke", "stroke-linejoin": "round",
      }));
    }
    run = [];
  };
  values.forEach((v, i) => { if (v === null) finish(); else run.push([x(i), y(v)]); });
  finish();
}

function latest(values) {
  const known = values.filter((v) => v !== null);
  return known.length ? known[known.length - 1] : null;
}

// Parts of the page.

function showTenants(tenants) {
  const names = [...document.querySelectorAll("#tenants th")].map((th) => th.textContent);
  const rows = tenants.map((t) => {
    const lookups = t.hits + t.misses;
    const share = lookups ? ` (${((100 * t.misses) / lookups).toFixed(t.misses && t.misses / lookups < 0.1 ? 1 : 0)} %)` : "";
    const cells = [t.name, count(t.running), count(t.waiting), rate(t.tokens_per_second), ms(t.ttft_p50_ms), ms(t.ttft_p95_ms),
      count(t.misses) + share, t.resident];
    const row = element("tr", {}, ...cells.map((text, i) => element("td", { "data-name": names[i] }, text)));
    if (t.unavailable) {
      row.firstChild.append(" ", element("b", { class: "unavailable", title: t.unavailable }, "unavailable"));
    }
    return row;
  });
  const failed = tenants.filter((t) => t.unavailable);
  $("unavailable").hidden = !failed.length;
  $("unavailable").replaceChildren(...failed.map((t) => element("li", {}, element("b", {}, t.name), ": " + t.unavailable)));
  document.querySelector("#tenants tbody").replaceChildren(...rows);
}

function showMemory(status) {
  const kinds = Object.keys(MEMORY);
  const total = kinds.reduce((sum, kind) => sum + status.memory[kind], 0);
  const parts = kinds.filter((kind) => status.memory[kind] > 0);
  $("memory-bar").replaceChildren(...parts.map((kind) => {
    const part = element("span", { class: kind, title: `${MEMORY[kind]}: ${bytes(status.memory[kind])}` });
    part.style.flexGrow = status.memory[kind] / total;
    return part;
  }));
  $("memory-bar").setAttribute("aria-label", kinds.map((k) => `${MEMORY[k]} ${bytes(status.memory[k])}`).join(", "));
  $("memory").replaceChildren(...kinds.map((kind) => element("li", {}, sample(kind), MEMORY[kind] + " ", element("b", {}, bytes(status.memory[kind])))));
  const room = status.kv_cache_bytes ? `; caches may take ${bytes(status.kv_cache_bytes)}` : "";
  $("memory-note").textContent = `${bytes(total)} in all${room}. As separate models: ${bytes(status.separate_bytes)}.`;
}

function sample(kind, mark) {
  const svg = shape("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" });
  svg.append(shape("rect", { x: 1, y: 1, width: 12, height: 12, rx: 2.5, class: kind }));
  if (kind === "missed") svg.append(shape("path", { d: "M4 4 10 10M10 4 4 10", class: "cross" }));
  if (mark) svg.append(shape("circle", { cx: 7, cy: 7, r: 2.2, class: "mark" }));
  return svg;
}

function showMap(map) {
  const text = JSON.stringify(map);
  if (text === drawn) return;
  drawn = text;
  // The longer side lies across.
  const across = map.layers >= map.experts;
  const columns = across ? map.layers : map.experts, rows = across ? map.experts : map.layers;
  const room = $("map-row").clientWidth - 34;
  const wide = Math.max(9, Math.min(34, Math.floor(room / columns))), high = Math.min(wide, 24);
  const arm = Math.min(2.5, wide / 6); // of a cross
  const left = 30, top = 18;
  const svg = $("map");
  svg.setAttribute("width", left + columns * wide + 4);
  svg.setAttribute("height", top + rows * high + 4);
  svg.replaceChildren();
  const every = (n, size) => [1, 2, 4, 8, 16, 32].find((step) => step * size >= 20 || step >= n) || 64;
  for (let c = 0; c < columns; c += every(columns, wide)) {
    svg.append(shape("text", { x: left + (c + 0.5) * wide, y: top - 6, "text-anchor": "middle" }, c));
  }
  for (let r = 0; r < rows; r += every(rows, high)) {
    svg.append(shape("text", { x: left - 6, y: top + (r + 0.5) * high + 4, "text-anchor": "end" }, r));
  }
  const counts = { o: 0, s: 0, m: 0, "-": 0 };
  let marked = 0;
  for (let layer = 0; layer < map.layers; layer++) {
    for (let expert = 0; expert < map.experts; expert++) {
      const kind = map.kinds[layer][expert], residual = map.residual[layer][expert] === "1";
      const owner = map.owner[layer][expert], users = map.users[layer][expert];
      counts[kind] += 1;
      marked += residual;
      const column = across ? layer : expert, row = across ? expert : layer;
      const x = left + column * wide + 1, y = top + row * high + 1, w = wide - 2, h = high - 2;
      const cell = shape("g", {});
      cell.append(shape("rect", kind === "-" ? { x: x + 1, y: y + 1, width: w - 2, height: h - 2, rx: 2, class: "missed" }
        : { x, y, width: w, height: h, rx: 2.5, class: KINDS[kind][0] }));
      if (kind === "-") cell.append(shape("path", { d: `M${x + w / 2 - arm} ${y + h / 2 - arm}l${2 * arm} ${2 * arm}m0 ${-2 * arm}l${-2 * arm} ${2 * arm}`, class: "cross" }));
      if (residual) cell.append(shape("circle", { cx: x + w / 2, cy: y + h / 2, r: Math.min(w, h) / 6 + 0.6, class: "mark" }));
      const whose = owner >= 0 ? `copy of ${map.owners[owner]}` : KINDS[kind][1];
      const serves = users > 1 ? `, serves ${users} tenants` : "";
      const says = `layer ${layer}, expert ${expert}: ${whose}${serves}${residual ? ", with a correction" : ""}`;
      cell.append(shape("title", {}, says));
      // Shown beside too: a finger has no tooltip.
      for (const name of ["pointerenter", "click"]) cell.addEventListener(name, () => { $("map-said").textContent = says; });
      svg.append(cell);
    }
  }
  const says = Object.entries(KINDS).map(([letter, [, name]]) => `${name} ${counts[letter]}`).join(", ");
  svg.setAttribute("aria-label", `${map.layers} layers ${across ? "across" : "down"}, ${map.experts} experts ${across ? "down" : "across"}: ${says}`);
  const items = Object.entries(KINDS).map(([letter, [kind, name]]) =>
    element("li", {}, sample(kind), name + " ", element("b", {}, count(counts[letter]))));
  items.push(element("li", {}, sample("shared", true), "with the tenant's correction ", element("b", {}, count(marked))));
  $("map-said").textContent = `${across ? "Layers across, experts down" : "Experts across, layers down"}. Point at one to see whose copy serves it.`;
  $("map-legend").replaceChildren(...items);
}

function choices(tenants) {
  const names = tenants.map((t) => t.name);
  const list = $("tenant");
  if (names.join("\n") !== [...list.options].map((o) => o.value).join("\n")) {
    list.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  }
  if (!names.includes(chosen)) chosen = names[0] || "";
  list.value = chosen;
}

function state(word, text) {
  $("state").dataset.state = word;
  $("state").textContent = text || word;
}

function show(status) {
  state(status.state);
  const about = [status.family, status.dtype, status.device && `on ${status.device}`].filter(Boolean).join(", ");
  $("about").textContent = `${about ? about + " · " : ""}version ${status.version} · up ${time(status.uptime_s)}`;
  $("ask-key").hidden = true;
  $("content").hidden = !status.memory;
  if (!status.memory) return;
  $("running").textContent = count(status.running);
  $("waiting").textContent = count(status.waiting);
  $("now-tokens").textContent = rate(status.tenants.reduce((sum, t) => sum + t.tokens_per_second, 0));
  $("now-ttft").textContent = ms(latest(status.series.ttft_p50_ms));
  $("now-itl").textContent = ms(latest(status.series.itl_mean_ms));
  line("line-tokens", status.series.tokens, count, "tokens a second");
  line("line-ttft", status.series.ttft_p50_ms, ms, "time to first token");
  line("line-itl", status.series.itl_mean_ms, ms, "time between tokens");
  showTenants(status.tenants);
  showMemory(status);
  choices(status.tenants);
  if (status.map) showMap(status.map);
}

// Asking.

async function ask() {
  clearTimeout(timer);
  const key = sessionStorage.getItem("moetel-key");
  try {
    const query = chosen ? "?tenant=" + encodeURIComponent(chosen) : "";
    const reply = await fetch("status.json" + query, { headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store" });
    if (reply.status === 401) {
      state("locked", "key needed");
      $("content").hidden = true;
      $("ask-key").hidden = false;
      $("key-said").textContent = key ? "The server does not know this key." : "";
      sessionStorage.removeItem("moetel-key");
      return; // until a key is given
    }
    if (reply.status === 404) {
      chosen = ""; // the tenant is gone
    } else if (!reply.ok) {
      throw new Error(reply.status);
    } else {
      const before = chosen;
      show(await reply.json());
      if (chosen !== before) return void ask(); // at first nobody is chosen, so the map is still to come
    }
  } catch (error) {
    console.error(error);
    state("lost", "no connection");
  }
  timer = setTimeout(ask, EVERY_MS);
}

$("ask-key").addEventListener("submit", (happened) => {
  happened.preventDefault();
  sessionStorage.setItem("moetel-key", $("key").value.trim());
  $("key").value = "";
  ask();
});
$("tenant").addEventListener("change", () => { chosen = $("tenant").value; ask(); });
addEventListener("resize", () => { drawn = ""; });
document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else ask(); });
ask();
