"""Style and script of the report, which must work from a file and without a network."""

CSS = """
:root { color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1c2127; --soft: #5c6670; --line: #d5dae0;
  --right: #18794e; --wrong: #c62a2f; --warn: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1d2126; --ink: #e6e9ec; --soft: #9aa5b1; --line: #363d45;
  --right: #4cc38a; --wrong: #ff7b72; --warn: #3a2f12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; margin: 0; }
ul.notes { list-style: none; padding: 0; margin: 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
ul.notes b { color: var(--ink); font-weight: 600; }
p.warning { background: var(--warn); padding: .5rem .8rem; border-radius: 6px; }
p.caption { color: var(--soft); font-size: .85rem; margin: .5rem 0; max-width: 75ch; }
p.lead { margin: .2rem 0; max-width: 75ch; } p.lead b { font-weight: 600; }
table.small { margin: .8rem 0; } details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
.skip { position: absolute; left: -999rem; } .skip:focus { position: static; }
:focus-visible { outline: 3px solid #3f8fd9; outline-offset: 2px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; min-width: 5.5rem; }
thead small, td small { display: block; color: var(--soft); font-weight: 400; }
th:first-child { text-align: left; min-width: 9rem; } tbody th { font-weight: 600; white-space: normal; }
td.clear { font-weight: 600; }
.chip { display: inline-block; width: 1.2em; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots figure { flex: 1 1 24rem; max-width: 40rem; margin: 0; }
.plots svg { width: 100%; height: auto; font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.filters { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .6rem 0; background: var(--ground); border-bottom: 1px solid var(--line); }
.filters[hidden] { display: none; }
.filters label { color: var(--soft); font-size: .85rem; } .filters select, .filters input { font: inherit; margin-left: .3rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; margin: .8rem 0; }
.single { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: .8rem; margin-top: .8rem; }
.single .card { margin: 0; }
.card[hidden], figure[hidden] { display: none; }
.card header p { margin: .1rem 0 .6rem; } .card h3, .card header p { overflow-wrap: break-word; }
.family { display: inline-block; padding: 0 .5em; margin-right: .4em; border: 1px solid var(--line); border-radius: 1em;
  color: var(--soft); font-size: .85rem; }
.plans { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .7rem; align-items: start; }
.plans figure { margin: 0; border-top: 3px solid var(--right); } .plans figure[data-right="0"] { border-color: var(--wrong); }
.plans img { display: block; width: 100%; height: auto; max-height: 20rem; object-fit: contain; object-position: left; cursor: zoom-in; }
dialog { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; max-width: 96vw; background: var(--ground); color: var(--ink); }
dialog::backdrop { background: #000b; } dialog button { font: inherit; float: right; } dialog p { margin: .4rem 0 0; }
dialog img { display: block; width: min(92vw, 80vh, 60rem); max-width: 100%; height: auto; max-height: 80vh; object-fit: contain;
  image-rendering: auto; }
figcaption { font-size: .85rem; overflow-wrap: break-word; } figcaption > * { display: block; } figcaption small { color: var(--soft); }
q, h3, b, td, option { unicode-bidi: isolate; }
td a { color: inherit; text-decoration: underline dotted; text-underline-offset: .2em; }
td a:hover { text-decoration: underline; }
h2 { scroll-margin-top: .5rem; } .card { scroll-margin-top: 5rem; } .id { color: var(--soft); margin-left: .6em; }
.list { max-height: 26rem; overflow: auto; border: 1px solid var(--line); border-radius: 8px; margin: .8rem 0; }
.list[hidden] { display: none; }
.list table { width: 100%; font-size: .85rem; } .list thead th { position: sticky; top: 0; background: var(--ground); min-width: 0; }
.list th, .list td { text-align: left; white-space: normal; overflow-wrap: break-word; padding: .2rem .5rem; }
.list table { min-width: 52rem; } .list td:nth-child(-n+4), .list th { white-space: nowrap; }
@media (max-width: 40rem) { body { padding: .8rem; } .filters { position: static; } th, td { padding: .3rem .45rem; }
  thead th { min-width: 4.5rem; } .filters label { flex: 1 1 40%; } .filters select, .filters input { max-width: 9rem; } }
.list .right { color: var(--right); } .list .wrong { color: var(--wrong); } .list button { margin: .5rem; font: inherit; }
figure[data-right="1"] .said { color: var(--right); } figure[data-right="0"] .said { color: var(--wrong); }
"""

