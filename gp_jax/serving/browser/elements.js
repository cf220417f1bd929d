// Elements and numbers as text.

export function element(name, fields = {}, ...children) {
  const made = document.createElement(name);
  for (const [field, value] of Object.entries(fields)) {
    if (field in made) made[field] = value;
    else made.setAttribute(field, value);
  }
  made.append(...children);
  return made;
}

export function seconds(value) {
  return value === null ? '' : `${value.toFixed(2)} s`;
}

export function percent(part, whole) {
  return whole ? `${(100 * part / whole).toFixed(1)}\u00a0%` : '';
}
