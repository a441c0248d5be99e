"use strict";
// The page's one program. `data` is written by dsv4c/view/html.py; "block" is a layer's nodes, shared by equal layers.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FAMILIES = {
  linear: "#5b8def", attention: "#5fae53", compress: "#8db84a", index: "#b3b03a", quant: "#e07f4f", norm: "#d9b13b",
  rope: "#a67fd1", hyper: "#3fa9a0", moe: "#d1699a", state: "#8a8a86", math: "#a9a9a4", shape: "#c9c9c4", sample: "#d1699a",
  fused: "#3d5a98",
};
const GROUP_COLORS = ["#a9c4f0", "#b9d9ae", "#f2cfa6", "#d8c3ea", "#f0b9c6", "#b4dcd8", "#e3dd9f", "#c9c9c5"];
const view = { stage: data.stages.length - 1, open: new Map(), member: new Map(), tab: new Map(), chosen: null, launches: false, trail: [] };

// --- reading the data ---------------------------------------------------------------------------------------------

const stage = () => data.stages[view.stage];
const block = (group) => data.blocks[group.block];
const prefixOf = (group) => group.members[memberOf(group)];
const memberOf = (group) => view.member.get(key(group)) ?? 0;
const key = (group) => `${view.stage}:${stage().groups.indexOf(group)}`;
const opOf = (node) => data.ops[node[0]];
const resultsOf = (node) => {
  const found = [];
  for (let i = 0; i < node[3].length; i += 2) found.push({ name: data.names[node[3][i]], type: data.types[node[3][i + 1]] });
  return found;
};

/** A name as the graph has it: ".attn.qa" in layers.4, "-1.ffn_out" in the layer before. */
function absolute(name, prefix) {
  if (!prefix) return name;
  if (name === "" || name[0] === ".") return prefix + name;
  const near = /^([+-]\d+)(.*)$/.exec(name);
  if (!near) return name;
  const dot = prefix.lastIndexOf(".");
  return `${prefix.slice(0, dot)}.${+prefix.slice(dot + 1) + +near[1]}${near[2]}`;
}

/** The values of a block by number, each {name, type, node}; name is relative. */
function valuesOf(nodes) {
  if (nodes.values_) return nodes.values_;
  const values = [];
  nodes.forEach((node, index) => { for (const result of resultsOf(node)) values.push({ ...result, node: index }); });
  Object.defineProperty(nodes, "values_", { value: values });
  return values;
}

/** What operand `number` is: {name, type, kind, node}; node only when the block makes it. */
function operand(source, number, prefix, foreign) {
  if (number >= 0) {
    const value = valuesOf(source.nodes)[number];
    return { name: value.name, type: value.type, kind: "result", node: value.node, full: absolute(value.name, prefix) };
  }
  const [name, type, kind] = source.outside[-1 - number];
  const away = name[0] === "^" ? foreign[+name.slice(1)] : absolute(name, prefix);
  return { name: name[0] === "^" ? away : name, type: data.types[type], kind, full: away };
}

const operandsOf = (group, node) =>
  node[2].map((n) => operand(block(group), n, prefixOf(group), group.foreign[memberOf(group)]));
const nameOf = (group, node) => absolute(resultsOf(node)[0].name, prefixOf(group));

function stateOf(group, index) {
  if (group.change === null) return "";
  const [fresh, changed] = data.changes[group.change];
  return fresh.includes(index) ? "new" : changed.includes(index) ? "changed" : "";
}

/** Where the value `name` is made in this stage: {group, member, node}, or null. */
function find(name) {
  for (const group of stage().groups) {
    for (let member = 0; member < group.members.length; member++) {
      const prefix = group.members[member];
      const values = valuesOf(block(group).nodes);
      const hit = values.find((v) => absolute(v.name, prefix) === name);
      if (hit) return { group, member, node: hit.node };
    }
  }
  return null;
}

// --- building elements --------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== ""));
  return element;
}

