// The page: asks every two seconds while somebody looks at it, and shows what is told.

import { getOverview, getPast, getPlacements, getWorkflow, key, servedBy } from './api.js';
import { Details } from './details.js';
import { Lanes } from './lanes.js';
import { Model, nameOf } from './model.js';
import { drawPoolLegend, Feed, showPools, showTenants } from './panels.js';
import { clock, el, percent, printable, STATES } from './words.js';

const POLL_MS = 2000;
const FRAME_MS = 500;
const MOST_LISTED = 200;
const FIRST_S = 600;
const FIRST_EVENTS = 2000;
const EVENTS = 1000;
const OVERLAP_S = 10;
const PLACEMENTS = 200;
// Workflows whose decisions are asked for at each look.
const ASKED_AT_ONCE = 5;

const byId = (id) => document.getElementById(id);

let model = new Model();
let answered = null;
let looking = false;
let wantsKey = false;
let seesRouter = servedBy === 'router';
const toAsk = new Set();

const details = new Details();
const open = (tenant, id) => {
  const lane = model.find(tenant, id);
  if (lane) details.open(lane);
};
const feed = new Feed(open);
const lanes = new Lanes((lane) => details.open(lane), startAnew);

function startAnew() {
  model = new Model();
  answered = null;
  feed.clear();
  toAsk.clear();
  look();
}

async function look() {
  if (looking || wantsKey || document.hidden) return;
  looking = true;
  const { tenant } = lanes;
  const asked = model;
  try {
    const found = await askAll(tenant);
    if (asked === model) await take(found, tenant);
  } catch (error) {
    fail(error);
  }
  looking = false;
  // Meanwhile another tenant may have been chosen.
  if (asked !== model) look();
}

async function askAll(tenant) {
  const within = answered === null ? FIRST_S : (Date.now() - answered) / 1000 + OVERLAP_S;
  const isFirst = within >= FIRST_S / 2;
  return Promise.all([
    getOverview(MOST_LISTED, tenant),
    getPast(Math.min(within, FIRST_S).toFixed(3), isFirst ? FIRST_EVENTS : EVENTS, tenant),
    // The pool and the shares are everybody's.
    tenant ? getOverview(1, undefined) : null,
    seesRouter ? getPlacements(PLACEMENTS).catch(noPlacements) : [],
  ]);
}

async function take([overview, past, whole, placements], tenant) {
  const at = Date.now();
  answered = at;
  model.addPast(past, at);
  for (const lane of model.addOverview(overview, at)) toAsk.add(lane);
  const all = whole ?? overview;
  showCounts(all, at);
  showPools({ ...overview, engines: all.engines }, open);
  showTenants(all);
  feed.addPlacements(
    placements.filter((one) => tenant === undefined || one.tenant === tenant),
    at,
  );
  lanes.show(model, overview);
  say(null);
  await Promise.all([askDecisions(), details.refresh()]);
  feed.show();
}

/** Decisions are told workflow by workflow: a few at a time, those first that have changed last. */
async function askDecisions() {
  const next = [...toAsk].filter((lane) => lane.brief && !lane.brief.plain).slice(-ASKED_AT_ONCE);
  if (next.length < ASKED_AT_ONCE) toAsk.clear();
  for (const lane of next) toAsk.delete(lane);
  await Promise.all(
    next.map(async (lane) => {
      const about = await getWorkflow(nameOf(lane), lane.tenant).catch(() => null);
      if (about?.tenant === lane.tenant) feed.addDecisions(about, lane, Date.now());
    }),
  );
}

/** The router's decisions are for operators; the rest of the page is not. */
function noPlacements(error) {
  if (error.status === 401 || error.status === 403) {
    seesRouter = false;
    byId('feed-note').textContent = "the engines'; the router's are for operators";
    return [];
  }
  throw error;
}

function showCounts(overview, at) {
  const counts = {};
  for (const engine of overview.engines) {
    for (const [state, count] of Object.entries(engine.counts ?? {})) {
      counts[state] = (counts[state] ?? 0) + count;
    }
  }
  const chips = Object.keys(STATES)
    .filter((state) => counts[state])
    .map((state) => el('span', `state ${state}`, `${counts[state]} ${STATES[state]}`));
  const { all, cached } = model.prompts(at - 1000 * FIRST_S);
  if (all)
    chips.push(el('span', 'quiet', `${percent(cached / all)} of prompts' tokens cached (10 min)`));
  byId('counts').replaceChildren(...chips);
}

function fail(error) {
  if (error.status === 401) {
    askKey(error.message);
    return;
  }
  if (error.status === undefined) console.error(error);
  say(explained(error));
}

function explained(error) {
  const { status, message } = error;
  if (status === undefined) return `This page has a bug: ${message}`;
  if (status === 403)
    return `${message}. A gateway that names a tenant, or the operator's key, opens it.`;
  if (status === 404) {
    return (
      `${message}: it tells nothing of workflows. Start vLLM with VLLM_PLUGINS=saga and ` +
      '--scheduler-cls saga; `vllm-saga doctor --url` says more.'
    );
  }
  return `${message}.`;
}

/** What is wrong; null for nothing. Then the last that was told stays, and is marked as old. */
function say(problem) {
  const since = answered === null ? '' : ` What is shown is of ${clock(answered)}.`;
  byId('problem').hidden = problem === null;
  byId('problem').textContent = problem === null ? '' : printable(`${problem}${since}`);
  byId('status').textContent = problem === null ? `as of ${clock(answered)}` : 'asking again …';
  document.body.classList.toggle('old', problem !== null);
  byId('forget').hidden = key.get() === null;
}

async function askKey(message) {
  const wrong = key.get() === null ? '' : 'The key was refused. ';
  key.forget();
  byId('status').textContent = 'waits for the key';
  wantsKey = true;
  byId('ask-key-text').textContent = printable(`${wrong}${location.host} says: ${message}.`);
  byId('key').value = '';
  const dialog = byId('ask-key');
  dialog.returnValue = '';
  dialog.showModal();
  await new Promise((done) => {
    dialog.addEventListener('close', done, { once: true });
  });
  wantsKey = false;
  if (dialog.returnValue !== 'yes') {
    say('Without the key nothing is told. Reload the page to enter it.');
    wantsKey = true;
    return;
  }
  key.set(byId('key').value.trim());
  byId('key').value = '';
  seesRouter = servedBy === 'router';
  look();
}

byId('server').textContent = `${location.host}, ${servedBy === 'router' ? 'a router' : 'a server'}`;
byId('forget').addEventListener('click', () => {
  key.forget();
  startAnew();
});
document.addEventListener('visibilitychange', look);
drawPoolLegend();
look();
setInterval(look, POLL_MS);
setInterval(() => {
  if (!document.hidden) lanes.draw();
}, FRAME_MS);
