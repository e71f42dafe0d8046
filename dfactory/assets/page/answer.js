// One answer: its tokens as they stand after a forward, the player that steps through them, the heat map, the numbers.
"use strict";

import { element } from "./ask.js";

const STEPS_OF_HEAT = 10;
const STEP_MS = 220; // of the player, at speed 1
export const STATES = {
  masked: "mask", drafted: "draft: what the model would put there", fresh: "new", committed: "committed",
  edited: "edited: it replaced another token", given: "of the template",
};

let answers = 0;

export class AnswerView {
  // `title` says by which model and rule it is decoded; `turn` is what was asked.
  constructor(turn, title) {
    this.turn = turn;
    this.title = title;
    this.opening = null;
    this.events = [];
    this.cells = []; // [state, text, probability] of each place after `at` events
    this.at = 0;
    this.done = null;
    this.view = "state";
    this.timer = null;
    this.number = ++answers;
    this.build();
  }

  build() {
    const id = `answer-${this.number}`;
    this.heading = element("h3", { id }, this.title);
    this.tokens = element("div", {
      class: "tokens", role: "group", tabindex: "0", "aria-labelledby": id, "aria-roledescription": "tokens",
      "aria-describedby": `${id}-keys`, "data-empty": "waiting",
      onkeydown: (event) => this.onKey(event), onfocusin: (event) => this.onFocus(event), onmouseover: (event) => this.onFocus(event),
    });
    this.numbers = element("p", { class: "numbers" });
    this.aboutToken = element("p", { class: "about-token", role: "status" });
    this.scale = element("div", { class: "scale", hidden: true });
    const button = (name, text, act) => element("button", { type: "button", "aria-label": name, title: name, onclick: act }, text);
    this.playButton = button("Play", "▶", () => this.toggle());
    this.slider = element("input", {
      type: "range", min: 0, max: 0, value: 0, "aria-label": "forward", oninput: () => { this.pause(); this.show(+this.slider.value); },
    });
    this.speed = element("select", { "aria-label": "speed" },
      ...[["0.25", 4], ["0.5", 2], ["1", 1], ["2", 0.5], ["4", 0.25]].map(([text, value]) => element("option", { value, selected: value === 1 }, `${text}×`)));
    this.player = element("div", { class: "player", role: "group", "aria-label": "Trace player", hidden: true },
      this.playButton, button("One forward back", "⏮", () => this.step(-1)), button("One forward on", "⏭", () => this.step(1)),
      this.slider, this.speed, button("Save the trace", "⤓", () => this.save()));
    this.bars = element("div", { class: "bars", "aria-hidden": "true", hidden: true });
    this.node = element("article", { class: "answer", "aria-labelledby": id }, this.heading, this.tokens, this.scale,
      this.aboutToken, this.numbers, this.player, this.bars,
      element("p", { class: "unseen", id: `${id}-keys` }, "Left and right arrow keys move from token to token."));
  }

  // --- events, as the server sends them ---------------------------------------------------------------------------------

  add(event) {
    if (event.id) {
      this.opening = event;
      return;
    }
    const follows = this.at === this.events.length;
    this.events.push(event);
    if (event.done) {
      this.done = event.done;
      this.playerOn();
    }
    if (follows) this.show(this.events.length);
  }

  fail(message) {
    this.tokens.dataset.empty = "no answer";
    this.numbers.textContent = message;
    if (this.events.length) this.playerOn();
  }

  playerOn() {
    this.player.hidden = this.bars.hidden = this.events.length === 0;
    this.slider.max = this.events.length;
    const written = this.events.map((event) => event.tokens - this.given(event.length));
    const gains = written.map((tokens, place) => tokens - (written[place - 1] ?? 0));
    const most = Math.max(1, ...gains);
    this.bars.replaceChildren(...gains.map((gain) => {
      const bar = element("i", { title: `${gain} tokens` });
      bar.style.height = `${Math.max(0, gain) / most * 100}%`;
      return bar;
    }));
  }

