// The server's public interface: /v1/models, /v1/chat/completions as a stream, and the samples.

const KEY = 'gp-jax-key';

// What went wrong, in one line.
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY), headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Failure('The server cannot be reached. Is gp-jax serve still running?');
  }
  if (answer.ok) return answer;
  const said = await answer.json().then(found => found.error.message, () => `the server answers ${answer.status}`);
  const wait = answer.headers.get('Retry-After');
  throw new Failure(wait ? `${said}; try again in ${wait} s` : said, answer.status);
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function getBlob(path) {
  return (await send(path)).blob();
}

function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1)} MB`;
}

// Events of a stream, one object each.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read().catch(error => {
      if (error.name === 'AbortError') throw error;
      return { done: true };
    });
    if (done) throw new Failure('The connection ended before the answer was whole.');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (line === 'data: [DONE]') return;
      if (line.startsWith('data: ')) yield JSON.parse(line.slice(6));
    }
  }
}

// Asks, and calls grow(answer) whenever there is more. limit: bytes of a body that the server takes.
// The answer: text, mask, usage, and seconds to the first token (first) and to the end (all).
export async function complete(request, limit, signal, grow) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true }, return_mask: true });
  const size = new Blob([body]).size;
  if (size > limit) {  // a server that refuses a body closes the connection, which not every browser takes for an answer
    const most = `the server takes ${megabytes(limit)} (--max-body)`;
    throw new Failure(`The pictures are too large: ${megabytes(size)} with the conversation; ${most}.`, 413);
  }
  const start = performance.now(), seconds = () => (performance.now() - start) / 1000;
  const headers = { 'Content-Type': 'application/json' };
  const reply = await send('v1/chat/completions', { method: 'POST', headers, body, signal });
  const answer = { text: '', mask: null, usage: null, first: null, all: null };
  for await (const event of events(reply.body)) {
    if (event.error) throw new Failure(event.error.message, 500);
    const delta = event.choices[0]?.delta ?? {};
    answer.mask ??= delta.mask ?? null;
    answer.usage ??= event.usage ?? null;
    answer.text += delta.content ?? '';
    if (delta.content) answer.first ??= seconds();
    answer.all = seconds();
    grow(answer);
  }
  return answer;
}