const number = (n) => n.toLocaleString("en-US");
function bytes(n) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return `${(n / size).toPrecision(4)} ${unit}`;
  return `${n} B`;
}
const colorOf = (node) => `--family:${FAMILIES[opOf(node)[1]] ?? "#9a9a95"}`;
const short = (name, prefix) => (name[0] === "." ? name.slice(1) : absolute(name, prefix));
const ranges = (members) => {
  const numbers = members.map((m) => m.slice(m.lastIndexOf(".") + 1));
  return numbers.length > 12 ? `${numbers.slice(0, 10).join(", ")}, … ${numbers.at(-1)}` : numbers.join(", ");
};
const groupColor = (index) => GROUP_COLORS[index % GROUP_COLORS.length];

// --- the parts of the page ----------------------------------------------------------------------------------------

function drawStages() {
  const plan = data.launches && make("li", {}, make("button", { "aria-current": view.launches ? "true" : null, "data-stage": "launches",
    onclick: () => { history.pushState(null, "", "#launches"); show(); } }, make("span", { class: "number" }, `${data.stages.length + 1}`), "launches",
    make("small", {}, `${number(data.launches.launches.length)} launches`, make("br"), `arena ${bytes(data.launches.arena)}`)));
  $("stages").replaceChildren(...data.stages.map((s, i) => make("li", {},
    make("button", { "aria-current": i === view.stage && !view.launches ? "true" : null, "data-stage": s.name, onclick: () => go(i, null) },
      make("span", { class: "number" }, `${i + 1}`), s.name,
      make("small", {}, `${number(s.totals.launches)} nodes work`, make("br"), ...badges(s.counts))))), ...(plan ? [plan] : []));
}

function badges(counts) {
  if (!counts) return ["start"];
  if (!counts.some(Boolean)) return ["no change"];
  return [["new", "+", counts[0]], ["changed", "~", counts[1]], ["gone", "−", counts[2]]].filter((c) => c[2])
    .flatMap(([name, sign, count]) => [make("span", { class: `${name}-text`, title: name }, `${sign}${number(count)}`), " "]);
}

function drawOverview() {
  const s = stage(), before = view.stage ? data.stages[view.stage - 1].totals : null;
  const figure = (label, value, old, write = number) => make("div", {}, make("dt", {}, label),
    make("dd", {}, write(value), " ", old !== null && old !== undefined && old !== value ? make("small", {}, `was ${write(old)}`) : ""));
  const figures = make("dl", { class: "figures" },
    figure("nodes", s.totals.nodes, before?.nodes), figure("that do work", s.totals.launches, before?.launches),
    figure("bytes moved", s.totals.bytes, before?.bytes, bytes), figure("GFLOP", s.totals.flops / 1e9, null, (n) => n.toFixed(2)),
    figure("params", s.params, null), figure("states", s.states, null));
  const cells = [];
  s.groups.forEach((group, index) => group.members.forEach((prefix, member) => {
    if (prefix) cells.push({ prefix, order: +prefix.slice(prefix.lastIndexOf(".") + 1), group, member, index });
  }));
  cells.sort((a, b) => a.prefix.split(".")[0].localeCompare(b.prefix.split(".")[0]) || a.order - b.order);
  const map = make("div", { class: "map", "aria-label": "Layers" }, cells.map((c) => make("button", {
    style: `background:${groupColor(c.index)}`, title: `${c.prefix}, like ${c.group.members[0]}`, "data-layer": c.prefix,
    onclick: () => { view.member.set(key(c.group), c.member); view.open.set(key(c.group), true); drawGroups(); scrollTo(c.group); },
  }, `${c.order}`)));
  $("overview").replaceChildren(figures, cells.length ? map : "");
}

const scrollTo = (group) => document.querySelector(`[data-group="${stage().groups.indexOf(group)}"]`)?.scrollIntoView({ block: "start" });

function drawGroups() {
  $("groups").replaceChildren(...stage().groups.map(drawGroup));
  if (stage().vanished.length) $("groups").append(make("p", { class: "gone-text" }, `gone: ${stage().vanished.join(", ")}`));
}

