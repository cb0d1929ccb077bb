// What is known of each workflow over time: lanes, filled from /past and from /workflows.

const KEEP_MS = 30 * 60_000;
const MOST_LANES = 1000;
const MOST_SPANS = 500;
const MOST_SEEN = 20_000;
// Two tellings of one moment differ by the time that the answers took.
const SLACK_MS = 1500;
const BUSY = ['held', 'queued', 'running'];

const keyOf = (tenant, name) => `${tenant}\0${name}`;

/**
 * A workflow as it is drawn. spans: its calls that have ended, by their ends; now: what it is doing
 * ({state, from}), as far as that is known; pieces: what it was seen doing of which no ended call
 * tells yet ({state, from, to}); brief: what /workflows says of it, null when it is not listed.
 */
function newLane(key, tenant, id) {
  return {
    key,
    tenant,
    id,
    engine: '',
    spans: [],
    began: Infinity,
    over: null,
    lost: 0,
    brief: null,
    now: null,
    pieces: [],
    place: Infinity,
  };
}

export class Model {
  constructor() {
    this.lanes = new Map();
    this._bySession = new Map();
    this._seen = new Set();
    this._polled = null;
  }

  /** Events of /past, answered at `at` (ms). */
  addPast(told, at) {
    for (const event of [...told.events].reverse()) {
      const mark = [
        event.engine,
        event.number,
        event.what,
        event.session ?? event.id,
        event.prompt_tokens ?? event.calls,
      ].join('\0');
      if (this._seen.has(mark)) continue;
      const ended = at - 1000 * event.ended_ago_s;
      this._seen.add(mark);
      const lane = this._laneOf(event.tenant, event.id, event.session ?? event.id);
      if (event.what === 'call') addCall(lane, event, at, ended);
      else addEnd(lane, event, at, ended);
      if (event.session) this._bySession.set(keyOf(event.tenant, event.session), lane);
    }
    this._forget(at);
  }

  /** Workflows of /workflows, answered at `at`; returns the lanes about which something is new. */
  addOverview(told, at) {
    const latest = new Map();
    for (const brief of told.workflows) {
      const lane = this._laneOf(brief.tenant, brief.id ?? '(unnamed)', brief.id);
      const other = latest.get(lane);
      // Of a workflow that has moved, what it is where it is now.
      if (!other || (brief.idle_s ?? 0) < (other.idle_s ?? 0)) latest.set(lane, brief);
    }
    const changed = [];
    let place = 0;
    // Whoever is not listed has ended, unless not everybody is.
    const whole = told.total <= told.workflows.length && !told.engines.some((one) => one.error);
    for (const lane of this.lanes.values()) if (!latest.has(lane)) leave(lane, at, whole);
    for (const [lane, brief] of latest) {
      const before = lane.brief;
      see(lane, brief, at, this._polled);
      lane.place = place++;
      const same =
        before &&
        before.state === brief.state &&
        before.resident === brief.resident &&
        before.calls_done === brief.calls_done;
      if (!same) changed.push(lane);
      for (const name of brief.sessions) this._bySession.set(keyOf(brief.tenant, name), lane);
    }
    this._polled = at;
    return changed;
  }

  /** The lane of a session; undefined if there is none. */
  find(tenant, session) {
    const key = keyOf(tenant, session);
    return this.lanes.get(key) ?? this._bySession.get(key);
  }

  /** Tokens of prompts that have ended since `from`: all, and those that were cached. */
  prompts(from) {
    const sum = { all: 0, cached: 0 };
    for (const lane of this.lanes.values()) {
      for (let i = lane.spans.length - 1; i >= 0 && lane.spans[i].to >= from; i--) {
        if (lane.spans[i].letIn === null) continue;
        sum.all += lane.spans[i].prompt;
        sum.cached += lane.spans[i].cached;
      }
    }
    return sum;
  }

  _laneOf(tenant, id, session) {
    const key = keyOf(tenant, id);
    // The session that a workflow began with may be over: then others stand for it.
    let lane = this.lanes.get(key) ?? this._bySession.get(keyOf(tenant, session));
    if (!lane || !this.lanes.has(lane.key)) {
      lane = newLane(key, tenant, id);
      this.lanes.set(key, lane);
    }
    return lane;
  }

