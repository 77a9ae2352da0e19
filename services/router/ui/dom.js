// Elements without a library: element("li", { class: "x", onclick }, "text", child), and the same for SVG.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function drawing(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** Text of a node, set only if it is another: a selection survives, and screen readers hear nothing twice. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A keyed list: keeps the nodes that stay, with their focus and selection. make(item) → node with update(item). */
export class KeyedList {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.rows = new Map();
  }

  show(items, key) {
    const before = this.rows;
    this.rows = new Map();
    let place = this.parent.firstChild;
    for (const item of items) {
      const name = key(item);
      const row = before.get(name) ?? this.make(item);
      before.delete(name);
      row.update(item);
      this.rows.set(name, row);
      if (row.node === place) place = place.nextSibling;
      else this.parent.insertBefore(row.node, place);
    }
    for (const row of before.values()) row.node.remove();
  }
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
