// The curves: Bokeh draws lines and axes; the step under the pointer or the cursor is read out in all of them.

// ---- Charts ---------------------------------------------------------------------------------------------------
const charts = new Map(), places = new Map();
let hover = null; // the step under the pointer, with the chart it is in
let first = 0, last = 1, steps = [];

function span() {
  const all = new Set();
  for (const runs of Object.values(data.points)) for (const one of runs) for (const step of one.step) all.add(step);
  steps = [...all].sort((a, b) => a - b);
  first = steps[0] ?? 0;
  last = steps[steps.length - 1] ?? 1;
}
function window_() {
  const from = choice.from === "" ? first : Number(choice.from), to = choice.to === "" ? last : Number(choice.to);
  return from < to ? [from, to] : [first, Math.max(last, first + 1)];
}
// The place of the point nearest to a step, by bisection.
function nearest(list, step) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= step) low = middle;
    else high = middle;
  }
  return high >= 0 && Math.abs(list[high] - step) < Math.abs(list[low] - step) ? high : low;
}
function valueAt(one, step) {
  if (!one.step.length || step < one.step[0] || step > one.step[one.step.length - 1]) return null;
  const place = nearest(one.step, step);
  return { step: one.step[place], value: one.value[place] };
}

function groupBox(group) {
  if (places.has(group)) return places.get(group);
  const grid = make("div", "grid");
  if (group === data.lazy) {
    const details = make("details");
    details.dataset.id = "more";
    details.append(make("summary", "", group), grid);
    details.addEventListener("toggle", () => details.open && drawAll());
    byId("charts").append(details);
  } else {
    const part = make("div");
    part.append(make("h3", "", group), grid);
    // The groups keep their order, also when one comes later.
    const after = data.groups.slice(data.groups.indexOf(group) + 1).map((one) => places.get(one)?.parentElement).find(Boolean);
    byId("charts").insertBefore(part, after ?? null);
  }
  places.set(group, grid);
  return grid;
}
function addChart(curve) {
  const box = make("figure", "chart"), caption = make("figcaption", "", curve.title);
  box.dataset.key = curve.key;
  box.tabIndex = 0;
  caption.append(make("span", "unit", curve.unit));
  const plot = make("div", "plot"), read = make("p", "read"), hair = make("div", "hair"), warned = make("p", "warned");
  plot.append(hair);
  box.append(caption, plot, read, warned);
  groupBox(curve.group).append(box);
  const chart = { curve, box, plot, read, hair, warned, view: null, sources: new Map() };
  charts.set(curve.key, chart);
  const stepOf = (event) => {
    if (!chart.view) return null;
    const x = event.clientX - plot.getBoundingClientRect().left, frame = chart.view.frame;
    if (x < frame.bbox.left - 12 || x > frame.bbox.right + 12 || !steps.length) return null;
    const [from, to] = window_();
    const own = [...new Set(data.points[curve.key].filter((_, run) => shown(run)).flatMap((one) => one.step))].sort((a, b) => a - b);
    const inside = own.filter((step) => step >= from && step <= to);
    return inside.length ? inside[nearest(inside, frame.x_scale.invert(x))] : null;
  };
  plot.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const step = stepOf(event);
    hover = step === null ? null : { step, chart, x: event.clientX, y: event.clientY };
    soon();
  });
  plot.addEventListener("pointerleave", () => {
    hover = null;
    soon();
  });
  plot.addEventListener("click", (event) => {
    const step = stepOf(event);
    if (step !== null) moveCursor(step);
  });
  box.addEventListener("keydown", (event) => {
    if (event.target !== box || event.ctrlKey || event.altKey || event.metaKey) return;
    const here = nearest(steps, cursor()), far = event.shiftKey ? 10 : 1, end = steps.length - 1;
    const place = { ArrowRight: Math.min(end, here + far), ArrowLeft: Math.max(0, here - far), Home: 0, End: end }[event.key];
    if (place === undefined || !steps.length) return;
    event.preventDefault();
    moveCursor(steps[place]);
  });
  return chart;
}
async function draw(chart) {
  if (chart.begun) return;
  chart.begun = true;
  const target = make("div");
  target.id = `plot-${charts.size}-${[...charts.keys()].indexOf(chart.curve.key)}`;
  chart.plot.prepend(target);
  const views = await Bokeh.embed.embed_item(data.figure, target.id);
  chart.view = views.roots[0];
  fill(chart);
  paint(chart);
}
const find = (chart, name) => chart.view.model.document.get_model_by_name(name);
const gaps = (values) => Float64Array.from(values, (value) => (value === null ? NaN : value));

