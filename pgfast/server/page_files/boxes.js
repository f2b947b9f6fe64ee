// Boxes in the text of a detect prompt: "<locY0><locX0><locY1><locX1> label", several separated by " ; ".

const BINS = 1024;
const MARKER = /<(?:loc(\d{4})|seg(\d{3}))>/;
const COLOURS = ["#ffd400", "#4ddcff", "#ff8ad8", "#7dea6a", "#ffab5e", "#c3b1ff"];

/**
 * Reads the boxes as pgfast/locations.py does, and leaves out the same ones; one label has one colour.
 * @param {string} text what the model wrote
 * @returns {{left: number, top: number, right: number, bottom: number, label: string, colour: string}[]} edges from 0 to 1
 */
export function parseBoxes(text) {
  const objects = [];
  let bins = [];
  const finish = (label) => {
    if (bins.length === 4) objects.push({ bins, label: label || "unnamed" });
    bins = [];
  };
  const parts = text.split(MARKER); // text, then for each marker: its bin, its code (one is undefined), text
  for (let i = 0; i < parts.length; i += 3) {
    if (i && parts[i - 2] !== undefined) {
      if (bins.length === 4) finish(""); // the object before it has no label
      bins.push(Number(parts[i - 2]));
    }
    const [label, ...others] = parts[i].split(";");
    if (label.trim() || others.length) finish(label.trim());
  }
  finish("");
  const seen = [];
  return objects.flatMap(({ bins: [y0, x0, y1, x1], label }) => {
    if (Math.max(y0, x0, y1, x1) >= BINS || y0 === y1 || x0 === x1) return []; // no bin, or an empty box
    if (!seen.includes(label)) seen.push(label);
    return {
      left: Math.min(x0, x1) / BINS, right: Math.max(x0, x1) / BINS,
      top: Math.min(y0, y1) / BINS, bottom: Math.max(y0, y1) / BINS,
      label, colour: COLOURS[seen.indexOf(label) % COLOURS.length],
    };
  });
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