function drawGroup(group, index) {
  const open = view.open.get(key(group)) ?? false;
  const nodes = block(group).nodes, change = group.change === null ? null : data.changes[group.change];
  const counts = change && [change[0].length, change[1].length, change[2].reduce((n, b) => n + b.length - 1, 0)];
  const many = group.members.length > 1 ? ` ×${group.members.length}` : "";
  const header = make("header", { tabindex: 0, role: "button", "aria-expanded": String(open), onclick: toggle, onkeydown: (e) => {
    if (e.key === "Enter" || e.key === " ") { e.preventDefault(); toggle(); } } },
    make("span", { class: "caret" }, open ? "▾" : "▸"), make("span", { class: "swatch", style: `background:${groupColor(index)}` }),
    make("h3", {}, group.title + many), ...(counts && counts.some(Boolean) ? badges(counts) : []),
    make("span", { class: "facts" }, `${number(nodes.length)} nodes`));
  function toggle() { view.open.set(key(group), !open); element.replaceWith(drawGroup(group, index)); }
  const element = make("article", { class: `group${open ? " open" : ""}`, "data-group": index, "data-title": group.title }, header);
  if (open) element.append(drawMembers(group, index), view.tab.get(key(group)) === "graph" ? drawCanvas(group) : drawRows(group, change));
  return element;
}

function drawMembers(group, index) {
  const redraw = () => document.querySelector(`[data-group="${index}"]`).replaceWith(drawGroup(group, index));
  const chips = group.members.length > 1 ? group.members.map((prefix, member) => make("button", {
    "aria-pressed": String(member === memberOf(group)), onclick: () => { view.member.set(key(group), member); redraw(); },
  }, prefix.slice(prefix.lastIndexOf(".") + 1))) : [];
  const tabs = ["list", "graph"].map((tab) => make("button", { "data-tab": tab, "aria-pressed": String((view.tab.get(key(group)) ?? "list") === tab),
    onclick: () => { view.tab.set(key(group), tab); redraw(); } }, tab));
  return make("div", { class: "members" }, chips.length ? "equal layers" : "", ...chips, make("span", { class: "tabs" }, ...tabs));
}

function drawRows(group, change) {
  const rows = make("div", { class: "rows" });
  let scope = null;
  block(group).nodes.forEach((node, index) => {
    const here = absolute(data.names[node[1]], prefixOf(group));
    if (here !== scope) rows.append(make("div", { class: "scope" }, (scope = here) || "model"));
    rows.append(...drawRow(group, node, index));
  });
  const gone = change ? change[2].flatMap(([b, ...indices]) => indices.map((i) => [data.blocks[b], data.blocks[b].nodes[i]])) : [];
  if (gone.length) rows.append(make("details", { class: "gones" }, make("summary", {}, `${number(gone.length)} nodes gone since ${data.stages[view.stage - 1].name}`),
    gone.map(([source, node]) => plainRow(source, node, prefixOf(group), "gone"))));
  return rows;
}

/** A row of the list, and below it the body when it is a fused op that is open. */
function drawRow(group, node, index) {
  const where = `${key(group)}:${index}`, open = view.open.get(where) ?? false, fused = node[5] >= 0;
  const name = nameOf(group, node), chosen = view.chosen === name;
  const caret = fused ? make("button", { class: "caret", "aria-label": "body", "aria-expanded": String(open), onclick: (e) => {
    e.stopPropagation(); view.open.set(where, !open);
    const drawn = drawRow(group, node, index);
    if (row.nextElementSibling?.classList.contains("body")) row.nextElementSibling.remove();
    row.replaceWith(...drawn);
  } }, open ? "▾" : "▸") : make("span");
  const prefix = data.names[node[1]];
  const trim = (n) => short(prefix && n.startsWith(`${prefix}.`) ? n.slice(prefix.length) : n, prefixOf(group));
  const row = make("div", { class: `row ${stateOf(group, index)}${chosen ? " chosen" : ""}`, "data-name": name, onclick: () => go(view.stage, name) },
    caret, make("span", { title: name }, resultsOf(node).map((r) => trim(r.name)).join(", ")),
    make("span", { class: "op", style: colorOf(node) }, opOf(node)[0]),
    make("span", { class: "operands" }, operandsOf(group, node).map((o) => trim(o.name)).join(", ")),
    make("span", { class: "type" }, resultsOf(node).map((r) => r.type).join(", ")));
  return fused && open ? [row, drawBody(node)] : [row];
}