  // --- what stands there after so many events -----------------------------------------------------------------------------

  show(at) {
    if (at < this.at) {
      this.cells = [];
      this.at = 0;
    }
    const fresh = [];
    for (const event of this.events.slice(this.at, at)) {
      this.cells.length = event.length;
      for (const [place, ...cell] of event.cells) {
        this.cells[place] = cell;
        fresh.push(place);
      }
    }
    this.at = at;
    this.draw();
    this.slider.value = at;
    this.slider.setAttribute("aria-valuetext", `forward ${this.now?.forward ?? 0} of ${this.events.at(-1)?.forward ?? 0}`);
    [...this.bars.children].forEach((bar, place) => bar.classList.toggle("now", place < at));
    this.writeNumbers();
  }

  get now() {
    return this.events[this.at - 1];
  }

  get isWhole() {
    return this.done !== null && this.at === this.events.length;
  }

  draw() {
    const kept = this.tokens.children;
    while (kept.length > this.cells.length) this.tokens.lastChild.remove();
    this.cells.forEach((cell, place) => {
      const node = kept[place] ?? this.tokens.appendChild(element("span", { "data-place": place }));
      this.drawToken(node, place, cell);
    });
    this.tokens.classList.toggle("empty", this.cells.length === 0 || (this.isWhole && this.done.output_tokens === 0));
    this.tokens.classList.toggle("heat", this.view !== "state");
    if (this.isWhole) this.tokens.dataset.empty = "an empty answer";
    this.drawScale();
  }

  drawToken(node, place, [state, text]) {
    const shown = state === "masked" ? "" : text.replace(/\n/g, "↵\n");
    if (node.textContent !== shown) node.textContent = shown;
    const after = this.isWhole && place >= this.done.output_tokens ? " after" : "";
    const heat = this.heat(place);
    const name = `t ${state}${after}${heat ? ` h${heat.level}` : ""}`;
    if (node.className !== name) node.className = name;
    if (heat) node.dataset.number = heat.number;
    else delete node.dataset.number;
  }

  // The colour of a token by the view, 0 to 9, and the number beside it; null for a mask, and where colours are off.
  heat(place) {
    const [state, , probability] = this.cells[place];
    if (this.view === "state" || state === "masked" || state === "drafted" || state === "given") return null;
    if (this.view === "confidence") {
      return { level: level(1 - probability), number: Math.round(probability * 100) };
    }
    const step = this.stepOf(place);
    const last = Math.max(1, ...this.cells.map((_, other) => this.stepOf(other)));
    return step === null ? null : { level: level((step - 1) / Math.max(1, last - 1)), number: step };
  }

  // The forward, counted from 1, that wrote what stands at a place; null for what a template gave.
  stepOf(place) {
    const steps = this.done?.history.step;
    if (this.isWhole && steps) return steps[place] >= 0 ? steps[place] + 1 : null;
    for (let at = this.at - 1; at >= 0; at--) {
      const cell = this.events[at].cells.find(([other, state]) => other === place && (state === "fresh" || state === "edited"));
      if (cell) return this.events[at].forward;
    }
    return null;
  }

  drawScale() {
    this.scale.hidden = this.view === "state";
    if (this.view === "state") return;
    const ends = this.view === "confidence" ? ["100%", "0%"] : ["first", "last"];
    const boxes = Array.from({ length: STEPS_OF_HEAT }, (_, place) => element("i", { class: `h${place}` }));
    const what = this.view === "confidence" ? "probability at the forward that wrote it" : "forward that wrote it";
    this.scale.replaceChildren(`${what}: ${ends[0]}`, element("span", {}, ...boxes), ends[1]);
  }

