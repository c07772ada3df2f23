// A form from a JSON Schema. Each field is { element, set(value), get() }; undefined is a value that is not there.

export class Fields {
  // changed: is told the JSON whenever somebody changes a field.
  constructor(place, schema, changed) {
    this.form = document.createElement("form");
    this.root = field(schema, schema, schema.title ?? "");
    this.verdict = document.createElement("p");
    this.verdict.className = "verdict quiet";
    this.form.append(this.root.element);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => {
      changed(JSON.stringify(this.root.get() ?? null));
      this.judge();
    });
    place.append(this.form, this.verdict);
    place.hidden = false;
  }

  // Show what a text says, where it is whole: drafts may not be.
  take(text) {
    try {
      this.root.set(JSON.parse(text));
    } catch {
      // the next step may be readable
    }
  }

  judge() {
    const wrong = [...this.form.elements].find((input) => !input.validity.valid);
    this.verdict.textContent = wrong ? `${wrong.dataset.name}: ${wrong.validationMessage}` : "Valid for the schema.";
    this.verdict.classList.toggle("error", Boolean(wrong));
  }
}

function field(schema, root, name, isRequired = true) {
  const at = resolved(schema, root);
  if (at.enum) return choice(at, name, isRequired);
  if (at.type === "object" && at.properties) return group(at, root, name);
  if (at.type === "array" && at.items) return list(at, root, name);
  if (at.type === "boolean") return check(at, name);
  if (at.type === "integer" || at.type === "number") return number(at, name, isRequired);
  if (at.type === "string") return text(at, name, isRequired);
  return anything(at, name);
}

// What a reference within the schema points to.
function resolved(schema, root) {
  const path = typeof schema?.$ref === "string" && schema.$ref.startsWith("#/") ? schema.$ref.slice(2).split("/") : [];
  const found = path.reduce((place, key) => place?.[key.replaceAll("~1", "/").replaceAll("~0", "~")], root);
  return (path.length ? found : schema) ?? {};
}

function group(schema, root, name) {
  const element = framed(name);
  const fields = Object.entries(schema.properties).map(([key, each]) => {
    const own = field(each, root, key, schema.required?.includes(key) ?? false);
    element.append(own.element);
    return [key, own];
  });
  const values = () => fields.map(([key, own]) => [key, own.get()]);
  const get = () => Object.fromEntries(values().filter(([, value]) => value !== undefined));
  return { element, get, set: (value) => fields.forEach(([key, own]) => own.set(value?.[key])) };
}

function list(schema, root, name) {
  const element = framed(name);
  let items = [];
  const set = (value) => {
    const wanted = Array.isArray(value) ? value : [];
    while (items.length > wanted.length) items.pop().element.remove();
    while (items.length < wanted.length) {
      items.push(field(schema.items, root, `${items.length + 1}`));
      element.append(items.at(-1).element);
    }
    items.forEach((item, index) => item.set(wanted[index]));
  };
  return { element, set, get: () => items.map((item) => item.get()) };
}

function choice(schema, name, isRequired) {
  const select = document.createElement("select");
  const options = isRequired ? schema.enum : [undefined, ...schema.enum];
  select.append(...options.map((value, index) => new Option(value === undefined ? "" : said(value), index)));
  select.selectedIndex = -1;
  const find = (value) => options.findIndex((option) => JSON.stringify(option) === JSON.stringify(value));
  const set = (value) => (select.selectedIndex = find(value));
  return { element: labelled(select, schema, name), set, get: () => options[select.selectedIndex] };
}

function check(schema, name) {
  const input = made("input", { type: "checkbox" });
  const element = labelled(input, schema, name);
  element.classList.add("row");
  return { element, set: (value) => (input.checked = value === true), get: () => input.checked };
}

function number(schema, name, isRequired) {
  const input = made("input", { type: "number", required: isRequired, step: schema.multipleOf ?? "any" });
  if (schema.type === "integer" && !schema.multipleOf) input.step = 1;
  input.min = schema.minimum ?? "";
  input.max = schema.maximum ?? "";
  const get = () => (input.value === "" ? undefined : Number(input.value));
  return { element: labelled(input, schema, name), set: (value) => (input.value = value ?? ""), get };
}

function text(schema, name, isRequired) {
  const isLong = !schema.pattern && (schema.maxLength ?? Infinity) > 200;
  const input = made(isLong ? "textarea" : "input", isLong ? { rows: 1 } : {});
  if (schema.pattern) input.pattern = `.*(?:${schema.pattern}).*`;
  if (schema.minLength) input.minLength = schema.minLength;
  if (schema.maxLength !== undefined) input.maxLength = schema.maxLength;
  const get = () => (input.value === "" && !isRequired ? undefined : input.value);
  return { element: labelled(input, schema, name), set: (value) => (input.value = value ?? ""), get };
}

// What has no field of its own, such as alternatives, is shown as JSON.
function anything(schema, name) {
  const input = made("textarea", { rows: 1, spellcheck: false });
  const get = () => {
    try {
      input.setCustomValidity("");
      return input.value.trim() ? JSON.parse(input.value) : undefined;
    } catch {
      input.setCustomValidity("This is not JSON.");
      return undefined;
    }
  };
  return { element: labelled(input, schema, name), set: (value) => (input.value = JSON.stringify(value) ?? ""), get };
}

function framed(name) {
  const element = document.createElement("fieldset");
  if (!name) return element;
  const legend = document.createElement("legend");
  legend.textContent = name;
  element.append(legend);
  return element;
}

function labelled(input, schema, name) {
  const label = document.createElement("label");
  input.dataset.name = name;
  input.title = schema.description ?? "";
  label.append(name, " ", input);
  return label;
}

function made(kind, properties) {
  return Object.assign(document.createElement(kind), properties);
}

function said(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}
