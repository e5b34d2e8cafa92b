"""A Pareto front as one page: dots with their recipes, a slider for each goal, and the dot that they choose."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from weightsmith.report.html import Text, page
from weightsmith.search.result import Found

__all__ = ["front_page", "short"]


def short(value: Any) -> str:
    """A gene's value in few digits."""
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def front_page(made: Found, said: Sequence[str]) -> str:
    """One page without another file: the points over two goals, a slider for each, and the point they choose."""
    goals = list(made.search.aim.goals)
    signs = [made.search.aim.sign(goal) for goal in goals]
    points = [
        {
            "n": t.number + 1,
            "s": [(t.scores or {})[goal] for goal in goals],
            "recipe": f"recipes/{t.number + 1}.yaml",
            "p": {name: short(value) for name, value in t.point.items()},
        }
        for t in made.front
    ]
    on = {t.number for t in made.front}
    others = [[(t.scores or {})[goal] for goal in goals] for t in made.search.trials if t.whole and t.number not in on]
    data = json.dumps({"goals": goals, "signs": signs, "points": points, "others": others}).replace("<", "\\u003c")
    sliders = "".join(
        f'<label>{escape(goal)} <input type="range" min="0" max="100" value="50" data-goal="{i}">'
        f"<output>50</output></label>"
        for i, goal in enumerate(goals)
    )
    options = "".join(f'<option value="{i}">{escape(goal)}</option>' for i, goal in enumerate(goals))
    body = (
        f'<p class="note">Grey: other candidates. Point at a dot to see its recipe; the sliders say what counts. '
        f"Scores count as shares of their range on the front.</p>"
        f'<div id="sliders">{sliders}</div><p>across <select id="x">{options}</select> up <select id="y">{options}'
        f'</select></p><svg id="front" viewBox="0 0 760 460" role="img" aria-label="Pareto front"></svg>'
        f'<div id="chosen"></div><div id="tip" hidden></div>'
    )
    shell = page("Pareto front", [Text("", said)])
    inner = f"<style>{_STYLE}</style>{body}<script>const D={data};{_SCRIPT}</script></main>"
    return re.sub("</main>", lambda _: inner, shell, count=1)


_STYLE = """
#sliders label { display: inline-block; margin-right: 1.6em; } #front { width: 100%; max-width: 860px; }
#front circle { cursor: pointer; } #front .axis { stroke: var(--line); }
#front text { fill: var(--soft); font-size: 12px; } #front .other { fill: #9aa6b8; opacity: .5; }
#front .best { fill: #c4573b; }
#tip { position: fixed; background: var(--page); border: 1px solid var(--soft); padding: .4em .7em; font-size: .85rem;
  pointer-events: none; white-space: pre; max-width: 90vw; overflow: hidden; }
#chosen { white-space: pre-wrap; font-variant-numeric: tabular-nums; }
"""

_SCRIPT = """
const $ = id => document.getElementById(id), NS = "http://www.w3.org/2000/svg";
const k = D.goals.length, w = Array(k).fill(50);
const all = D.points.map(p => p.s), lo = [], hi = [];
for (let i = 0; i < k; i++) { lo[i] = Math.min(...all.map(s => s[i])); hi[i] = Math.max(...all.map(s => s[i])); }
const share = (s, i) => { if (hi[i] <= lo[i]) return 1; const t = (s[i] - lo[i]) / (hi[i] - lo[i]);
  return D.signs[i] > 0 ? t : 1 - t; };
const label = i => D.goals[i] + (D.signs[i] > 0 ? ", more is better" : ", less is better");
const num = v => Number(v.toPrecision(5)).toString();
const told = p => "candidate " + p.n + "\\n" + D.goals.map((g, i) => g + ": " + num(p.s[i])).join("\\n") + "\\n" +
  Object.entries(p.p).map(([a, b]) => a + " = " + b).join("\\n") + "\\n" + p.recipe;
function best() { let b = 0, v = -Infinity; D.points.forEach((p, j) => {
  let s = 0; for (let i = 0; i < k; i++) s += w[i] * share(p.s, i); if (s > v + 1e-12) { v = s; b = j; } }); return b; }
function draw() {
  const x = +$("x").value, y = +$("y").value, svg = $("front"), every = all.concat(D.others);
  svg.replaceChildren();
  const span = i => { const v = every.map(s => s[i]), a = Math.min(...v), b = Math.max(...v), m = (b - a) * .06 || .5;
    return [a - m, b + m]; };
  const [xa, xb] = span(x), [ya, yb] = span(y);
  const px = v => 60 + 680 * (v - xa) / (xb - xa), py = v => 420 - 400 * (v - ya) / (yb - ya);
  const add = (tag, at, text) => { const e = document.createElementNS(NS, tag);
    for (const a in at) e.setAttribute(a, at[a]); if (text) e.textContent = text; svg.append(e); return e; };
  add("line", {x1: 60, x2: 740, y1: 420, y2: 420, class: "axis"});
  add("line", {x1: 60, x2: 60, y1: 20, y2: 420, class: "axis"});
  for (let i = 0; i <= 5; i++) { const a = xa + (xb - xa) * i / 5, b = ya + (yb - ya) * i / 5;
    add("text", {x: px(a), y: 436, "text-anchor": "middle"}, Number(a.toPrecision(3)).toString());
    add("text", {x: 54, y: py(b) + 4, "text-anchor": "end"}, Number(b.toPrecision(3)).toString()); }
  add("text", {x: 400, y: 456, "text-anchor": "middle"}, label(x)); add("text", {x: 60, y: 14}, label(y));
  D.others.forEach(s => add("circle", {cx: px(s[x]), cy: py(s[y]), r: 3, class: "other"}));
  const b = best();
  D.points.forEach((p, j) => { const c = add("circle", {cx: px(p.s[x]), cy: py(p.s[y]), r: j == b ? 9 : 6,
      class: j == b ? "best" : "front", tabindex: 0});
    c.onpointerenter = c.onpointermove = e => { const t = $("tip"); t.textContent = told(p); t.hidden = false;
      t.style.left = Math.min(e.clientX + 14, innerWidth - 260) + "px"; t.style.top = (e.clientY + 14) + "px"; };
    c.onpointerleave = () => { $("tip").hidden = true; }; });
  $("chosen").textContent = "chosen: " + told(D.points[b]);
}
document.querySelectorAll("#sliders input").forEach(i => i.oninput = () => {
  w[+i.dataset.goal] = +i.value; i.nextElementSibling.value = i.value; draw(); });
$("y").value = k > 1 ? "1" : "0"; $("x").onchange = $("y").onchange = draw; draw();
"""
