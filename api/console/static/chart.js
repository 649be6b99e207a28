// Lines over the last five minutes at most, in SVG; series differ by dash as well as by colour.

import { h, show, svg } from "./dom.js";

const SHORTEST_S = 60;
const LONGEST_S = 300;
const HEIGHT = 168;
const PAD = { left: 44, right: 10, top: 10, bottom: 22 };
const KINDS = 6;

export class Chart {
  /** `format` writes a value; `most` fixes the top of the axis, else it follows the values. */
  constructor(parent, { title, format, most = null, empty }) {
    Object.assign(this, { title, format, most, empty });
    this.points = new Map(); // name → [[time, value or null]]
    this.now = 0;
    this.plot = h("div", { class: "plot" });
    this.legend = h("ul", { class: "legend" });
    parent.append(this.plot, this.legend);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.draw();
  }

  /** Add a value of each series at `time` (seconds); one that is not named any more ends. */
  add(time, values) {
    this.now = time;
    for (const [name, value] of Object.entries(values)) {
      if (!this.points.has(name)) this.points.set(name, []);
      this.points.get(name).push([time, value]);
    }
    for (const [name, points] of this.points) {
      while (points.length && points[0][0] < time - LONGEST_S) points.shift();
      if (!points.length) this.points.delete(name);
      else if (!(name in values) && points.at(-1)[1] !== null) points.push([time, null]);
    }
    this.draw();
  }

  top() {
    if (this.most !== null) return this.most;
    const values = [...this.points.values()].flat().map(([, value]) => value ?? 0);
    const most = Math.max(4, ...values);
    const power = 10 ** Math.floor(Math.log10(most));
    return [1, 2, 4, 8, 10].map((n) => n * power).find((n) => n >= most);
  }

  /** How long the axis is: it grows with what there is to show. */
  span() {
    const first = Math.min(this.now, ...[...this.points.values()].map((points) => points[0][0]));
    return Math.min(Math.max(SHORTEST_S, Math.ceil((this.now - first) / 30) * 30), LONGEST_S);
  }

  draw() {
    const width = Math.max(200, this.plot.clientWidth);
    const top = this.top(), span = this.span();
    const x = (time) => width - PAD.right - ((this.now - time) / span) * (width - PAD.left - PAD.right);
    const y = (value) => HEIGHT - PAD.bottom - (value / top) * (HEIGHT - PAD.top - PAD.bottom);
    const names = [...this.points.keys()].sort();
    const lines = names.map((name, i) => svg("path", { class: `line s${i % KINDS}`, d: path(this.points.get(name), x, y) }));
    const axis = [0, top / 2, top].flatMap((value) => [
      svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: PAD.left - 7, y: y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    const times = [span, (2 * span) / 3, span / 3, 0].map((ago) => svg("text", {
      class: "tick", x: x(this.now - ago), y: HEIGHT - 5, "text-anchor": ago === 0 ? "end" : ago === span ? "start" : "middle",
    }, ago === 0 ? "now" : `−${ago % 60 === 0 ? `${ago / 60}\u202fmin` : `${ago}\u202fs`}`));
    const label = `${this.title}. ${names.map((name) => `${name}: ${this.last(name)}`).join("; ") || this.empty}`;
    const none = names.length ? [] : [svg("text", { class: "none", x: (width + PAD.left) / 2, y: HEIGHT / 2 - 4, "text-anchor": "middle" }, this.empty)];
    show(this.plot, svg("svg", { width, height: HEIGHT, role: "img", "aria-label": label }, ...axis, ...times, ...lines, ...none));
    show(this.legend, names.map((name, i) => h("li", {},
      svg("svg", { width: 22, height: 8, "aria-hidden": "true" }, svg("path", { class: `line s${i % KINDS}`, d: "M0 4H22" })),
      h("span", {}, name), h("b", {}, this.last(name)))));
  }

  last(name) {
    const value = this.points.get(name).at(-1)[1];
    return value === null ? "gone" : this.format(value);
  }
}

function path(points, x, y) {
  let d = "", pen = "M";
  for (const [time, value] of points) {
    if (value === null) pen = "M";
    else { d += `${pen}${x(time).toFixed(1)} ${y(value).toFixed(1)}`; pen = "L"; }
  }
  return d;
}
