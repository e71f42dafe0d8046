// The conversation: asks, streams the answers of one lane or two, changes their rules while they run.
"use strict";

import { AnswerView, STATES } from "./answer.js";
import { element, events, get, keepToken, post } from "./ask.js";
import { Lane } from "./settings.js";

const at = (id) => document.getElementById(id);
const BLANK = /\[\[(\d+)\]\]/;

let about = null;
let lanes = [];
let histories = [[], []]; // of messages, a lane each
let running = []; // of the answers that are streamed: { view, lane, stop }
const views = [];

// --- start ---------------------------------------------------------------------------------------------------------------

async function start() {
  try {
    about = await get("about");
  } catch (problem) {
    at("access").hidden = problem.status !== 401;
    at("server").textContent = problem.status === 401 ? "" : problem.message;
    if (problem.status === 401) {
      if (at("token").value) at("refused").textContent = "This token is not the server's.";
      at("token").focus();
    }
    return;
  }
  at("access").hidden = true;
  at("main").hidden = false;
  lanes = [new Lane(about, "", changed)];
  showLanes();
  showMode();
  legend();
}

function legend() {
  const examples = { masked: "", drafted: "draft", fresh: "new", committed: "committed", edited: "edited", given: "template" };
  at("legend").replaceChildren(...Object.entries(examples).map(([state, text]) =>
    element("span", { title: STATES[state] }, element("span", { class: `t ${state}` }, text), text ? "" : " mask")));
}

function showLanes() {
  at("lanes").replaceChildren(...lanes.map((lane) => lane.node));
  const model = lanes[0].model;
  const names = [...new Set(lanes.map((lane) => lane.model.name))].join(" and ");
  at("server").textContent = `${names}, ${model.sees_whole_document ? "full attention" : `blocks of ${model.block_size}`}`;
  const chat = lanes.every((lane) => lane.model.chat);
  const radio = document.querySelector('input[name="mode"][value="chat"]');
  radio.disabled = !chat;
  if (!chat && radio.checked) document.querySelector('input[name="mode"][value="text"]').checked = true;
  showMode();
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value.trim());
  start();
});

// --- settings --------------------------------------------------------------------------------------------------------------

at("compare").addEventListener("change", () => {
  if (at("compare").checked) {
    const second = new Lane(about, "Right", changed);
    second.model = about.models[1] ?? about.models[0];
    second.reset();
    lanes[0].name = "Left";
    second.build();
    lanes = [lanes[0], second];
    histories[1] = [...histories[0]];
  } else {
    lanes = [lanes[0]];
    lanes[0].name = "";
  }
  lanes[0].build();
  showLanes();
});

async function changed(lane, isRule) {
  showLanes();
  if (!isRule) return;
  for (const one of running.filter((other) => other.lane === lane && other.view.opening)) {
    try {
      await post(`denoise/${one.view.opening.id}`, lane.body(true));
    } catch (problem) {
      if (problem.status !== 404) at("problem").textContent = problem.message;
    }
  }
}

at("view").addEventListener("change", () => views.forEach((view) => view.setView(at("view").value)));

// --- what to ask -----------------------------------------------------------------------------------------------------------

function mode() {
  return document.querySelector('input[name="mode"]:checked').value;
}

function showMode() {
  const names = { chat: "Question", text: "Text to continue", fill: lanes[0]?.model.chat ? "Question" : "Text before the template" };
  at("question-label").textContent = names[mode()];
  at("template-part").hidden = mode() !== "fill";
  at("template-hint").textContent = lanes[0]?.model.sees_whole_document
    ? "Full attention: every blank sees the whole template." : `A blank sees the template to the end of its block of ${lanes[0]?.model.block_size} tokens.`;
}

document.querySelectorAll('input[name="mode"]').forEach((radio) => radio.addEventListener("change", showMode));

at("blank").addEventListener("click", () => {
  const box = at("template");
  box.setRangeText("[[4]]", box.selectionStart, box.selectionEnd, "end");
  box.focus();
});

function request(lane, history, question) {
  const body = { ...lane.body() };
  if (mode() === "text" || !lane.model.chat) {
    if (lane.model.text) body.prompt = question;
    else body.prompt_ids = question.trim().split(/[\s,]+/).map(Number);
  } else {
    const system = at("system").value.trim();
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...(mode() === "chat" ? history : []), { role: "user", content: question }];
  }
  if (mode() === "fill") {
    const parts = at("template").value.split(/(\[\[\d+\]\])/).filter((part) => part);
    body.template = parts.map((part) => (BLANK.test(part) ? +part.match(BLANK)[1] : part));
  }
  return body;
}

// --- one turn --------------------------------------------------------------------------------------------------------------

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.length || !at("question").value.trim()) return;
  ask(at("question").value);
});

at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

at("stop").addEventListener("click", stop);

function stop() {
  running.forEach((one) => one.stop.abort());
}

async function ask(question) {
  at("problem").textContent = "";
  const made = lanes.map((lane) => new AnswerView(question, lane.title));
  addTurn(question, made);
  const asked = mode();
  if (asked === "chat") at("question").value = "";
  at("send").disabled = true;
  at("stop").disabled = false;
  at("announced").textContent = "Denoising.";
  running = lanes.map((lane, place) => ({ view: made[place], lane, stop: new AbortController() }));
  await Promise.all(running.map((one, place) => answer(one, request(one.lane, histories[place], question))));
  if (asked === "chat") {
    made.forEach((view, place) => {
      if (view.done) histories[place].push({ role: "user", content: question }, { role: "assistant", content: view.done.text ?? "" });
    });
  }
  running = [];
  at("send").disabled = false;
  at("stop").disabled = true;
  at("announced").textContent = made.map((view) => said(view)).join(" ");
}

function said(view) {
  if (!view.done) return "Stopped.";
  return `${made(view)} ${view.done.text || "An empty answer"}. ${view.done.output_tokens} tokens in ${view.done.forwards} forwards.`;
}

function made(view) {
  return lanes.length > 1 ? `${view.title}:` : "Answer:";
}

async function answer({ view, lane, stop: stopper }, body) {
  try {
    for await (const event of events(`denoise?model=${encodeURIComponent(lane.model.name)}`, body, stopper.signal)) {
      view.add(event);
      const seconds = +at("delay").value;
      if (seconds > 0) await waited(seconds, stopper.signal);
      stopper.signal.throwIfAborted();
    }
  } catch (problem) {
    view.fail(stopper.signal.aborted ? "stopped" : problem.message);
  }
}

function waited(seconds, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", resolve);
  });
}

function addTurn(question, made) {
  made.forEach((view) => view.setView(at("view").value));
  views.push(...made);
  const turn = element("section", { class: "turn" }, element("h2", { class: "asked" }, question),
    element("div", { class: `answers${made.length > 1 ? " two" : ""}` }, ...made.map((view) => view.node)));
  at("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
}

at("new").addEventListener("click", () => {
  stop();
  histories = [[], []];
  views.length = 0;
  at("turns").replaceChildren();
  at("announced").textContent = "A new conversation.";
  at("question").focus();
});

// --- a trace from a file ---------------------------------------------------------------------------------------------------

at("open").addEventListener("change", async () => {
  const [file] = at("open").files;
  if (!file) return;
  try {
    const view = AnswerView.opened(await file.text());
    addTurn(view.turn, [view]);
    view.show(0);
    at("problem").textContent = "";
  } catch (problem) {
    at("problem").textContent = `${file.name}: ${problem.message}`;
  }
  at("open").value = "";
});

start();
