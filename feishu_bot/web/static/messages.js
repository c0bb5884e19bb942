// The messages of one conversation: a window of pages that follows the scrolling, both ways, so that a conversation of
// thousands of messages is as light as a short one.
import { $, api, copyText, fill, instant, make, t } from "./page.js";

const PAGE = 50, MOST = 200, NEAR = 120;
const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg"), use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, act) {
  const button = make("button", { type: "button", className: "quiet icon-button", "aria-label": label, title: label }, icon(name));
  button.addEventListener("click", () => act(button));
  return button;
}

async function copy(text, button) {
  await copyText(text).catch(() => null);
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

/** Puts the server's HTML of an answer in place; it was made safe there, and the page's policy runs nothing of it. */
export function dress(words, html) {
  words.innerHTML = html;
  for (const pre of words.querySelectorAll("pre")) {
    const block = make("div", { className: "code" });
    pre.tabIndex = 0;
    pre.replaceWith(block);
    block.append(pre, iconButton("copy", t.copy_code, (button) => copy(pre.innerText, button)));
  }
}

const scroll = $("scroll"), list = $("messages");
export const isNearEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
export function toEnd() { scroll.scrollTop = scroll.scrollHeight; }

export class Messages {
  constructor(actions) {
    this.actions = actions; // fork(id), regenerate()
    this.conversation = null;
    this.older = this.newer = false;
    this.busy = false;
    const edges = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.more(entry.target === this.top);
    }, { root: scroll, rootMargin: "600px 0px" });
    this.top = make("div", { className: "edge" });
    this.bottom = make("div", { className: "edge" });
    list.before(this.top);
    list.after(this.bottom);
    edges.observe(this.top);
    edges.observe(this.bottom);
    scroll.addEventListener("scroll", () => { $("to-end").hidden = !this.newer && isNearEnd(); }, { passive: true });
  }

  get stored() { return list.querySelectorAll("[data-id]"); }
  get lastId() { const all = this.stored; return all.length ? Number(all[all.length - 1].dataset.id) : 0; }
  get firstId() { return Number(list.querySelector("[data-id]")?.dataset.id ?? 0); }

  shows(id) { return list.querySelector(`[data-id="${id}"]`) !== null; }

  clear() {
    list.replaceChildren();
    this.older = this.newer = false;
  }

  /** Shows a conversation from its end, or with the message `at` in sight. */
  async open(conversation, at = null) {
    this.conversation = conversation;
    this.clear();
    if (conversation === null) return;
    const page = await this.page(at === null ? "" : `&before=${at + 1}`);
    if (this.conversation !== conversation) return;
    this.older = page.next !== null;
    this.newer = at !== null;
    list.replaceChildren(...page.items.reverse().map((item) => this.element(item)));
    const target = at === null ? null : list.querySelector(`[data-id="${at}"]`);
    if (target) {
      await this.more(false);
      target.classList.add("found");
      target.scrollIntoView({ block: "center" });
    } else toEnd();
  }

  page(where) {
    return api("GET", `/conversations/${this.conversation}/messages?html&limit=${PAGE}${where}`);
  }

  /** Loads the next page at one end and lets go of what is far from it. */
  async more(up) {
    if (this.busy || this.conversation === null || !(up ? this.older : this.newer)) return;
    this.busy = true;
    const conversation = this.conversation;
    try {
      const page = await this.page(up ? `&before=${this.firstId}` : `&after=${this.lastId}`);
      if (this.conversation !== conversation) return;
      const fresh = page.items.reverse().map((item) => this.element(item));
      const before = scroll.scrollHeight - scroll.scrollTop;
      if (up) {
        this.older = page.next !== null;
        list.prepend(...fresh);
        scroll.scrollTop = scroll.scrollHeight - before;
        while (list.children.length > MOST) { list.lastElementChild.remove(); this.newer = true; }
      } else {
        this.newer = page.next !== null;
        list.append(...fresh);
        while (list.children.length > MOST) {
          const first = list.firstElementChild, height = first.offsetHeight;
          first.remove();
          scroll.scrollTop -= height;
          this.older = true;
        }
      }
    } catch { /* the next scrolling tries again */ } finally {
      this.busy = false;
    }
  }

  /** Adds what was said since the last message that is shown. */
  async catchUp() {
    const conversation = this.conversation;
    if (conversation === null || this.newer) return [];
    const page = await this.page(this.lastId ? `&after=${this.lastId}` : "");
    if (this.conversation !== conversation) return [];
    const stick = isNearEnd();
    const fresh = page.items.reverse().filter((item) => !this.shows(item.id)).map((item) => this.element(item));
    const first = list.querySelector("[data-request]");
    for (const element of fresh) first ? first.before(element) : list.append(element);
    if (stick) toEnd();
    return fresh;
  }

  element(item) {
    const words = make("div", { className: "words" });
    if (item.role === "assistant") dress(words, item.html);
    else words.textContent = item.content;
    const about = make("div", { className: "about" },
      iconButton("copy", t.copy_message, (button) => copy(item.content, button)),
      iconButton("fork", t.fork, () => this.actions.fork(item.id)),
      item.role === "assistant" ? iconButton("again", t.regenerate, () => this.actions.regenerate()) : null,
      make("span", {}, [instant(item.timestamp), item.model, fill(t.tokens, { n: item.tokens })].filter(Boolean).join(" · ")));
    const element = make("article", { className: `message ${item.role}`, "data-id": item.id, "aria-label": item.role === "user" ? t.you : t.bot }, words, about);
    element.hidden = item.role !== "user" && item.role !== "assistant";
    return element;
  }
}
