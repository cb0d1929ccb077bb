// Asks whoever served the page. The key lives in this tab's sessionStorage only.

const KEY = 'saga-key';
const TIMEOUT_MS = 10_000;

const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
export const servedBy = meta('saga-served-by');
const tenantHeader = meta('saga-tenant-header');

/** There is no answer to use; `status` is 0 if there is none at all. */
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export async function getOverview(limit, tenant) {
  return (await ask(`workflows?${query({ limit, tenant })}`)).told;
}

export async function getPast(within_s, limit, tenant) {
  return (await ask(`past?${query({ within_s, limit, tenant })}`)).told;
}

export async function getWorkflow(id, tenant) {
  return (await ask(`workflows/${segment(id)}?${query({ tenant })}`)).told;
}

/** The router's decisions, latest first, each with `ago_s`: its clock may differ from ours. */
export async function getPlacements(limit) {
  const { told, at } = await ask(`decisions?${query({ limit })}`);
  return told.decisions.map((decision) => ({ ...decision, ago_s: at / 1000 - decision.at }));
}

/** Whether the session was known. */
export async function endSession(session, tenant) {
  const headers = tenant ? { [tenantHeader]: tenant } : {};
  const { told } = await ask(`sessions/${segment(session)}/end`, 'POST', headers);
  return Boolean(told.ended ?? told.known);
}

function query(values) {
  return new URLSearchParams(Object.entries(values).filter(([, value]) => value)).toString();
}

function segment(name) {
  if (name === '.' || name === '..') throw new Failure(0, `no URL can name ${name}`);
  return encodeURIComponent(name);
}

/** The answer, and the server's time of it in milliseconds. */
async function ask(path, method = 'GET', more = {}) {
  const headers = { ...more, ...(key.get() ? { Authorization: `Bearer ${key.get()}` } : {}) };
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  let answer, text;
  try {
    answer = await fetch(`v1/saga/${path}`, { method, headers, signal, cache: 'no-store' });
    text = await answer.text();
  } catch (error) {
    if (error instanceof TypeError && answer === undefined && !isSendable(headers)) {
      throw new Failure(0, 'the key or the tenant has characters that no HTTP header can hold');
    }
    throw new Failure(0, `${location.host} does not answer`);
  }
  const told = read(text);
  if (!answer.ok) throw new Failure(answer.status, errorOf(told) ?? `status ${answer.status}`);
  if (told === null) throw new Failure(0, `${location.host} answers something that is not JSON`);
  return { told, at: Date.parse(answer.headers.get('Date')) || Date.now() };
}

function isSendable(headers) {
  return Object.values(headers).every((value) => /^[\x20-\x7e\xa0-\xff]*$/.test(value));
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function errorOf(told) {
  const error = told?.error?.message ?? told?.error ?? told?.detail;
  return typeof error === 'string' ? error : null;
}
