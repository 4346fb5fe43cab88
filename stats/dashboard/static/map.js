// The load map: a canvas with a row for each layer and a column for each rank, expert or slot.

import { colour } from "./words.js";

const LEFT = 38, BOTTOM = 20, TALLEST = 24, SHORTEST = 7, HEIGHT = 440;

export class LoadMap {
  /** onCell(row, column) of the cell that is pointed at, onCell(null) of none; onSelect(row) of a choice. */
  constructor(canvas, onCell, onSelect) {
    this.canvas = canvas;
    this.onCell = onCell;
    this.cursor = null;
    canvas.addEventListener("pointermove", (event) => this.point(this.at(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("click", (event) => {
      const cell = this.at(event);
      if (cell) onSelect(cell[0]);
    });
    canvas.addEventListener("keydown", (event) => {
      if (!this.data) return;
      const [row, column] = this.cursor ?? [this.selected, 0];
      const rows = this.data.values.length, columns = this.data.values[0].length;
      const to = {
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
        ArrowRight: [row, column + 1], Home: [row, 0], End: [row, columns - 1],
      }[event.key];
      if (to) this.point([Math.max(0, Math.min(rows - 1, to[0])), Math.max(0, Math.min(columns - 1, to[1]))]);
      else if (event.key === "Enter" || event.key === " ") onSelect(row);
      else return;
      event.preventDefault();
    });
    canvas.addEventListener("blur", () => this.point(null));
  }

  /** data: the server's map; separators: columns between which a rank or a node ends, as {column: "rank" | "node"}. */
  show(data, { selected, separators, dark }) {
    Object.assign(this, { data, selected, separators, dark });
    const rows = data.values.length, columns = data.values[0].length;
    if (this.cursor && (this.cursor[0] >= rows || this.cursor[1] >= columns)) this.cursor = null;
    this.image = document.createElement("canvas");
    this.image.width = columns;
    this.image.height = rows;
    const context = this.image.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    data.values.forEach((line, row) => line.forEach((value, column) => {
      const shown = data.loads[row] ? [...colour(value, dark), 255] : [0, 0, 0, 0];
      pixels.data.set(shown, 4 * (row * columns + column));
    }));
    context.putImageData(pixels, 0, 0);
    this.draw();
  }

  draw() {
    if (!this.data) return;
    const { canvas, data } = this;
    const rows = data.values.length, columns = data.values[0].length;
    const width = canvas.clientWidth, dense = window.devicePixelRatio || 1;
    this.tall = Math.max(SHORTEST, Math.min(TALLEST, HEIGHT / rows));
    this.wide = (width - LEFT) / columns;
    const height = rows * this.tall;
    canvas.style.height = `${height + BOTTOM}px`;
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round((height + BOTTOM) * dense);
    const context = canvas.getContext("2d");
    context.scale(dense, dense);
    const style = getComputedStyle(canvas);
    const soft = style.getPropertyValue("--soft"), ink = style.getPropertyValue("--ink");
    context.imageSmoothingEnabled = false;
    this.hatch(context, height, style.getPropertyValue("--line"));
    context.drawImage(this.image, LEFT, 0, width - LEFT, height);
    context.fillStyle = soft;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(13 / this.tall);
    data.layers.forEach((layer, row) => {
      if (row % every === 0) context.fillText(layer, LEFT - 6, Math.max(6, (row + 0.5) * this.tall));
    });
    context.textAlign = "center";
    const step = Math.max(1, ...[1, 2, 4, 8, 16, 32, 64, 128, 256].filter((s) => (s / 2) * this.wide < 34 && s <= columns));
    const across = this.wide > 24 ? 1 : step;
    for (let column = 0; column < columns; column += across) context.fillText(column, LEFT + (column + 0.5) * this.wide, height + 11);
    for (const [column, kind] of Object.entries(this.separators)) {
      context.fillStyle = kind === "node" ? ink : soft;
      const thick = kind === "node" ? 2.5 : 0.7;
      context.fillRect(LEFT + column * this.wide - thick / 2, 0, thick, height);
    }
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.strokeRect(LEFT + 1, this.selected * this.tall, width - LEFT - 2, this.tall);
    if (this.cursor) {
      const [row, column] = this.cursor;
      context.lineWidth = 2.5;
      context.strokeRect(LEFT + column * this.wide, row * this.tall, Math.max(this.wide, 3), this.tall);
    }
  }

  /** Where there is no load there is no colour. */
  hatch(context, height, colourOfLine) {
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, this.canvas.clientWidth - LEFT, height);
    context.clip();
    context.strokeStyle = colourOfLine;
    context.beginPath();
    for (let x = LEFT - height; x < this.canvas.clientWidth; x += 7) {
      context.moveTo(x, height);
      context.lineTo(x + height, 0);
    }
    context.stroke();
    context.restore();
  }

  at(event) {
    if (!this.data) return null;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT) / this.wide);
    const row = Math.floor((event.clientY - box.top) / this.tall);
    const inside = row >= 0 && row < this.data.values.length && column >= 0 && column < this.data.values[0].length;
    return inside ? [row, column] : null;
  }

  point(cell) {
    if (String(cell) === String(this.cursor)) return;
    this.cursor = cell;
    this.draw();
    this.onCell(...(cell ?? [null]));
  }
}
