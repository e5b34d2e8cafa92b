// What the pages do beside htmx: fields that change the recipe, ramps drawn by hand, dragging, a job's events.
"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const editor = () => $(".editor");
  const quoted = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`; // for a shell

  // --- the recipe: one change at a time, each of the text that the one before it has left ---
  const waiting = [];
  let asked = null, soon = null, drawing = false, refocus = "";
  const post = (where, values, target = "#form") => {
    refocus = document.activeElement ? document.activeElement.id : "";
    waiting.push({ where, values, target });
    next();
  };
  async function next() { // not while somebody types in the YAML or draws
    if (asked || soon || drawing || !waiting.length) return;
    asked = waiting.shift();
    asked.text = $("#yaml").value;
    const { where, target } = asked;
    const values = { path: editor().dataset.recipe, ...(typeof asked.values === "function" ? asked.values() : asked.values) };
    try { await htmx.ajax("POST", where, { target, swap: "innerHTML", source: "#form", values }); } catch { /* told by sendError */ }
    asked = null;
    next();
  }
  const rest = () => { // what was to be asked in a moment is asked now
    if (!soon) return;
    const { timer, what } = soon;
    clearTimeout(timer);
    soon = null;
    what();
    next();
  };
  const shortly = (of, wait, what) => {
    if (soon && soon.of !== of) rest();
    if (soon) clearTimeout(soon.timer);
    soon = { of, what, timer: setTimeout(rest, wait) };
  };
  const typed = () => waiting.unshift({ where: "/recipe/yaml", values: {}, target: "#form" });
  const places = () => [...document.querySelectorAll("#form details[id]")].map((d) => [d.id, d.open]);
  let open = [], half = null;

  const commit = (input) => {
    if (!editor() || input === half || !input.closest("#form") || input.value === (input.dataset.sent ?? input.defaultValue)) return;
    const { key, kind, rename, stage } = input.dataset;
    if (input.tagName === "INPUT") input.dataset.sent = input.value;
    if (key) post("/recipe/set", { key, value: input.value, kind: kind || "yaml" });
    else if (rename !== undefined) post("/recipe/model", { do: "rename-model", name: rename, value: input.value });
    else if (stage !== undefined) post("/recipe/stage", { do: "set-stage", index: stage, value: input.value });
  };
  document.addEventListener("change", (event) => commit(event.target));
  document.addEventListener("focusout", (event) => { if (event.target.tagName === "INPUT") commit(event.target); });
  window.addEventListener("pagehide", () => { // nothing that was typed is lost
    if (soon && soon.of === "yaml") rest();
    const last = [...waiting, asked].find((one) => one && ["/recipe/yaml", "/recipe/set"].includes(one.where));
    if (!last) return;
    const grounds = [...document.querySelectorAll("#grounds input")].map((one) => [one.name, one.value]);
    const kept = [["path", editor().dataset.recipe], ["yaml", $("#yaml").value], ...grounds, ...Object.entries(last.values)];
    navigator.sendBeacon(last.where, new URLSearchParams(kept));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.copy !== undefined) {
      const said = button.textContent;
      (navigator.clipboard ? navigator.clipboard.writeText(button.dataset.copy) : Promise.reject())
        .then(() => "copied", () => "not allowed")
        .then((text) => { button.textContent = text; setTimeout(() => { button.textContent = said; }, 1200); });
    }
    if (!editor()) return;
    const { do: what, path, name, index, ramp } = button.dataset;
    if (what === "native") post("/recipe/native", {});
    else if (what === "save") { rest(); post("/recipe/save", {}, "#saved"); }
    else if (ramp !== undefined) {
      const drawn = button.closest(".field").querySelector(".ramp");
      const number = parseFloat(button.dataset.default);
      const value = Number.isFinite(number) ? number : 0.5;
      const first = drawn ? JSON.parse(drawn.dataset.values)[0] : null;
      post("/recipe/set", { key: ramp, kind: "yaml", value: drawn ? String(first) : `[${[value, value, value, value, value].join(", ")}]` });
    } else if (what === "add-model" || what === "set-base") post("/recipe/model", { do: what, model: path });
    else if (what === "remove-model") post("/recipe/model", { do: what, name });
    else if (what && what.endsWith("-stage")) post("/recipe/stage", { do: what, index: index || "0" });
    else if (what && what.endsWith("-rule")) post("/recipe/rule", { do: what, index: index || "0" });
  });

  document.addEventListener("submit", (event) => { // a double click asks once
    const form = event.target;
    if (form.method !== "post" || event.defaultPrevented) return;
    if (form.id === "run-form") { // after the changes that are on their way
      event.preventDefault();
      rest();
      const where = event.submitter && event.submitter.getAttribute("formaction");
      post(where || form.getAttribute("action"), () => Object.fromEntries(new FormData(form)));
      return;
    }
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
    setTimeout(() => delete form.dataset.sent, 1500);
  });

  document.addEventListener("input", (event) => {
    if (event.target.id === "yaml") shortly("yaml", 350, typed);
    if (event.target.closest("#run-form")) {
      const code = $(".run-card .command code");
      const out = $("#out").value.trim() || "OUT", more = $("#overwrite").checked ? " --overwrite" : "";
      code.textContent = `weightsmith merge ${quoted(editor().dataset.recipe)} ${quoted(out.startsWith("-") ? `./${out}` : out)}${more}`;
      $(".run-card .command button").dataset.copy = code.textContent;
    }
    if (event.target.dataset.filter) {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of document.querySelectorAll(event.target.dataset.filter)) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    }
    const output = event.target.type === "range" && event.target.parentElement.querySelector("output");
    if (output) output.value = event.target.value;
  });

  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.target.id === "form") open = places();
    if (event.detail.xhr.status === 409) { // something else has changed the recipe
      event.detail.shouldSwap = true;
      event.detail.target = $("#clash");
    } else if (event.detail.xhr.status >= 400) {
      event.detail.shouldSwap = false;
      $("#toast").innerHTML = "";
      const said = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
      $("#toast").textContent = said.body.textContent.trim().replace(/\s*\n\s*/g, "\n");
    } else if (event.detail.target.id === "form") {
      const again = asked && asked.where !== "/recipe/yaml" && $("#yaml").value !== asked.text;
      if (drawing || again || (soon && soon.of !== "yaml")) { // it would undo what a hand has just done: asked again after that
        event.detail.shouldSwap = false;
        if (asked) waiting.splice(waiting[0] && waiting[0].where === "/recipe/yaml" ? 1 : 0, 0, asked);
        return;
      }
      $("#toast").textContent = "";
      const now = document.activeElement;
      half = now.matches("#form [data-key], #form [data-rename]") && now.tagName === "INPUT" && now.value !== now.defaultValue ? now : null;
    }
  });
  document.addEventListener("htmx:beforeOnLoad", (event) => { if (event.detail.xhr.getResponseHeader("HX-Redirect")) waiting.length = 0; });
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id !== "form") return;
    for (const [id, was] of open) { const found = document.getElementById(id); if (found) found.open = was; }
    open = [];
    ramps();
    const same = half && document.getElementById(half.id);
    if (same && same !== half && same.dataset.key === half.dataset.key && same.dataset.rename === half.dataset.rename) { // half typed
      same.value = half.value;
      same.focus({ preventScroll: true });
      same.setSelectionRange(half.selectionStart, half.selectionEnd);
    }
    half = null;
    const found = refocus && document.getElementById(refocus);
    if (found && document.activeElement !== found && (document.activeElement === document.body || !document.activeElement)) found.focus({ preventScroll: true });
  });
  document.addEventListener("htmx:sendError", () => {
    for (const input of document.querySelectorAll("#form [data-sent]")) delete input.dataset.sent;
    $("#toast").textContent = "The studio does not answer; start it again with weightsmith studio.";
  });

  // --- ramps: values from the first block to the last, or one for each block ---
  const NS = "http://www.w3.org/2000/svg";
  const H = 150, L = 34, R = 12, T = 12, B = 22;
  function ramps() {
    for (const box of document.querySelectorAll(".ramp:empty")) draw(box);
  }
  function draw(box) {
    let values = JSON.parse(box.dataset.values), W = Math.max(box.clientWidth, 200);
    const blocks = +($("#blocks") || { dataset: {} }).dataset.blocks || 0;
    const low = +box.dataset.low, high = +box.dataset.high, step = (high - low) / 100;
    const digits = Math.max(0, 2 - Math.floor(Math.log10(high - low)));
    const round = (v) => Number(Math.min(high, Math.max(low, v)).toFixed(digits));
    const make = (tag, at, into) => { const e = document.createElementNS(NS, tag); for (const a in at) e.setAttribute(a, at[a]); into.append(e); return e; };
    const each = () => blocks > 1 && values.length === blocks; // one value for each block
    const x = (i) => each() ? L + (W - L - R) * (i + 0.5) / blocks : L + (W - L - R) * (values.length > 1 ? i / (values.length - 1) : 0.5);
    const y = (v) => H - B - (H - T - B) * (v - low) / (high - low);
    const svg = make("svg", { role: "group", "aria-label": `${box.dataset.label} from the first block to the last` }, box);
    const row = document.createElement("div");
    row.className = "row";
    const label = document.createElement("label"), count = document.createElement("input");
    count.type = "number"; count.min = 1; count.max = 200; count.value = values.length; count.id = `count-${box.dataset.key.replace(/\W+/g, "-")}`;
    label.append("points", count);
    const said = document.createElement("span");
    const hint = "drag to draw; arrow keys move a point";
    said.textContent = hint;
    row.append(label);
    if (blocks > 1 && blocks <= 200 && !each()) {
      const all = document.createElement("button");
      all.type = "button"; all.className = "quiet"; all.textContent = `one for each of ${blocks} blocks`;
      all.addEventListener("click", () => { count.value = blocks; resample(blocks); });
      row.append(all);
    }
    row.append(said);
    box.append(row);
    const name = (i) => each() ? `block ${i}` : `point ${i + 1} of ${values.length}`;
    const tell = (i) => { said.textContent = i === null ? hint : `${name(i)}: ${values[i]}`; };
    const send = () => post("/recipe/set", { key: box.dataset.key, kind: "yaml", value: `[${values.join(", ")}]` });

    function paint() {
      svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
      svg.replaceChildren();
      const lines = make("g", { class: "lines" }, svg);
      for (const v of [low, (low + high) / 2, high]) {
        make("line", { x1: L, x2: W - R, y1: y(v), y2: y(v) }, lines);
        make("text", { x: L - 5, y: y(v) + 4, "text-anchor": "end" }, svg).textContent = Number(v.toPrecision(3));
      }
      make("text", { x: L, y: H - 6 }, svg).textContent = each() ? "block 0" : "first block";
      make("text", { x: W - R, y: H - 6, "text-anchor": "end" }, svg).textContent = each() ? `block ${blocks - 1}` : "last block";
      const points = values.map((v, i) => `${x(i)},${y(v)}`), zero = y(Math.min(high, Math.max(low, 0)));
      if (each()) {
        const wide = Math.max(1, (W - L - R) / blocks - 2);
        values.forEach((v, i) => make("rect", { x: x(i) - wide / 2, width: wide, y: Math.min(y(v), zero), height: Math.abs(y(v) - zero) }, svg));
      } else {
        make("polygon", { points: [`${x(0)},${zero}`, ...points, `${x(values.length - 1)},${zero}`].join(" ") }, svg);
        make("polyline", { points: points.join(" ") }, svg);
      }
      values.forEach((v, i) => {
        const dot = make("circle", { cx: x(i), cy: y(v), r: values.length > 40 ? 3 : 5, tabindex: 0, role: "slider", id: `${count.id}-${i}`,
          "aria-label": name(i), "aria-valuemin": low, "aria-valuemax": high, "aria-valuenow": v }, svg);
        dot.addEventListener("focus", () => tell(i));
        dot.addEventListener("keydown", (event) => {
          const by = { ArrowUp: 5, ArrowRight: 5, ArrowDown: -5, ArrowLeft: -5, PageUp: 20, PageDown: -20 }[event.key];
          if (by === undefined) return;
          event.preventDefault();
          values[i] = round(values[i] + (event.shiftKey ? Math.sign(by) : by) * step);
          paint();
          document.getElementById(dot.id).focus();
          shortly(box.dataset.key, 500, send);
        });
      });
    }
    const at = (event) => {
      const rect = svg.getBoundingClientRect(), n = values.length;
      const px = (event.clientX - rect.left) / rect.width * W, py = (event.clientY - rect.top) / rect.height * H;
      const i = each() ? Math.floor((px - L) / (W - L - R) * n) : Math.round((px - L) / (W - L - R) * (n - 1));
      return [Math.min(n - 1, Math.max(0, i || 0)), round(low + (H - B - py) / (H - T - B) * (high - low))];
    };
    let last = null;
    const touch = (event) => {
      const [i, v] = at(event);
      if (last !== null && Math.abs(last[0] - i) > 1) { // a fast stroke: fill in what it went over
        const [j, w] = last, s = Math.sign(i - j);
        for (let k = j + s; k !== i; k += s) values[k] = round(w + (v - w) * (k - j) / (i - j));
      }
      values[i] = v;
      last = [i, v];
      paint();
      tell(i);
    };
    svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); drawing = true; last = null; touch(event); event.preventDefault(); });
    svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) touch(event); else tell(at(event)[0]); });
    svg.addEventListener("pointerleave", () => tell(null));
    svg.addEventListener("lostpointercapture", () => { drawing = false; send(); });
    function resample(wanted) {
      const n = Math.min(200, Math.max(1, Math.round(wanted) || 1)), old = values;
      values = Array.from({ length: n }, (_, i) => {
        const place = n > 1 ? i / (n - 1) * (old.length - 1) : 0, j = Math.floor(place);
        return round(old[j] + (old[Math.min(j + 1, old.length - 1)] - old[j]) * (place - j));
      });
      send();
    }
    count.addEventListener("change", (event) => { event.stopPropagation(); resample(+count.value); });
    new ResizeObserver(() => { if (box.clientWidth && box.clientWidth !== W) { W = Math.max(box.clientWidth, 200); paint(); } }).observe(box);
    paint();
  }

  // --- dragging models ---
  let carried = "";
  document.addEventListener("dragstart", (event) => {
    const item = event.target.closest("[data-path][draggable]");
    if (!item) return;
    carried = item.dataset.path;
    event.dataTransfer.setData("text/plain", carried);
    event.dataTransfer.effectAllowed = "copy";
  });
  const zone = (event) => carried && event.target.closest("[data-zone], [data-drop]");
  document.addEventListener("dragover", (event) => { const z = zone(event); if (z) { event.preventDefault(); z.classList.add("over"); } });
  document.addEventListener("dragleave", (event) => { const z = event.target.closest && event.target.closest(".over"); if (z && !z.contains(event.relatedTarget)) z.classList.remove("over"); });
  document.addEventListener("dragend", () => { carried = ""; document.querySelectorAll(".over").forEach((e) => e.classList.remove("over")); });
  document.addEventListener("drop", (event) => {
    const z = zone(event);
    if (!z) return;
    event.preventDefault();
    z.classList.remove("over");
    if (z.dataset.zone) post("/recipe/model", { do: z.dataset.zone === "base" ? "set-base" : "add-model", model: carried });
    else {
      const form = $("form.shelf");
      form.recipe.value = z.dataset.drop;
      for (const box of form.querySelectorAll("input[name=path]")) if (box.value === carried) box.checked = true;
      form.submit();
    }
  });

  // --- a job ---
  function follow() {
    const job = $("#job");
    if (!job || !job.dataset.events) return;
    const source = new EventSource(job.dataset.events);
    source.onmessage = (event) => {
      const now = JSON.parse(event.data), log = $("#log");
      if (now.over) { // its buttons are others now; the page stays
        source.close();
        const had = job.contains(document.activeElement);
        htmx.ajax("GET", location.pathname, { target: "#job", select: "#job", swap: "outerHTML" })
          .then(() => { const next = had && $("#job .primary"); if (next) next.focus({ preventScroll: true }); });
        return;
      }
      $("#state").textContent = now.state;
      $("#state").className = `state ${now.state}`;
      $("#words").textContent = now.words;
      $("#progress").value = now.share;
      const end = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      log.textContent = now.log + now.output;
      if (end) log.scrollTop = log.scrollHeight;
    };
    source.addEventListener("ending", () => { source.close(); $("#words").textContent = "The studio was ended, and the job with it; start it again to resume."; });
    source.onerror = () => { $("#words").textContent = "The studio does not answer; the job's state is kept in the folder."; };
  }

  document.addEventListener("DOMContentLoaded", () => {
    ramps();
    follow();
    for (const tree of document.querySelectorAll(".scroll:has(> .tree)")) tree.scrollLeft = (tree.scrollWidth - tree.clientWidth) / 2; // the root
  });
})();