  _forget(at) {
    for (const lane of this.lanes.values()) {
      lane.spans = lane.spans.filter((span) => span.to >= at - KEEP_MS).slice(-MOST_SPANS);
    }
    const idle = [...this.lanes.values()].filter((lane) => !lane.brief);
    idle.sort((a, b) => lastSign(a) - lastSign(b));
    const many = this.lanes.size - MOST_LANES;
    for (const [index, lane] of idle.entries()) {
      if (index < many || lastSign(lane) < at - KEEP_MS) this.lanes.delete(lane.key);
    }
    for (const [name, lane] of this._bySession) {
      if (this.lanes.get(lane.key) !== lane) this._bySession.delete(name);
    }
    // The first that were told; what is told again is of the last seconds.
    for (const mark of this._seen) {
      if (this._seen.size <= MOST_SEEN) break;
      this._seen.delete(mark);
    }
  }
}

/** What its workflow is asked for by: the session it began with, while that lives. */
export function nameOf(lane) {
  return lane.brief?.id ?? lane.id;
}

/** When a lane was last heard of. */
export function lastSign(lane) {
  return Math.max(lane.over ?? 0, lane.spans.at(-1)?.to ?? 0, lane.pieces.at(-1)?.to ?? 0);
}

/** The state of its workflow; "over", or "unlisted" where nothing is told of it at present. */
export function stateOf(lane) {
  if (lane.brief) return lane.brief.state;
  return lane.over === null ? 'unlisted' : 'over';
}

function addCall(lane, event, at, ended) {
  const letIn = event.let_in_ago_s === null ? null : at - 1000 * event.let_in_ago_s;
  const span = {
    session: event.session,
    engine: event.engine,
    from: at - 1000 * event.arrived_ago_s,
    letIn,
    to: ended,
    prompt: event.prompt_tokens,
    cached: event.cached_tokens,
    output: event.output_tokens,
    tool: event.tool,
  };
  const behind = lane.spans.findLastIndex((other) => other.to <= span.to);
  lane.spans.splice(behind + 1, 0, span);
  lane.engine = event.engine;
  lane.began = Math.min(lane.began, span.from);
  lane.pieces = lane.pieces.filter((piece) => piece.from > span.to - SLACK_MS);
  if (lane.now && BUSY.includes(lane.now.state) && lane.now.calls === 1) {
    // The one call that it has is a later one.
    lane.now.from = Math.max(lane.now.from, span.to);
  }
}

function addEnd(lane, event, at, ended) {
  lane.engine = event.engine;
  lane.began = Math.min(lane.began, at - 1000 * event.began_ago_s);
  lane.over = Math.max(lane.over ?? 0, ended);
  lane.lost = event.lost_tokens;
}

/** It is in a state now; `polled` is when that was last asked. */
function see(lane, brief, at, polled) {
  const before = lane.now;
  const calls = brief.calls.running + brief.calls.queued + brief.calls.held;
  const goesOn =
    before &&
    before.state === brief.state &&
    (lane.brief?.calls_done === brief.calls_done || calls > 1);
  lane.brief = brief;
  lane.engine = brief.engine;
  lane.over = null;
  lane.began = Math.min(lane.began, at - 1000 * brief.age_s);
  if (goesOn) {
    before.calls = calls;
    return;
  }
  const from = since(lane, brief, at, polled);
  if (before && BUSY.includes(before.state) && from > before.from) {
    lane.pieces.push({ state: before.state, from: before.from, to: from });
  }
  lane.now = { state: brief.state, from, calls };
}

/** Since when it is in its state: as it says, or else since the last look. */
function since(lane, brief, at, polled) {
  if (brief.state === 'held') return at - 1000 * brief.waits_for.held_s;
  if (!BUSY.includes(brief.state)) return at - 1000 * brief.idle_s;
  const first = brief.calls_done === 0 && !lane.now ? at - 1000 * brief.age_s : 0;
  const looked = lane.now ? polled : at;
  return Math.max(first || looked, lane.spans.at(-1)?.to ?? 0);
}

/** It is not listed any more. */
function leave(lane, at, isOver) {
  if (lane.now && BUSY.includes(lane.now.state)) {
    lane.pieces.push({ state: lane.now.state, from: lane.now.from, to: at });
  }
  if (isOver) lane.over ??= lane.brief ? at : lastSign(lane);
  Object.assign(lane, { brief: null, now: null, place: Infinity });
}
