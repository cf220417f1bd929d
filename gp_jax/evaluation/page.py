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
.card header p { margin: .1rem 0 .6rem; } .card h3, .card header p { overflow-wrap: anywhere; }
.family { display: inline-block; padding: 0 .5em; margin-right: .4em; border: 1px solid var(--line); border-radius: 1em;
  color: var(--soft); font-size: .85rem; }
.plans { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .7rem; align-items: start; }
.plans figure { margin: 0; border-top: 3px solid var(--right); } .plans figure[data-right="0"] { border-color: var(--wrong); }
.plans img { display: block; width: 100%; height: auto; max-height: 20rem; object-fit: contain; object-position: left; cursor: zoom-in; }
.plans figure.large { grid-column: span 2; } .plans figure.large img { max-height: none; cursor: zoom-out; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } figcaption > * { display: block; } figcaption small { color: var(--soft); }
q { unicode-bidi: isolate; }
figure[data-right="1"] .said { color: var(--right); } figure[data-right="0"] .said { color: var(--wrong); }
"""

JS = """
const form = document.getElementById('filters'), shown = document.getElementById('shown');
const gallery = document.getElementById('gallery');
const cards = [...document.querySelectorAll('.card')].map(card => ({card, figures: [...card.querySelectorAll('figure')]}));
function filter() {
  const {family, plan, outcome, words} = form.elements, wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const {card, figures} of cards) {
    const own = figures.filter(f => plan.value === '' || f.dataset.plan === plan.value);
    const right = f => f.dataset.right === '1', wrong = f => f.dataset.right === '0';
    const fits = {'': () => true, right: () => own.some(right), wrong: () => own.some(wrong),
      mixed: () => figures.some(right) && figures.some(wrong)}[outcome.value]();
    const show = fits && own.length > 0 && (family.value === '' || card.dataset.family === family.value)
      && wanted.every(word => card.dataset.words.includes(word));
    card.hidden = !show;
    figures.forEach(f => { f.hidden = !own.includes(f); });
    count += show;
  }
  gallery.classList.toggle('single', plan.value !== '');
  shown.textContent = `${count} of ${cards.length} samples`;
}
form.hidden = false;
form.addEventListener('input', filter);
form.addEventListener('submit', event => event.preventDefault());
document.addEventListener('click', event => {
  if (event.target.matches('.plans img')) event.target.closest('figure').classList.toggle('large');
});
filter();
"""
