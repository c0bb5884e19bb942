// The list of conversations, page by page as it is scrolled, and the search over all of them.
import { $, api, base, make, t } from "./page.js";

const PAGE = 50, SEARCH_AFTER_MS = 250;
const list = $("list"), conversations = $("conversations"), results = $("results"), nothing = $("nothing");

export class Sidebar {
  constructor(open) {
    this.open = open; // (conversation, message)
    this.next = null;
    this.current = null;
    this.busy = false;
    list.addEventListener("scroll", () => this.more(), { passive: true });
    $("search").addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.search(), SEARCH_AFTER_MS);
    });
    $("search-form").addEventListener("submit", (event) => { event.preventDefault(); this.search(); });
    list.addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.open(Number(link.dataset.conversation), link.dataset.message ? Number(link.dataset.message) : null);
    });
  }

  /** Reads the list anew from its beginning. */
  async refresh() {
    const page = await api("GET", `/conversations?limit=${PAGE}`);
    this.next = page.next;
    conversations.replaceChildren(...page.items.map((item) => this.row(item)));
    this.tell();
    requestAnimationFrame(() => this.more());
  }

  async more() {
    const rest = list.scrollHeight - list.scrollTop - list.clientHeight;
    if (this.busy || this.next === null || rest > 400 || !results.hidden) return;
    this.busy = true;
    try {
      const page = await api("GET", `/conversations?limit=${PAGE}&before=${this.next}`);
      this.next = page.next;
      for (const item of page.items) if (!this.find(item.id)) conversations.append(this.row(item));
    } catch { /* the next scrolling tries again */ } finally {
      this.busy = false;
    }
  }

  find(id) { return conversations.querySelector(`[data-conversation="${id}"]`)?.parentElement; }

  row(item) {
    const branch = item.parent_id ? make("span", { className: "branch", title: t.branch, "aria-label": t.branch }, "⑂") : null;
    const link = make("a", { href: `${base}/?c=${item.id}`, "data-conversation": item.id }, branch, item.title ?? t.untitled);
    if (item.id === this.current) link.setAttribute("aria-current", "page");
    return make("li", {}, link);
  }

  /** Brings a conversation to the top, as it is now. */
  touch(item) {
    this.find(item.id)?.remove();
    conversations.prepend(this.row(item));
    this.tell();
  }

  change(item) {
    this.find(item.id)?.replaceWith(this.row(item));
  }

  remove(id) {
    this.find(id)?.remove();
    this.tell();
  }

  mark(id) {
    this.current = id;
    for (const link of list.querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
    this.find(id)?.firstElementChild.setAttribute("aria-current", "page");
  }

  tell() {
    nothing.textContent = results.hidden ? t.no_conversations : t.search_none;
    nothing.hidden = (results.hidden ? conversations : results).children.length > 0;
  }

  async search() {
    const text = $("search").value.trim();
    results.hidden = !text;
    conversations.hidden = Boolean(text);
    if (!text) return this.tell();
    const found = await api("GET", `/search?limit=50&q=${encodeURIComponent(text)}`).catch(() => ({ items: [] }));
    if ($("search").value.trim() !== text) return;
    results.replaceChildren(...found.items.map((hit) => {
      const snippet = make("small", {}, ...hit.snippet.map((part) => (part.hit ? make("mark", {}, part.text) : part.text)));
      const link = make("a", { href: `${base}/?c=${hit.conversation_id}`, "data-conversation": hit.conversation_id, "data-message": hit.message_id }, hit.title ?? t.untitled, snippet);
      return make("li", {}, link);
    }));
    this.tell();
  }
}
