// The list of lanes: which, in what order, and what the pointer shows.

import { callAt, drawAxis, drawLane, drawSample, heightOf, readTheme, rowsOf } from './draw.js';
import { lastSign, stateOf } from './model.js';
import {
  amount,
  clock,
  el,
  ends,
  percent,
  printable,
  seconds,
  shortened,
  STATES,
  tenantName,
} from './words.js';

const MOST_LANES = 200;
const NOW_MS = 1000;

const byId = (id) => document.getElementById(id);
const filters = { tenant: byId('by-tenant'), state: byId('by-state'), text: byId('by-text') };
const list = byId('lanes');
const hint = byId('hint');

const SAMPLES = [
  ['call', 'call; its dark part: the share of its prompt that had to be computed'],
  ['held', 'held: waits for room'],
  ['queued', 'let in, waits for vLLM'],
  ['gap', 'tool gap'],
  ['withdrawn', 'withdrawn while held'],
  ['over', 'end'],
];

export class Lanes {
  /** `open(lane)`: what a click does. `changed()`: another tenant is wanted. */
  constructor(open, changed) {
    this._open = open;
    this._rows = new Map();
    this._shown = [];
    this._theme = readTheme();
    this._legend = SAMPLES.map(([kind, text]) => {
      const canvas = el('canvas', 'sample');
      byId('legend').append(el('span', '', canvas, text));
      return [kind, canvas];
    });
    this._watch = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const row = this._rows.get(entry.target.dataset.key);
          if (row) row.visible = entry.isIntersecting;
        }
        this.draw();
      },
      { rootMargin: '100px' },
    );
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.restyle());
    filters.tenant.addEventListener('change', changed);
    for (const control of [filters.state, byId('order')]) {
      control.addEventListener('change', () => this.show(this._model, this._told));
    }
    filters.text.addEventListener('input', () => this.show(this._model, this._told));
    byId('span').addEventListener('change', () => this.show(this._model, this._told));
    addEventListener('resize', () => this.draw());
    this.restyle();
  }

  /** The tenant whose workflows are asked for; undefined for everybody's. */
  get tenant() {
    return filters.tenant.value === '*' ? undefined : filters.tenant.value.slice(1);
  }

  restyle() {
    this._theme = readTheme();
    for (const [kind, canvas] of this._legend) drawSample(canvas, kind, this._theme);
    this.draw();
  }

  /** Everything anew: what is listed, and what is drawn. */
  show(model, told) {
    if (!told) return;
    [this._model, this._told] = [model, told];
    this._offerTenants(told, model);
    const { from } = this._view();
    const alive = [...model.lanes.values()].filter((lane) => lane.brief || lastSign(lane) >= from);
    const wanted = alive.filter((lane) => this._isWanted(lane)).sort(this._order());
    this._shown = wanted.slice(0, MOST_LANES);
    this._place(told);
    this._say(alive.length, wanted.length, told);
    this.draw();
  }

  draw() {
    const view = this._view();
    drawAxis(byId('axis'), view, this._theme);
    for (const lane of this._shown) {
      const row = this._rows.get(lane.key);
      if (!row?.visible) continue;
      row.layout = rowsOf(lane, view.from);
      row.canvas.style.height = `${heightOf(row.layout.count)}px`;
      drawLane(row.canvas, lane, row.layout, view, this._theme);
    }
  }

  _view() {
    const to = Date.now();
    return { from: to - 1000 * Number(byId('span').value), to };
  }

  _isWanted(lane) {
    if (this.tenant !== undefined && lane.tenant !== this.tenant) return false;
    if (filters.state.value !== '*' && stateOf(lane) !== filters.state.value) return false;
    const part = filters.text.value.toLowerCase();
    const names = [lane.id, ...(lane.brief?.sessions ?? [])];
    return names.some((name) => name.toLowerCase().includes(part));
  }

  /** As the API lists them, then those that have ended; or the first to begin first. */
  _order() {
    if (byId('order').value === 'age') return (a, b) => a.began - b.began;
    return (a, b) => (a.place === b.place ? lastSign(b) - lastSign(a) : a.place - b.place);
  }

  _offerTenants(told, model) {
    const known = new Set([...filters.tenant.options].map((option) => option.value));
    const names = Object.keys(told.tenants).filter((name) => name !== '(others)');
    for (const lane of model.lanes.values()) names.push(lane.tenant);
    for (const name of names) {
      if (known.has(`=${name}`)) continue;
      known.add(`=${name}`);
      const option = el('option', '', shortened(tenantName(name), 40));
      option.value = `=${name}`;
      filters.tenant.append(option);
    }
  }

  _place(told) {
    const several = told.engines.length > 1;
    const wanted = new Set(this._shown.map((lane) => lane.key));
    for (const [key, row] of this._rows) {
      if (wanted.has(key)) continue;
      this._watch.unobserve(row.item);
      row.item.remove();
      this._rows.delete(key);
    }
    this._shown.forEach((lane, index) => {
      const row = this._rows.get(lane.key) ?? this._make(lane);
      row.lane = lane;
      if (list.children[index] !== row.item)
        list.insertBefore(row.item, list.children[index] ?? null);
      fill(row, lane, several);
    });
  }

  _make(lane) {
    const [about, state, since] = [el('span', 'about'), el('span', 'state'), el('span', 'since')];
    const label = el('button', 'label', ends(lane.id), el('span', 'what', state, since, about));
    label.type = 'button';
    const canvas = el('canvas', 'lane');
    const item = el('li', '', label, canvas);
    item.dataset.key = lane.key;
    const row = {
      item,
      label,
      canvas,
      about,
      state,
      since,
      lane,
      visible: true,
      layout: rowsOf(lane, 0),
    };
    item.addEventListener('click', () => this._open(row.lane));
    canvas.addEventListener('pointermove', (event) => this._point(row, event));
    canvas.addEventListener('pointerleave', () => {
      hint.hidden = true;
    });
    this._rows.set(lane.key, row);
    this._watch.observe(item);
    return row;
  }

  _point(row, event) {
    const { lane, layout, canvas } = row;
    const view = this._view();
    const call = callAt(lane, layout, view, canvas.clientWidth, event.offsetX, event.offsetY);
    const lines = call
      ? aboutCall(call, lane)
      : aboutMoment(lane, view, event.offsetX / canvas.clientWidth);
    hint.hidden = !lines.length;
    hint.replaceChildren(...lines.map((line) => el('div', '', line)));
    const left = Math.min(event.clientX + 14, innerWidth - hint.offsetWidth - 8);
    const below = event.clientY + 18;
    const top =
      below + hint.offsetHeight < innerHeight ? below : event.clientY - hint.offsetHeight - 10;
    Object.assign(hint.style, { left: `${Math.max(left, 4)}px`, top: `${Math.max(top, 4)}px` });
  }

  _say(alive, wanted, told) {
    const total = Math.max(told.total, alive);
    byId('shown').textContent =
      wanted > this._shown.length || total > wanted
        ? `${this._shown.length} of ${total} workflows`
        : `${wanted} ${wanted === 1 ? 'workflow' : 'workflows'}`;
    const nothing = byId('nothing');
    nothing.hidden = wanted > 0;
    if (alive) nothing.textContent = `None of the ${alive} workflows matches the filter.`;
    else if (this.tenant !== undefined) nothing.textContent = 'This tenant has no workflows.';
    else nothing.textContent = whyEmpty(told.engines);
  }
}

