// The console works without this. With it, orders are asked about in place, and the overview's figures stay fresh.
import { $, base, copyText } from "./page.js";

const dialog = $("ask");

for (const form of document.querySelectorAll("form[data-ask]")) {
  form.addEventListener("submit", (event) => {
    if (form.elements.sure) return;
    event.preventDefault();
    const { amount, name, role } = form.elements;
    const said = { n: amount?.value, name: name?.value, role: role?.selectedOptions[0].label };
    $("ask-words").textContent = form.dataset.ask.replace(/\{(\w+)\}/g, (whole, key) => said[key] ?? whole);
    dialog.returnValue = "no";
    dialog.onclose = () => {
      if (dialog.returnValue !== "yes") return;
      const sure = document.createElement("input");
      Object.assign(sure, { type: "hidden", name: "sure", value: "yes" });
      form.append(sure);
      form.requestSubmit();
    };
    dialog.showModal();
  });
}

// A page that the browser brings back keeps no answer given before.
addEventListener("pageshow", (event) => {
  if (event.persisted) for (const sure of document.querySelectorAll("form[data-ask] input[name=sure]")) sure.remove();
});

for (const button of document.querySelectorAll("[data-copies]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await copyText($(button.dataset.copies).textContent);
    button.textContent = button.dataset.copied;
  });
}

// Where a chart is wider than the window, the newest days are what one wants to see.
for (const chart of document.querySelectorAll(".scroll:has(> .chart)")) chart.scrollLeft = chart.scrollWidth;

document.querySelector(".sections [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

const live = $("live");

function show({ figures, problems }) {
  for (const element of live.querySelectorAll("[data-live]")) {
    const text = String(figures[element.dataset.live]);
    if (element.textContent !== text) element.textContent = text;
  }
  const list = $("problems");
  const lines = problems.length ? problems : [list.dataset.well];
  if ([...list.children].map((item) => item.textContent).join("\n") === lines.join("\n")) return;
  list.replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
}

async function look() {
  if (!document.hidden) {
    try {
      const response = await fetch(`${base}/admin/live`);
      if (response.ok) show(await response.json());
    } catch {
      // The server is away; the next look finds it again.
    }
  }
  setTimeout(look, Number(live.dataset.every) * 1000);
}

if (live) setTimeout(look, Number(live.dataset.every) * 1000);