  writeNumbers() {
    const event = this.now;
    if (!event) {
      this.numbers.textContent = "";
      return;
    }
    const whole = this.isWhole;
    const stop = whole ? this.done.output_tokens : event.length;
    const tokens = (whole ? stop : event.tokens) - this.given(stop);
    const each = tokens / Math.max(event.forward, 1);
    const bold = (text) => element("b", {}, text);
    this.numbers.replaceChildren(
      "forward ", bold(event.forward), whole || !this.done ? "" : ` of ${this.done.forwards}`, ", ", bold(tokens), " tokens, ", bold(each.toFixed(2)), " a forward, ",
      bold((tokens / Math.max(event.seconds, 1e-4)).toFixed(tokens / event.seconds < 10 ? 1 : 0)), ` a second, ${event.rule}`,
      whole ? `, ${this.done.finish_reason === "eos" ? "ended" : "cut at the longest answer"}, seed ${this.done.seed}` : "");
  }

  // How many of the first `stop` tokens a template gave: no forward wrote these.
  given(stop) {
    return (this.opening?.given ?? []).filter((place) => place < stop).length;
  }

  setView(view) {
    this.view = view;
    this.draw();
  }

  // --- one token ----------------------------------------------------------------------------------------------------------

  describe(place) {
    const [state, text, probability] = this.cells[place];
    const parts = [`token ${place + 1} of ${this.cells.length}`, text ? JSON.stringify(text) : "no text", STATES[state]];
    if (state === "masked") return parts.join(", ");
    if (state !== "given") parts.push(`probability ${probability.toFixed(3)}`);
    const step = this.stepOf(place);
    if (step && state !== "drafted") parts.push(`written by forward ${step}`);
    for (const [, at, before, after] of (this.done?.history.edits ?? []).filter((edit) => edit[0] === place)) {
      parts.push(`forward ${at + 1} turned ${JSON.stringify(before)} into ${JSON.stringify(after)}`);
    }
    return parts.join(", ");
  }

  onFocus(event) {
    const place = event.target.dataset?.place;
    if (place !== undefined && this.cells[+place]) this.aboutToken.textContent = this.describe(+place);
  }

  onKey(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !this.cells.length) return;
    event.preventDefault();
    const here = +(document.activeElement.dataset?.place ?? (move > 0 ? -1 : this.cells.length));
    const next = Math.min(Math.max(here + move, 0), this.cells.length - 1);
    const node = this.tokens.children[next];
    this.tokens.querySelector("[tabindex]")?.removeAttribute("tabindex");
    node.tabIndex = -1;
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", this.describe(next));
    node.focus();
  }

  // --- the player ---------------------------------------------------------------------------------------------------------

  step(by) {
    this.pause();
    this.show(Math.min(Math.max(this.at + by, 0), this.events.length));
  }

  toggle() {
    if (this.timer !== null) return this.pause();
    if (this.at >= this.events.length) this.show(0);
    this.say("Pause", "⏸");
    const next = () => {
      if (this.at >= this.events.length) return this.pause();
      this.show(this.at + 1);
      this.timer = setTimeout(next, STEP_MS * this.speed.value);
    };
    this.timer = setTimeout(next, STEP_MS * this.speed.value);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.say("Play", "▶");
  }

  say(name, text) {
    this.playButton.textContent = text;
    this.playButton.setAttribute("aria-label", name);
    this.playButton.title = name;
  }

  // --- traces in files ----------------------------------------------------------------------------------------------------

  save() {
    const trace = { turn: this.turn, title: this.title, opening: this.opening, events: this.events };
    const link = element("a", { href: URL.createObjectURL(new Blob([JSON.stringify(trace)], { type: "application/json" })), download: "trace.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  static opened(text) {
    const trace = JSON.parse(text);
    if (!Array.isArray(trace.events) || typeof trace.turn !== "string") throw new Error("this file is no trace that this page saved");
    const view = new AnswerView(trace.turn, String(trace.title));
    for (const event of [trace.opening, ...trace.events]) if (event) view.add(event);
    return view;
  }
}

function level(share) {
  return Math.min(STEPS_OF_HEAT - 1, Math.max(0, Math.floor(share * STEPS_OF_HEAT)));
}
