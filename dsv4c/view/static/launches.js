// The launches of a plan in order, and its arena as a picture: time to the right, addresses downward. Data is written by
// dsv4c/view/launches.py. Functions only: page.js, which follows, calls them.

function drawLaunches(chosen) {
  const plan = data.launches, at = plan.launches.findIndex(([name]) => name === chosen);
  const figure = (label, value) => make("div", {}, make("dt", {}, label), make("dd", {}, value));
  const together = plan.launches.filter(([, , nodes]) => nodes.length > 1).length;
  $("overview").replaceChildren(make("dl", { class: "figures" },
    figure("bucket", plan.bucket), figure("target", plan.target), figure("launches", number(plan.launches.length)),
    figure("of several nodes", number(together)), plan.kernels ? figure("kernels", number(plan.kernels)) : "", figure("arena", bytes(plan.arena))),
    make("h2", {}, "The arena while they run"),
    make("p", { class: "axis" }, `Launch 1 to ${number(plan.launches.length)} from left to right, addresses downward. A bar is a value: its bytes, from the launch that writes it to the last that reads it, in the color of its layer.`));
  let layer = null;
  const rows = make("div", { class: "rows" });
  plan.launches.forEach(([name, op, nodes, own, kernel], i) => {
    if (own !== layer) rows.append(make("div", { class: "scope" }, (layer = own) || "model"));
    rows.append(make("div", { class: `row launch${i === at ? " chosen" : ""}`, "data-name": name, onclick: () => goLaunch(name) },
      make("span", { class: "number" }, `${i + 1}`), make("span", { title: nodes.join(", ") }, name),
      make("span", { class: "op" }, op), make("span", { class: "type" }, kernel)));
  });
  $("groups").replaceChildren(make("div", { class: "pinned" }, drawArena(plan, at)), make("article", { class: "group open", "data-title": "launches" }, rows));
  drawLaunch(plan, at);
  const row = at >= 0 && document.querySelector(".row.chosen");
  if (row) bringIntoView(row);
}

function goLaunch(name) {
  history.pushState(null, "", `#launches/${encodeURIComponent(name)}`);
  const scrolled = document.querySelector(".arena")?.scrollLeft ?? 0;
  show();
  document.querySelector(".arena").scrollLeft = scrolled;
}

function layerColor(layer) {
  return layer ? GROUP_COLORS[+layer.slice(layer.lastIndexOf(".") + 1) % (GROUP_COLORS.length - 1)] : GROUP_COLORS.at(-1);
}

function drawArena(plan, at) {
  const count = plan.launches.length, height = 260, step = Math.max(3, Math.min(24, 1000 / count)), scale = height / Math.max(plan.arena, 1);
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const bars = plan.values.map(([name, layer, offset, size, first, last]) => {
    const live = at >= first && at <= last;
    return svg("rect", { class: live ? "bar live" : "bar", x: first * step, y: offset * scale, width: (last - first + 1) * step - 0.5,
      height: Math.max(size * scale, 1), fill: layerColor(layer) },
      svg("title", {}, `${name}\n${bytes(size)} at ${number(offset)}\nlaunches ${first + 1} to ${last + 1}`));
  });
  const marker = at >= 0 ? [svg("rect", { class: "now", x: at * step, y: 0, width: step, height })] : [];
  const picture = svg("svg", { width: count * step, height, viewBox: `0 0 ${count * step} ${height}` }, ...bars, ...marker);
  picture.addEventListener("click", (event) => {
    const x = event.clientX - picture.getBoundingClientRect().left;
    goLaunch(plan.launches[Math.max(0, Math.min(count - 1, Math.floor(x / step)))][0]);
  });
  return make("div", { class: "arena" }, picture);
}

function drawLaunch(plan, at) {
  if (at < 0) {
    $("details").replaceChildren(make("h2", {}, "Details"), make("p", {}, "Choose a launch, in the list or in the picture."));
    return;
  }
  const [name, op, nodes, , kernel, how] = plan.launches[at], last = data.stages.length - 1;
  const live = plan.values.filter(([, , , , first, end]) => at >= first && at <= end).sort((a, b) => a[2] - b[2]);
  const held = live.reduce((sum, value) => sum + value[3], 0);
  $("details").replaceChildren(make("h2", {}, `Launch ${at + 1} of ${number(plan.launches.length)}`), make("div", { class: "name" }, name),
    make("p", {}, op), kernel ? make("p", {}, make("b", {}, kernel), ` ${how}`) : "",
    make("h2", {}, nodes.length > 1 ? `${nodes.length} nodes together` : "Node"),
    make("ul", {}, nodes.map((n) => make("li", {}, existsIn(last, n) ? make("a", { "data-goto": n, onclick: () => go(last, n) }, n) : n))),
    make("h2", {}, `In the arena: ${bytes(held)}`), make("ul", {}, live.map(([value, , offset, size, first, end]) => make("li", {}, value, " ",
      make("span", { class: "type" }, `${bytes(size)} at ${number(offset)}${first === at ? " · written here" : ""}${end === at ? " · last read here" : ""}`)))));
}
