// Small charts as SVG: a line over an area, gaps where there was nothing, bars for what failed.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 80;

function shape(kind, attributes, className) {
  const made = document.createElementNS(NS, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (className) made.setAttribute("class", className);
  return made;
}

// values: numbers or null, oldest first. bad: numbers drawn as bars from below, on the same scale.
export function draw(svg, values, { bad = [], text = String } = {}) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, ...bad, 0) || 1;
  const x = (index) => (index / Math.max(1, values.length - 1)) * WIDTH;
  const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 10);
  const parts = [shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }, "base")];
  for (const [index, value] of bad.entries()) {
    if (value) parts.push(shape("rect", { x: x(index) - 2, y: y(value), width: 4, height: HEIGHT - 2 - y(value) }, "bad"));
  }
  for (const run of runs(values)) {
    const points = run.map(([index, value]) => `${x(index).toFixed(1)},${y(value).toFixed(1)}`);
    const [first, last] = [x(run[0][0]), x(run[run.length - 1][0])];
    if (run.length === 1) {
      parts.push(shape("rect", { x: first - 1.5, y: y(run[0][1]), width: 3, height: HEIGHT - 2 - y(run[0][1]) }, "dot"));
    } else {
      parts.push(shape("polygon", { points: `${first},${HEIGHT - 2} ${points.join(" ")} ${last},${HEIGHT - 2}` }, "area"));
      parts.push(shape("polyline", { points: points.join(" ") }, "line"));
    }
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", known.length ? `${svg.dataset.name}, at most ${text(top)}` : `${svg.dataset.name}: nothing yet`);
}

function runs(values) {
  const found = [];
  let run = [];
  for (const [index, value] of values.entries()) {
    if (value !== null) run.push([index, value]);
    else if (run.length) { found.push(run); run = []; }
  }
  if (run.length) found.push(run);
  return found;
}
