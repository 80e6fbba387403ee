// Shows /openapi.json to people. Loads nothing else.

const $ = (id) => document.getElementById(id);

function make(kind, text, ...children) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

// Text in which `this` is code.
function words(text) {
  return (text ?? "").split("`").map((part, index) => (index % 2 ? make("code", part) : document.createTextNode(part)));
}

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.filter((item) => item !== null).join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items)}`;
  const kind = Array.isArray(schema.type) ? schema.type.filter((item) => item !== "null").join(" or ") : schema.type;
  return schema.contentMediaType ? "bytes" : kind ?? "any";
}

function table(headings, rows) {
  const scroll = make("div");
  scroll.className = "scroll";
  scroll.append(make("table", "", make("thead", "", make("tr", "", ...headings.map((heading) => make("th", heading)))),
    make("tbody", "", ...rows.map((row) => make("tr", "", ...row.map((cell) => make("td", "", ...words(cell))))))));
  return scroll;
}

function operation(path, method, told) {
  const details = make("details", "", make("summary", "", make("b", method.toUpperCase()), make("code", path), make("span", "", ...words(told.summary))));
  const parameters = told.parameters.map((item) => {
    const kind = item.schema ?? item.content?.["application/json"]?.schema;
    return [item.name, item.in, typeOf(kind), [item.required ? "required" : "", kind?.description ?? item.description ?? ""].filter(Boolean).join("; ")];
  });
  if (parameters.length) details.append(table(["parameter", "in", "type", ""], parameters));
  if (told.requestBody) details.append(make("p", "", ...words(`Body: ${Object.keys(told.requestBody.content).join(", ")}. ${told.requestBody.description ?? ""}`)));
  details.append(table(["status", "answer"], Object.entries(told.responses).map(([status, answer]) => [status,
    answer.$ref ? `problem: ${answer.$ref.split("/").pop()}` : `${Object.values(answer.content ?? {}).map((item) => typeOf(item.schema)).join(", ")} ${answer.description}`])));
  return details;
}

const document_ = await (await fetch("/openapi.json")).json();
$("version").textContent = `API of version ${document_.info.version}`;
$("paths").append(...Object.entries(document_.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, told]) => operation(path, method, told))));
$("schemas").append(...Object.entries(document_.components.schemas).filter(([, schema]) => schema.properties).map(([name, schema]) =>
  make("details", "", make("summary", "", make("code", name), make("span", schema.description ?? "")),
    table(["field", "type", ""], Object.entries(schema.properties).map(([field, told]) => [field, typeOf(told), told.description ?? ""])))));
