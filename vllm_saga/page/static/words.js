// How things are said. Whatever others have named becomes text here, never markup.

const TAIL = 10;

/** An element with a class, and children: elements, or texts. */
export function el(tag, className = '', ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null).map(asNode));
  return made;
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(printable(child));
}

/** Without what a display would take for a command: control characters, and turns of direction. */
export function printable(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu, '\ufffd');
}

/** No longer than `most` characters: the middle goes, for ids differ at their ends. */
export function shortened(text, most) {
  const shown = [...printable(text)];
  if (shown.length <= most) return shown.join('');
  const head = Math.floor(most / 3);
  return [...shown.slice(0, head), '…', ...shown.slice(shown.length - (most - head - 1))].join('');
}

/** An id on one line, cut in the middle where there is no room: ids differ at their ends. */
export function ends(id) {
  const signs = [...printable(id)];
  const tail = signs.splice(Math.max(signs.length - TAIL, 0));
  const name = el(
    'span',
    'name',
    el('span', 'front', signs.join('')),
    el('span', '', tail.join('')),
  );
  name.title = printable(id);
  return name;
}

/** A span of seconds, as short as can be: 4.2 s, 75 s, 12 min, 3 h. */
export function seconds(value) {
  if (value === null || value === undefined) return '';
  if (value < 10) return `${Math.max(value, 0).toFixed(1)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  return value < 6000 ? `${(value / 60).toFixed(0)} min` : `${(value / 3600).toFixed(0)} h`;
}

/** A count: 950, 12.5k, 450k, 3.1M. */
export function amount(value) {
  if (value < 10_000) return value.toFixed(0);
  const [scaled, unit] = value < 1e6 ? [value / 1e3, 'k'] : [value / 1e6, 'M'];
  return `${scaled < 100 ? scaled.toFixed(1) : scaled.toFixed(0)}${unit}`;
}

export function percent(part) {
  return `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

/** The time of day of a moment in milliseconds. */
export function clock(at) {
  return new Date(at).toLocaleTimeString([], { hourCycle: 'h23' });
}

export const STATES = {
  held: 'held',
  queued: 'queued',
  running: 'running',
  gap: 'gap',
  presumed_ended: 'ended?',
  over: 'ended',
  unlisted: 'not told of',
};

/** What a workflow is doing, in a sentence. */
export function stateInWords(brief) {
  const calls = brief.calls.running + brief.calls.queued + brief.calls.held;
  const several = calls > 1 ? ` (${calls} calls)` : '';
  switch (brief.state) {
    case 'held':
      return `Held for ${seconds(brief.waits_for.held_s)}${several}.`;
    case 'queued':
      return `Let in${several}; waits for a place in vLLM's batch.`;
    case 'running':
      return `A call is running${several}.`;
    case 'gap':
      return `Between two calls for ${seconds(brief.idle_s)}${after(brief)}.`;
    default:
      return `Away for ${seconds(brief.idle_s)}${after(brief)}: presumed to have ended.`;
  }
}

function after(brief) {
  return brief.tool ? `, after ${printable(brief.tool)}` : '';
}

/** Who a tenant is; there may be none. */
export function tenantName(tenant) {
  return tenant === '' ? '(none)' : tenant;
}
