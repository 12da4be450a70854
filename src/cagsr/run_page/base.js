// The page's script in four parts, put together in this order inside one function (page.py): what all of them share.
// Texts are put in with textContent only: what a user or a model wrote never becomes markup.

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
