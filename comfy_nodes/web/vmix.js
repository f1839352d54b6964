// The sliders of VMixAesthetics: one for each label of the connected file.
//
// What is saved, exported and run is the node's text widget `aesthetics`, JSON from label to
// weight. The sliders show that text and write it; they hold nothing themselves.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { findLabels, findText, nodesOf } from "./upstream.js";

const NODE = "VMixAesthetics";
const MARGIN = 6;
const TEXTS = {
  en: {
    all: ["all", "Every label at 1"],
    none: ["none", "Every label at its neutral weight, or at 0"],
    defaults: ["defaults", "The file's own weights"],
    only: ["only", "This label at 1, all others at their neutral weight, or at 0"],
    remove: ["remove", "Remove it from the text"],
    unconnected: "Connect a VMix file to see its labels.",
    untraceable: "Which file this will be is known only when it runs; run once to see its labels.",
    loading: "Reading the labels …",
    noLabels: "This file has no labels.",
    preset: "A preset holds one selection, which cannot be changed.",
    elsewhere: "The text comes from another node or from several sub-graphs, and is set there.",
    notJson: "The text is not a JSON object, label to weight: ",
    unknown: "no label of this file",
    noNumber: "not a number",
    notInPreset: "not what the preset holds",
  },
  zh: {
    all: ["全部", "所有标签设为 1"],
    none: ["全不", "所有标签设为中性权重，没有中性权重的设为 0"],
    defaults: ["默认", "文件自带的权重"],
    only: ["仅此", "此标签设为 1，其余设为中性权重，没有中性权重的设为 0"],
    remove: ["移除", "从文本中移除"],
    unconnected: "连接 VMix 文件后显示其标签。",
    untraceable: "运行时才能确定是哪个文件；运行一次后显示其标签。",
    loading: "正在读取标签 …",
    noLabels: "此文件没有标签。",
    preset: "预设只含一组固定的权重，不能更改。",
    elsewhere: "文本来自其他节点或多个子图，请在那里设置。",
    notJson: "文本不是“标签到权重”的 JSON 对象：",
    unknown: "此文件没有该标签",
    noNumber: "不是数字",
    notInPreset: "与预设所含的不同",
  },
};

const panels = new WeakMap(); // node, or its element → Panel
const answers = new Map(); // query → promise of what the server said

class Panel {
  constructor(node) {
    this.node = node;
    this.content = element("div", "vmix-content");
    this.root = element("div", "vmix-sliders");
    this.root.append(this.content);
    panels.set(node, this).set(this.root, this);
    this.height = 32;
    this.widget = node.addDOMWidget("sliders", "VMIX_SLIDERS", this.root, {
      serialize: false, // not into the API prompt …
      margin: MARGIN,
      getMinHeight: () => this.height,
    });
    this.widget.serialize = false; // … nor into the workflow
    forwardToCanvas(this.root);
    // Its height is known only once it is shown, and changes when text wraps.
    new ResizeObserver(() => this.fit()).observe(this.content);
  }

