// One question about one picture: what was asked, how it went, and its place in the list.

import { countLabels, parseBoxes } from "./boxes.js";

const OPEN = new Set(["waiting", "running", "busy"]);

export class Entry {
  /**
   * @param {{mode: "question" | "prompt", text: string, choices: string[]}} asked
   * @param {{onShow: (entry: Entry) => void, onAgain: (entry: Entry) => void}} actions
   */
  constructor(asked, { onShow, onAgain }) {
    this.asked = asked;
    this.boxes = [];
    this.node = document.getElementById("entry").content.firstElementChild.cloneNode(true);
    this.part(".words").textContent = asked.text;
    this.part(".asked").classList.toggle("raw", asked.mode === "prompt");
    this.part(".asked").addEventListener("click", () => onShow(this));
    this.part(".again").addEventListener("click", () => onAgain(this));
    this.part(".stop").addEventListener("click", () => this.stop());
    this.restart();
  }

  part(selector) {
    return this.node.querySelector(selector);
  }

  get open() {
    return OPEN.has(this.state);
  }

  /** Back to the state of a question that nobody has worked on. */
  restart() {
    this.controller = new AbortController();
    for (const part of [".confidence", ".shares", ".labels", "details"]) this.part(part).hidden = true;
    this.showText("");
    this.setState("waiting");
  }

  stop() {
    if (!this.open) return;
    this.controller.abort();
    this.setState("stopped", "Stopped.");
  }

  setState(state, trouble = "") {
    if (document.activeElement === this.part(".stop") && !OPEN.has(state)) this.part(".asked").focus(); // it is about to vanish
    this.state = state;
    this.node.dataset.state = state;
    this.node.setAttribute("aria-busy", String(this.open));
    this.part(".stop").hidden = !this.open;
    this.part(".again").hidden = state !== "failed" && state !== "stopped";
    this.part(".trouble").textContent = trouble;
    this.part(".trouble").hidden = !trouble;
  }

  select(selected) {
    if (selected) this.node.setAttribute("aria-current", "true");
    else this.node.removeAttribute("aria-current");
  }

  /** Text so far; boxes in it count as soon as they are complete. */
  showText(text) {
    this.boxes = parseBoxes(text);
    this.part(".answer").textContent = this.boxes.length ? countLabels(this.boxes) : text;
    this.part(".labels").hidden = this.boxes.length === 0;
    const colours = new Map(this.boxes.map(({ label, colour }) => [label, colour]));
    this.part(".labels").replaceChildren(...[...colours].map(([label, colour]) => {
      const item = element("li", label);
      item.style.setProperty("--mark", colour);
      return item;
    }));
  }

  /** @param answer JSON of /v1/answer; @param seconds on the user's clock */
  finish(answer, seconds) {
    this.showText(answer.text);
    const percentage = percent(answer.confidence);
    this.part(".confidence b").textContent = percentage;
    this.part(".took").textContent = duration(seconds);
    this.part(".scale i").style.width = `${answer.confidence * 100}%`;
    this.part(".confidence").hidden = false;
    this.showChoices(answer.choices);
    this.showDetails(answer);
    this.setState("done", answer.finish_reason === "length" ? "Cut off at the limit of tokens." : "");
    const said = this.part(".answer").textContent || "No text";
    this.spoken = `${said}. Confidence ${percentage}, ${duration(seconds)}.`;
  }

  showChoices(choices) {
    this.part(".shares").hidden = !choices;
    if (!choices) return;
    const best = Math.max(...Object.values(choices));
    this.part(".shares").replaceChildren(...Object.entries(choices).map(([name, chance]) => {
      const bar = element("span", "");
      const fill = element("i", "");
      fill.style.width = `${chance * 100}%`;
      bar.setAttribute("aria-hidden", "true");
      bar.append(fill);
      const item = element("li", "");
      item.classList.toggle("best", chance === best);
      item.append(element("b", name), bar, element("em", percent(chance)));
      return item;
    }));
  }

  showDetails(answer) {
    const { timings = {}, image, finish_reason: end, model, id } = answer;
    const rows = Object.entries(timings).map(([name, seconds]) => [name, duration(seconds)]);
    if (this.boxes.length) rows.unshift(["text", answer.text]);
    if (image) rows.push(["picture", `${image.width} × ${image.height}`]);
    rows.push(["tokens", String(answer.token_logprobs?.length ?? "")], ["ended by", end], ["model", model], ["request", id]);
    const pairs = rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", name), element("dd", value)]);
    this.part("details dl").replaceChildren(...pairs);
    this.part("details").hidden = false;
  }
}

function element(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

/** 0.9876 -> "98.8 %"; never rounded to a certainty that is none. */
function percent(share) {
  if (share < 1 && share >= 0.9995) return "> 99.9 %";
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(share * 100).toFixed(1)} %`;
}

function duration(seconds) {
  return seconds < 0.9995 ? `${Number((seconds * 1000).toPrecision(3))} ms` : `${seconds.toFixed(1)} s`;
}
