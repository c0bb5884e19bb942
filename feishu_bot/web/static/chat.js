// The chat page: which conversation is open, what is being answered in it, and what is done to it.
import { $, api, base, fill, make, newId, t } from "./page.js";
import { Composer } from "./composer.js";
import { Messages, dress, icon, isNearEnd, toEnd } from "./messages.js";
import { Sidebar } from "./sidebar.js";
import { ask } from "./stream.js";

const prefix = $("composer").dataset.prefix;
const phone = matchMedia("(max-width: 46rem)");
const numbers = new Intl.NumberFormat(document.documentElement.lang);
const others = new BroadcastChannel("feishu-bot-chat"); // further tabs of this browser
const running = new Map(); // request id -> what is being answered, also of conversations that are not in sight
const chosen = new Map(); // conversation -> the agent that was chosen here for what is asked next
let open = null; // the conversation in sight; null: a new one
let draft = {}; // the new conversation in sight; first: the request that begins it
let visit = 0; // counts what is in sight, so that what comes late finds out

const messages = new Messages({ fork, regenerate: () => send(`${prefix}retry`, []) });
const sidebar = new Sidebar((conversation, message) => { show(conversation, message); closeMenu(); });
const composer = new Composer({ send, say: notice });

// ------------------------------------------------------------------------------------------ which is open

async function show(conversation, message = null, { push = true } = {}) {
  const mine = ++visit;
  open = conversation;
  draft = {};
  if (push) history.pushState({}, "", conversation === null ? `${base}/` : `${base}/?c=${conversation}`);
  notice(null);
  sidebar.mark(conversation);
  head(null);
  $("greeting").hidden = conversation !== null;
  try {
    const [item] = await Promise.all([
      conversation === null ? null : api("GET", `/conversations/${conversation}`),
      messages.open(conversation, message),
    ]);
    if (mine !== visit) return;
    head(item);
    for (const run of here()) place(run);
  } catch (error) {
    if (mine === visit) {
      notice(error.status === 404 ? t.gone : error.message);
      $("actions").hidden = true;
    }
  }
  buttons();
  if (!phone.matches) $("text").focus();
}

function head(item) {
  $("title").textContent = item === null ? (open === null ? t.new_chat : "\u00a0") : item.title ?? t.untitled;
  document.title = item?.title ? `${item.title} · ${t.title}` : t.title;
  $("actions").hidden = open === null;
  $("meter").replaceChildren();
  if (item?.message_count) {
    $("meter").append(make("span", { className: "long" }, `${fill(t.messages_count, { n: numbers.format(item.message_count) })} · `), fill(t.tokens, { n: numbers.format(item.total_tokens) }));
  }
  $("agent").value = chosen.get(open) ?? item?.agent ?? $("agent").options[0]?.value ?? "";
}

function notice(text) {
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
}

// ---------------------------------------------------------------------------------------- asking, answers

function send(message, files) {
  const run = { id: newId(), conversation: open, draft, message, files };
  if (open === null) {
    if (draft.first) run.follows = draft.first;
    else draft.first = run.id;
  }
  if ($("agent").value && !$("agents").hidden) run.agent = $("agent").value;
  start(run);
  return true;
}

function start(run) {
  notice(null);
  running.set(run.id, run);
  run.words = make("div", { className: "words", "aria-busy": "true" }, make("span", { className: "muted thinking" }, t.thinking));
  run.user = make("article", { className: "message user", "data-request": run.id, "aria-label": t.you }, make("div", { className: "words" }, [run.message, ...(run.files ?? []).map((file) => `[${file.name ?? file}]`)].filter(Boolean).join("\n")));
  run.bot = make("article", { className: "message assistant", "data-request": run.id, "aria-label": t.bot }, run.words);
  if (isHere(run)) {
    place(run);
    toEnd();
  }
  buttons();
  $("status").textContent = t.answering;
  follow(run);
}

function place(run) {
  $("greeting").hidden = true;
  $("messages").append(run.user, run.bot);
}

async function follow(run) {
  const body = { message: run.message, request_id: run.id };
  if (run.follows) body.follows = run.follows;
  else if (run.conversation !== null) body.conversation_id = run.conversation;
  if (run.agent) body.agent = run.agent;
  if (run.files?.length && typeof run.files[0] === "object") body.files = run.files.map(({ name, data }) => ({ name, data }));
  try {
    const answer = await ask(body, {
      show: ({ text, html }) => {
        const stick = isHere(run) && isNearEnd();
        run.words.classList.add("writing");
        if (html !== null) dress(run.words, html);
        else run.words.textContent = text;
        if (stick) toEnd();
      },
      wait: (waiting) => { if (isHere(run)) notice(waiting ? t.reconnecting : null); },
    });
    running.delete(run.id);
    if (isHere(run)) notice(null);
    await finish(run, answer);
  } catch (error) {
    running.delete(run.id);
    await fail(run, error);
  }
  $("status").textContent = t.answered;
  buttons();
}