function drawBody(node) {
  const body = data.bodies[node[5]];
  return make("div", { class: "body", "data-body": opOf(node)[0] }, body.nodes.flatMap((inner) => {
    const row = plainRow(body, inner, "", "");
    return inner[5] >= 0 ? [row, drawBody(inner)] : [row];
  }));
}

function plainRow(source, node, prefix, kind) {
  const operands = node[2].map((n) => operand(source, n, prefix, []));
  const attributes = Object.entries(opOf(node)[2]).map(([k, v]) => `${k}=${v}`).join(", ");
  return make("div", { class: `row ${kind}`, title: attributes }, make("span"), make("span", {}, resultsOf(node).map((r) => short(r.name, prefix)).join(", ")),
    make("span", { class: "op", style: colorOf(node) }, opOf(node)[0]),
    make("span", { class: "operands" }, [operands.map((o) => short(o.name ?? "^", prefix)).join(", "), attributes].filter(Boolean).join("  ")),
    make("span", { class: "type" }, resultsOf(node).map((r) => r.type).join(", ")));
}

// --- details ------------------------------------------------------------------------------------------------------

function drawDetails() {
  const place = view.chosen && find(view.chosen);
  if (!place) {
    $("details").replaceChildren(make("h2", {}, "Details"), view.chosen ? make("p", {}, `${view.chosen} is not in ${stage().name}.`)
      : make("p", {}, "Choose a node, or search with /."), keysHelp());
    return;
  }
  const { group, member, node: index } = place, node = block(group).nodes[index], op = opOf(node), prefix = group.members[member];
  view.member.set(key(group), member);
  const link = (name) => make("a", { "data-goto": name, onclick: () => go(view.stage, name) }, name);
  const valueItem = (v) => make("li", {}, v.kind === "result" || !v.kind ? link(v.full) : `${v.full}`, " ", make("span", { class: "type" }, v.type, v.kind && v.kind !== "result" ? ` · ${v.kind}` : ""));
  const made = resultsOf(node).map((r) => absolute(r.name, prefix));
  const state = stateOf(group, index), parts = [];
  parts.push(make("h2", {}, state ? make("span", { class: `${state}-text` }, `${state} in ${stage().name}`) : `In ${stage().name}`));
  parts.push(make("div", { class: "name" }, made.join(", ")));
  parts.push(make("p", {}, make("span", { class: "op", style: colorOf(node) }, op[0]), `  ${op[3].replaceAll("\n", " ")}`));
  const facts = [...Object.entries(op[2]), ["scope", absolute(data.names[node[1]], prefix) || "model"], ["bytes", bytes(node[6])], ["flops", number(node[7])]];
  if (group.members.length > 1) facts.push(["layers", `${group.members.length} equal: ${ranges(group.members)}`]);
  parts.push(make("table", {}, make("tbody", {}, facts.map(([k, v]) => make("tr", {}, make("td", {}, k), make("td", {}, `${v}`))))));
  parts.push(make("h2", {}, "Operands"), make("ul", {}, operandsOf(group, node).map(valueItem)));
  parts.push(make("h2", {}, "Results"), make("ul", {}, resultsOf(node).map((r, i) => make("li", {}, made[i], " ", make("span", { class: "type" }, r.type)))));
  const readers = readersOf(group, index, made);
  if (readers.length) parts.push(make("h2", {}, "Read by"), make("ul", {}, readers.map((name) => make("li", {}, link(name)))));
  const origin = node[4].map((n) => absolute(data.names[n], prefix));
  if (origin.length) parts.push(make("h2", {}, `Stands for ${origin.length} unfused results`), make("details", {}, make("summary", {}, "names"), make("ul", {}, origin.map((n) => make("li", {}, n)))));
  if (node[5] >= 0) parts.push(make("h2", {}, "Body"), drawBody(node));
  const source = group.sources?.[index];
  if (source !== undefined) parts.push(make("h2", {}, "Generated source"), make("details", { open: true, id: "source" }, make("summary", {}, `${data.sources[source].split("\n").length} lines`), make("pre", {}, data.sources[source])));
  const earlier = view.stage > 0 && data.stages.slice(0, view.stage).some((_, i) => existsIn(i, view.chosen));
  if (earlier) parts.push(make("h2", {}, "Other stages"), make("ul", {}, data.stages.map((s, i) => i !== view.stage && existsIn(i, view.chosen)
    ? make("li", {}, make("a", { onclick: () => go(i, view.chosen) }, s.name)) : null)));
  $("details").replaceChildren(...parts);
}

