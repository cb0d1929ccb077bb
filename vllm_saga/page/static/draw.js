// A lane on a canvas: calls, holds and gaps over time, one row for each session at work.

export const ROW_PX = 18;
const SUB_ROW_PX = 10;
const MOST_ROWS = 6;
const EDGE_PX = 3;

/** Colours of the stylesheet, as canvases need them; read again when they change. */
export function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ['call', 'computed', 'held', 'held-line', 'gap', 'queued', 'quiet', 'line', 'ink'];
  return { ...Object.fromEntries(names.map((name) => [name, colour(name)])), hatches: new Map() };
}

/** Sessions of a lane by the row they are drawn in; the workflow's own is row 0. */
export function rowsOf(lane, from) {
  const spells = new Map();
  for (const span of lane.spans) {
    if (span.to < from) continue;
    const spell = spells.get(span.session);
    if (spell) spell.to = Math.max(spell.to, span.to);
    else spells.set(span.session, { from: span.from, to: span.to });
  }
  const rows = new Map([[lane.id, 0]]);
  const until = [Infinity];
  for (const [session, spell] of [...spells].sort((a, b) => a[1].from - b[1].from)) {
    if (session === lane.id) continue;
    let row = until.findIndex((end) => end < spell.from);
    if (row < 0) row = Math.min(until.length, MOST_ROWS - 1);
    until[row] = Math.max(until[row] ?? 0, spell.to);
    rows.set(session, row);
  }
  return { rows, count: until.length, spells };
}

export function heightOf(rowCount) {
  return ROW_PX + (rowCount - 1) * SUB_ROW_PX + 2 * EDGE_PX;
}

/** Where row `row` is: its upper edge and its height. */
function place(row) {
  if (row === 0) return [EDGE_PX, ROW_PX];
  return [EDGE_PX + ROW_PX + (row - 1) * SUB_ROW_PX + 1, SUB_ROW_PX - 2];
}

/** `view`: {from, to} in ms. */
export function drawLane(canvas, lane, layout, view, theme) {
  const { context, width } = prepare(canvas);
  const x = scale(view, width);
  drawGaps(context, lane, layout, view, x, theme);
  for (const span of lane.spans) {
    if (span.to < view.from) continue;
    drawCall(context, span, place(layout.rows.get(span.session) ?? 0), x, theme);
  }
  const main = place(0);
  for (const piece of lane.pieces) drawState(context, piece, piece.to, main, x, theme);
  if (lane.now) drawState(context, lane.now, view.to, main, x, theme);
  if (lane.over !== null && lane.over >= view.from) {
    context.fillStyle = theme.quiet;
    context.fillRect(x(lane.over), EDGE_PX, 2, ROW_PX);
  }
}

/** The ended call at a point of a lane's canvas (CSS pixels); null if there is none. */
export function callAt(lane, layout, view, width, px, py) {
  const x = scale(view, width);
  let best = null;
  let least = 4;
  for (const span of lane.spans) {
    const [top, height] = place(layout.rows.get(span.session) ?? 0);
    if (py < top - 1 || py > top + height + 1) continue;
    const left = x(span.from);
    const right = Math.max(x(span.to), left + 1);
    const away = Math.max(left - px, px - right, 0);
    if (away < least) [best, least] = [span, away];
  }
  return best;
}

export function drawAxis(canvas, view, theme) {
  const { context, width, height } = prepare(canvas);
  const x = scale(view, width);
  const span = (view.to - view.from) / 1000;
  const steps = [10, 20, 30, 60, 120, 300, 600];
  const step = steps.find((candidate) => span / candidate <= width / 75) ?? 600;
  context.font = '11px system-ui, sans-serif';
  context.textBaseline = 'top';
  for (let ago = 0; ago <= span; ago += step) {
    const at = x(view.to - 1000 * ago);
    context.fillStyle = theme.line;
    context.fillRect(Math.min(at, width - 1), height - 4, 1, 4);
    const text = ago === 0 ? 'now' : ago % 60 ? `−${ago} s` : `−${ago / 60} min`;
    const wide = context.measureText(text).width;
    context.fillStyle = theme.quiet;
    context.fillText(text, Math.min(Math.max(at - wide / 2, 0), width - wide), 0);
  }
}

/** A sample for the legend. */
export function drawSample(canvas, kind, theme) {
  const { context, width, height } = prepare(canvas);
  const x = (part) => part * width;
  const box = [1, height - 2];
  if (kind === 'call')
    drawCall(context, { from: 0, letIn: 0, to: 1, prompt: 3, cached: 2 }, box, x, theme);
  else if (kind === 'withdrawn') drawWithdrawn(context, 0, width, box, theme);
  else if (kind === 'gap') gapLine(context, 0, width, box, theme);
  else if (kind === 'over') {
    context.fillStyle = theme.quiet;
    context.fillRect(width / 2 - 1, 1, 2, height - 2);
  } else drawState(context, { state: kind, from: 0 }, 1, box, x, theme);
}

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) {
    [canvas.width, canvas.height] = [across, down];
  }
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function scale(view, width) {
  const perMs = width / (view.to - view.from);
  return (at) => (at - view.from) * perMs;
}

