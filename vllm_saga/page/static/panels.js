// Beside the lanes: whose the KV pool is, what tenants have had, what was decided.

import { amount, clock, el, ends, percent, printable, shortened, tenantName } from './words.js';

// Field of the pool, how it is called, its class.
const PARTS = [
  ['running_blocks', 'with a call', 'p-running'],
  ['gap_blocks', 'in a gap', 'p-gap'],
  ['visitor_blocks', 'visitors', 'p-visitors'],
  ['promised_blocks', 'promised to next calls', 'p-promised'],
  ['free_blocks', 'free', 'p-free'],
];
const MOST_RESIDENTS = 5;
const MOST_TENANTS = 12;
const MOST_ENTRIES = 100;
// Where every call goes by rule; nothing was weighed.
const PLAIN_REASONS = new Set(['home', 'session', 'round_robin', 'least_loaded']);
const ROUTED = {
  new: 'placed',
  report: 'found again',
  parent: 'placed beside its parent',
  failover: 'failed over',
  fallback: 'placed without a policy',
};

const byId = (id) => document.getElementById(id);

export function drawPoolLegend() {
  for (const [, name, kind] of PARTS) {
    byId('pool-legend').append(el('span', '', el('i', `swatch ${kind}`), name));
  }
}

/** `open(tenant, id)`: what a click on a resident does. */
export function showPools(told, open) {
  const several = told.engines.length > 1;
  const shown = told.engines.map((engine) => {
    const calls = engine.error ? '' : `${engine.running} running, ${engine.waiting} waiting`;
    const head = el(
      'div',
      'engine',
      el('b', '', several ? `engine ${engine.engine}` : 'the engine'),
      el('span', 'quiet', calls),
    );
    return el('div', 'pool', head, ...poolOf(engine, told.workflows, open));
  });
  byId('pools').replaceChildren(...shown);
  if (!shown.length) byId('pools').append(el('p', 'nothing', 'There is no engine.'));
}

function poolOf(engine, workflows, open) {
  if (engine.error) return [el('p', 'silent', `Nothing is told: ${engine.error}.`)];
  const pool = engine.pool;
  if (!pool) {
    const why =
      'It schedules as stock vLLM does, with no workflows: prefix caching is off, or the ' +
      'policy has failed. Its log says which.';
    return [el('p', 'silent', why)];
  }
  const filled = PARTS.map(([field]) => Math.max(pool[field], 0));
  const whole = Math.max(
    pool.capacity_blocks,
    filled.reduce((a, b) => a + b),
    1,
  );
  const bar = el('div', 'bar');
  PARTS.forEach(([, name, kind], index) => {
    const part = el('i', kind);
    part.style.width = `${(100 * filled[index]) / whole}%`;
    part.title = `${name}: ${blocks(filled[index], pool)}, ${percent(filled[index] / whole)}`;
    bar.append(part);
  });
  bar.setAttribute('role', 'img');
  bar.setAttribute('aria-label', PARTS.map(([, name], i) => `${name} ${filled[i]}`).join(', '));
  const used = 1 - Math.max(pool.free_blocks, 0) / Math.max(pool.capacity_blocks, 1);
  const line =
    `${percent(used)} of ${amount(pool.capacity_blocks * pool.block_tokens)} tokens; ` +
    `${pool.residents} resident, ${pool.residents_in_gap} of them in a gap`;
  return [bar, el('div', 'quiet', line), ...residentsOf(engine, pool, workflows, open)];
}

/** The largest residents; what they share with others is counted for each of them. */
function residentsOf(engine, pool, workflows, open) {
  const here = workflows.filter(
    (one) => one.engine === engine.engine && one.resident && one.blocks,
  );
  here.sort((a, b) => b.blocks - a.blocks);
  return here.slice(0, MOST_RESIDENTS).map((one) => {
    const fill = el('i', one.state === 'gap' ? 'p-gap' : 'p-running');
    fill.style.width = `${Math.min((100 * one.blocks) / pool.capacity_blocks, 100)}%`;
    const size = el('span', 'size', blocks(one.blocks, pool));
    const button = el(
      'button',
      'resident',
      ends(one.id ?? '(unnamed)'),
      el('span', 'mini', fill),
      size,
    );
    button.type = 'button';
    button.addEventListener('click', () => open(one.tenant, one.id));
    return button;
  });
}

function blocks(count, pool) {
  return `${amount(count * pool.block_tokens)} tokens`;
}

