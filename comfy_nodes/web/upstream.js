// Which VMix file and which text a node will be run with: the links are followed as ComfyUI's
// frontend follows them when it flattens a workflow for the server.

const MUTED = 2;
const BYPASSED = 4;
const DEPTH = 64; // links can run in circles through bypassed nodes

/** All nodes of a workflow, those in sub-graphs too. */
export function* nodesOf(root) {
  yield* root.nodes;
  for (const graph of root.subgraphs?.values() ?? []) yield* graph.nodes;
}

/**
 * The query for the labels of the file at the node's `vmix` input: undefined if there is none,
 * null if the file is known only at the run.
 */
export function findLabels(node) {
  const found = feeds(node, slotOf(node, "vmix"));
  const queries = new Set(found.map(queryOf));
  if (queries.size > 1) return null; // one sub-graph used with several files
  return [...queries][0];
}

/** The widget that holds the node's text of this name, wherever it is; undefined if it is none. */
export function findText(node, name, path = []) {
  const slot = slotOf(node, name);
  if (!linkInto(node, slot)) return node.widgets.find((widget) => widget.name === name);
  const found = feeds(node, slot, path);
  return found.length === 1 ? found[0].widget : undefined;
}

function queryOf({ node, path }) {
  if (node?.comfyClass === "VMixDemoModel") return "demo=1";
  const name = node?.comfyClass === "VMixLoader" && findText(node, "vmix_name", path)?.value;
  return name ? String(new URLSearchParams({ vmix_name: name })) : null;
}

function slotOf(node, name) {
  return node.inputs.findIndex((input) => input.name === name || input.widget?.name === name);
}

/**
 * All that can feed an input: nodes that run, or widgets of a sub-graph's outside. A sub-graph
 * may be used several times; `path` is the uses through which we came in, innermost last.
 */
function feeds(node, slot, path = [], depth = 0) {
  const input = node?.inputs?.[slot];
  if (!input || depth > DEPTH) return [];
  const link = linkInto(node, slot);
  if (!link) {
    const widget = node.getWidgetFromSlot(input);
    return widget ? [{ widget }] : [];
  }
  if (link.originIsIoNode) {
    const uses = path.length ? path.slice(-1) : usesOf(node.graph);
    return uses.flatMap((use) => feeds(use, link.origin_slot, path.slice(0, -1), depth + 1));
  }
  return sources(node.graph.getNodeById(link.origin_id), link.origin_slot, path, depth + 1);
}

function sources(node, slot, path, depth) {
  if (!node || depth > DEPTH || node.mode === MUTED) return [];
  if (node.mode === BYPASSED) {
    const { type } = node.outputs[slot];
    const same = node.inputs[slot]?.type === type;
    const other = same ? slot : node.inputs.findIndex((input) => input.type === type);
    return feeds(node, other, path, depth);
  }
  if (node.isSubgraphNode?.()) {
    const inside = node.resolveSubgraphOutputLink(slot);
    if (!inside?.outputNode) return [];
    return sources(inside.outputNode, inside.link.origin_slot, [...path, node], depth + 1);
  }
  if (!node.isVirtualNode) return [{ node, path }];
  if (node.type === "PrimitiveNode") return [{ widget: node.widgets?.[0] }];
  // Reroutes hand on the input of the same number, others redirect the link.
  if (node.inputs?.[slot]) return feeds(node, slot, path, depth);
  const link = node.getInputLink?.(slot);
  if (!link) return [];
  return sources(node.graph.getNodeById(link.origin_id), link.origin_slot, path, depth + 1);
}

/** Newer frontends deprecate `input.link`, and `getInputLink` of a sub-graph is of its outputs. */
function linkInto(node, slot) {
  for (const link of node.graph.links.values()) {
    if (String(link.target_id) === String(node.id) && link.target_slot === slot) return link;
  }
  return undefined;
}

/** The nodes that stand for this sub-graph, anywhere in the workflow. */
function usesOf(graph) {
  return [...nodesOf(graph.rootGraph)].filter((node) => node.subgraph === graph);
}
