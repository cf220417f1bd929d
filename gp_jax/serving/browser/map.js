// Draws a map over its picture: kept regions bright with an outline, the others dark, and importance as heat.

import { element } from './elements.js';

const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];  // inferno

function heat(value) {
  const place = Math.min(0.9999, Math.max(0, value)) * (STOPS.length - 1), stop = Math.floor(place);
  return STOPS[stop].map((from, k) => Math.round(from + (place - stop) * (STOPS[stop + 1][k] - from)));
}

export const SCALE = `linear-gradient(to right, ${STOPS.map(stop => `rgb(${stop})`)})`;

// Edges between kept and dropped regions, as one path. at: pixels of a column's or row's edge.
function outline(keep, rows, columns, x, y) {
  const path = new Path2D(), kept = (row, column) =>
    row >= 0 && column >= 0 && row < rows && column < columns && keep[row * columns + column];
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      const own = kept(row, column);
      if (own !== kept(row - 1, column)) { path.moveTo(x(column), y(row)); path.lineTo(x(column + 1), y(row)); }
      if (own !== kept(row, column - 1)) { path.moveTo(x(column), y(row)); path.lineTo(x(column), y(row + 1)); }
    }
  }
  return path;
}

// A picture with room for its map. remove: takes it away again; null: it was asked about already.
export function figureOf(picture, remove) {
  const canvas = element('canvas', { role: 'img' }), caption = element('span', {}), line = element('figcaption', {}, caption);
  const name = `Remove ${picture.name}`;
  if (remove) line.append(element('button', { type: 'button', textContent: 'Remove', 'aria-label': name, onclick: remove }));
  const frame = element('div', { className: 'frame' }, element('img', { src: picture.url, alt: picture.name }), canvas);
  frame.style.setProperty('--ratio', picture.width / picture.height);
  return { picture, canvas, caption, asked: !remove, root: element('figure', {}, frame, line) };
}

export function clearMap({ picture, canvas, caption, asked }) {
  canvas.hidden = true;
  caption.textContent = asked ? picture.name : `${picture.name} (next question)`;
}

// map: one of a reply's `mask`; keep: flags, flat; show: { kept, heat }.
export function drawMap({ picture, canvas, caption }, map, keep, show) {
  const count = keep.filter(Boolean).length;
  caption.textContent = `${picture.name}: ${count} of ${keep.length} kept`;
  canvas.setAttribute('aria-label', `Map of ${picture.name}: ${count} of ${keep.length} regions are kept`);
  canvas.hidden = false;
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth * scale, height = canvas.clientHeight * scale;
  canvas.width = width;
  canvas.height = height;
  const { rows, columns, area: [left, top, right, bottom] } = map, pen = canvas.getContext('2d');
  const x = column => Math.round((left + (right - left) * column / columns) * width);
  const y = row => Math.round((top + (bottom - top) * row / rows) * height);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const box = [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)], value = map.importance[row][column];
      if (show.kept && !keep[row * columns + column]) { pen.fillStyle = 'rgb(12 14 18 / .6)'; pen.fillRect(...box); }
      if (show.heat) { pen.fillStyle = `rgb(${heat(value).join(' ')} / ${0.15 + 0.4 * value})`; pen.fillRect(...box); }
    }
  }
  if (show.kept) {
    const path = outline(keep, rows, columns, x, y);
    for (const [color, thick] of [['#000c', 4], ['#fff', 2]]) {
      pen.strokeStyle = color;
      pen.lineWidth = thick * scale;
      pen.lineCap = 'square';
      pen.stroke(path);
    }
  }
}
