// One workflow: what it waits for, what is expected of it, what was decided, and its end.

import { endSession, getWorkflow } from './api.js';
import { lastSign, nameOf, stateOf } from './model.js';
import {
  amount,
  clock,
  el,
  percent,
  printable,
  seconds,
  stateInWords,
  STATES,
  tenantName,
} from './words.js';

const MOST_CALLS = 15;
const OVER = 'The engines know it no more: it has ended, or was forgotten.';

const byId = (id) => document.getElementById(id);
const panel = byId('details');

export class Details {
  constructor() {
    this._lane = null;
    this._said = null;
    addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && !document.querySelector('dialog[open]')) this.close();
    });
  }

  async open(lane) {
    this._back = document.activeElement;
    [this._lane, this._said] = [lane, null];
    this._body = el('div', 'body', el('p', 'nothing', 'asking …'));
    const close = el('button', 'close', '×');
    close.type = 'button';
    close.setAttribute('aria-label', 'Close');
    close.addEventListener('click', () => this.close());
    panel.replaceChildren(el('div', 'head', el('h2', '', lane.id), close), this._body);
    panel.hidden = false;
    close.focus();
    await this.refresh();
  }

  close() {
    panel.hidden = true;
    this._lane = null;
    if (this._back?.isConnected) this._back.focus();
  }

  async refresh() {
    const lane = this._lane;
    if (!lane) return;
    const shown = stateOf(lane) === 'over' ? over(lane, OVER) : await this._ask(lane);
    if (lane !== this._lane || this._isBusy()) return;
    const top = panel.scrollTop;
    this._body.replaceChildren(...(this._said ? [this._said] : []), ...shown);
    panel.scrollTop = top;
  }

  async _ask(lane) {
    try {
      const told = await getWorkflow(nameOf(lane), lane.tenant);
      if (told.tenant === lane.tenant) return this._about(told, lane);
      return over(lane, 'Another tenant has a session of this name.');
    } catch (error) {
      return over(
        lane,
        error.status === 404 ? OVER : `It cannot be asked about: ${error.message}.`,
      );
    }
  }

  /** Somebody is about to press a button that a redrawn panel would take away. */
  _isBusy() {
    return this._body.contains(document.activeElement) && document.querySelector('dialog[open]');
  }

  _about(told, lane) {
    return [
      section(
        '',
        facts([
          ['state', el('b', `state ${told.state}`, STATES[told.state])],
          ['tenant', tenantName(told.tenant)],
          ['engine', told.engine],
          ['age', `${seconds(told.age_s)}, ${told.calls_done} calls done`],
          ['KV', `${told.blocks} blocks, ${told.resident ? 'resident' : 'not resident'}`],
          told.lost_tokens
            ? ['computed again', `${amount(told.lost_tokens)} tokens that had been evicted`]
            : null,
        ]),
        el('p', 'words', stateInWords(told)),
      ),
      told.waits_for && section('What it waits for', ...waiting(told.waits_for)),
      section(told.sessions.length > 1 ? 'Sessions' : 'Session', ...this._sessions(told, lane)),
      section('What is expected of it', ...expected(told)),
      told.share && section("Its tenant's share", el('p', '', share(told.share))),
      section('Decisions', decisions(told.decisions)),
      section('Last calls', calls(lane)),
    ].filter(Boolean);
  }

  _sessions(told, lane) {
    const rows = told.sessions.map((session) => {
      const end = el('button', 'grave', 'End session');
      end.type = 'button';
      end.addEventListener('click', () => this._end(session, lane));
      return el('li', '', el('span', 'name', session), end);
    });
    const more = told.more_sessions ? [el('p', 'quiet', `… ${told.more_sessions} more`)] : [];
    return [el('ul', 'sessions', ...rows), ...more];
  }

  async _end(session, lane) {
    const dialog = byId('confirm');
    byId('confirm-text').textContent =
      `End the session ${printable(session)}? Calls in flight ` +
      'finish first; then its KV is the first to be evicted. If its agent goes on, it starts anew.';
    dialog.returnValue = 'no';
    dialog.showModal();
    await new Promise((done) => {
      dialog.addEventListener('close', done, { once: true });
    });
    if (dialog.returnValue !== 'yes') return;
    this._said?.remove();
    try {
      const known = await endSession(session, lane.tenant);
      this._said = known
        ? el('p', 'done', `The session ${printable(session)} was told to end.`)
        : el(
            'p',
            'failed',
            `No session is called ${printable(session)}: it has ended already, or no ` +
              'client ever named it and it cannot be ended by name.',
          );
    } catch (error) {
      this._said = el('p', 'failed', `It was not ended: ${error.message}.`);
    }
    this._said.setAttribute('role', 'status');
    // The rest follows with the next look.
    if (lane === this._lane) this._body.prepend(this._said);
  }
}

