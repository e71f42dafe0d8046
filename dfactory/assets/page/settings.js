// The decode keys of one lane as a form, made from what the server says of its models, rules and keys.
"use strict";

import { element } from "./ask.js";

const COMMON = ["max_new_tokens", "editing_threshold", "temperature", "seed"]; // shown beside the keys of the rule
const FIXED = ["max_new_tokens", "blocks_from", "seed"]; // not changed during an answer

export class Lane {
  // `changed` is called when a key has another value.
  constructor(about, name, changed) {
    this.about = about;
    this.name = name;
    this.changed = changed;
    this.values = {};
    this.model = about.models[0];
    this.node = element("div", { class: "lane", role: "group", "aria-label": `Decoding ${name}`.trim() });
    this.reset();
    this.build();
  }

  reset() {
    this.values = { ...this.model.keys };
    delete this.values.seed;
  }

  get rule() {
    return this.about.rules.find((rule) => rule.name === this.values.rule);
  }

  get title() {
    const dial = this.rule.keys[0];
    return `${this.model.name}, ${this.rule.name}${dial ? ` ${this.values[dial] ?? "off"}` : ""}`;
  }

  key(name) {
    return this.about.keys.find((key) => key.name === name);
  }

  // What a request says: the keys that differ from the server's own.
  body(during = false) {
    const own = this.model.keys;
    const same = (name) => JSON.stringify(this.values[name]) === JSON.stringify(name in own ? own[name] : this.key(name).default);
    const body = { rule: this.values.rule };
    for (const name of Object.keys(this.values)) {
      const foreign = this.key(name).rules && !this.key(name).rules.includes(this.values.rule);
      if (!foreign && !same(name) && this.values[name] !== null && !(during && FIXED.includes(name))) body[name] = this.values[name];
    }
    return body;
  }

  build() {
    const parts = [];
    if (this.name) parts.push(element("h3", {}, this.name));
    const options = (names, chosen) => names.map((name) => element("option", { value: name, selected: name === chosen }, name));
    const select = (label, names, chosen, act) => {
      const made = element("select", { onchange: () => act(made.value) }, ...options(names, chosen));
      return element("label", {}, label, made);
    };
    if (this.about.models.length > 1) {
      parts.push(select("Model", this.about.models.map((model) => model.name), this.model.name, (name) => {
        this.model = this.about.models.find((model) => model.name === name);
        this.reset();
        this.build();
        this.changed(this, false);
      }));
    }
    parts.push(select("Decoding rule", this.model.rules, this.values.rule, (name) => {
      this.values.rule = name;
      for (const key of this.about.keys) if (key.rules) delete this.values[key.name];
      for (const own of this.rule.keys) this.values[own] = own in this.model.keys ? this.model.keys[own] : this.key(own).default;
      this.build();
      this.changed(this, true);
      this.node.querySelector("select").focus();
    }));
    parts.push(element("p", { class: "meaning" }, this.rule.what));
    const shown = [...this.rule.keys, ...COMMON];
    const others = this.about.keys.filter((key) => !key.rules && !COMMON.includes(key.name) && key.name !== "rule").map((key) => key.name);
    parts.push(...this.rule.keys.slice(0, 1).map((name) => this.field(name)));
    parts.push(...COMMON.map((name) => this.field(name)));
    const more = [...shown.filter((name) => !COMMON.includes(name)).slice(1), ...others];
    parts.push(element("details", {}, element("summary", {}, "All keys"), ...more.map((name) => this.field(name))));
    this.node.replaceChildren(...parts);
  }

  field(name) {
    const key = this.key(name);
    const id = `${this.name || "lane"}-${name}`.replace(/\W/g, "-");
    const set = (value) => {
      if (value === undefined || Number.isNaN(value)) return;
      this.values[name] = value;
      this.changed(this, !FIXED.includes(name));
    };
    const value = this.values[name] ?? null;
    const off = key.optional || name === "seed" ? (name === "seed" ? "random" : "off") : "";
    const described = { id, "aria-describedby": `${id}-meaning` };
    const meaning = element("p", { class: "meaning", id: `${id}-meaning`, title: key.help }, key.help.split(/[;(]/)[0]);
    if (key.type === "bool" && !key.optional) {
      const box = element("input", { ...described, type: "checkbox", checked: value === true, onchange: () => set(box.checked) });
      return element("div", {}, element("label", { class: "check" }, box, name), meaning);
    }
    if (key.choices?.length) {
      const box = element("select", { ...described, onchange: () => set(box.value) }, ...key.choices.map((one) => element("option", { selected: one === value }, one)));
      return element("div", {}, element("label", { for: id }, name), box, meaning);
    }
    if (key.type === "int" || key.type === "float") return element("div", {}, element("label", { for: id }, name), this.number(key, described, value, off, set), meaning);
    const text = value === null ? "" : key.type === "list" ? value.join(" ") : value;
    const box = element("input", { ...described, type: "text", value: text, placeholder: off, onchange: () => set(read(box.value, key.type)) });
    return element("div", {}, element("label", { for: id }, name), box, meaning);
  }

  // A number; one between 0 and 1 has a slider besides.
  number(key, described, value, off, set) {
    const whole = key.type === "int";
    const high = key.high !== null && key.high < 2 ** 53 ? key.high : null;
    const box = element("input", {
      ...described, type: "number", min: key.low, max: high, step: whole ? 1 : "any", value: value ?? "", placeholder: off,
      onchange: () => (box.checkValidity() ? take() : box.reportValidity()),
    });
    let slider = null;
    const take = () => {
      set(box.value === "" ? null : +box.value);
      if (slider) [slider.hidden, slider.value] = [box.value === "", box.value || 1];
    };
    if (!whole && key.low === 0 && key.high === 1) {
      slider = element("input", {
        type: "range", min: 0, max: 1, step: 0.01, value: value ?? 1, "aria-label": `${key.name}, slider`, hidden: value === null,
        oninput: () => { box.value = slider.value; }, onchange: () => set(+slider.value),
      });
    }
    return element("div", { class: "dial" }, ...(slider ? [slider] : []), box);
  }
}

function read(text, type) {
  if (text.trim() === "") return null;
  return type === "list" ? text.trim().split(/[\s,]+/).map(Number) : text;
}