LOGIC = """
function matching(data, wanted) {  // [[sample, [plans]]] that fit; wanted: task, family, plan, metric, against, outcome, words
  const number = text => text === '' ? -1 : Number(text);
  const plan = number(wanted.plan), metric = number(wanted.metric), against = number(wanted.against), found = [];
  const words = wanted.words.toLowerCase().split(/\\s+/).filter(Boolean);
  const has = own => own && (metric < 0 || own[2 + metric] !== null);
  data.samples.forEach((sample, i) => {
    const [task, id, question, answer, family] = sample, all = data.answers[i];
    if ((wanted.task !== '' && task !== wanted.task) || (wanted.family !== '' && family !== wanted.family)) return;
    if (against >= 0 && !has(all[against])) return;
    const plans = all.map((own, p) => p).filter(p => (plan < 0 || p === plan) && has(all[p]));
    if (!plans.length) return;
    const right = p => isRight(data, i, p) === true, wrong = p => isRight(data, i, p) === false;
    const every = all.map((own, p) => p).filter(p => all[p]);
    if (wanted.outcome === 'mixed' && !(every.some(right) && every.some(wrong))) return;
    const shown = wanted.outcome === 'right' ? plans.filter(right) : wanted.outcome === 'wrong' ? plans.filter(wrong) : plans;
    if (!shown.length) return;
    const text = words.length ? [`${task}:${id}`, question, answer, family, ...plans.map(p => all[p][0])].join(' ').toLowerCase() : '';
    if (!words.every(word => text.includes(word))) return;
    found.push([i, plan >= 0 && against >= 0 && against !== plan ? [...shown, against] : shown]);
  });
  return found;
}
function isRight(data, sample, plan) {  // null: not scored
  const value = data.main < 0 ? null : data.answers[sample][plan][2 + data.main];
  return value === null ? null : value >= 0.5;
}
"""

