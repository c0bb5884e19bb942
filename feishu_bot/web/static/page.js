// What every page has: words, calls of our own API, language and theme, leaving.
const root = document.documentElement;
export const base = root.dataset.base;
export const t = JSON.parse(document.getElementById("words").textContent);
export const $ = (id) => document.getElementById(id);

const YEAR_S = 31_536_000;

/** What the server said instead of doing it. */
export class ApiError extends Error {
  constructor(status, code, message, retryAfterS) {
    super(message);
    Object.assign(this, { status, code, retryAfterS });
  }
}

/** Headers of a change: a page of another site cannot know the token. */
export function headers(more = {}) {
  return root.dataset.csrf ? { "X-CSRFToken": root.dataset.csrf, ...more } : more;
}

/** Calls the API and returns the JSON of its answer, null for none. Throws ApiError. */
export async function api(method, path, body) {
  const options = { method, headers: headers(body === undefined ? {} : { "Content-Type": "application/json" }) };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(base + path, options);
  } catch {
    throw new ApiError(0, "offline", t.offline);
  }
  if (response.status === 204) return null;
  const data = await response.json().catch(() => null);
  if (response.ok) return data;
  if (response.status === 401 && path !== "/login") location.assign(`${base}/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  const error = data?.error ?? {};
  throw new ApiError(response.status, error.code, error.message ?? t.failed, Number(response.headers.get("Retry-After")) || null);
}

/** Makes an element: properties by name, `data-…` and `aria-…` as attributes, children as texts or elements. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Fills `{name}` in a sentence. */
export const fill = (sentence, values) => sentence.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

export function remember(name, value) {
  document.cookie = `${name}=${value}; Path=${base || "/"}; Max-Age=${YEAR_S}; SameSite=Lax`;
}

/** Copies a text; also where the page comes by http from another machine, and browsers keep the clipboard to themselves. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", { value: text, className: "hidden", readOnly: true }), before = document.activeElement;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  before?.focus();
}

/** Returns an id nobody else has; `crypto.randomUUID` is missing where the page comes by http from another machine. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const instants = new Intl.DateTimeFormat(root.lang, { dateStyle: "medium", timeStyle: "short" });
export const instant = (text) => instants.format(new Date(text));

for (const element of document.querySelectorAll("[data-do=language]")) {
  element.addEventListener("click", () => {
    remember("lang", root.lang === "zh" ? "en" : "zh");
    location.reload();
  });
}
for (const element of document.querySelectorAll("[data-do=theme]")) {
  element.addEventListener("change", () => {
    root.dataset.theme = element.value;
    remember("theme", element.value);
  });
}
for (const element of document.querySelectorAll("[data-do=logout]")) {
  element.addEventListener("click", async () => {
    await api("POST", "/logout").catch(() => null);
    location.assign(`${base}/login`);
  });
}