async function finish(run, answer) {
  const stick = isHere(run) && isNearEnd();
  run.words.classList.remove("writing");
  run.words.setAttribute("aria-busy", "false");
  if (answer.status === "paused") {
    asNote(run, answer.message || t.paused);
    return;
  }
  dress(run.words, answer.html ?? "");
  const wasOpen = isHere(run), isCommand = run.message.startsWith(prefix);
  if (answer.conversation_id === null) {
    if (wasOpen && run.conversation !== null) await show(null);
    if (wasOpen) { place(run); asNote(run, answer.response); }
    return;
  }
  for (const other of [run, ...running.values()]) if (other.conversation === null && other.draft === run.draft) other.conversation = answer.conversation_id;
  if (wasOpen && open === null) {
    open = messages.conversation = answer.conversation_id;
    if (chosen.has(null)) chosen.set(open, chosen.get(null));
    chosen.delete(null);
    history.replaceState({}, "", `${base}/?c=${open}`);
  }
  const item = await api("GET", `/conversations/${answer.conversation_id}`).catch(() => null);
  if (item) sidebar.touch(item);
  others.postMessage({ conversation: answer.conversation_id });
  if (open !== run.conversation) return;
  sidebar.mark(open);
  if (item) head(item);
  if (isCommand && run.message.trim() === `${prefix}retry`) return messages.open(open);
  const stored = await messages.catchUp().catch(() => []);
  const isStored = messages.shows(answer.message_id); // maybe since the answer before this one
  for (const lost of run.draft?.failed ?? []) if (stored.some((element) => isSame(element, lost))) lost.remove();
  if (isStored || stored.length) { run.user.remove(); if (isStored) run.bot.remove(); else asNote(run, answer.response); }
  else if (isCommand) asNote(run, answer.response);
  if (stick) toEnd();
}

const isSame = (...elements) => new Set(elements.map((element) => element.className + element.querySelector(".words").textContent)).size === 1;

function asNote(run, text) {
  run.bot.className = "message note";
  run.words.textContent = text;
  settle(run);
}

/** What stays as it is keeps its place: what is stored later comes after it. */
function settle(run) {
  for (const element of [run.user, run.bot]) delete element.dataset.request;
}

async function fail(run, error) {
  run.bot.className = "message note problem";
  run.words.setAttribute("aria-busy", "false");
  run.words.textContent = error.message || t.failed;
  const again = make("button", { type: "button" }, icon("again"), t.try_again);
  again.addEventListener("click", () => { run.user.remove(); run.bot.remove(); send(run.message, run.files ?? []); });
  run.bot.append(again);
  if (isHere(run)) {
    const stored = await messages.catchUp().catch(() => []);
    if (stored.some((element) => element.classList.contains("user"))) run.user.remove();
  }
  if (run.conversation === null) {
    (run.draft.failed ??= []).push(run.user);
    await sidebar.refresh().catch(() => null);
  }
  settle(run);
}

/** Says whether a question is asked in what is in sight: of two new conversations each has a draft of its own. */
const isHere = (run) => run.conversation === open && (open !== null || run.draft === draft);
const here = () => [...running.values()].filter(isHere);

function buttons() {
  const busy = here().length > 0;
  $("stop").hidden = !busy;
}

function stop() {
  for (const run of here()) api("POST", "/chat/stop", { request_id: run.id }).catch((error) => notice(error.message));
}

// ----------------------------------------------------------------------------------- what is done to one

function dialog(title, { value = null, yes, danger = false }) {
  const element = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-label").textContent = title;
  $("dialog-field").hidden = value === null;
  $("dialog-input").value = value ?? "";
  $("dialog-yes").textContent = yes;
  $("dialog-yes").className = danger ? "danger" : "primary";
  element.returnValue = "";
  element.showModal();
  if (value !== null) $("dialog-input").select();
  return new Promise((resolve) => {
    element.addEventListener("close", () => resolve(element.returnValue === "yes" ? $("dialog-input").value : null), { once: true });
  });
}

async function fork(message) {
  try {
    const item = await api("POST", `/conversations/${open}/fork`, { message_id: message });
    sidebar.touch(item);
    await show(item.id);
    $("status").textContent = t.forked_from;
  } catch (error) { notice(error.message); }
}

