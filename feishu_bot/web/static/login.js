import { $, api, fill, t } from "./page.js";

const form = $("login");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = $("problem"), button = form.querySelector("button");
  problem.hidden = true;
  button.disabled = true;
  try {
    await api("POST", "/login", { name: form.elements.name.value, password: form.elements.password.value });
    location.assign(form.dataset.place);
  } catch (error) {
    problem.textContent = error.status === 429 ? fill(t.login_later, { minutes: Math.ceil((error.retryAfterS ?? 60) / 60) })
      : error.status === 401 ? t.login_wrong : error.message;
    problem.hidden = false;
    form.elements.password.select();
  } finally {
    button.disabled = false;
  }
});