export function showTenants(told) {
  const tenants = Object.entries(told.tenants);
  const had = ([, used]) => used.gpu_s + used.pool_s;
  tenants.sort((a, b) => had(b) - had(a));
  const all = tenants.reduce((sum, one) => sum + had(one), 0);
  const weights = tenants.reduce((sum, [, used]) => sum + used.weight, 0);
  const shown = tenants.slice(0, MOST_TENANTS).map(([name, used]) => {
    const share = all > 0 ? had([name, used]) / all : 0;
    const due = used.weight / weights;
    const fill = el('i', 'fill');
    fill.style.width = `${100 * share}%`;
    const bar = el('div', 'bar share', fill);
    const words =
      `${percent(share)} of service (GPU ${amount(used.gpu_s)} s, pool ` +
      `${amount(used.pool_s)} s)` +
      (used.waiting ? `, ${used.waiting} waiting` : '');
    const head = el('div', 'engine', el('b', '', shortened(tenantName(name), 36)));
    if (tenants.length > 1) {
      const mark = el('i', 'due');
      mark.style.left = `${100 * due}%`;
      bar.append(mark);
      bar.title = `the mark is its share by weight, ${percent(due)}`;
      head.append(el('span', 'quiet', `weight ${used.weight}: ${percent(due)}`));
    }
    return el('div', 'pool', head, bar, el('div', 'quiet', words));
  });
  if (tenants.length > MOST_TENANTS)
    shown.push(el('p', 'quiet', `… ${tenants.length - MOST_TENANTS} more`));
  if (!shown.length) shown.push(el('p', 'nothing', 'Nobody has been served yet.'));
  byId('tenants').replaceChildren(...shown);
}

/** What was decided, latest first: by engines, asked workflow by workflow, and by the router. */
export class Feed {
  constructor(open) {
    this._open = open;
    this._entries = [];
  }

  /** `told` is a workflow's details, of `lane`, answered at `at`. */
  addDecisions(told, lane, at) {
    for (const decision of told.decisions) {
      const text =
        decision.blocks > 0
          ? `${decision.what}: ${decision.why} (${decision.blocks} blocks short)`
          : `${decision.what}: ${decision.why}`;
      this._add({
        at: at - 1000 * decision.ago_s,
        tenant: lane.tenant,
        id: lane.id,
        kind: decision.what,
        text,
      });
    }
  }

  addPlacements(placements, at) {
    for (const one of placements) {
      if (!one.session || (PLAIN_REASONS.has(one.reason) && !one.moved_from)) continue;
      const what =
        one.moved_from || one.reason === 'moved' ? 'moved' : (ROUTED[one.reason] ?? one.reason);
      const from = one.moved_from ? ` from ${one.moved_from}` : '';
      const why = one.moved_from ? ` (${one.reason})` : '';
      this._add({
        at: at - 1000 * one.ago_s,
        tenant: one.tenant,
        id: one.session,
        kind: 'routed',
        text: `router: ${what}${from} to ${one.backend}${why}`,
      });
    }
  }

  show() {
    byId('no-feed').hidden = this._entries.length > 0;
    const drawn = this._entries.map((entry) => {
      entry.item ??= this._make(entry);
      return entry.item;
    });
    const list = byId('feed');
    if (
      drawn.length !== list.children.length ||
      drawn.some((item, i) => item !== list.children[i])
    ) {
      list.replaceChildren(...drawn);
    }
  }

  clear() {
    this._entries = [];
  }

  _make({ at, tenant, id, kind, text }) {
    const name = el('button', 'link', shortened(id, 30));
    name.type = 'button';
    name.title = printable(id);
    name.addEventListener('click', () => this._open(tenant, id));
    const mark = el('i', `mark ${kind.replaceAll(' ', '-')}`);
    return el(
      'li',
      '',
      el('time', 'quiet', clock(at)),
      mark,
      el('div', '', name, el('div', 'quiet', text)),
    );
  }

  _add(entry) {
    const same = (other) =>
      other.id === entry.id &&
      other.tenant === entry.tenant &&
      other.text === entry.text &&
      Math.abs(other.at - entry.at) < 2500;
    if (this._entries.some(same)) return;
    const after = this._entries.findIndex((other) => other.at < entry.at);
    this._entries.splice(after < 0 ? this._entries.length : after, 0, entry);
    this._entries.length = Math.min(this._entries.length, MOST_ENTRIES);
  }
}
