// A chart of curves over steps, as SVG: axes, lines, held-out diamonds, the values under the pointer or the arrow keys.
"use strict";

import { element } from "./ask.js";

const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;
const WIDTH = 460, HEIGHT = 220, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24;
const LOG_FROM = 20; // a log axis if the values span more than this factor, as in the static report

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Values at even places of an axis, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

export function shown(value) {
  if (value === null || value === undefined) return "none";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  if (Math.abs(value) >= 1e4) return Math.abs(value) < 1e9 ? Math.round(value).toLocaleString("en") : value.toExponential(1);
  return String(+value.toPrecision(4));
}

// `panel`: title, log, from_zero; `lines`: label, colour, steps, values, and perhaps smooth and held (drawn as diamonds).
export function chart(panel, lines) {
  const points = lines.flatMap((line) => line.values.filter((value) => value !== null));
  const steps = lines.flatMap((line) => line.steps);
  let [low, high] = [Math.min(...points), Math.max(...points)];
  const log = panel.log && low > 0 && high > LOG_FROM * low;
  if (panel.from_zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const scale = log ? Math.log10 : (value) => value;
  const room = (scale(high) - scale(low)) * 0.05;
  const [bottom, top] = [scale(low) - (panel.from_zero && low === 0 ? 0 : room), scale(high) + room];
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => LEFT + (last === first ? 0.5 : (step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (scale(value) - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);

  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": `${panel.title}. ${inWords(lines)}` });
  for (const value of ticks(bottom, top, 4)) {
    const at = TOP + (1 - (value - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
      svg("text", { x: LEFT - 5, y: at + 4, "text-anchor": "end" }, shown(log ? 10 ** value : value)));
  }
  for (const step of ticks(first, last, 5).filter(Number.isInteger)) {
    picture.append(svg("text", { x: x(step), y: HEIGHT - 7, "text-anchor": "middle" }, shown(step)));
  }
  picture.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  for (const line of lines) draw(picture, line, x, y);
  const readout = element("p", { class: "readout" });
  follow(picture, readout, lines, x, [first, last]);
  return element("figure", {}, element("figcaption", {}, panel.title), picture, readout, keys(lines));
}

function draw(picture, line, x, y) {
  const path = (values) => values.map((value, place) => (value === null ? null : `${x(line.steps[place]).toFixed(1)},${y(value).toFixed(1)}`)).filter(Boolean).join(" ");
  const look = `s${line.colour % 6} dash${line.dash ?? 0}`;
  if (line.held) {
    picture.append(svg("polyline", { class: `s${line.colour % 6} held`, points: path(line.values) }));
  } else if (line.smooth) {
    picture.append(svg("polyline", { class: `${look} raw`, points: path(line.values) }), svg("polyline", { class: look, points: path(line.smooth) }));
  } else {
    picture.append(svg("polyline", { class: look, points: path(line.values) }));
  }
  if (!line.held && line.steps.length > 1) return;
  line.values.forEach((value, place) => {
    if (value === null) return;
    const [at, up] = [x(line.steps[place]), y(value)];
    picture.append(svg("path", { class: `s${line.colour % 6}`, d: `M${at - 4},${up} L${at},${up - 4} L${at + 4},${up} L${at},${up + 4} Z` }));
  });
}

function keys(lines) {
  if (lines.length === 1 && !lines[0].held) return "";
  return element("div", {}, ...lines.map((line) => {
    const sample = svg("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, svg("polyline", { class: `s${line.colour % 6} ${line.held ? "held" : `dash${line.dash ?? 0}`}`, points: "1,5 29,5" }));
    if (line.held) sample.append(svg("path", { class: `s${line.colour % 6}`, d: "M11,5 L15,1 L19,5 L15,9 Z" }));
    return element("span", { class: "key" }, sample, line.label);
  }));
}

function inWords(lines) {
  return lines.map((line) => {
    const values = line.values.filter((value) => value !== null);
    return `${line.label}: ${shown(values[0])} at step ${line.steps[0]}, ${shown(values.at(-1))} at step ${line.steps.at(-1)}`;
  }).join(". ");
}

// Writes the values at the step that is nearest to the pointer; arrow keys move from step to step.
function follow(picture, readout, lines, x, [first, last]) {
  const every = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const mark = svg("line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  picture.append(mark);
  let place = every.length - 1;
  const show = (to) => {
    place = Math.min(Math.max(to, 0), every.length - 1);
    const step = every[place];
    mark.setAttribute("x1", x(step));
    mark.setAttribute("x2", x(step));
    const values = lines.filter((line) => line.steps.includes(step)).map((line) => `${line.label} ${shown(line.values[line.steps.indexOf(step)])}`);
    readout.textContent = `step ${step}: ${values.join(", ")}`;
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const step = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    show(every.reduce((best, one, at) => (Math.abs(one - step) < Math.abs(every[best] - step) ? at : best), 0));
  });
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -every.length, End: every.length }[event.key];
    if (!move) return;
    event.preventDefault();
    show(place + move);
    readout.setAttribute("aria-live", "polite");
  });
}
