// The plain chat page: one conversation, streamed answers, texts in the browser's language.
import { base, headers } from "./page.js";

const zh = document.documentElement.lang === "zh";
const t = zh
  ? { fresh: "新对话", send: "发送", label: "消息", failed: "发送失败，请重试。", paused: "已收到，稍后回答。", tokens: "个 token" }
  : { fresh: "New chat", send: "Send", label: "Message", failed: "Sending failed, please try again.", paused: "Received; the answer comes later.", tokens: "tokens" };
const $ = (id) => document.getElementById(id);
$("new").textContent = t.fresh;
$("send").textContent = t.send;
$("label").textContent = t.label;

let conversation = null;

function show(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView();
  return element;
}

function finish(element, data) {
  conversation = data.conversation_id;  // null after /new: what is said next begins another
  element.textContent = data.response ?? (data.status === "paused" ? data.message || t.paused : element.textContent);
  const usage = document.createElement("span");
  usage.className = "usage";
  if (data.usage?.total_tokens) usage.textContent = `${data.usage.total_tokens} ${t.tokens} · ${data.usage.model}`;
  element.append(usage);
}

function handle(block, element) {
  const name = /^event: (.*)$/m.exec(block)?.[1];
  const data = /^data: (.*)$/m.exec(block)?.[1];
  if (!name || !data) return;
  const value = JSON.parse(data);
  if (name === "delta") element.textContent += value.text;
  if (name === "done") finish(element, value);
  if (name === "error") { element.textContent = value.message; element.classList.add("error"); }
}

async function ask(text) {
  show("user", text);
  const element = show("assistant", "");
  const body = { message: text, request_id: crypto.randomUUID() };
  if (conversation !== null) body.conversation_id = conversation;
  try {
    const response = await fetch(`${base}/chat`, {
      method: "POST",
      headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
      body: JSON.stringify(body),
    });
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      const error = await response.json();
      throw new Error(error.error?.message);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) handle(block, element);
    }
  } catch (error) {
    element.textContent = error.message || t.failed;
    element.classList.add("error");
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("new").addEventListener("click", () => {
  conversation = null;
  $("messages").replaceChildren();
  $("text").focus();
});