function whyEmpty(engines) {
  if (!engines.length) return 'There is no engine: the router has no backends.';
  if (engines.every((engine) => engine.error)) return 'No engine tells of its workflows.';
  if (engines.every((engine) => engine.error || engine.scheduler === 'stock')) {
    return 'No workflows: the engine schedules as stock vLLM does, which knows none.';
  }
  return 'No workflows yet: the calls of agents show up here as they come.';
}

function fill(row, lane, several) {
  const state = stateOf(lane);
  row.state.textContent = STATES[state];
  row.state.className = `state ${state}`;
  row.since.textContent = sinceWhen(lane);
  row.label.setAttribute('aria-label', `${printable(lane.id)}, ${STATES[state]}`);
  const about = [lane.tenant, several && lane.engine, lane.brief?.plain && 'plain call'];
  row.about.textContent = printable(about.filter(Boolean).join(' · '));
  row.item.classList.toggle('gone', !lane.brief);
}

function sinceWhen(lane) {
  const brief = lane.brief;
  if (!brief) return lane.over === null ? '' : `${seconds((Date.now() - lane.over) / 1000)} ago`;
  if (brief.waits_for) return `${seconds(brief.waits_for.held_s)}`;
  if (brief.idle_s !== null) return seconds(brief.idle_s);
  return brief.state === 'running' && lane.now ? seconds((Date.now() - lane.now.from) / 1000) : '';
}

function aboutCall(call, lane) {
  const held = ((call.letIn ?? call.to) - call.from) / 1000;
  const lines = [`${clock(call.from)} to ${clock(call.to)}`];
  if (call.session !== lane.id) lines.push(`session ${shortened(call.session, 48)}`);
  if (call.letIn === null) return [...lines, `withdrawn after it was held for ${seconds(held)}`];
  if (held >= 0.05) lines.push(`held for ${seconds(held)}`);
  const computed = Math.max(call.prompt - call.cached, 0);
  const share = call.prompt > 0 ? ` (${percent(call.cached / call.prompt)} cached)` : '';
  const parts = `${amount(call.cached)} cached, ${amount(computed)} computed${share}`;
  return [
    ...lines,
    `ran for ${seconds((call.to - call.letIn) / 1000)}`,
    `prompt ${amount(call.prompt)} tokens: ${parts}`,
    `output ${amount(call.output)} tokens${call.tool ? `, then ${shortened(call.tool, 40)}` : ''}`,
    `on engine ${printable(call.engine)}`,
  ];
}

/** What a lane was doing where no ended call is drawn. */
function aboutMoment(lane, view, part) {
  const at = view.from + part * (view.to - view.from);
  const end = lane.over ?? Infinity;
  if (at < lane.began || at > end + NOW_MS) return [];
  const now = lane.now && at >= lane.now.from ? lane.now : null;
  const piece = now ?? lane.pieces.find((one) => one.from <= at && at <= one.to);
  if (piece && piece.state !== 'gap') {
    const took = ((piece.to ?? view.to) - piece.from) / 1000;
    return [`${STATES[piece.state]} for ${seconds(took)}`];
  }
  const before = lane.spans.findLast((span) => span.to <= at);
  const after = lane.spans.find((span) => span.from >= at);
  if (!before) return [];
  const until = after ? after.from : Math.min(end, view.to);
  const tool = before.tool ? ` after ${shortened(before.tool, 40)}` : '';
  return [`gap of ${seconds((until - before.to) / 1000)}${tool}`];
}
