// gradindex: what the page does beyond its HTML. It works without; nothing here asks another host.
// Text is only ever set as text; HTML comes from the server, parsed as a document without scripts.
"use strict";
(() => {
  const all = (what, root = document) => [...root.querySelectorAll(what)];
  const one = (what, root = document) => root.querySelector(what);
  const shown = (value) => { // three digits, as the server writes them
    const rounded = Number(value.toPrecision(3));
    let text = Math.abs(value) < 999.5 ? String(rounded) : Math.round(value).toLocaleString("en");
    if (rounded && Math.abs(rounded) < 1e-4) text = rounded.toExponential().replace(/e-(\d)$/, "e-0$1");
    return (value < 0 ? "" : "+") + text;
  };
  const exact = new Map(); // id → influence, as a search under way tells them

  // ---- state that is only a view: layers, filters, the open hit; in the URL's fragment
  const state = new URLSearchParams(location.hash.slice(1));
  const keep = () => {
    const text = state.toString();
    try { history.replaceState(null, "", text ? "#" + text : location.pathname + location.search); } catch { /* a file */ }
    for (const link of all("[data-link]")) link.textContent = location.href;
  };

  // ---- theme
  const theme = one(".theme");
  const body = document.body;
  const stored = () => { try { return localStorage.getItem("gradindex-theme"); } catch { return null; } };
  if (stored()) body.dataset.theme = stored();
  if (theme) {
    theme.hidden = false;
    theme.addEventListener("click", () => {
      const dark = body.dataset.theme ? body.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      body.dataset.theme = dark ? "light" : "dark";
      try { localStorage.setItem("gradindex-theme", body.dataset.theme); } catch { /* not kept */ }
    });
  }
  body.classList.add("js-on");

  // ---- hits: filters, layers re-summed, folding, order
  function setUp() {
    for (const item of all("button.js, form.js")) item.hidden = false;
    const form = one(".filters");
    const list = one(".hits");
    if (!form || !list) { keep(); return; }
    const layers = (one("[data-layers]").dataset.layers || "").split(" ").filter(Boolean).map(Number);
    const cards = all(".hit", list).map((card) => ({
      card, text: all(".text, .own, .where, .field", card).map((part) => part.textContent).join(" ").toLowerCase(),
      own: Number(card.dataset.influence),
      layers: (card.dataset.layers || "").split(" ").filter(Boolean).map(Number),
    }));
    const fields = form.elements;
    const [first, last] = [layers[0], layers[layers.length - 1]];

    for (const name of ["text", "source", "first", "last"]) {
      if (fields[name] && state.has(name)) fields[name].value = state.get(name);
    }
    if (state.has("fold")) fields.fold.checked = false;
    if (state.has("generic")) fields.generic.checked = true;

    const end = (field, otherwise) => !field || field.value === "" ? otherwise : Number(field.value);
    let summed = false; // some layers only are shown
    function apply(event) {
      const wanted = fields.text.value.trim().toLowerCase();
      const source = fields.source.value;
      const from = Math.max(first, end(fields.first, first));
      const to = Math.min(last, end(fields.last, last));
      const partly = from > first || to < last;
      let visible = 0;
      for (const item of cards) {
        const card = item.card;
        item.value = partly && item.layers.length ?
          item.layers.reduce((sum, value, at) => layers[at] >= from && layers[at] <= to ? sum + value : sum, 0) : item.own;
        if (item.layers.length && (partly || summed)) show(item, item.value);
        const near = card.dataset.near;
        card.classList.toggle("shown", !fields.fold.checked);
        card.hidden = (wanted && !item.text.includes(wanted)) || (source && card.dataset.source !== source) ||
          (fields.generic.checked && card.dataset.generic === "1");
        if (!card.hidden && !(near && !card.matches(".shown, .unfolded"))) visible += 1;
      }
      summed = partly;
      const sign = list.dataset.side === "opponents" ? -1 : 1;
      const order = partly ? [...cards].sort((a, b) => sign * (b.value - a.value)) : cards;
      for (const item of order) list.append(item.card);
      one(".shown", form).textContent = `${visible} of ${cards.length} hits` +
        (partly ? `; influence of layers ${from} to ${to}, exact, among these hits` : "");
      if (!event) return; // what an address asks for stays in it, though these hits may lack it yet
      set("text", wanted); set("source", source);
      set("first", from > first ? from : ""); set("last", to < last ? to : "");
      set("fold", fields.fold.checked ? "" : "0"); set("generic", fields.generic.checked ? "1" : "");
      keep();
    }
    const set = (name, value) => value === "" ? state.delete(name) : state.set(name, String(value));

    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    list.addEventListener("click", openMap);
    list.addEventListener("toggle", (event) => {
      const card = event.target.closest(".hit");
      if (!card) return;
      if (one("details[open]", card)) state.set("hit", card.dataset.id);
      else if (state.get("hit") === card.dataset.id) state.delete("hit");
      if (one(".mapped[open]", card)) state.set("map", "1"); else state.delete("map");
      keep();
    }, true);
    apply();
    for (const [id, value] of exact) becomeExact(id, value);
    const opened = document.getElementById("h" + state.get("hit"));
    if (opened && !one(".stages")) { // once the list is settled
      const [link, map] = [one("a.to-map", opened), one("details.mapped", opened)];
      if (state.has("map") && link) link.click();
      else if (state.has("map") && map) map.open = true;
      else toggle(opened, true);
      opened.scrollIntoView();
    }
    all(".share pre").slice(0, 1).forEach((pre) => { pre.dataset.link = ""; pre.textContent = location.href; });
  }

  function show(item, value) {
    const label = one(".influence", item.card);
    label.textContent = shown(value);
    label.classList.toggle("plus", value >= 0);
    label.classList.toggle("minus", value < 0);
    one(".nats", item.card).textContent = nats(value, item.card.dataset);
  }

  // as wording.nats says it of a saved result
  function nats(value, about) {
    const [change, [gain, loss]] = [value / Number(about.scale), about.room.split(" ").map(Number)];
    if (about.known !== "1") return `${about.unit === "nats" ? "nats" : "change"} unknown`;
    return change > gain || change < -loss ? "beyond first order" :
      `${shown(change)} first-order ${about.unit}`;
  }

  function becomeExact(id, value) {
    const card = document.getElementById("h" + id);
    if (!card || !card.matches(".approximate")) return;
    show({ card }, value);
    card.classList.remove("approximate");
  }

  function toggle(card, open) {
    const details = one("details.all", card) || one("details", card);
    if (details) details.open = open === undefined ? !details.open : open;
  }

  // The server's HTML as an inert document: nothing in it runs, nothing is set as markup.
  function fetchPage(url) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("GET", url);
      request.responseType = "document";
      request.onload = () => request.status === 200 && request.response ? resolve(request.response) : reject(new Error(String(request.status)));
      request.onerror = () => reject(new Error("no answer"));
      request.send();
    });
  }

  async function openMap(event) {
    const link = event.target.closest("a.to-map");
    if (!link) return;
    event.preventDefault();
    try {
      const map = one("#map", await fetchPage(link.href));
      const details = document.createElement("details");
      details.className = "mapped";
      const summary = document.createElement("summary");
      summary.textContent = "token × layer map";
      details.append(summary, ...document.adoptNode(map).childNodes);
      details.open = true;
      link.replaceWith(details);
    } catch {
      location.href = link.href;
    }
  }

  // ---- a search under way: stages, exact scores in place, then the finished page
  function follow() {
    const main = one("main[data-job]");
    if (!main || ["done", "failed"].includes(main.dataset.state)) return;
    const job = main.dataset.job;
    let hadHits = Boolean(one(".hits"));
    const events = new EventSource(`/api/result/${job}/events`);
    const stop = one(".stop");
    if (stop) stop.addEventListener("click", () => {
      stop.disabled = true;
      fetch(`/api/result/${job}/stop`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
    });
    events.addEventListener("stage", (event) => {
      const now = JSON.parse(event.data);
      all("[data-stage]").forEach((item, place) => {
        item.className = place < now.step ? "past" : place === now.step ? "now" : "";
      });
      const bar = one("progress");
      if (now.total) { bar.max = now.total; bar.value = now.done; }
      if (now.total) one(".count").textContent = `${now.done.toLocaleString("en")} of ${now.total.toLocaleString("en")} exact` +
        (now.seconds_left > 1 ? `, about ${Math.ceil(now.seconds_left)} s left` : "");
      for (const [id, value] of Object.entries(now.found)) { exact.set(id, value); becomeExact(id, value); }
      if (now.hits && !hadHits) { hadHits = true; renew(false); }
    });
    events.addEventListener("end", () => { events.close(); exact.clear(); renew(true); });
    events.addEventListener("error", () => {
      if (events.readyState === EventSource.CLOSED) one(".count").textContent = "the server has forgotten this search: load the page again";
    });
  }

  async function renew(ended) {
    try {
      const page = await fetchPage(`${location.pathname}${location.search}&job=${one("main").dataset.job}`);
      const answer = one("#answer", page);
      const there = one("#answer");
      // asked for before the end, come after it: what stands there is newer
      if (!ended && ["done", "failed"].includes(one("main").dataset.state)) return;
      if (!answer || !there) { location.reload(); return; }
      const y = scrollY;
      if (!ended) { // the stages stay, with who listens to them
        for (const child of [...answer.children]) if (!child.matches(".stages")) there.append(document.adoptNode(child));
      } else {
        there.replaceWith(document.adoptNode(answer));
        one("main").dataset.state = one("main", page).dataset.state;
      }
      setUp();
      scrollTo(0, y);
    } catch { location.reload(); }
  }

  // ---- the form: the completion's tokens, as they are typed
  function live() {
    const ask = one("form.ask");
    if (!ask) return;
    const box = one(".scored", ask); // only where there is a completion
    let timer = 0, latest = 0;
    const refresh = async () => {
      const mine = ++latest;
      const [prompt, completion] = [ask.elements.prompt.value, ask.elements.completion.value];
      if (!completion) { box.hidden = true; one(".of", box).value = ""; return; }
      let found;
      try {
        const answer = await fetch("/api/tokens", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt, completion }) });
        if (!answer.ok) return;
        found = await answer.json();
      } catch { return; }
      if (mine !== latest) return;
      for (const label of all("label", box)) label.remove();
      found.tokens.forEach((piece, place) => {
        const label = document.createElement("label");
        const check = document.createElement("input");
        Object.assign(check, { type: "checkbox", name: "score", value: String(place), checked: true });
        label.append(check, piece);
        box.append(label);
      });
      one(".of", box).value = completion;
      box.hidden = !found.tokens.length;
    };
    if (box) for (const name of ["prompt", "completion"]) ask.elements[name].addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(refresh, 250);
    });
    for (const area of all("textarea", ask)) area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
    });
    ask.addEventListener("submit", () => { // a short URL: nothing that is empty or a default
      for (const field of [...ask.elements]) {
        if (field.name && !field.value) field.disabled = true;
        if (field.tagName === "SELECT" && field.options[0].selected) field.disabled = true;
      }
      const checks = all("[name=score]", ask);
      if (box && checks.every((check) => check.checked)) for (const field of [...checks, one(".of", box)]) field.disabled = true;
      setTimeout(() => { for (const field of [...ask.elements]) field.disabled = false; }, 500);
    });
  }

  // ---- folded hits, wherever there are lists of hits
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".unfold");
    if (!button) return;
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    for (const card of all(`[data-near="${button.closest(".hit").dataset.id}"]`, button.closest(".hits"))) card.classList.toggle("unfolded", open);
    const form = one(".filters");
    if (form) form.dispatchEvent(new Event("input"));
  });

  // ---- copying, keys
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (!button) return;
    const text = button.parentElement.nextElementSibling.textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; } catch { button.textContent = "select the text"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const cards = all(".hit").filter((card) => card.offsetParent);
    const at = cards.indexOf(document.activeElement.closest ? document.activeElement.closest(".hit") : null);
    const go = (place) => { if (cards[place]) { cards[place].focus(); cards[place].scrollIntoView({ block: "nearest" }); } };
    if (event.key === "/") { const first = one("form.ask textarea"); if (first) { first.focus(); event.preventDefault(); } }
    else if (event.key === "f") { const text = one(".filters [name=text]"); if (text) { text.focus(); event.preventDefault(); } }
    else if (event.key === "j") go(Math.min(cards.length - 1, at + 1));
    else if (event.key === "k") go(Math.max(0, at - 1));
    else if (event.key === "Enter" && document.activeElement.matches(".hit")) toggle(document.activeElement);
  });

  setUp();
  follow();
  live();
})();
