// The page: pictures, questions, answers as they stream, and the map, which follows threshold and cap without asking again.

import { complete, Failure, getBlob, getJson, useKey } from './client.js';
import { percent } from './elements.js';
import { opened, receive } from './files.js';
import { clearMap, drawMap, figureOf, SCALE } from './map.js';
import { keepRule } from './rule.js';
import { offerSamples } from './samples.js';
import { TurnView } from './turns.js';

const MOVED = ['reduce_threshold', 'max_remain_ratio'];  // what the sliders set
const at = id => document.getElementById(id);
const state = {
  model: null,     // of /v1/models
  pending: [],     // pictures of the next question: { url, name, width, height }
  turns: [],       // { question, pictures, messages, rule, pruned, dense, view }
  chosen: null,    // the turn whose map is shown
  moved: false,    // whether threshold or cap were moved
  asking: null,    // the AbortController of what is asked
  figures: [],     // of the pictures that are shown, in the order of the conversation
  loading: Promise.resolve(),  // pictures that are being opened
  round: 0,        // number of the conversation
};

// Shows an error, or that there is none. place: beside what went wrong.
function say(error, place = 'error') {
  at(place).textContent = error ? error.message : '';
  if (error?.status !== 401) return;
  at('key-form').hidden = false;
  at('key').focus();
}

const sayOfFiles = error => say(error, 'file-error');

// Pictures ------------------------------------------------------------------------------------------------------------------------

// Opens pictures, one batch behind the other. A question waits for them; a new conversation forgets them.
function load(work) {
  const own = state.round;
  state.loading = state.loading.then(async () => {
    try {
      const picture = await work();
      if (own !== state.round) return;
      state.pending.push(picture);
      at('samples').open = false;
      showPictures();
    } catch (error) {
      if (own === state.round) sayOfFiles(error);
    }
  });
}

function add(files) {
  sayOfFiles(null);
  for (const file of files) load(() => opened(file, file.name || 'The pasted file'));
}

function takeSample(sample) {
  begin();
  at('question').value = sample.question;
  at('question').focus();
  load(async () => opened(await getBlob(sample.picture), sample.name));
}

function showPictures() {
  const asked = state.turns.flatMap(turn => turn.pictures);
  state.figures = [...asked, ...state.pending].map((picture, place) => {
    const remove = () => {
      state.pending = state.pending.filter(own => own !== picture);
      showPictures();
      at('file').focus();
    };
    return { place, ...figureOf(picture, place < asked.length ? null : remove) };
  });
  at('pictures').replaceChildren(...state.figures.map(figure => figure.root));
  drawMaps();
}

// The map -------------------------------------------------------------------------------------------------------------------------

function wantedRule() {
  const cap = Number(at('cap').value), moved = { reduce_threshold: Number(at('threshold').value), max_remain_ratio: cap < 1 ? cap : null };
  return { ...state.model.prune, fixed_remain_ratio: null, ...moved };
}

// What stays under the rule that is set: the server's own flags where it was asked with that rule, otherwise worked out here.
function kept(turn) {
  const asked = turn.rule && state.moved && MOVED.every(name => turn.rule[name] === wantedRule()[name]);
  if (asked || (!turn.rule && !state.moved)) return turn.pruned.mask.map(map => map.keep.flat().map(Boolean));
  return keepRule(turn.pruned.mask, state.moved ? wantedRule() : state.model.prune);
}

function drawMaps() {
  const turn = state.chosen, maps = turn?.pruned?.mask ?? [], keep = maps.length && state.model.prune ? kept(turn) : [];
  const show = { kept: at('show-kept').checked, heat: at('show-heat').checked };
  for (const figure of state.figures) {
    // Of several views the last, which is the finest.
    const own = keep.length ? maps.findLastIndex(map => map.picture === figure.place) : -1;
    if (own < 0) clearMap(figure);
    else drawMap(figure, maps[own], keep[own], show);
  }
  const flat = keep.flat();
  if (flat.length) at('rule').hidden = false;
  const count = flat.filter(Boolean).length;
  at('kept').textContent = flat.length ? `Kept ${count} of ${flat.length} visual tokens (${percent(count, flat.length)})`
    : 'Ask a question about a picture to see its map.';
}

function setRule(rule) {
  at('threshold').value = rule.reduce_threshold;
  at('cap').value = rule.max_remain_ratio ?? 1;
  state.moved = false;
  showRule();
}

function showRule() {
  const { reduce_threshold: threshold, max_remain_ratio: cap } = state.moved ? wantedRule() : state.model.prune;
  const said = { threshold: `above ${threshold}`, cap: cap === null ? 'none' : `at most ${+(100 * cap).toFixed(1)} %` };
  for (const [name, text] of Object.entries(said)) {
    at(`${name}-value`).textContent = text;
    at(name).setAttribute('aria-valuetext', text);
  }
  at('scale').querySelector('b').style.left = `${100 * Math.min(1, Math.max(0, threshold))}%`;
  drawMaps();
}

// Questions -----------------------------------------------------------------------------------------------------------------------

function begin() {
  state.asking?.abort();
  Object.assign(state, { pending: [], turns: [], chosen: null, asking: null, round: state.round + 1 });
  at('turns').replaceChildren();
  at('question').value = '';
  at('samples').open = true;
  say(null);
  sayOfFiles(null);
  showPictures();
  showTurns();
}

