// Sample answers, by step or one prompt over time.

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