/** Of a workflow that nobody tells of now: what was seen of it. */
function over(lane, why) {
  const shown = [el('p', 'words', why)];
  if (lastSign(lane)) shown.push(el('p', '', `It was last heard of at ${clock(lastSign(lane))}.`));
  return [...shown, section('Last calls', calls(lane))];
}

function section(title, ...content) {
  return el('section', '', ...(title ? [el('h3', '', title)] : []), ...content);
}

function facts(pairs) {
  const list = el('dl');
  for (const pair of pairs.filter(Boolean))
    list.append(el('dt', '', pair[0]), el('dd', '', pair[1]));
  return list;
}

function waiting(cause) {
  const place =
    cause.ahead === 0
      ? 'It is the next one.'
      : `Its place in line: ${cause.ahead + 1}.` +
        (cause.first === null ? '' : ` The first is ${printable(cause.first)}.`);
  const rule = cause.rule ? [el('p', 'quiet', `It was held because ${cause.rule}.`)] : [];
  return [el('p', 'words', upper(cause.text)), el('p', '', place), ...rule];
}

function expected(told) {
  const guess = told.predicted;
  if (!guess) return [el('p', '', 'Nothing: it is a single call, of no session that is known.')];
  const back = guess.p_return === null ? null : ['will return', percent(guess.p_return)];
  return [
    facts([
      ['calls left', `about ${guess.calls_left.toFixed(0)}, in ${seconds(guess.seconds_left)}`],
      ['will grow by', `${amount(guess.growth_tokens)} tokens`],
      [
        `gap after ${printable(told.tool ?? 'a call')}`,
        `half within ${seconds(guess.gap_s.p50)}, 90 % within ${seconds(guess.gap_s.p90)}`,
      ],
      back,
      [
        'confidence',
        `${percent(guess.confidence)} in its gaps, ${percent(guess.evidence)} in its length`,
      ],
    ]),
  ];
}

function share(told) {
  const had = (told.gpu_s ?? 0) + (told.pool_s ?? 0);
  const stands = told.behind
    ? `It has had ${seconds(told.lead_s)} more than the least served that waits: others go first.`
    : 'No other tenant goes before it.';
  return `It has had ${amount(had)} engine seconds at weight ${told.weight ?? 1}. ${stands}`;
}

function decisions(told) {
  if (!told.length) return el('p', 'nothing', 'None: it has never been short of room.');
  const rows = [...told].reverse().map((one) => {
    const short = one.blocks > 0 ? ` (${one.blocks} blocks short)` : '';
    const when = el('time', 'quiet', `${seconds(one.ago_s)} ago`);
    return el('li', '', when, el('b', '', one.what), el('span', '', `${one.why}${short}`));
  });
  return el('ol', 'decided', ...rows);
}

function calls(lane) {
  const last = lane.spans.slice(-MOST_CALLS).reverse();
  if (!last.length) return el('p', 'nothing', 'None of its calls has ended lately.');
  const titles = ['ended', 'held', 'ran', 'prompt', 'cached', 'output', 'then'];
  const rows = last.map((span) => {
    const begun = span.letIn ?? span.to;
    const held = (begun - span.from) / 1000;
    const values = [
      clock(span.to),
      held >= 0.05 ? seconds(held) : '',
      span.letIn === null ? 'withdrawn' : seconds((span.to - begun) / 1000),
      amount(span.prompt),
      amount(span.cached),
      amount(span.output),
      span.tool ?? '',
    ];
    return el('tr', '', ...values.map((value) => el('td', '', value)));
  });
  return el('table', '', el('tr', '', ...titles.map((title) => el('th', '', title))), ...rows);
}

function upper(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith('.') ? '' : '.');
}
