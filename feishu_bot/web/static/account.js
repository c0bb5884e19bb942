import { $, api, copyText, instant, make, t } from "./page.js";

function row(item, action, word) {
  const button = make("button", { type: "button", className: "danger quiet", "aria-label": `${word}: ${item.told}` }, word);
  button.addEventListener("click", async () => {
    await api("DELETE", `${action}/${item.id}`).catch(() => null);
    if (item.current) location.reload();
    show();
  });
  const about = make("span", { className: "muted" }, [item.address, `${t.last_used}: ${instant(item.used_at)}`].filter(Boolean).join(" · "));
  const badge = item.current ? make("span", { className: "badge" }, t.this_session) : null;
  return make("li", {}, make("div", { className: "grow" }, make("strong", { title: item.label }, item.told || "–"), " ", badge, make("br"), about), button);
}

async function show() {
  const [sessions, tokens] = await Promise.all([api("GET", "/account/sessions"), api("GET", "/account/tokens")]);
  $("sessions").replaceChildren(...sessions.items.map((item) => row(item, "/account/sessions", t.end_session)));
  $("tokens").replaceChildren(...tokens.items.map((item) => row(item, "/account/tokens", t.revoke)));
  if (!tokens.items.length) $("tokens").append(make("li", { className: "muted" }, t.no_tokens));
}

// Who came by a proxy has neither this form nor a password here.
$("make-token")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = event.target.elements.label, problem = $("problem");
  problem.hidden = true;
  let made;
  try {
    made = await api("POST", "/account/tokens", { label: input.value });
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
    return;
  }
  input.value = "";
  $("token").querySelector("code").textContent = made.token;
  $("token").hidden = false;
  show();
});
$("copy")?.addEventListener("click", async () => {
  await copyText($("token").querySelector("code").textContent);
  $("copy").textContent = t.copied;
});
$("password")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target, said = $("changed");
  said.className = "error";
  try {
    await api("POST", "/account/password", { old: form.elements.old.value, new: form.elements.new.value });
    said.className = "good";
    said.textContent = t.password_changed;
    form.reset();
    show();
  } catch (error) {
    const known = { wrong_password: t.old_wrong, bad_password: t.password_bad };
    said.textContent = known[error.code] ?? error.message;
  }
  said.hidden = false;
});
show();