const deeds = {
  async rename() {
    const title = (await dialog(t.rename_title, { value: $("title").textContent, yes: t.save }))?.trim();
    if (!title) return;
    const item = await api("PATCH", `/conversations/${open}`, { title });
    sidebar.change(item);
    head(item);
    others.postMessage({ conversation: open });
  },
  export_md: () => location.assign(`${base}/conversations/${open}/export?format=md`),
  export_json: () => location.assign(`${base}/conversations/${open}/export?format=json`),
  async clear() {
    if (await dialog(t.clear_sure, { yes: t.clear, danger: true }) === null) return;
    head(await api("POST", `/conversations/${open}/clear`));
    await messages.open(open);
  },
  async delete() {
    if (await dialog(t.delete_sure, { yes: t.delete, danger: true }) === null) return;
    const gone = open;
    await api("DELETE", `/conversations/${gone}`);
    sidebar.remove(gone);
    others.postMessage({ conversation: gone });
    await show(null);
  },
};

function menu(isOpen) {
  $("action-list").hidden = !isOpen;
  $("more").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("action-list").firstElementChild.focus();
}
$("more").addEventListener("click", () => menu($("action-list").hidden));
$("action-list").addEventListener("click", async (event) => {
  const name = event.target.closest("[data-action]")?.dataset.action;
  if (!name) return;
  menu(false);
  $("more").focus();
  try { await deeds[name](); } catch (error) { notice(error.message); }
});
$("action-list").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const items = [...$("action-list").children];
  items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
});
document.addEventListener("click", (event) => { if (!event.target.closest("#actions")) menu(false); });

// --------------------------------------------------------------------------------------- page and keyboard

function openMenu() {
  $("sidebar").classList.add("open");
  $("shade").hidden = false;
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}
function closeMenu() {
  $("sidebar").classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
}
$("menu").addEventListener("click", openMenu);
$("close-menu").addEventListener("click", () => { closeMenu(); $("menu").focus(); });
$("shade").addEventListener("click", closeMenu);
$("new").addEventListener("click", () => { closeMenu(); show(null); $("text").focus(); });
$("stop").addEventListener("click", stop);
$("agent").addEventListener("change", () => chosen.set(open, $("agent").value));
$("to-end").addEventListener("click", () => { messages.newer ? messages.open(open) : toEnd(); });
$("dialog-no").addEventListener("click", () => $("dialog").close());

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("action-list").hidden) { menu(false); $("more").focus(); }
  else if (event.key === "Escape" && $("sidebar").classList.contains("open")) { closeMenu(); $("menu").focus(); }
  else if (event.key === "Escape" && document.activeElement === $("search") && $("search").value) { $("search").value = ""; sidebar.search(); }
  else if (event.key === "Escape" && !$("dialog").open && here().length) stop();
  else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") { event.preventDefault(); if (phone.matches) openMenu(); $("search").focus(); }
  else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); show(null); }
});

const wanted = () => Number(new URLSearchParams(location.search).get("c")) || null;
addEventListener("popstate", () => show(wanted(), null, { push: false }));

async function refresh(conversation) {
  await sidebar.refresh().catch(() => null);
  if (open === null || (conversation && conversation !== open) || here().length) return;
  const item = await api("GET", `/conversations/${open}`).catch(() => null);
  if (item) { head(item); await messages.catchUp().catch(() => null); }
}
others.addEventListener("message", (event) => refresh(event.data.conversation));
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

async function agents() {
  const { items } = await api("GET", "/agents");
  $("agent").replaceChildren(...items.map(({ name }) => make("option", { value: name }, name === "default" ? t.agent_default : name)));
  $("agents").hidden = items.length < 2;
}

/** Goes on with what was asked before the page was loaded. */
async function resume() {
  const { items } = await api("GET", "/chat/pending");
  const drafts = new Map(); // request that begins a conversation -> its draft
  const asked = items.filter((item) => !running.has(item.request_id)).map((item) => {
    const first = item.follows ?? item.request_id;
    if (!drafts.has(first)) drafts.set(first, { first });
    return { id: item.request_id, conversation: item.conversation_id, draft: drafts.get(first), follows: item.follows, message: item.message, agent: item.agent, files: item.files };
  });
  const last = asked.findLast((run) => run.conversation === null);
  if (open === null && !draft.first && last) draft = last.draft;
  asked.forEach(start);
}

Promise.all([show(wanted(), null, { push: false }), sidebar.refresh().then(() => sidebar.mark(open)), agents()])
  .catch(() => null)
  .then(resume)
  .catch(() => null);