  /** Brings the panel up to date; many events ask for it, so once for all of them. */
  refresh() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load(), 0);
  }

  async load() {
    if (this.node.graph?.getNodeById(this.node.id) !== this.node) {
      this.handOver();
      return;
    }
    this.graphId = this.node.graph.id;
    const query = findLabels(this.node);
    this.query = query;
    if (!query) {
      this.file = query === undefined ? undefined : lastRun(this.node);
      this.message = query === undefined ? "unconnected" : this.file ? "" : "untraceable";
    } else {
      const answer = ask(query);
      if (answer !== this.answer) {
        this.answer = answer;
        this.file = undefined;
        this.message = "loading";
        this.draw();
      }
      const said = await answer;
      if (this.query !== query || this.answer !== answer) return; // overtaken by another
      this.file = said.error ? undefined : said;
      this.message = said.error ?? "";
    }
    this.draw();
  }

  /** Undo makes all nodes anew, and Nodes 2.0 goes on showing the elements of the old ones. */
  handOver() {
    if (!this.root.isConnected) return;
    for (const node of nodesOf(rootGraph())) {
      const heir = panels.get(node);
      if (heir && String(node.id) === String(this.node.id) && node.graph.id === this.graphId) {
        this.root.replaceWith(heir.root);
      }
    }
  }

  /** What the text says, seen with the file's labels. */
  read() {
    // Without a graph the node was removed while an input of ours had the focus.
    const text = this.node.graph && findText(this.node, "aesthetics");
    const labels = this.file?.labels ?? [];
    const fixed = this.file?.kind === "preset";
    const known = new Map(labels.map((label) => [label.name, label.weight]));
    const weights = new Map(known);
    const problems = [];
    let error = "";
    let chosen = {};
    if (!text) error = "elsewhere";
    else {
      try {
        chosen = parse(text.value);
      } catch (reason) {
        error = translated("notJson") + reason.message;
      }
    }
    for (const [name, value] of Object.entries(chosen)) {
      const weight = typeof value === "number" ? value : NaN;
      if (!known.has(name)) problems.push([name, value, "unknown"]);
      else if (!Number.isFinite(weight)) problems.push([name, value, "noNumber"]);
      else if (fixed && weight !== known.get(name)) problems.push([name, value, "notInPreset"]);
      else weights.set(name, weight);
    }
    return { text, chosen, labels, fixed, weights, problems, error };
  }

  /** Writes weights of the file's labels; what else is in the text stays. */
  write(weights) {
    const { text, labels, problems } = this.read();
    if (!text) return;
    const chosen = new Map(problems.map(([name, value]) => [name, value]));
    for (const { name } of labels) if (weights.has(name)) chosen.set(name, weights.get(name));
    this.setText(text, chosen);
  }

  setText(text, chosen) {
    text.value = format(chosen);
    text.callback?.(text.value, app.canvas, this.node); // Nodes 2.0 shows it only then
    this.node.graph.setDirtyCanvas(true, true);
    this.draw();
  }

  /** Builds the rows anew only if they are others than before: a slider may be in use. */
  draw() {
    const state = this.read();
    const shape = JSON.stringify([
      language(), this.message, this.file, state.problems, state.error, !state.text,
    ]);
    if (shape !== this.shape) {
      this.shape = shape;
      this.build(state);
    }
    for (const [name, { slider, number }] of this.rows) {
      const weight = state.weights.get(name);
      if (document.activeElement !== slider) slider.value = weight;
      if (document.activeElement !== number) number.value = shown(weight);
    }
  }

  build({ labels, fixed, problems, error, text }) {
    const disabled = fixed || Boolean(error);
    this.rows = new Map();
    this.content.replaceChildren();
    const say = (key) => this.content.append(element("p", "vmix-message", translated(key)));
    if (this.message) say(this.message);
    else if (fixed) say("preset");
    else if (!labels.length) say("noLabels");
    else if (text) this.content.append(this.buttons(labels));
    if (error && (text || labels.length)) say(error);
    if (text) for (const label of labels) this.content.append(this.row(label, disabled));
    // Without the file there is nothing to judge the labels by.
    if (this.file) for (const problem of problems) this.content.append(this.warning(...problem));
  }

  buttons(labels) {
    const bar = element("div", "vmix-buttons");
    bar.append(
      button("all", () => this.commit(alone(labels, () => true))),
      button("none", () => this.commit(alone(labels, () => false))),
      button("defaults", () => this.commit(new Map())),
    );
    return bar;
  }

  row(label, disabled) {
    const row = element("div", "vmix-row");
    const [name, tooltip] = described(label);
    const title = element("span", "vmix-name", name);
    const slider = element("input", "vmix-slider");
    Object.assign(slider, { type: "range", min: label.low, max: label.high, step: label.step });
    const number = element("input", "vmix-number");
    Object.assign(number, { type: "number", step: label.step });
    const only = button("only", () => {
      this.commit(alone(this.file.labels, ({ name }) => name === label.name));
    });
    for (const input of [slider, number]) input.ariaLabel = name;
    for (const part of [title, slider, number]) part.title = tooltip;
    for (const part of [slider, number, only]) part.disabled = disabled;

    const set = (weight) => {
      const { weights, problems } = this.read();
      for (const [other] of problems) weights.delete(other); // what is wrong there stays
      this.write(weights.set(label.name, weight));
    };
    slider.addEventListener("input", () => {
      set(slider.valueAsNumber);
      number.value = shown(slider.valueAsNumber);
    });
    slider.addEventListener("change", checkpoint);
    // With the focus in an input, ComfyUI leaves Ctrl+Z to it, and a slider has no undo.
    slider.addEventListener("pointerup", () => slider.blur());
    number.addEventListener("change", () => {
      if (Number.isFinite(number.valueAsNumber)) set(number.valueAsNumber);
      number.value = shown(this.read().weights.get(label.name));
      slider.value = number.value;
      checkpoint();
    });
    number.addEventListener("keydown", (event) => {
      if (event.key === "Enter") number.blur();
    });

    row.append(title, slider, number, only);
    this.rows.set(label.name, { slider, number });
    return row;
  }

  warning(name, value, reason) {
    const row = element("div", "vmix-row vmix-warning");
    const text = `⚠ ${JSON.stringify(name)}: ${JSON.stringify(value)}`;
    const said = element("span", "vmix-name", `${text} – ${translated(reason)}`);
    said.title = said.textContent;
    const remove = button("remove", () => {
      const { text, chosen } = this.read();
      this.setText(text, new Map(Object.entries(chosen).filter(([other]) => other !== name)));
      checkpoint();
    });
    row.append(said, remove);
    return row;
  }

  commit(weights) {
    this.write(weights);
    checkpoint();
  }

  /** Makes the node as high as its rows need, and as low again unless it was resized. */
  fit() {
    const { node } = this;
    const height = this.content.offsetHeight + 2 * MARGIN;
    if (!this.content.offsetHeight || height === this.height) return;
    this.height = height;
    const [, needed] = node.computeSize();
    const wanted = node.size[1] === this.fitted ? needed : Math.max(node.size[1], needed);
    this.fitted = wanted;
    if (wanted !== node.size[1]) node.setSize([node.size[0], wanted]);
    node.graph?.setDirtyCanvas(true, true);
  }
}

