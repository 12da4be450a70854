"use strict";
// Texts are put in with textContent only: what a user or a model wrote never becomes markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const database = document.body.dataset.database;
  const scales = document.body.dataset.scales.split(" ").filter(Boolean);
  const SIDES = ["left", "right"];
  const SAVED = { left: "Saved: left", right: "Saved: right", tie: "Saved: tie", both_bad: "Saved: both bad", skip: "Skipped" };
  const KEYS = { ArrowLeft: "left", l: "left", ArrowRight: "right", r: "right", t: "tie", b: "both_bad", s: "skip" };
  const choiceButtons = [...document.querySelectorAll("[data-choice]")];
  const rows = SIDES.flatMap((side) => scales.map((scale) =>
    document.querySelector(`fieldset[data-side="${side}"][data-scale="${scale}"]`)));

  history.replaceState(null, "", "/"); // the token stays out of the address bar and of the history

  // ---- What the browser keeps --------------------------------------------------------------------------------
  // An unsent message lies in localStorage until the server has confirmed it, so that neither a dead server nor a closed
  // page loses it. Each has a name of its own: two tabs never write over each other's.
  const PREFIX = `cagsr-rate/${database}/`;
  const memory = new Map(); // for what the browser refuses to keep (private windows, no room)
  const stored = (act, otherwise) => { try { return act(localStorage); } catch { return otherwise(); } };
  const kept = {
    get: (name) => memory.get(name) ?? stored((storage) => storage.getItem(PREFIX + name), () => null),
    set: (name, text) => stored((storage) => storage.setItem(PREFIX + name, text), () => memory.set(name, text)),
    remove: (name) => { memory.delete(name); stored((storage) => storage.removeItem(PREFIX + name), () => null); },
    unsent: () => {
      const names = stored((storage) => Object.keys(storage), () => []).filter((key) => key.startsWith(PREFIX));
      return [...memory.keys(), ...names.map((key) => key.slice(PREFIX.length))].filter((name) => name.startsWith("unsent/")).sort();
    },
  };
  function freshId() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  // ---- Talking to the server ---------------------------------------------------------------------------------
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  function notice(text) {
    byId("notice").hidden = !text;
    byId("notice").textContent = text;
    byId("welcome-problem").textContent = byId("welcome").hidden ? "" : text;
  }
  // Asks until there is an answer that settles the matter. A server that is away, fails, or serves another ratings file
  // (412) or another token (403) now settles nothing.
  async function ask(path, message, about) {
    for (let attempt = 0; ; attempt++) {
      let response = null, answer = null;
      try {
        const options = message === null ? {} : {
          method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message),
        };
        response = await fetch(path, { ...options, signal: AbortSignal.timeout(15000) });
        answer = await response.json();
      } catch { /* away, or killed while it answered */ }
      const settled = answer !== null && response.status < 500 && response.status !== 403 && response.status !== 412;
      if (settled) {
        notice("");
        return { status: response.status, answer };
      }
      notice(`${answer?.error ?? "The server does not answer."} ${about}`);
      await sleep(Math.min(2000, 150 * 2 ** Math.min(attempt, 5)));
    }
  }
  async function deliver(name) {
    const { path, message } = JSON.parse(kept.get(name));
    const found = await ask(path, message, "Your choice is kept here and sent as soon as the server is back: leave the page open, or come back to it.");
    kept.remove(name);
    return found;
  }

  // ---- What is shown -----------------------------------------------------------------------------------------
  let now = null, busy = false, chosen = null, row = 0;
  const marked = new Map(); // question -> its marks, so that an undo brings them back

  const status = (text) => { byId("status").textContent = text; };
  function show(part) {
    byId("welcome").hidden = part !== "welcome";
    byId("rating").hidden = part !== "rating";
  }
  function putText(box, text) {
    box.classList.toggle("empty", text.trim() === "");
    box.textContent = text.trim() === "" ? "(an empty answer)" : text;
  }
  function putPrompt(box, prompt) {
    box.replaceChildren();
    if (typeof prompt === "string") {
      box.textContent = prompt;
      return;
    }
    for (const message of prompt) {
      const part = document.createElement("div"), role = document.createElement("span"), text = document.createElement("div");
      part.className = "message";
      role.className = "role";
      role.textContent = message.role;
      text.textContent = message.content;
      text.dir = "auto";
      part.append(role, text);
      box.append(part);
    }
  }
  function render(progress) {
    now = progress;
    show("rating");
    byId("who").textContent = progress.rater;
    byId("progress").max = Math.max(1, progress.total);
    byId("progress").value = progress.done;
    byId("count").textContent = `${progress.done} of ${progress.total}`;
    const question = progress.question;
    document.body.dataset.question = question?.id ?? "";
    byId("ask").hidden = question === null;
    byId("end").hidden = question !== null;
    if (question !== null) {
      putPrompt(byId("prompt"), question.prompt);
      for (const side of SIDES) putText(byId(side), question[side]);
      for (const box of document.querySelectorAll(".text")) box.scrollTop = 0;
      putMarks(marked.get(question.id));
      window.scrollTo(0, 0);
      byId("ask").focus({ preventScroll: true });
    }
    enable();
  }
  function enable() {
    for (const button of choiceButtons) {
      button.disabled = busy || now?.question == null;
      button.setAttribute("aria-pressed", busy && button.dataset.choice === chosen);
    }
    document.querySelector(".choices").classList.toggle("over", now?.question === null);
    byId("undo").disabled = busy || now?.last == null;
    document.body.dataset.busy = busy;
  }

  // ---- Scales ------------------------------------------------------------------------------------------------
  const markOf = (fieldset) => Number(fieldset.querySelector("input:checked")?.value ?? 0);
  function point(place) {
    row = Math.min(place, rows.length);
    rows.forEach((fieldset, i) => fieldset.classList.toggle("active", i === row));
  }
  function putMarks(marks) {
    for (const fieldset of rows) {
      const mark = marks?.[fieldset.dataset.side]?.[fieldset.dataset.scale];
      for (const input of fieldset.querySelectorAll("input")) input.checked = Number(input.value) === mark;
    }
    point(0);
  }
  function marks() {
    const found = { left: {}, right: {} };
    for (const fieldset of rows) if (markOf(fieldset)) found[fieldset.dataset.side][fieldset.dataset.scale] = markOf(fieldset);
    return found;
  }
  function markRow(mark) {
    if (row >= rows.length) return;
    rows[row].querySelector(`input[value="${mark}"]`).checked = true;
    point(row + 1);
    rows[row]?.scrollIntoView({ block: "nearest" });
  }
  rows.forEach((fieldset, i) => {
    fieldset.addEventListener("focusin", () => point(i));
    fieldset.addEventListener("change", () => point(i));
  });

  // ---- Rating ------------------------------------------------------------------------------------------------
  async function act(name, path, message, said) {
    busy = true;
    chosen = message.choice ?? null;
    enable();
    kept.set(name, JSON.stringify({ path, message }));
    const { status: code, answer } = await deliver(name);
    busy = false;
    if (code === 200) status(said);
    else status(code === 409 ? "This question was rated before, in another window: that rating stands." : answer.error);
    if ("total" in answer) render(answer);
    else await open(now.rater);
  }
  function choose(choice) {
    if (busy || now?.question == null) return;
    const id = now.question.id, given = scales.length && choice !== "skip" ? marks() : null;
    if (given !== null) {
      marked.set(id, given);
      const missing = rows.filter((fieldset) => !markOf(fieldset));
      if (missing.length) {
        status(`Mark both answers on every scale, or skip: ${missing.length} to go.`);
        point(rows.indexOf(missing[0]));
        missing[0].scrollIntoView({ block: "nearest" });
        return;
      }
    }
    const client_id = freshId();
    const message = { database, rater: now.rater, question: id, choice, client_id, marks: given };
    act(`unsent/${Date.now()}-${client_id}`, "/api/rate", message, `${SAVED[choice]}.`);
  }
  function undo() {
    if (busy || now?.last == null) return;
    const message = { database, rater: now.rater, client_id: now.last };
    act(`unsent/${Date.now()}-undo`, "/api/undo", message, "Taken back: judge it again.");
  }
  for (const button of choiceButtons) {
    // The second half of a double click would judge the next question unseen.
    button.addEventListener("click", (event) => event.detail < 2 && choose(button.dataset.choice));
  }
  byId("undo").addEventListener("click", undo);
  document.addEventListener("keydown", (event) => {
    if (byId("rating").hidden || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    const radio = event.target instanceof HTMLInputElement;
    if (radio && event.key.startsWith("Arrow")) return; // they move within the row of marks
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key in KEYS) choose(KEYS[key]);
    else if (key === "u") undo();
    else if (scales.length && /^[1-5]$/.test(key)) markRow(key);
    else return;
    event.preventDefault();
  });
  window.addEventListener("beforeunload", (event) => {
    if (kept.unsent().length) event.preventDefault();
  });

  // ---- Coming and going --------------------------------------------------------------------------------------
  function welcome(problem) {
    show("welcome");
    byId("welcome-problem").textContent = problem;
    byId("name").focus();
  }
  async function open(rater) {
    const path = `/api/state?${new URLSearchParams({ database, rater })}`;
    const { status: code, answer } = await ask(path, null, "The page goes on as soon as the server is back.");
    if (code === 200) render(answer);
    else welcome(code === 404 ? "" : answer.error);
  }
  byId("name-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const { status: code, answer } = await ask("/api/rater", { database, rater: byId("name").value }, "The page goes on as soon as the server is back.");
    if (code !== 200) return welcome(answer.error);
    kept.set("rater", answer.rater);
    status("");
    render(answer);
  });
  byId("leave").addEventListener("click", () => {
    if (busy) return;
    kept.remove("rater");
    byId("name").value = "";
    welcome("");
  });
  (async () => {
    const rater = kept.get("rater");
    const unsent = kept.unsent();
    if (unsent.length) show("rating");
    for (const name of unsent) if (kept.get(name) !== null) await deliver(name);
    if (rater !== null) await open(rater);
    else welcome("");
    document.body.dataset.ready = "true";
  })();
})();
