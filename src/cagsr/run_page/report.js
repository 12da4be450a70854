"use strict";
// Texts are put in with textContent only: what a user or a model wrote never becomes markup.
(async () => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  let data = JSON.parse(byId("data").textContent);
  const RUNS = data.runs.length;
  Bokeh.logger.set_level("off");

  // ---- Choices: kept when the page is refreshed or loaded again ------------------------------------------------
  const STORE = `cagsr-report:${location.pathname}`;
  // cursor and answerStep: null follows the newest step.
  const choice = { cursor: null, from: "", to: "", smooth: true, hidden: [], run: 0, arrange: "step", answerStep: null, prompt: 0, changes: true };
  try {
    Object.assign(choice, JSON.parse(sessionStorage.getItem(STORE) || "{}"));
  } catch { /* no storage here: the choices live as long as the page */ }
  function keep() {
    try {
      sessionStorage.setItem(STORE, JSON.stringify(choice));
    } catch { /* as above */ }
  }
  const shown = (run) => !choice.hidden.includes(run);

  // ---- Numbers and signs ----------------------------------------------------------------------------------------
  function number(x) {
    if (x === null || x === undefined) return "–";
    const size = Math.abs(x);
    const text = size !== 0 && (size >= 1e6 || size < 1e-4) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
    return text.replace("-", "−");
  }
  const three = (x) => (x === null ? "–" : number(Number(x.toPrecision(3))));
  const signed = (x) => (x === null ? "–" : `${x > 0 ? "+" : ""}${three(x)}`);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const runColour = (run) => `--r${run % 7}`;
  const SVG = "http://www.w3.org/2000/svg";
  const SHAPES = {
    circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", square: "M-3.5-3.5h7v7h-7z", triangle: "M0-4.5L4.3 3.5H-4.3z",
    diamond: "M0-5L3.6 0L0 5L-3.6 0z", inverted_triangle: "M0 4.5L4.3-3.5H-4.3z", plus: "M-1.2-4.5h2.4v3.3h3.3v2.4h-3.3v3.3h-2.4v-3.3h-3.3v-2.4h3.3z",
    x: "M-4-2.6L-2.6-4L0-1.4L2.6-4L4-2.6L1.4 0L4 2.6L2.6 4L0 1.4L-2.6 4L-4 2.6L-1.4 0z", star: "M0-5L1.3-1.7L4.8-1.5L2.1.7L3 4.1L0 2.2L-3 4.1L-2.1.7L-4.8-1.5L-1.3-1.7z",
  };
  const DASHES = { solid: "", dashed: "6 4", dotted: "2 3", dashdot: "2 3 6 3", dotdash: "6 3 2 3" };
  function sign(run, wide) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", wide ? "-20 -6 40 12" : "-7 -6 14 12");
    if (wide) {
      const line = document.createElementNS(SVG, "path");
      line.setAttribute("d", "M-19 0H19");
      line.setAttribute("style", `stroke:var(${runColour(run)});stroke-width:2;fill:none;stroke-dasharray:${DASHES[data.dashes[run % data.dashes.length]] || "none"}`);
      svg.append(line);
    }
    const mark = document.createElementNS(SVG, "path");
    mark.setAttribute("d", SHAPES[data.markers[run % data.markers.length]]);
    mark.setAttribute("style", `fill:var(${runColour(run)})`);
    svg.append(mark);
    return svg;
  }
  function putSigns(box) {
    for (const key of box.querySelectorAll(".key:empty")) key.append(sign(Number(key.dataset.run), key.classList.contains("wide")));
  }

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

  // ---- Answers ----------------------------------------------------------------------------------------------------
  const answers = () => data.answers[Math.min(choice.run, RUNS - 1)];
  function options(select, entries, value) {
    const same = select.options.length === entries.length && entries.every(([key, text], i) => select.options[i].value === String(key) && select.options[i].textContent === text);
    if (!same) {
      select.replaceChildren(...entries.map(([key, text]) => {
        const option = make("option", "", text);
        option.value = key;
        return option;
      }));
    }
    select.value = String(value);
    select.disabled = entries.length === 0;
  }
  function showAnswers() {
    const { prompts, rows, left_out: leftOut } = answers();
    const all = [...new Set(rows.map((row) => row.step))];
    const times = new Map();
    for (const row of rows) {
      const key = `${row.prompt}${row.held_out ? "h" : "t"}`;
      if (!times.has(key)) times.set(key, { prompt: row.prompt, held_out: row.held_out, steps: new Set() });
      times.get(key).steps.add(row.step);
    }
    const again = [...times.entries()].filter(([, one]) => one.steps.size > 1).sort(([, a], [, b]) => b.held_out - a.held_out || b.steps.size - a.steps.size);
    const byPrompt = choice.arrange === "prompt" && again.length > 0;
    const radio = document.querySelector('input[name="arrange"][value="prompt"]');
    radio.disabled = again.length === 0;
    radio.parentElement.title = again.length ? "" : "No prompt was answered at two steps yet.";
    document.querySelector(`input[name="arrange"][value="${byPrompt ? "prompt" : "step"}"]`).checked = true;
    byId("pick-step").hidden = byPrompt;
    byId("answers-prompt").hidden = !byPrompt;

    const step = choice.answerStep === null ? all[all.length - 1] : all[nearest(all, choice.answerStep)];
    options(byId("answers-step"), all.map((one) => [one, `step ${one}`]), step);
    byId("step-back").disabled = all.indexOf(step) <= 0;
    byId("step-on").disabled = all.indexOf(step) >= all.length - 1;
    const key = times.has(choice.prompt) && times.get(choice.prompt).steps.size > 1 ? choice.prompt : again[0]?.[0];
    const short = (text) => (text.length > 90 ? `${text.slice(0, 90)}…` : text).replace(/\s+/g, " ");
    options(byId("answers-prompt"), again.map(([one, { prompt, held_out: held, steps: seen }]) => [one, `${held ? "held-out: " : ""}${short(prompts[prompt])} (${seen.size} steps)`]), key ?? "");

    const chosen = byPrompt ? rows.filter((row) => `${row.prompt}${row.held_out ? "h" : "t"}` === key) : rows.filter((row) => row.step === step);
    const most = Math.max(1e-9, ...chosen.flatMap((row) => row.terms.map((term) => Math.abs(term[2] ?? 0))));
    byId("answers").replaceChildren(...chosen.map((row) => card(row, prompts[row.prompt], most)));
    const notes = [];
    if (!rows.length) notes.push("No answers yet.");
    else if (!again.length) notes.push("No prompt was answered at two steps, so there is nothing to compare an answer with.");
    else if (!byPrompt) notes.push("Changes are marked against the first answer to the same prompt, where there is one.");
    if (leftOut) notes.push(`The answers of ${leftOut} steps are left out, at even distances, for the page's size.`);
    byId("answers-note").textContent = notes.join(" ");
  }
  function card(row, prompt, most) {
    const box = make("article", "answer"), head = make("div", "head");
    box.dataset.step = row.step;
    box.dataset.reward = row.reward ?? "";
    head.append(make("b", "", row.held_out ? `step ${row.step}, held out` : `step ${row.step}`));
    if (row.reward !== null) head.append(make("span", "", `reward ${signed(row.reward)}`));
    if (row.metric !== null) head.append(make("span", "", `metric ${number(row.metric)}`));
    if (row.held_out) head.append(make("span", "", "greedy"));
    if (typeof row.tokens === "number") head.append(make("span", "", `${row.tokens} ${row.tokens === 1 ? "token" : "tokens"}`));
    if (row.ended !== null && row.ended !== undefined) head.append(make("span", "", row.ended ? "ended by itself" : "cut"));
    const quote = make("blockquote", "", prompt), text = make("p", "text");
    quote.tabIndex = prompt.length > 400 ? 0 : -1;
    if (row.diff && choice.changes) {
      for (const [kind, piece] of row.diff) text.append(kind === 0 ? piece : make(kind > 0 ? "ins" : "del", "", piece));
      if (!row.text) text.append(" (nothing)");
    } else text.textContent = row.text || "(nothing)";
    box.append(head, quote, text);
    if (row.first) {
      const before = row.first.reward === null ? "" : ` (reward ${signed(row.first.reward)})`;
      box.append(make("p", "soft", row.same ? `The same as at step ${row.first.step}${before}.` : `${choice.changes ? "Changes" : "Changed"} since step ${row.first.step}${before}.`));
    }
    if (row.terms.length) box.append(breakdown(row.terms, most));
    return box;
  }
  function breakdown(terms, most) {
    const table = make("table", "terms"), body = make("tbody");
    const head = make("thead"), titles = make("tr");
    for (const [text, wide] of [["term", "36%"], ["value", "20%"], ["paid", "20%"], ["", ""]]) {
      const title = make("th", "", text);
      title.scope = "col";
      title.style.width = wide;
      titles.append(title);
    }
    head.append(titles);
    for (const [name, value, paid] of terms) {
      const row = make("tr"), title = make("th", "", name.replaceAll("_", " ")), track = make("td", "track");
      title.scope = "row";
      Object.assign(row.dataset, { term: name, raw: value ?? "", contribution: paid ?? "" });
      if (paid !== null) {
        const width = (50 * Math.abs(paid)) / most, fill = make("span", paid < 0 ? "fill negative" : "fill");
        fill.style.left = `${paid < 0 ? 50 - width : 50}%`;
        fill.style.width = `${width}%`;
        track.append(fill);
      }
      track.setAttribute("aria-hidden", "true");
      row.append(title, make("td", "", value === null ? "n/a" : three(value)), make("td", "", signed(paid)), track);
      body.append(row);
    }
    table.append(head, body);
    return table;
  }

  // ---- Controls ---------------------------------------------------------------------------------------------------
  function rearrange() {
    keep();
    charts.forEach((chart) => chart.view && fill(chart));
    soon();
  }
  byId("smooth").checked = choice.smooth;
  byId("from").value = choice.from;
  byId("to").value = choice.to;
  byId("changes").checked = choice.changes;
  byId("cursor").addEventListener("input", (event) => moveCursor(steps[nearest(steps, Number(event.target.value))]));
  byId("smooth").addEventListener("change", (event) => {
    choice.smooth = event.target.checked;
    rearrange();
  });
  for (const end of ["from", "to"]) byId(end).addEventListener("change", (event) => {
    choice[end] = event.target.value;
    rearrange();
  });
  for (const box of document.querySelectorAll(".show-run")) {
    const run = Number(box.value);
    box.checked = shown(run);
    box.addEventListener("change", () => {
      choice.hidden = box.checked ? choice.hidden.filter((one) => one !== run) : [...choice.hidden, run];
      rearrange();
    });
  }
  const again = () => {
    keep();
    showAnswers();
  };
  const runPick = byId("answers-run");
  if (runPick) {
    runPick.value = choice.run;
    runPick.addEventListener("change", () => {
      Object.assign(choice, { run: Number(runPick.value), prompt: 0 });
      again();
    });
  }
  function pickStep(step) {
    const all = [...new Set(answers().rows.map((row) => row.step))];
    choice.answerStep = step === all[all.length - 1] ? null : step;
    again();
  }
  byId("answers-step").addEventListener("change", (event) => pickStep(Number(event.target.value)));
  for (const [id, way] of [["step-back", -1], ["step-on", 1]]) byId(id).addEventListener("click", () => {
    const select = byId("answers-step"), option = select.options[select.selectedIndex + way];
    if (option) pickStep(Number(option.value));
  });
  byId("answers-prompt").addEventListener("change", (event) => {
    choice.prompt = event.target.value;
    again();
  });
  byId("changes").addEventListener("change", (event) => {
    choice.changes = event.target.checked;
    again();
  });
  for (const radio of document.querySelectorAll('input[name="arrange"]')) radio.addEventListener("change", () => {
    choice.arrange = radio.value;
    again();
  });
  byId("warnings").addEventListener("click", (event) => {
    const step = event.target.closest("[data-jump]")?.dataset.jump;
    if (step === undefined) return;
    moveCursor(Number(step));
    byId("curves").scrollIntoView({ block: "start" });
  });
  window.addEventListener("resize", () => setTimeout(soon, 150));

  // ---- News, where the page is served -----------------------------------------------------------------------------
  let version = document.body.dataset.live;
  function ages(now) {
    for (const span of document.querySelectorAll(".ago")) {
      const written = Number(span.dataset.written), state = span.closest("[data-state]").dataset.state;
      if (!span.dataset.written) continue;
      const date = new Date(written * 1000), seconds = Math.max(0, Math.round(now - written));
      const when = date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      const since = seconds < 90 ? `${seconds} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
      span.textContent = version && state === "running" ? `last step ${since} ago` : `last step: ${when}`;
    }
  }
  function replace(html) {
    for (const [id, text] of Object.entries(html)) {
      const box = byId(id), fresh = make("div");
      fresh.innerHTML = text; // the server's own markup, escaped there; the policy lets no script in it run
      if (box.sent === text) continue;
      box.sent = text;
      const open = [...box.querySelectorAll("details[open]")].map((one) => one.dataset.id);
      const focused = box.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
      box.replaceChildren(...fresh.childNodes);
      for (const one of box.querySelectorAll("details")) one.open = open.includes(one.dataset.id);
      if (focused) box.querySelector(`[data-id="${focused}"]`)?.focus();
      putSigns(box);
    }
  }
  async function ask() {
    const contact = byId("contact");
    try {
      const answer = await fetch(`news.json?have=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const news = await answer.json();
      contact.classList.toggle("lost", Boolean(news.error));
      if (news.error) contact.textContent = news.error;
      else if (contact.dataset.lost) {
        contact.textContent = "This page refreshes while training goes on.";
      }
      contact.dataset.lost = news.error ? "1" : "";
      if (news.data) {
        version = news.version;
        data = news.data;
        span();
        replace(news.html);
        await drawAll();
        showAnswers();
        byId("thinned").hidden = !data.thinned;
        title();
      }
      ages(news.now);
    } catch (error) {
      if (!(error instanceof TypeError) && !/^\d+$/.test(error.message)) throw error;
      contact.classList.add("lost");
      contact.dataset.lost = "1";
      contact.textContent = "cagsr report is not answering any more: this is what it showed last.";
    }
    const busy = data.runs.some((run) => run.state === "running" || run.state === "waiting");
    setTimeout(ask, document.hidden ? 10000 : busy ? 1500 : 4000);
  }
  const name = document.title;
  function title() {
    const states = new Set(data.runs.map((run) => run.state));
    document.title = version ? `${states.size === 1 ? [...states][0] : `${data.runs.filter((run) => run.state === "running").length} running`} · ${name}` : name;
  }

  span();
  putSigns(document);
  ages(Date.now() / 1000);
  title();
  byId("thinned").hidden = !data.thinned;
  showAnswers();
  await drawAll();
  document.body.dataset.ready = "true";
  if (version) setTimeout(ask, 1000);
})();
