// Shows openapi.json: what each call takes and gives, with a curl line. Needs nothing from elsewhere.
import { $, api, base, make, t } from "./page.js";

const known = await api("GET", "/openapi.json");

/** Returns a schema as an example that a reader understands at once. */
function example(schema, depth = 0) {
  if (schema.$ref) return depth > 3 ? {} : example(known.components.schemas[schema.$ref.split("/").pop()], depth + 1);
  const type = [schema.type].flat()[0];
  if (schema.enum) return schema.enum[0];
  if (type === "object") return Object.fromEntries(Object.entries(schema.properties ?? {}).map(([name, inner]) => [name, example(inner, depth + 1)]));
  if (type === "array") return [example(schema.items, depth + 1)];
  return { integer: 1, boolean: true, string: schema.format === "date-time" ? "2025-01-01T00:00:00Z" : "text" }[type] ?? null;
}

const pretty = (value) => make("pre", { tabIndex: 0 }, make("code", {}, JSON.stringify(value, null, 2)));

/** Returns words with what stands between backticks as code. */
const told = (words) => words.split("`").map((part, n) => (n % 2 ? make("code", {}, part) : part));

function curl(method, path, kind, body) {
  const parts = [`curl -X ${method} "${location.origin}${base}${path}"`, '-H "Authorization: Bearer $TOKEN"'];
  if (kind === "application/json") parts.push(`-H 'Content-Type: ${kind}'`, `-d '${JSON.stringify(example(body))}'`);
  else if (body) parts.push(...Object.entries(example(body)).map(([name, value]) => `--data-urlencode '${name}=${value}'`));
  return parts.join(" \\\n  ");
}

function operation(method, path, about) {
  const inside = make("div", { className: "inside" });
  if (about.description) inside.append(make("p", {}, ...told(about.description)));
  if (about.parameters.length) {
    inside.append(make("h3", {}, t.parameters), make("dl", {}, ...about.parameters.flatMap((parameter) => [
      make("dt", {}, make("code", {}, parameter.name)), make("dd", {}, ...told(parameter.description ?? parameter.in))])));
  }
  const [kind, { schema: body } = {}] = Object.entries(about.requestBody?.content ?? {})[0] ?? [];
  if (body) inside.append(make("h3", {}, t.request), pretty(example(body)));
  inside.append(make("h3", {}, "curl"), make("pre", { tabIndex: 0 }, make("code", {}, curl(method, path, kind, body))), make("h3", {}, t.answers));
  for (const [status, answer] of Object.entries(about.responses)) {
    inside.append(make("p", {}, make("code", {}, status), ` ${answer.description}`));
    const schema = answer.content?.["application/json"]?.schema;
    if (schema && status < 400) inside.append(pretty(example(schema)));
  }
  return make("details", {}, make("summary", {}, make("code", { className: "method" }, method), make("code", {}, path), make("span", { className: "muted" }, ...told(about.summary))), inside);
}

for (const [path, methods] of Object.entries(known.paths)) {
  for (const [method, about] of Object.entries(methods)) $("operations").append(operation(method.toUpperCase(), path, about));
}
