// What the user can set, and news where the page is served.

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
  const count = (state) => data.runs.filter((run) => run.state === state).length;
  const told = ["running", "stopped", "waiting", "finished"].find((state) => count(state) > 0);
  document.title = version ? `${RUNS > 1 ? `${count(told)} ` : ""}${told} · ${name}` : name;
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