/** Some labels at 1, and all others left out. */
function alone(labels, chosen) {
  return new Map(labels.map((label) => [label.name, chosen(label) ? 1 : label.neutral ?? 0]));
}

/** The labels as GET /vmix/labels gives them, or {error}. */
function ask(query) {
  if (!answers.has(query)) {
    const answer = api
      .fetchApi(`/vmix/labels?${query}`)
      .then((response) => response.json())
      .catch((error) => ({ error: String(error) }));
    answers.set(query, answer);
  }
  return answers.get(query);
}

/** The same structure from the node's last run. */
function lastRun(node) {
  const outputs = app.nodeOutputs ?? {};
  // By the first key in a sub-graph, by the second outside.
  const found = outputs[`${node.graph.id}:${node.id}`] ?? outputs[node.id];
  return panels.get(node).executed ?? found?.vmix_labels?.[0];
}

function parse(text) {
  const found = String(text ?? "").trim() ? JSON.parse(text) : {};
  if (typeof found !== "object" || found === null || Array.isArray(found)) {
    throw new TypeError(JSON.stringify(found));
  }
  return found;
}

/** JSON as people write it in one line. */
function format(chosen) {
  const entries = [...chosen].map(([name, v]) => `${JSON.stringify(name)}: ${JSON.stringify(v)}`);
  return `{${entries.join(", ")}}`;
}

function shown(weight) {
  const short = weight.toFixed(2);
  return Number(short) === weight ? short : String(weight);
}

/** A label's name in the language of the UI, and its tooltip. */
function described({ name, dimension, display_names: names = {} }) {
  const local = names[language()] ?? names[language().split("-")[0]];
  const parts = [dimension, local && local !== name ? name : ""].filter(Boolean);
  return [local || name, parts.join(" · ") || name];
}

function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** One of our texts, or, as the server's messages are, the key itself. */
function translated(key) {
  return (TEXTS[language().split("-")[0]] ?? TEXTS.en)[key] ?? key;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(key, onClick) {
  const [text, tooltip] = translated(key);
  const made = element("button", "vmix-button", text);
  made.type = "button";
  made.title = tooltip;
  made.addEventListener("click", onClick);
  return made;
}

/** A step of its own for undo, which ComfyUI takes by itself only after the mouse. */
function checkpoint() {
  app.canvas.emitBeforeChange();
  app.canvas.emitAfterChange();
}

/** Zooming and panning go on over the panel, as over ComfyUI's own text fields. */
function forwardToCanvas(root) {
  root.addEventListener("wheel", (event) => app.canvas.processMouseWheel(event));
  root.addEventListener("pointerdown", (event) => {
    if (event.button === 1) app.canvas.processMouseDown(event);
  });
  root.addEventListener("pointermove", (event) => {
    if (event.buttons & 4) app.canvas.processMouseMove(event);
  });
  root.addEventListener("pointerup", (event) => {
    if (event.button === 1) app.canvas.processMouseUp(event);
  });
}

/** Calls `after` each time the object's method of that name was called. */
function chain(object, name, after) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    after(...args);
    return result;
  };
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

function refreshAll() {
  for (const node of nodesOf(rootGraph())) panels.get(node)?.refresh();
  for (const root of document.querySelectorAll(".vmix-sliders")) panels.get(root).refresh();
}

function forgetAnswers() {
  answers.clear();
  refreshAll();
}

app.registerExtension({
  name: "vmix.sliders",

  setup() {
    const style = element("link", "");
    Object.assign(style, { rel: "stylesheet", href: new URL("vmix.css", import.meta.url).href });
    document.head.append(style);
    // Another file, link or mode anywhere upstream, undo, or a text that was set elsewhere.
    api.addEventListener("graphChanged", refreshAll);
    api.addEventListener("reconnected", forgetAnswers);
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel(node);
    node.size[0] = Math.max(node.size[0], 360);
    const text = node.widgets.find((widget) => widget.name === "aesthetics");
    for (const method of ["onAdded", "onConfigure", "onConnectionsChange"]) {
      chain(node, method, () => panel.refresh());
    }
    chain(text, "callback", () => panel.refresh());
    chain(node, "onExecuted", (output) => {
      panel.executed = output?.vmix_labels?.[0] ?? panel.executed;
      panel.refresh();
    });
  },

  afterConfigureGraph: refreshAll,
  refreshComboInNodes: forgetAnswers,
});