function existsIn(index, name) {
  const now = view.stage;
  view.stage = index;
  const found = find(name);
  view.stage = now;
  return found !== null;
}

/** Names of the nodes that read what this node makes, in its layer and elsewhere. */
function readersOf(group, index, made) {
  const names = [], values = valuesOf(block(group).nodes);
  const numbers = new Set(values.map((v, i) => (v.node === index ? i : -1)).filter((i) => i >= 0));
  for (const node of block(group).nodes) if (node[2].some((n) => numbers.has(n))) names.push(nameOf(group, node));
  for (const other of stage().groups) {
    const source = block(other);
    other.members.forEach((prefix, member) => {
      source.outside.forEach(([name], position) => {
        const full = name[0] === "^" ? other.foreign[member][+name.slice(1)] : absolute(name, prefix);
        if (!made.includes(full)) return;
        for (const node of source.nodes) if (node[2].includes(-1 - position)) names.push(absolute(resultsOf(node)[0].name, prefix));
      });
    });
  }
  for (const [label, name] of stage().outputs) if (made.includes(name)) names.push(`output ${label}`);
  return [...new Set(names)].slice(0, 40);
}

function keysHelp() {
  const keys = [["/", "search"], ["[ ]", "previous, next stage"], ["j k", "next, previous node"], ["b", "open or close its body"], ["g", "list or graph"], ["Esc", "close"]];
  return make("div", {}, make("h2", {}, "Keys"), make("div", { class: "keys" }, keys.flatMap(([k, what]) => [make("kbd", {}, k), make("span", {}, what)])));
}

// --- drawing a layer as a graph: ranks by longest path, order by neighbors ------------------------------------------

const BOX = { width: 168, height: 34, gapX: 16, gapY: 26 };

function layOut(source) {
  const made = valuesOf(source.nodes), count = source.nodes.length;
  const before = source.nodes.map((node) => [...new Set(node[2].filter((n) => n >= 0).map((n) => made[n].node))]);
  const after = source.nodes.map(() => []);
  before.forEach((list, i) => list.forEach((j) => after[j].push(i)));
  const rank = new Array(count).fill(0);
  for (let i = 0; i < count; i++) for (const j of before[i]) rank[i] = Math.max(rank[i], rank[j] + 1);
  for (let i = count - 1; i >= 0; i--) if (!before[i].length && after[i].length) rank[i] = Math.min(...after[i].map((j) => rank[j])) - 1;
  const rows = [];
  rank.forEach((r, i) => (rows[r] ??= []).push(i));
  const x = new Array(count).fill(0), step = BOX.width + BOX.gapX;
  rows.forEach((row) => row.forEach((i, at) => (x[i] = at * step)));
  const mean = (list) => list.reduce((sum, i) => sum + x[i], 0) / list.length;
  const settle = (row, neighbors) => {
    const wish = new Map(row.map((i) => [i, neighbors[i].length ? mean(neighbors[i]) : x[i]]));
    row.sort((a, b) => wish.get(a) - wish.get(b));
    let edge = -Infinity;
    for (const i of row) edge = x[i] = Math.max(wish.get(i), edge + step);
    const drift = row.reduce((sum, i) => sum + x[i] - wish.get(i), 0) / row.length;
    for (const i of row) x[i] -= drift;
  };
  for (let sweep = 0; sweep < 6; sweep++) {
    if (sweep % 2) for (let r = rows.length - 2; r >= 0; r--) settle(rows[r], after);
    else for (let r = 1; r < rows.length; r++) settle(rows[r], before);
  }
  const left = Math.min(...x);
  return { x: x.map((v) => v - left + 8), y: rank.map((r) => 8 + r * (BOX.height + BOX.gapY)), before, rows: rows.length };
}

