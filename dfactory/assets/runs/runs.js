// The runs: a list that follows the folders, curves of the chosen ones, their completions by group.
"use strict";

import { element, events, get, getBlob, keepToken } from "./ask.js";
import { chart, shown } from "./chart.js";

const at = (id) => document.getElementById(id);
const AGAIN_MS = 3000; // after the connection broke

let runs = []; // what /runs says
let chosen = null; // names; null until the first list
let reports = new Map(); // name -> its report, and what the list said of it then
let drawn = ""; // what the page shows
let page = 0;

// --- the list --------------------------------------------------------------------------------------------------------------

async function follow() {
  try {
    at("state").textContent = "connecting";
    for await (const event of events("runs", null)) {
      at("access").hidden = true;
      at("main").hidden = false;
      await listed(event.runs);
    }
    at("state").textContent = "The server has ended. Trying again.";
  } catch (problem) {
    at("access").hidden = problem.status !== 401;
    if (problem.status === 401) {
      at("state").textContent = "";
      if (at("token").value) at("refused").textContent = "This token is not the server's.";
      at("token").focus();
      return;
    }
    at("state").textContent = `${problem.message}. Trying again.`;
  }
  setTimeout(follow, AGAIN_MS);
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value.trim());
  follow();
});

async function listed(found) {
  runs = found;
  if (chosen === null && runs.length) {
    const first = runs.find((run) => run.state === "running") ?? runs[0];
    chosen = new Set([first.name]);
  }
  showList();
  await refresh();
  const count = runs.filter((run) => run.state === "running").length;
  at("state").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}, ${count} running, looked at ${new Date().toLocaleTimeString()}`;
}

function showList() {
  const wanted = at("search").value.toLowerCase();
  const kept = document.activeElement?.dataset?.run;
  at("runs").replaceChildren(...runs.filter((run) => run.name.toLowerCase().includes(wanted)).map((run) => {
    const box = element("input", {
      type: "checkbox", checked: chosen.has(run.name), "data-run": run.name,
      onchange: () => { if (box.checked) chosen.add(run.name); else chosen.delete(run.name); refresh(); },
    });
    const steps = run.of ? `step ${run.step} of ${run.of}` : `step ${run.step}`;
    const bad = run.unreadable ? `, ${run.unreadable} unreadable lines` : "";
    return element("li", {}, element("label", {}, box, element("span", {}, run.name),
      element("span", { class: "how" }, element("i", { class: `dot ${run.state.split(" ")[0]}` }), ` ${run.state}, ${run.stage}, ${steps}${bad}`)));
  }));
  if (kept) [...at("runs").querySelectorAll("input")].find((box) => box.dataset.run === kept)?.focus();
}

at("search").addEventListener("input", showList);

// --- the chosen runs ---------------------------------------------------------------------------------------------------------

async function refresh() {
  const names = runs.map((run) => run.name).filter((name) => chosen?.has(name));
  await Promise.all(names.map(async (name) => {
    const about = JSON.stringify(runs.find((run) => run.name === name));
    if (reports.get(name)?.about === about) return;
    try {
      reports.set(name, { about, report: await get(`run?name=${encodeURIComponent(name)}`) });
    } catch (problem) {
      at("chosen").textContent = `${name}: ${problem.message}`;
    }
  }));
  const kept = names.filter((name) => reports.has(name)).map((name) => reports.get(name).report);
  at("chosen").textContent = kept.length ? "" : "Choose runs in the list.";
  const now = JSON.stringify(kept.map((report) => reports.get(report.name).about));
  if (now === drawn) return;
  drawn = now;
  const focus = [...document.querySelectorAll("#curves svg[tabindex]")].indexOf(document.activeElement);
  showNumbers(kept);
  showCurves(kept);
  showDetails(kept);
  if (focus >= 0) document.querySelectorAll("#curves svg[tabindex]")[focus]?.focus();
  await showCompletions(kept);
}

function showNumbers(kept) {
  const names = [...new Set(kept.flatMap((report) => Object.keys(report.numbers)))];
  const head = element("tr", {}, element("td"), ...kept.map((report) => element("th", { scope: "col" }, report.name)));
  const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name), ...kept.map((report) => element("td", {}, report.numbers[name] ?? ""))));
  at("numbers").replaceChildren(...(names.length ? [element("div", { class: "wide" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)))] : []));
}

// Runs of one stage share axes, as in the static report.
function showCurves(kept) {
  const stages = [...new Set(kept.map((report) => report.stage))];
  const names = [...new Set(kept.flatMap((report) => report.figures.map((figure) => figure.name)))];
  const parts = [];
  for (const name of names) {
    const having = kept.map((report) => report.figures.find((figure) => figure.name === name));
    const panels = [];
    const titles = [...new Set(having.flatMap((figure) => figure?.panels.map((panel) => panel.title) ?? []))];
    for (const title of titles) {
      for (const stage of stages) {
        const lines = [];
        let first = null;
        kept.forEach((report, place) => {
          const panel = report.stage === stage && having[place]?.panels.find((one) => one.title === title);
          if (!panel) return;
          first ??= panel;
          panel.lines.forEach((line, number) => lines.push({
            ...line, held: line.label === "held out", dash: place % 3,
            colour: kept.length > 1 || name === "loss_by_t" ? (name === "loss_by_t" ? number : place) : number,
            label: kept.length > 1 ? `${report.name}, ${line.label}` : line.label,
          }));
        });
        if (first) panels.push(chart({ ...first, title: stages.length > 1 ? `${title}: ${stage}` : title }, lines));
      }
    }
    const caption = having.find(Boolean).caption;
    if (caption) panels[0].append(element("p", { class: "hint" }, caption));
    parts.push(...panels);
  }
  at("curves").replaceChildren(...parts);
}

// What unfolds stays unfolded while a run goes on.
function showDetails(kept) {
  const parts = kept.flatMap((report) => [
    ...Object.entries(report.pictures).map(([what, caption]) => picture(report.name, what, caption)),
    element("details", {}, element("summary", {}, `recipe of ${report.name}, resolved`), element("pre", {}, report.config)),
  ]);
  const before = [...at("recipes").children];
  at("recipes").replaceChildren(...parts.map((part) => before.find((old) => old.textContent === part.textContent) ?? part));
}

function picture(name, what, caption) {
  const image = element("img", { alt: `${what} of ${name}` });
  const box = element("details", {
    ontoggle: async () => {
      if (!box.open || image.src) return;
      try {
        image.src = URL.createObjectURL(await getBlob(`picture?name=${encodeURIComponent(name)}&what=${what}`));
      } catch (problem) {
        image.alt = problem.message;
      }
    },
  }, element("summary", {}, `${what} of ${name}`), element("figure", {}, image), element("p", { class: "hint" }, caption));
  return box;
}

// --- completions -------------------------------------------------------------------------------------------------------------

async function showCompletions(kept) {
  const having = kept.filter((report) => report.completions > 0).map((report) => report.name);
  at("rollouts").hidden = having.length === 0;
  if (!having.length) return;
  const before = at("of").value;
  at("of").replaceChildren(...having.map((name) => element("option", { selected: name === before }, name)));
  await showGroups();
}

async function showGroups() {
  const query = new URLSearchParams({ name: at("of").value, order: at("order").value, mixed: at("mixed").checked, page });
  for (const name of ["low", "high", "first", "last", "text"]) query.set(name, at(name).value);
  let said;
  try {
    said = await get(`completions?${query}`);
  } catch (problem) {
    at("found").textContent = problem.message;
    return;
  }
  const pages = Math.max(said.pages, 1);
  at("found").textContent = `${said.found} of ${said.of} groups, page ${page + 1} of ${pages}`;
  at("back").disabled = page === 0;
  at("on").disabled = page + 1 >= pages;
  at("groups").replaceChildren(...said.groups.map(group));
}

function group(one) {
  const columns = ["reward", ...one.functions, "advantage", "tokens_per_forward", "version"];
  const most = Math.max(...one.rows.map((row) => Math.abs(row.reward ?? 0)), 1e-9);
  const head = element("tr", {}, element("th", { scope: "col", class: "said" }, "completion"), ...columns.map((name) => element("th", { scope: "col" }, name.replaceAll("_", " "))));
  const rows = one.rows.map((row) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${Math.max(0, row.reward ?? 0) / most * 2.5}rem`;
    const cells = columns.map((name) => element("td", {}, ...(name === "reward" ? [bar] : []), typeof row[name] === "number" ? shown(row[name]) : String(row[name] ?? "none")));
    return element("tr", { class: row.chosen ? "" : "other" }, element("td", { class: "said" }, String(row.completion ?? "")), ...cells);
  });
  return element("article", { class: "group" }, element("h3", {}, `step ${one.step}, group ${one.group}, mean reward ${shown(one.mean)}`),
    element("p", { class: "prompt" }, one.prompt), element("div", { class: "wide" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))),
    element("p", { class: "hint" }, one.origin));
}

at("filter").addEventListener("input", () => { page = 0; showGroups(); });
at("filter").addEventListener("submit", (event) => event.preventDefault());
at("filter").addEventListener("reset", () => setTimeout(() => { page = 0; showGroups(); }));
at("back").addEventListener("click", () => { page -= 1; showGroups(); });
at("on").addEventListener("click", () => { page += 1; showGroups(); });

follow();