function fill(chart) {
  const runs = data.points[chart.curve.key];
  runs.forEach((one, run) => {
    const smooth = one.smooth ?? one.value, long = one.step.length > 40;
    find(chart, `line${run}`).data = { step: Float64Array.from(one.step), value: gaps(one.value), smooth: gaps(smooth) };
    // Dots: all points of a short curve; of a long one a few, to tell runs apart.
    const every = long ? (RUNS > 1 ? Math.ceil(one.step.length / 7) : Infinity) : 1;
    const offset = long ? Math.floor((every * (run + 1)) / (RUNS + 1)) : 0;
    const values = choice.smooth && one.smooth ? smooth : one.value;
    const dots = one.step.map((_, place) => place).filter((place) => every !== Infinity && place % every === offset % every && values[place] !== null);
    find(chart, `dots${run}`).data = { step: Float64Array.from(dots, (place) => one.step[place]), value: Float64Array.from(dots, (place) => values[place]) };
    find(chart, `marks${run}`).data = { step: Float64Array.from(one.marks, (mark) => mark[0]) };
  });
  arrange(chart);
}
// Which lines are seen, and the axes.
function arrange(chart) {
  const runs = data.points[chart.curve.key], [from, to] = window_(), renderers = chart.view.model.renderers;
  const by = (name) => renderers.find((one) => one.name === name);
  let low = Infinity, high = -Infinity;
  runs.forEach((one, run) => {
    const smooth = choice.smooth && one.smooth !== null, few = one.step.length <= 40;
    by(`raw${run}`).visible = shown(run);
    by(`raw${run}`).glyph.line_alpha = smooth ? 0.3 : 1;
    by(`raw${run}`).glyph.line_width = smooth ? 1 : 1.8;
    by(`smooth${run}`).visible = shown(run) && smooth;
    by(`dot${run}`).visible = shown(run) && (RUNS > 1 || (few && !smooth));
    by(`mark${run}`).visible = shown(run);
    if (!shown(run)) return;
    one.step.forEach((step, place) => {
      const value = one.value[place];
      if (value === null || step < from || step > to) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
  });
  if (low > high) [low, high] = [0, 1];
  if (chart.curve.floor !== null) [low, high] = [Math.min(0, low), Math.max(chart.curve.floor, high)];
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
  const edge = (to - from) * 0.015;
  Object.assign(chart.view.model.x_range, { start: from - edge, end: to + edge });
  Object.assign(chart.view.model.y_range, { start: chart.curve.floor !== null && low === 0 ? 0 : low - pad, end: high + pad });
  const marks = runs.flatMap((one, run) => (shown(run) ? one.marks.map((mark) => mark[0]) : []));
  chart.warned.textContent = marks.length ? `⚠ warned at step ${[...new Set(marks)].sort((a, b) => a - b).join(", ")}` : "";
}
// Colours are the page's, light or dark.
function paint(chart) {
  const soft = colour("--soft"), line = colour("--line"), model = chart.view.model;
  for (const axis of [...model.below, ...model.left]) {
    Object.assign(axis, { axis_line_color: line, major_tick_line_color: line, major_label_text_color: soft });
  }
  for (const grid of model.center) grid.grid_line_color = grid.dimension === 1 ? line : null;
  for (const renderer of model.renderers) {
    const [, kind, run] = /^([a-z]+)(\d+)$/.exec(renderer.name), own = colour(runColour(Number(run)));
    if (kind === "mark") renderer.glyph.line_color = RUNS > 1 ? own : colour("--bad");
    else renderer.glyph.line_color = own;
    if (kind === "dot") renderer.glyph.fill_color = own;
  }
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.view && paint(chart)));

async function drawAll() {
  for (const curve of data.curves) {
    const chart = charts.get(curve.key) ?? addChart(curve);
    chart.curve = curve;
    if (chart.view) fill(chart);
  }
  const lazy = places.get(data.lazy)?.closest("details");
  await Promise.all([...charts.values()].filter((chart) => chart.curve.group !== data.lazy || lazy?.open).map(draw));
  follow();
}

// ---- The cursor: one step in all charts -------------------------------------------------------------------------
const cursor = () => Math.min(last, Math.max(first, choice.cursor ?? last));
function moveCursor(step) {
  choice.cursor = step === last ? null : step;
  keep();
  soon();
}
let asked = false;
function soon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    follow();
  });
}
function follow() {
  const step = hover?.step ?? cursor(), slider = byId("cursor");
  Object.assign(slider, { min: first, max: last, disabled: steps.length < 2 });
  slider.value = cursor();
  slider.setAttribute("aria-valuetext", `step ${cursor()} of ${last}`);
  byId("cursor-value").textContent = steps.length ? `${cursor()} of ${last}` : "none yet";
  for (const chart of charts.values()) {
    if (!chart.view) continue;
    readOut(chart, step);
    const frame = chart.view.frame, x = frame.x_scale.compute(step);
    const inside = steps.length > 0 && x >= frame.bbox.left - 1 && x <= frame.bbox.right + 1;
    chart.hair.style.display = inside ? "block" : "none";
    chart.hair.style.left = `${x}px`;
    chart.hair.style.top = `${frame.bbox.top}px`;
    chart.hair.style.height = `${frame.bbox.height}px`;
  }
  tip();
}
function readOut(chart, step) {
  const parts = [], told = [];
  data.points[chart.curve.key].forEach((one, run) => {
    if (!shown(run)) return;
    const point = valueAt(one, step), part = make("span");
    if (RUNS > 1) {
      const key = make("span", "key");
      key.append(sign(run, false));
      part.append(key, make("span", "hidden", `${data.runs[run].label}: `));
    } else if (point) part.append(make("span", "step", `step ${point.step}: `));
    part.append(number(point?.value));
    if (point && point.value !== null) {
      Object.assign(part.dataset, { run, step: point.step, value: point.value });
      part.title = `${data.runs[run].label}, step ${point.step}: ${point.value}`;
    }
    told.push(`${RUNS > 1 ? `${data.runs[run].label} ` : ""}${number(point?.value)}`);
    parts.push(part);
  });
  if (RUNS > 1) parts.unshift(make("span", "step", `step ${step}`));
  chart.read.replaceChildren(...parts);
  chart.box.setAttribute("aria-label", `${chart.curve.title}, step ${step}: ${told.join(", ")}. Arrow keys change the step.`);
}
function tip() {
  const box = byId("tip");
  box.hidden = hover === null;
  if (hover === null) return;
  const rows = [make("b", "", `step ${hover.step}`)];
  data.points[hover.chart.curve.key].forEach((one, run) => {
    if (!shown(run)) return;
    const point = valueAt(one, hover.step), row = make("div");
    if (RUNS > 1) {
      const key = make("span", "key");
      key.append(sign(run, false));
      row.append(key, `${data.runs[run].label}: `);
    }
    row.append(number(point?.value));
    if (point && point.step !== hover.step) row.append(` (step ${point.step})`);
    if (point && one.smooth && choice.smooth) row.append(` · smoothed ${number(one.smooth[nearest(one.step, hover.step)])}`);
    rows.push(row);
    for (const [at, said] of one.marks) {
      if (Math.abs(at - hover.step) <= (last - first) / 60) rows.push(make("div", "warned", `⚠ ${said}`));
    }
  });
  box.replaceChildren(...rows);
  const wide = box.offsetWidth, high = box.offsetHeight, room = document.documentElement;
  const x = hover.x + 16 + wide > room.clientWidth ? Math.max(4, hover.x - 16 - wide) : hover.x + 16;
  const y = hover.y + 14 + high > room.clientHeight ? Math.max(4, hover.y - 14 - high) : hover.y + 14;
  box.style.transform = `translate(${x}px, ${y}px)`;
}
