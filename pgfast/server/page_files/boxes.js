// Boxes in the text of a detect prompt: "<locY0><locX0><locY1><locX1> label", several separated by " ; ".

const BINS = 1024;
const GROUP = /<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>(?:\s*<seg\d{3}>)*([^<;]*)/g;
const COLOURS = ["#ffd400", "#4ddcff", "#ff8ad8", "#7dea6a", "#ffab5e", "#c3b1ff"];

/**
 * Reads the boxes; one label has one colour.
 * @param {string} text what the model wrote
 * @returns {{left: number, top: number, right: number, bottom: number, label: string, colour: string}[]} edges from 0 to 1
 */
export function parseBoxes(text) {
  const seen = [];
  const boxes = [];
  for (const [, ...parts] of text.matchAll(GROUP)) {
    const [y0, x0, y1, x1] = parts.slice(0, 4).map((bin) => Number(bin) / BINS);
    if (Math.max(y0, x0, y1, x1) >= 1) continue; // not a bin: the model knows 0000 to 1023
    const label = parts[4].trim() || "unnamed";
    if (!seen.includes(label)) seen.push(label);
    boxes.push({
      left: Math.min(x0, x1), right: Math.max(x0, x1), top: Math.min(y0, y1), bottom: Math.max(y0, y1),
      label, colour: COLOURS[seen.indexOf(label) % COLOURS.length],
    });
  }
  return boxes;
}

/** Draws boxes into an element that lies exactly over the picture. */
export function drawBoxes(layer, boxes) {
  layer.replaceChildren(...boxes.map(({ left, top, right, bottom, label, colour }) => {
    const box = document.createElement("div");
    const tag = document.createElement("span");
    box.className = "box";
    tag.textContent = label;
    tag.classList.toggle("inside", top < 0.08); // no room above
    tag.classList.toggle("from-right", left > 0.6);
    const percent = (share) => `${(share * 100).toFixed(3)}%`;
    Object.assign(box.style, {
      left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
    });
    box.style.setProperty("--mark", colour);
    box.append(tag);
    return box;
  }));
}

/** "2 × cat, dog": labels in order of their first box. */
export function countLabels(boxes) {
  const counts = new Map();
  for (const { label } of boxes) counts.set(label, (counts.get(label) ?? 0) + 1);
  return [...counts].map(([label, count]) => (count > 1 ? `${count} × ${label}` : label)).join(", ");
}
