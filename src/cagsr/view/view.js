"use strict";
// Texts are put in with textContent only: what a user or a model wrote never becomes markup.
(async () => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const prompt = data.prompt, answers = data.answers;
  const P = prompt.tokens.length, W = prompt.words.length;
  const STEPS = 10, STRONGEST = 3;
  const VALUE = Float32Array.from({ length: 256 }, (_, q) => (q / 255) ** 2);
  const status = byId("status"), hint = status.textContent;
  const layerPick = byId("layer"), headPick = byId("head");

  // ---- Texts -------------------------------------------------------------------------------------------------
  function makeList(box, tokens, kind, index, classOf) {
    const list = { box, tokens, kind, index, spans: [], base: [], level: new Uint8Array(tokens.length), tops: [], current: 0 };
    const part = document.createDocumentFragment();
    tokens.forEach((text, i) => {
      const span = document.createElement("span");
      span.textContent = text;
      list.base.push(["t", classOf(i), text === "" ? "split" : "", text.includes("\n") ? "nl" : ""].filter(Boolean).join(" "));
      span.className = list.base[i];
      span.setAttribute("role", "option");
      span.tabIndex = i === 0 ? 0 : -1;
      span.place = i;
      list.spans.push(span);
      part.append(span);
    });
    box.append(part);
    // The numbers of the strongest three are moved about, not put into the tokens: thousands of them need no new layout.
    list.badges = Array.from({ length: STRONGEST }, (_, n) => {
      const badge = document.createElement("span");
      badge.className = "badge";
      badge.setAttribute("aria-hidden", "true");
      badge.dataset.n = n + 1;
      box.append(badge);
      return badge;
    });
    return list;
  }
  const cards = [...document.querySelectorAll(".answer")];
  const promptList = makeList(byId("prompt"), prompt.tokens, "prompt", 0, (i) => (prompt.word[i] < 0 ? "grey" : ""));
  const answerLists = answers.map((answer, a) =>
    makeList(cards[a].querySelector(".tokens"), answer.tokens, "answer", a, (i) => (answer.repeated[i] ? "repeated" : "")));
  const regions = prompt.regions, G = regions.length;
  const regionList = makeRegions();
  const lists = [promptList, ...answerLists, ...(G ? [regionList] : [])];

  // The regions of the images, or of a sound's time, are tokens like others, but lie over the images, or over the waveform.
  function makeRegions() {
    const list = { box: byId("images"), tokens: regions.map((one) => one.name), kind: "region", index: 0, spans: [], base: [],
      level: new Uint8Array(G), tops: [], current: 0, badges: [] };
    regions.forEach((one, i) => {
      const span = document.createElement("span"), [left, top, right, bottom] = one.place;
      list.base.push(one.share > 0 ? "t region" : "t region grey");
      span.className = list.base[i];
      span.setAttribute("role", "option");
      span.tabIndex = i === 0 ? 0 : -1;
      span.place = i;
      Object.assign(span.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`,
        height: `${100 * (bottom - top)}%` });
      list.spans.push(span);
      list.box.querySelector(`figure[data-image="${one.image}"]`).append(span);
    });
    return list;
  }

  // ---- Shading -----------------------------------------------------------------------------------------------
  // Only tokens whose step changes are touched: that is what keeps thousands of them quick.
  function shade(list, valueAt, scale) {
    for (let i = 0; i < list.spans.length; i++) {
      const step = scale > 0 ? Math.max(0, Math.min(STEPS, Math.round((STEPS * valueAt(i)) / scale))) : 0;
      if (step !== list.level[i]) {
        list.level[i] = step;
        list.spans[i].className = step ? `${list.base[i]} l${step}` : list.base[i];
      }
    }
  }
  function markTops(list, places) {
    if (!places.length && !list.tops.length) return;
    for (const i of list.tops) list.spans[i].classList.remove("top");
    list.tops = places;
    // Read all places before anything is changed, else each reading would wait for a layout of its own.
    const corners = places.map((i) => {
      const span = list.spans[i], right = Math.min(span.offsetLeft + span.offsetWidth, list.box.clientWidth - 4);
      return [right - 9, span.offsetTop - 7];
    });
    list.badges.forEach((badge, n) => {
      badge.style.visibility = n < places.length ? "visible" : "hidden";
      if (n < places.length) badge.style.transform = `translate(${Math.max(0, corners[n][0])}px, ${Math.max(0, corners[n][1])}px)`;
    });
    for (const i of places) list.spans[i].classList.add("top");
  }
  function strongest(count, valueAt, from) {
    const found = [];
    for (let i = from; i < count; i++) {
      const value = valueAt(i);
      if (value <= 0 || (found.length === STRONGEST && value <= found[STRONGEST - 1].value)) continue;
      found.push({ i, value });
      found.sort((x, y) => y.value - x.value);
      if (found.length > STRONGEST) found.pop();
    }
    return found;
  }

  // ---- Attention ---------------------------------------------------------------------------------------------
  const maps = answers.map(() => null), looks = answers.map(() => null);
  let plane = 0;
  const regionAt = (a, t, r) => (looks[a] ? VALUE[looks[a][t * G + r]] : 0);
  const bestAt = (a, r) => answers[a].tokens.reduce((best, _, t) => Math.max(best, regionAt(a, t, r)), 0);
  const at = (a, t, j) => VALUE[maps[a][(plane * answers[a].tokens.length + t) * P + j]];

  async function unpack(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Best attention to each word and each token's focus: from the reward itself, or from the layer and head chosen.
  const seen = new Map();
  function summary(a) {
    if (plane === 0 || !maps[a]) return answers[a];
    const key = `${plane}/${a}`;
    if (seen.has(key)) return seen.get(key);
    const R = answers[a].tokens.length, best = new Float32Array(W), focus = [], words = new Float32Array(W);
    for (let t = 0; t < R; t++) {
      words.fill(0);
      for (let j = 0; j < P; j++) {
        const w = prompt.word[j];
        if (w < 0) continue;
        const value = at(a, t, j);
        words[w] = data.pooling === "sum" ? words[w] + value : Math.max(words[w], value);
      }
      let mass = 0, entropy = 0;
      for (let w = 0; w < W; w++) {
        mass += words[w];
        best[w] = Math.max(best[w], words[w]);
      }
      for (let w = 0; w < W; w++) if (words[w] > 0) entropy -= (words[w] / mass) * Math.log(words[w] / mass);
      const spread = mass > 0 ? entropy / Math.log(Math.max(W, 2)) : 1;
      focus.push(W > 1 ? 1 - Math.min(1, Math.max(data.floor, spread)) : 0);
    }
    const found = { best, focus };
    seen.set(key, found);
    return found;
  }

  // ---- Focus lines -------------------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  const lines = cards.map((card) => {
    const svg = card.querySelector(".focus svg"), path = document.createElementNS(SVG, "path");
    const cursor = document.createElementNS(SVG, "line");
    svg.setAttribute("preserveAspectRatio", "none");
    cursor.setAttribute("y1", 0);
    cursor.setAttribute("y2", 1);
    cursor.style.display = "none";
    svg.append(path, cursor);
    return { svg, path, cursor, value: card.querySelector(".focus-value") };
  });
  function drawFocus() {
    lines.forEach((line, a) => {
      const focus = summary(a).focus, last = Math.max(1, focus.length - 1);
      line.svg.setAttribute("viewBox", `0 0 ${last} 1`);
      const points = focus.map((value, t) => `${t},${(1 - value).toFixed(4)}`);
      line.path.setAttribute("d", `M${points.join("L")}${focus.length === 1 ? `H${last}` : ""}`);
      const mean = focus.reduce((sum, value) => sum + value, 0) / focus.length;
      line.mean = `mean ${mean.toFixed(3)}, from 0 to 1`;
      line.svg.setAttribute("aria-label", `Focus over the answer: ${line.mean}`);
      line.value.textContent = `(${line.mean})`;
    });
  }

  // ---- What is shown -----------------------------------------------------------------------------------------
  let chosen = 0, hover = null, focused = null, pinned = null, source = null;

  const number = (x) => (x >= 0.1 ? x.toFixed(2) : x >= 0.001 ? x.toFixed(3) : x.toFixed(4));
  const percent = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
  const quote = (text) => `“${text === "" ? "‥" : text.trim() === "" ? text.replace(/\n/g, "↵") : text.trim()}”`;
  // The first token is where attention parks (the sink); unless it counts it would drown all others.
  const first = P > 1 && prompt.word[0] < 0 ? 1 : 0;

  function legend(high, what) {
    byId("legend-high").textContent = high;
    byId("legend-what").textContent = what;
  }
  function colourPrompt() {
    const mode = document.querySelector('input[name="colour"]:checked').value;
    const word = prompt.word;
    if (mode === "salience") {
      const most = prompt.share.reduce((x, y) => Math.max(x, y), 0);
      shade(promptList, (j) => (word[j] < 0 ? 0 : prompt.share[word[j]]), most);
      legend(percent(most), "share of the prompt’s salience");
      const heaviest = regions.reduce((x, one) => Math.max(x, one.share), 0);
      shade(regionList, (r) => regions[r].share, heaviest);
    } else {
      const best = summary(chosen).best;
      shade(promptList, (j) => (word[j] < 0 ? 0 : best[word[j]]), data.threshold);
      shade(regionList, (r) => bestAt(chosen, r), data.region_threshold);
      const which = answers.length > 1 ? `the ${chosen + 1}. answer` : "the answer";
      legend(`${data.threshold} or more`, `best attention that a word got from ${which} (coverage)`);
    }
  }
  function choose(a) {
    chosen = a;
    cards.forEach((card, b) => {
      card.classList.toggle("chosen", answers.length > 1 && a === b);
      card.querySelector(".show")?.setAttribute("aria-pressed", String(a === b));
    });
  }

  function render() {
    const point = hover ?? focused ?? pinned;
    if (source) source.classList.remove("source");
    source = null;
    lines.forEach((line, a) => {
      const here = point && point.list.kind === "answer" && point.list.index === a;
      line.cursor.style.display = here ? "" : "none";
      if (here) {
        line.cursor.setAttribute("x1", point.i);
        line.cursor.setAttribute("x2", point.i);
      }
    });
    lists.forEach((list) => markTops(list, []));
    if (point && point.list.kind === "answer") renderAnswerToken(point);
    else if (point && point.list.kind === "region") renderRegion(point);
    else if (point) renderPromptToken(point);
    else {
      colourPrompt();
      answerLists.forEach((list) => shade(list, () => 0, 0));
      status.textContent = hint;
    }
    if (point) {
      source = point.list.spans[point.i];
      source.classList.add("source");
    }
    if (pinned) pinned.list.spans[pinned.i].classList.add("pinned");
  }
  function renderAnswerToken({ list, i }) {
    const a = list.index, answer = answers[a];
    choose(a);
    answerLists.forEach((other) => shade(other, () => 0, 0));
    const head = `${quote(answer.tokens[i])}, token ${i + 1} of ${answer.tokens.length}`;
    if (!maps[a]) {
      colourPrompt();
      status.textContent = `${head}: its attention is not on this page.`;
      return;
    }
    const look = (j) => at(a, i, j), top = strongest(P, look, first);
    const scale = top.length ? top[0].value : 0;
    shade(promptList, look, scale);
    markTops(promptList, top.map((one) => one.i));
    legend(scale ? `${number(scale)}${first ? " or more" : ""}` : "0", `attention of ${quote(answer.tokens[i])}`);
    let mass = 0;
    for (let j = 0; j < P; j++) mass += look(j);
    const parts = top.map((one) => `${quote(prompt.tokens[one.i])} ${number(one.value)}`).join(", ");
    const [spot] = strongest(G, (r) => regionAt(a, i, r), 0);
    shade(regionList, (r) => regionAt(a, i, r), spot ? spot.value : 0);
    markTops(regionList, spot ? [spot.i] : []);
    const there = spot ? ` Of ${data.regions_of} most at ${regions[spot.i].name} (${number(spot.value)}).` : "";
    const own = plane === 0 ? ` It adds ${number(answer.gains[i])} to the coverage.` : "";
    const sink = first ? `, ${percent(look(0))} on the first token` : "";
    status.textContent = `${head}, looked at ${parts || "nothing"}; ${percent(Math.min(1, mass))} on the prompt${sink}; focus ${summary(a).focus[i].toFixed(2)}.${there}${own}`;
  }
  function renderRegion({ list, i }) {
    colourPrompt();
    const tops = answerLists.map((one, a) => strongest(one.spans.length, (t) => regionAt(a, t, i), 0));
    const scale = Math.max(0, ...tops.map((top) => (top.length ? top[0].value : 0)));
    answerLists.forEach((one, a) => {
      shade(one, (t) => regionAt(a, t, i), scale);
      markTops(one, tops[a].map((top) => top.i));
    });
    const best = bestAt(chosen, i), worth = regions[i].share > 0 ? `${percent(regions[i].share)} of the weight of ${data.regions_of}` : "it weighs nothing";
    const parts = tops[chosen].map((top) => `${quote(answers[chosen].tokens[top.i])} ${number(top.value)}`).join(", ");
    status.textContent = `${list.tokens[i]}: ${worth}, best attention ${number(best)} (${percent(Math.min(1, best / data.region_threshold))} covered); looked at most by ${parts || "no token"}. Full colour in the answers: ${number(scale)}.`;
  }
  function renderPromptToken({ list, i }) {
    colourPrompt();
    const tops = answerLists.map((one, a) => (maps[a] ? strongest(one.spans.length, (t) => at(a, t, i), 0) : []));
    const scale = Math.max(0, ...tops.map((top) => (top.length ? top[0].value : 0)));
    answerLists.forEach((one, a) => {
      shade(one, maps[a] ? (t) => at(a, t, i) : () => 0, scale);
      markTops(one, tops[a].map((top) => top.i));
    });
    const w = prompt.word[i], best = summary(chosen).best;
    const worth = w < 0 ? "it does not count in the reward" :
      `${percent(prompt.share[w])} of the salience, best attention to the word ${number(best[w])} (${percent(Math.min(1, best[w] / data.threshold))} covered)`;
    const parts = tops[chosen].map((top) => `${quote(answers[chosen].tokens[top.i])} ${number(top.value)}`).join(", ");
    status.textContent = `${quote(list.tokens[i])}, token ${i + 1} of ${P}: ${worth}; looked at most by ${parts || "no token"}. Full colour in the answers: ${number(scale)}.`;
  }

  // ---- Pointer and keys --------------------------------------------------------------------------------------
  function moveTo(list, i) {
    list.spans[list.current].tabIndex = -1;
    list.current = i;
    const span = list.spans[i];
    span.tabIndex = 0;
    hover = null;
    span.focus();
    revealStrongest();
  }
  // The prompt scrolls inside its own box; on a key or a click, never on mere pointing, where it would jump about.
  function revealStrongest() {
    const point = focused ?? pinned;
    if (!point) return;
    for (const list of point.list.kind === "answer" ? [promptList] : answerLists) {
      if (!list.tops.length) continue;
      const box = list.box, span = list.spans[list.tops[0]];
      const place = span.getBoundingClientRect(), frame = box.getBoundingClientRect();
      if (place.top < frame.top || place.bottom > frame.bottom) box.scrollTop += place.top - frame.top - frame.height / 2;
    }
  }
  function lineStep(list, i, way) {
    const here = list.spans[i].getBoundingClientRect(), x = here.left + here.width / 2;
    let best = i, distance = Infinity, row = null;
    for (let k = i + way; k >= 0 && k < list.spans.length; k += way) {
      const rect = list.spans[k].getClientRects()[0];
      if (!rect || Math.abs(rect.top - here.top) < here.height * 0.6) continue;
      row ??= rect.top;
      if (Math.abs(rect.top - row) > here.height * 0.6) break;
      const gap = Math.abs(rect.left + rect.width / 2 - x);
      if (gap < distance) [best, distance] = [k, gap];
    }
    return best;
  }
  function unpin() {
    if (pinned) pinned.list.spans[pinned.i].classList.remove("pinned");
    pinned = null;
  }
  function togglePin(list, i) {
    const same = pinned && pinned.list === list && pinned.i === i;
    unpin();
    if (!same) pinned = { list, i };
    render();
    revealStrongest();
  }
  let pointerX = NaN, pointerY = NaN;
  for (const list of lists) {
    const placeOf = (event) => event.target.closest?.(".t")?.place;
    list.box.addEventListener("pointerover", (event) => {
      const i = placeOf(event);
      if (i === undefined || event.pointerType === "touch") return;
      // Text that scrolls under a resting pointer is not pointed at.
      if (event.clientX === pointerX && event.clientY === pointerY) return;
      [pointerX, pointerY] = [event.clientX, event.clientY];
      hover = { list, i };
      render();
    });
    list.box.addEventListener("pointerleave", () => {
      if (!hover) return;
      hover = null;
      render();
    });
    list.box.addEventListener("focusin", (event) => {
      const i = placeOf(event);
      if (i === undefined) return;
      list.spans[list.current].tabIndex = -1;
      list.current = i;
      list.spans[i].tabIndex = 0;
      list.spans[i].setAttribute("aria-label", `${quote(list.tokens[i])}, token ${i + 1} of ${list.tokens.length}`);
      focused = { list, i };
      render();
    });
    list.box.addEventListener("focusout", (event) => {
      if (event.relatedTarget?.classList?.contains("t")) return; // the next token's focusin shows what is to be shown
      focused = null;
      render();
    });
    list.box.addEventListener("click", (event) => {
      const i = placeOf(event);
      if (i !== undefined) togglePin(list, i);
    });
    list.box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const i = list.current, last = list.spans.length - 1;
      const target = {
        ArrowRight: () => Math.min(last, i + 1), ArrowLeft: () => Math.max(0, i - 1), Home: () => 0, End: () => last,
        ArrowDown: () => lineStep(list, i, 1), ArrowUp: () => lineStep(list, i, -1),
      }[event.key];
      if (target) moveTo(list, target());
      else if (event.key === "Enter" || event.key === " ") togglePin(list, i);
      else return;
      event.preventDefault();
    });
  }
  window.addEventListener("resize", render);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    unpin();
    hover = focused = null;
    render();
  });
  cards.forEach((card, a) => card.querySelector(".show")?.addEventListener("click", () => {
    choose(a);
    unpin();
    render();
  }));
  document.querySelectorAll('input[name="colour"]').forEach((input) => input.addEventListener("change", render));

  // ---- Layers and heads --------------------------------------------------------------------------------------
  const hasHeads = (layer) => data.planes.some(([l, h]) => l === layer && h !== null);
  function pickPlane() {
    const layer = layerPick.value === "" ? null : Number(layerPick.value);
    headPick.disabled = layer === null || !hasHeads(layer);
    if (headPick.disabled) headPick.value = "";
    const head = headPick.value === "" ? null : Number(headPick.value);
    plane = Math.max(0, data.planes.findIndex(([l, h]) => l === layer && h === head));
    drawFocus();
    render();
  }
  layerPick.disabled = data.planes.length < 2;
  layerPick.addEventListener("change", pickPlane);
  headPick.addEventListener("change", pickPlane);

  choose(0);
  drawFocus();
  render();
  if (typeof DecompressionStream === "undefined") {
    status.textContent = "This browser is too old to unpack the attention; the numbers and colours of coverage are right.";
  } else {
    await Promise.all(answers.map(async (answer, a) => {
      if (answer.map) maps[a] = await unpack(answer.map);
      if (answer.regions) looks[a] = await unpack(answer.regions);
    }));
    render();
  }
  document.body.dataset.ready = "true";
})();