function drawCanvas(group) {
  const source = block(group), { x, y, before, rows } = layOut(source);
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const width = Math.max(...x) + BOX.width + 8, height = rows * (BOX.height + BOX.gapY) + 8;
  const edges = before.flatMap((list, i) => list.map((j) => {
    const [x1, y1, x2, y2] = [x[j] + BOX.width / 2, y[j] + BOX.height, x[i] + BOX.width / 2, y[i]], bend = Math.min(60, (y2 - y1) / 2);
    const near = [i, j].some((k) => nameOf(group, source.nodes[k]) === view.chosen);
    return svg("path", { class: `edge${near ? " near" : ""}`, d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` });
  }));
  const fit = (text, most) => (text.length > most ? `…${text.slice(text.length - most + 1)}` : text);
  const boxes = source.nodes.map((node, i) => {
    const name = nameOf(group, node), result = resultsOf(node)[0];
    const box = svg("g", { class: `box ${stateOf(group, i)}${name === view.chosen ? " chosen" : ""}`, "data-name": name, transform: `translate(${x[i]} ${y[i]})` },
      svg("title", {}, `${name}: ${result.type}`), svg("rect", { width: BOX.width, height: BOX.height }),
      svg("rect", { width: 4, height: BOX.height, style: `fill:${FAMILIES[opOf(node)[1]] ?? "#9a9a95"};stroke:none` }),
      svg("text", { x: 12, y: 14 }, fit(opOf(node)[0], 22)), svg("text", { x: 12, y: 27, class: "sub" }, fit(short(result.name, prefixOf(group)), 25)));
    box.addEventListener("click", () => go(view.stage, name));
    return box;
  });
  return make("div", { class: "canvas" }, svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, ...edges, ...boxes));
}

// --- search -------------------------------------------------------------------------------------------------------

const LIMIT = 60;

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const layer = words.find((w) => /^(layers|mtp)\.\d+/.test(w))?.match(/^(layers|mtp)\.\d+/)[0];
  const hits = [];
  let total = 0;
  if (words.length) for (const group of stage().groups) {
    const member = layer ? group.members.indexOf(layer) : 0;
    if (member < 0) continue;
    block(group).nodes.forEach((node, index) => {
      const [op, family, attributes] = opOf(node), results = resultsOf(node);
      const names = results.map((r) => absolute(r.name, group.members[member]));
      const heap = [op, family, ...names, ...results.map((r) => r.type), ...Object.entries(attributes).map(([k, v]) => `${k}=${v}`),
        stateOf(group, index), ...node[2].map((n) => (n < 0 ? absolute(block(group).outside[-1 - n][0], group.members[member]) : ""))].join(" ").toLowerCase();
      if (!words.every((w) => heap.includes(w))) return;
      total += 1;
      if (hits.length < LIMIT) hits.push({ group, member, node, name: names[0] });
    });
  }
  return { hits, total };
}

function drawHits() {
  const text = $("query").value, { hits, total } = search(text);
  $("hits").hidden = !text.trim();
  $("hits").replaceChildren(
    make("li", { class: "count" }, total ? `${number(total)} in ${stage().name}${total > hits.length ? `, the first ${LIMIT}` : ""}` : `nothing in ${stage().name}`),
    ...hits.map((hit, i) => make("li", { class: i ? "" : "at", "data-name": hit.name, onclick: () => choose(hit.name) },
      make("span", { class: "op", style: colorOf(hit.node) }, opOf(hit.node)[0]), make("span", {}, hit.name),
      make("span", { class: "empty" }, hit.group.members.length > 1 ? `×${hit.group.members.length}` : ""))));
}

function choose(name) { $("hits").hidden = true; $("query").blur(); go(view.stage, name); }

function moveHit(by) {
  const items = [...document.querySelectorAll("#hits li[data-name]")], at = items.findIndex((i) => i.classList.contains("at"));
  if (!items.length) return;
  const next = (at + by + items.length) % items.length;
  items.forEach((item, i) => item.classList.toggle("at", i === next));
  items[next].scrollIntoView({ block: "nearest" });
}

// --- going places: every state of the page has an address, #stage/node -------------------------------------------------

function go(index, name) {
  const hash = `#${encodeURIComponent(data.stages[index].name)}${name ? `/${encodeURIComponent(name)}` : ""}`;
  if (location.hash !== hash) history.pushState(null, "", hash);  // unlike location.hash =, without a later event
  show();
}

function show() {
  const [wanted, name] = location.hash.slice(1).split("/").map(decodeURIComponent), launches = view.launches;
  view.launches = wanted === "launches" && Boolean(data.launches);
  if (view.launches) { document.title = `launches · ${data.stages[0].graph}`; drawStages(); drawLaunches(name); return; }
  const index = data.stages.findIndex((s) => s.name === wanted), last = view.stage;
  view.stage = index >= 0 ? index : last;
  const moved = last !== view.stage || launches || !$("groups").children.length;
  view.chosen = name || (moved ? view.chosen : null);
  const place = view.chosen && find(view.chosen);
  if (place) { view.open.set(key(place.group), true); view.member.set(key(place.group), place.member); }
  document.title = `${wanted && index >= 0 ? `${wanted} · ` : ""}${data.stages[0].graph}`;
  if (!moved && place) markChosen(place); else { drawStages(); drawOverview(); drawGroups(); }
  drawDetails();
  if (place) bringIntoView(document.querySelector(`[data-name="${CSS.escape(view.chosen)}"]:is(.row, .box)`));
}

function bringIntoView(element) {
  if (!element) return;
  const { top, bottom } = element.getBoundingClientRect(), hidden = top < 100 || bottom > innerHeight;
  element.scrollIntoView({ block: hidden ? "center" : "nearest", inline: "nearest" });
}

/** Redraw only the group of the chosen node, and take the mark off the others. */
function markChosen(place) {
  document.querySelectorAll(".chosen").forEach((e) => e.classList.remove("chosen"));
  const index = stage().groups.indexOf(place.group), element = document.querySelector(`[data-group="${index}"]`);
  const canvas = element.querySelector(".canvas"), at = canvas && [canvas.scrollLeft, canvas.scrollTop];
  const drawn = drawGroup(place.group, index);
  element.replaceWith(drawn);
  if (at) drawn.querySelector(".canvas")?.scrollTo(...at);
}

function step(by) {
  const rows = [...document.querySelectorAll("#groups .row[data-name]")], at = rows.findIndex((r) => r.dataset.name === view.chosen);
  const next = rows[Math.max(0, Math.min(rows.length - 1, at + by))];
  if (next) go(view.stage, next.dataset.name);
}

const KEYS = {
  "/": () => { $("query").focus(); $("query").select(); },
  "[": () => go(Math.max(0, view.stage - 1), view.chosen),
  "]": () => go(Math.min(data.stages.length - 1, view.stage + 1), view.chosen),
  j: () => step(1),
  k: () => step(-1),
  b: () => document.querySelector(".row.chosen .caret[aria-expanded]")?.click(),
  g: () => { const place = view.chosen && find(view.chosen); if (!place) return;
    view.tab.set(key(place.group), view.tab.get(key(place.group)) === "graph" ? "list" : "graph"); markChosen(place); },
  Escape: () => go(view.stage, null),
  "?": () => go(view.stage, null),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("query")) {
    const act = { ArrowDown: () => moveHit(1), ArrowUp: () => moveHit(-1), Escape: () => { $("hits").hidden = true; $("query").blur(); },
      Enter: () => { const at = document.querySelector("#hits li.at"); if (at) choose(at.dataset.name); } }[event.key];
    if (act) { event.preventDefault(); act(); }
  } else if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});
document.addEventListener("click", (event) => { if (!$("search").contains(event.target)) $("hits").hidden = true; });
$("query").addEventListener("input", drawHits);
$("query").addEventListener("focus", drawHits);
$("help").addEventListener("click", KEYS["?"]);
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.dataset.theme = "dark";
$("title").textContent = document.title;
window.addEventListener("hashchange", show);
show();
