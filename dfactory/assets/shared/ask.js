// Requests to this server: the token, JSON, and server-sent events of a POST.
"use strict";

const TOKEN = "dfactory-token";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

function headers(more) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function answered(path, options) {
  const response = await fetch(path, { credentials: "omit", ...options });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refused(response.status, said?.error?.message ?? `${response.status} ${response.statusText}`);
}

export async function get(path) {
  return (await answered(path, { headers: headers({}) })).json();
}

export async function getBlob(path) {
  return (await answered(path, { headers: headers({}) })).blob();
}

export async function post(path, body) {
  const json = headers({ "Content-Type": "application/json" });
  return (await answered(path, { method: "POST", headers: json, body: JSON.stringify(body) })).json();
}

// Yields the events of a stream until it ends or `signal` is aborted. An event with `error` is thrown.
export async function* events(path, body, signal) {
  const sent = body === null ? { headers: headers({}) }
    : { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) };
  const response = await answered(path, { ...sent, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Refused(response.status, event.error.message);
      yield event;
    }
  }
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