function drawGaps(context, lane, layout, view, x, theme) {
  // Who is presumed to have ended is in no gap.
  const away = lane.now?.state === 'presumed_ended' ? lane.now.from : null;
  const known = lane.brief ? view.to : (lane.spans.at(-1)?.to ?? view.from);
  const end = lane.over ?? away ?? known;
  if (lane.began < end) {
    const left = Math.max(x(lane.began), 0);
    gapLine(context, left, x(end) - left, place(0), theme);
  }
  if (away !== null) {
    context.fillStyle = theme.gap;
    for (let at = Math.max(x(away), 0); at < x(view.to); at += 8) {
      context.fillRect(at, EDGE_PX + ROW_PX / 2 - 1, 2, 2);
    }
  }
  for (const [session, row] of layout.rows) {
    const spell = layout.spells.get(session);
    if (!spell || row === 0) continue;
    const left = Math.max(x(spell.from), 0);
    gapLine(context, left, x(spell.to) - left, place(row), theme);
  }
}

function gapLine(context, left, width, [top, height], theme) {
  context.fillStyle = theme.gap;
  context.fillRect(left, top + height / 2 - 1, width, 2);
}

/** The dark part of a call, from below, is the share of its prompt that had to be computed. */
function drawCall(context, span, [top, height], x, theme) {
  const left = x(span.from);
  if (span.letIn === null) {
    drawWithdrawn(context, left, Math.max(x(span.to) - left, 2), [top, height], theme);
    return;
  }
  const begin = x(span.letIn);
  if (begin - left > 0.5) drawHeld(context, left, begin - left, [top, height], theme);
  // A hair of background keeps calls apart that follow at once.
  const width = Math.max(x(span.to) - begin - 0.5, 1.5);
  context.fillStyle = theme.call;
  context.fillRect(begin, top, width, height);
  const computed = span.prompt > 0 ? Math.max(span.prompt - span.cached, 0) / span.prompt : 0;
  context.fillStyle = theme.computed;
  context.fillRect(begin, top + height * (1 - computed), width, height * computed);
}

/** What it is doing, or was seen doing while nothing is told of the call yet. */
function drawState(context, { state, from }, to, [top, height], x, theme) {
  const left = Math.max(x(from), 0);
  const width = Math.max(x(to) - left, 1.5);
  if (state === 'held') drawHeld(context, left, width, [top, height], theme);
  if (state === 'running') {
    context.fillStyle = theme.call;
    context.fillRect(left, top, width, height);
  }
  if (state === 'queued') {
    context.strokeStyle = theme.queued;
    context.lineWidth = 1.5;
    context.strokeRect(left + 0.75, top + 0.75, Math.max(width - 1.5, 0.5), height - 1.5);
  }
}

function drawHeld(context, left, width, [top, height], theme) {
  context.fillStyle = theme.held;
  context.fillRect(left, top, width, height);
  context.fillStyle = hatch(context, theme);
  context.fillRect(left, top, width, height);
}

function drawWithdrawn(context, left, width, [top, height], theme) {
  drawHeld(context, left, width, [top + height / 4, height / 2], theme);
  context.strokeStyle = theme.ink;
  context.lineWidth = 1.5;
  context.beginPath();
  const [x, y, r] = [left + width - 4, top + height / 2, 3.5];
  context.moveTo(x - r, y - r);
  context.lineTo(x + r, y + r);
  context.moveTo(x + r, y - r);
  context.lineTo(x - r, y + r);
  context.stroke();
}

/** Stripes, so that a hold is told from a call without colours, too. */
function hatch(context, theme) {
  const ratio = window.devicePixelRatio || 1;
  if (!theme.hatches.has(ratio)) {
    const size = Math.round(6 * ratio);
    const tile = new OffscreenCanvas(size, size);
    const pen = tile.getContext('2d');
    pen.strokeStyle = theme['held-line'];
    pen.lineWidth = 1.4 * ratio;
    for (const shift of [-size, 0, size]) {
      pen.moveTo(shift - 1, size + 1);
      pen.lineTo(shift + size + 1, -1);
    }
    pen.stroke();
    const pattern = context.createPattern(tile, 'repeat');
    pattern.setTransform(new DOMMatrix().scale(1 / ratio));
    theme.hatches.set(ratio, pattern);
  }
  return theme.hatches.get(ratio);
}