function messagesOf(question, pictures) {
  const before = state.turns.flatMap(turn => [turn.messages.at(-1), { role: 'assistant', content: turn.pruned.text }]);
  const parts = pictures.map(picture => ({ type: 'image_url', image_url: { url: picture.url } }));
  return [...before, { role: 'user', content: [...parts, { type: 'text', text: question }] }];
}

function showTurns() {
  for (const turn of state.turns) {
    const last = turn === state.turns.at(-1), only = state.turns.length === 1;
    turn.view.show({ chosen: turn === state.chosen, only, last, busy: Boolean(state.asking) });
  }
  at('hint').hidden = state.turns.length > 0;
  if (!state.asking && document.activeElement === at('stop')) at('question').focus();
  at('stop').hidden = !state.asking;
  at('send').setAttribute('aria-disabled', String(Boolean(state.asking)));
}

// Has one side of a turn answered: 'pruned' or 'dense'. Raises: Failure; AbortError.
async function answer(turn, side) {
  const card = turn.view.cards[side], given = turn.rule && Object.fromEntries(MOVED.map(name => [name, turn.rule[name]]));
  const request = { model: state.model.id, messages: turn.messages, prune: side === 'dense' ? null : given ?? 'auto' };
  card.begin();
  try {
    await complete(request, state.model.limits.max_body, state.asking.signal, now => {
      const first = turn[side] !== now;
      turn[side] = now;
      if (first && side === 'pruned') {
        state.chosen = turn;
        drawMaps();
      }
      showTurns();
    });
  } finally {
    card.end();
  }
}

// Runs something that asks; one at a time. failed(error) is told what went wrong, also that it was stopped.
async function busy(work, failed) {
  if (state.asking) return;
  const own = state.asking = new AbortController();
  say(null);
  sayOfFiles(null);
  showTurns();
  try {
    await work();
  } catch (error) {
    if (!own.signal.aborted) say(error);
    failed?.(error);
  } finally {
    state.asking = state.asking === own ? null : state.asking;
    showTurns();
  }
}

async function ask() {
  await state.loading;
  const question = at('question').value.trim();
  if (state.asking || !state.model) return;
  if (!question) return say(new Failure('Type a question first.'));
  const pictures = state.pending, rule = state.moved ? wantedRule() : null;
  const turn = { question, pictures, messages: messagesOf(question, pictures), rule };
  turn.view = new TurnView(turn, { map: choose, again, dense: compare }, !state.model.prune);
  state.turns.push(turn);
  state.pending = [];
  at('turns').append(turn.view.root);
  at('question').value = '';
  showPictures();
  const before = state.chosen;
  busy(async () => {
    turn.view.root.scrollIntoView({ block: 'nearest' });
    await answer(turn, 'pruned');
    if (at('both').checked) await compareNow(turn);
  }, () => {
    if (turn.pruned?.text || !state.turns.includes(turn)) return;  // what there is of an answer stays
    state.turns.pop();
    state.chosen = before;
    turn.view.root.remove();
    state.pending = [...turn.pictures, ...state.pending];
    at('question').value ||= question;
    showPictures();
  });
}

function again(turn) {
  const before = turn.pruned, rule = turn.rule;
  turn.rule = state.moved ? wantedRule() : null;
  busy(() => answer(turn, 'pruned'), () => {
    if (turn.pruned === before) turn.rule = rule;
  });
}

async function compareNow(turn) {
  try {
    await answer(turn, 'dense');
  } catch (error) {
    if (!turn.dense) turn.dense = null;
    if (!state.asking?.signal.aborted) turn.view.cards.dense.failure.textContent = error.message;
    turn.view.cards.dense.root.hidden = false;
    if (error.status === 401) say(error);
  }
}

function compare(turn) {
  busy(() => compareNow(turn));
}

function choose(turn) {
  state.chosen = turn;
  showTurns();
  drawMaps();
}

// The start -----------------------------------------------------------------------------------------------------------------------

async function start() {
  try {
    state.model = (await getJson('v1/models')).data[0];
  } catch (error) {
    return say(error.status === 401 && at('key-form').hidden ? { status: 401, message: '' } : error);
  }
  at('key-form').hidden = true;
  say(null);
  at('model').textContent = state.model.id;
  at('both-label').hidden = !state.model.prune;
  if (state.model.prune) setRule(state.model.prune);
}

receive(at('drop'), at('file'), add, sayOfFiles);
at('ask').onsubmit = event => {
  event.preventDefault();
  ask();
};
at('question').onkeydown = event => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
at('stop').onclick = () => state.asking?.abort();
at('reset').onclick = () => {
  begin();
  at('question').focus();
};
at('threshold').oninput = at('cap').oninput = () => {
  state.moved = true;
  showRule();
};
at('own-rule').onclick = () => setRule(state.model.prune);
at('show-kept').onchange = at('show-heat').onchange = drawMaps;
at('key-form').onsubmit = event => {
  event.preventDefault();
  useKey(at('key').value.trim());
  at('key').value = '';
  start();
};
at('scale').querySelector('i').style.background = SCALE;
new ResizeObserver(drawMaps).observe(at('pictures'));
offerSamples(at('samples'), at('note'), takeSample);
start();