JS = (
    LOGIC
    + """
const data = JSON.parse(document.getElementById('data').textContent);
const form = document.getElementById('filters'), shown = document.getElementById('shown'), gallery = document.getElementById('gallery');
const list = document.getElementById('list'), body = list.querySelector('tbody'), more = list.querySelector('button');
const cards = [...document.querySelectorAll('.card')].map(card => ({card, figures: [...card.querySelectorAll('figure')]}));
const pictured = new Set(cards.map(({card}) => Number(card.dataset.number)));
const NUMBERED = {plan: data.plans, against: data.plans, metric: data.metrics};  // fields whose values are numbers of these
const NAMES = ['task', 'family', 'plan', 'metric', 'against', 'outcome', 'words'], STEP = 200;
let rows = [], drawn = 0;
function draw() {  // only as many lines as are looked at
  const part = document.createDocumentFragment();
  for (const [i, p] of rows.slice(drawn, drawn + STEP)) {
    const [task, id, question, answer] = data.samples[i], [text, line, ...values] = data.answers[i][p], right = isRight(data, i, p);
    const metric = form.elements.metric.value === '' ? data.main : Number(form.elements.metric.value);
    const name = document.createElement(pictured.has(i) ? 'a' : 'span'), row = document.createElement('tr');
    name.textContent = `${task}:${id}`;
    if (pictured.has(i)) name.href = `#card-${i}`;
    const mark = right === null ? '?' : right ? '✓' : '✗', value = metric < 0 || values[metric] === null ? '' : values[metric];
    for (const cell of [name, data.plans[p], line || '', `${mark} ${value}`, question, answer, text]) {
      const td = document.createElement('td');
      td.append(cell);
      row.append(td);
    }
    row.children[3].className = right === null ? '' : right ? 'right' : 'wrong';
    part.append(row);
  }
  body.append(part);
  drawn = Math.min(rows.length, drawn + STEP);
  more.hidden = drawn >= rows.length;
  more.textContent = `${rows.length - drawn} more`;
}
function filter() {
  const wanted = Object.fromEntries(NAMES.map(name => [name, form.elements[name].value])), found = matching(data, wanted);
  const kept = new Map(found);
  rows = found.flatMap(([i, plans]) => plans.map(p => [i, p]));
  for (const {card, figures} of cards) {
    const plans = kept.get(Number(card.dataset.number));
    card.hidden = !plans;
    const all = wanted.plan === '' && wanted.metric === '';
    figures.forEach(f => { f.hidden = !all && !(plans || []).includes(Number(f.dataset.plan)); });
  }
  gallery.classList.toggle('single', wanted.plan !== '' && wanted.against === '');
  const seen = cards.filter(({card}) => !card.hidden).length;
  shown.textContent = `${rows.length} answers to ${found.length} of ${data.samples.length} samples; ${seen} with pictures below`;
  body.replaceChildren();
  drawn = list.scrollTop = 0;
  draw();
  remember(wanted);
}
function remember(wanted) {  // in the address, by name, so that it can be sent to somebody
  const chosen = NAMES.filter(name => wanted[name] !== '');
  const said = chosen.map(name => `${name}=${encodeURIComponent(NUMBERED[name] ? NUMBERED[name][wanted[name]] : wanted[name])}`);
  const hash = said.length ? `#${said.join('&')}` : location.hash.includes('=') ? '#samples' : location.hash;
  try { if (hash !== location.hash) history.replaceState(null, '', hash || '#'); } catch (error) { /* a page without an address */ }
}
function recall() {  // from the address
  if (!location.hash.includes('=')) return;
  for (const name of NAMES) form.elements[name].value = '';
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (NAMES.includes(name)) form.elements[name].value = NUMBERED[name] ? String(NUMBERED[name].indexOf(text)) : text;
  }
}
function rove(group, selector) {  // one stop of the tab key per group; arrows move inside it
  const items = [...group.querySelectorAll(selector)], select = item => items.forEach(i => { i.tabIndex = i === item ? 0 : -1; });
  if (items.length) select(items[0]);
  group.addEventListener('focusin', event => { if (items.includes(event.target)) select(event.target); });
  group.addEventListener('keydown', event => {
    const seen = items.filter(item => item.offsetParent !== null), at = seen.indexOf(document.activeElement);
    if (at < 0) return;
    const row = seen.filter(item => item.closest('tr') && item.closest('tr') === seen[at].closest('tr')).length || 1;
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row, Home: 0, End: seen.length - 1}[event.key];
    if (to === undefined || !seen[to]) return;
    event.preventDefault();
    seen[to].focus();
  });
}
const large = document.getElementById('large');
function enlarge(image) {
  const figure = image.closest('figure'), card = image.closest('.card');
  const shown = large.querySelector('img') || large.insertBefore(document.createElement('img'), large.querySelector('p'));
  shown.src = image.src;
  shown.alt = image.alt;
  large.querySelector('p').textContent = `${card.querySelector('h3').textContent} ${figure.querySelector('figcaption').innerText}`;
  large.showModal();
}
form.hidden = list.hidden = false;
form.addEventListener('input', filter);
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('reset', () => setTimeout(filter));
more.addEventListener('click', draw);
document.addEventListener('click', event => {
  if (event.target.matches('.plans img')) enlarge(event.target);
  if (event.target === large || event.target.matches('#large button')) large.close();
  const link = event.target.closest('td a[href="#samples"]');
  if (!link) return;
  event.preventDefault();
  for (const name of NAMES) form.elements[name].value = link.dataset[name] || '';
  filter();
  const samples = document.getElementById('samples');
  samples.scrollIntoView();
  samples.focus({preventScroll: true});
});
document.addEventListener('keydown', event => {
  if ((event.key === 'Enter' || event.key === ' ') && event.target.matches('.plans img')) {
    event.preventDefault();
    enlarge(event.target);
  }
});
document.querySelectorAll('.wide').forEach(table => rove(table, 'td a'));
document.querySelectorAll('.plans').forEach(plans => rove(plans, 'img'));
window.addEventListener('hashchange', () => { if (location.hash.includes('=')) { recall(); filter(); } });
recall();
filter();
"""
)
