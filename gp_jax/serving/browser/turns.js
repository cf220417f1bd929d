// The elements of a turn: its question, the pruned and the dense answer beside each other, and what each took.

import { element, percent, seconds } from './elements.js';

const FACTS = [
  ['first token', answer => seconds(answer.first)],
  ['whole answer', answer => seconds(answer.all)],
  ['prompt tokens', ({ usage }) => usage && usage.prompt_tokens],
  ['visual tokens', ({ usage }) => usage && usage.prompt_tokens_details.visual_tokens],
  ['kept of them', ({ usage }) => usage && usage.prompt_tokens_details.kept_tokens],
  ['share kept', ({ usage }) => usage && percent(usage.prompt_tokens_details.kept_tokens, usage.prompt_tokens_details.visual_tokens)],
  ['answer tokens', ({ usage }) => usage && usage.completion_tokens],
  ['pictures already seen', ({ usage }) => usage && usage.prompt_tokens_details.vision_cache_hits],
];

// What a rule is called. rule: null for the model's own.
export function ruleName(rule) {
  if (!rule) return 'the model\'s own rule';
  const cap = rule.max_remain_ratio;
  return `threshold ${rule.reduce_threshold}, ${cap === null ? 'no cap' : `at most ${+(100 * cap).toFixed(1)} %`}`;
}

class Card {
  constructor(title, single) {
    this.text = element('p', { className: 'text', 'aria-live': 'polite' });
    this.rule = element('p', { className: 'soft' });
    this.failure = element('p', { className: 'failure', role: 'alert' });
    const head = element('h3', { textContent: title, hidden: single });
    this.root = element('article', { className: 'answer' }, head, this.text, this.rule, this.failure);
  }

  begin() {
    this.text.textContent = '';
    this.failure.textContent = '';
    this.text.setAttribute('aria-busy', 'true');  // read out when it is whole
  }

  end() {
    this.text.setAttribute('aria-busy', 'false');
  }
}

// The element of a turn. act: { map, again, dense }, called with the turn. single: the model cannot prune.
export class TurnView {
  constructor(turn, act, single) {
    this.turn = turn;
    this.cards = { pruned: new Card('Pruned', single), dense: new Card('Dense', false) };
    Object.assign(this.cards.dense.root, { hidden: true, tabIndex: -1 });
    const button = (text, action) => element('button', { type: 'button', textContent: text, onclick: () => act[action](turn) });
    this.buttons = { map: button('Show its map', 'map'), again: button('Ask again', 'again'),
      dense: button('Compare with dense', 'dense') };
    this.table = element('table', {});
    const more = turn.pictures.length ? ` (${turn.pictures.length} picture${turn.pictures.length > 1 ? 's' : ''})` : '';
    this.root = element('li', {},
      element('p', { className: 'question' }, turn.question, element('span', { className: 'soft', textContent: more })),
      element('div', { className: 'answers' }, this.cards.pruned.root, this.cards.dense.root),
      element('div', { className: 'facts' }, this.table),
      element('p', { className: 'tools' }, ...Object.values(this.buttons)));
    this.single = single;
  }

  // Shows how far its answers are. chosen: its map is shown; only, last: of all turns; busy: some answer is on its way.
  show({ chosen, only, last, busy }) {
    const { pruned, dense } = this.turn;
    for (const [name, answer] of Object.entries({ pruned, dense })) {
      if (answer && this.cards[name].text.textContent !== answer.text) this.cards[name].text.textContent = answer.text;
    }
    this.cards.pruned.rule.textContent = this.single ? '' : ruleName(this.turn.rule);
    this.cards.dense.rule.textContent = 'every visual token';
    if (dense) this.cards.dense.root.hidden = false;
    this.buttons.map.setAttribute('aria-pressed', String(chosen));
    this.buttons.map.hidden = this.single || only || !pruned?.mask?.length;
    this.buttons.again.hidden = !last || !pruned;
    if (dense?.usage && document.activeElement === this.buttons.dense) this.cards.dense.root.focus();
    this.buttons.dense.hidden = this.single || !pruned?.usage || Boolean(dense?.usage);
    for (const button of [this.buttons.again, this.buttons.dense]) button.setAttribute('aria-disabled', String(busy));  // keeps the focus
    this.fill([['pruned', pruned], ['dense', dense]].filter(([, answer]) => answer));
  }

  fill(columns) {
    const cell = (name, fields, text) => element(name, { ...fields, textContent: text });
    const head = element('tr', {}, element('th'), ...columns.map(([name]) => cell('th', { scope: 'col' }, this.single ? '' : name)));
    const rows = FACTS.map(([name, fact]) => [name, columns.map(([, answer]) => fact(answer) ?? '')]);
    const known = rows.filter(([, values]) => values.some(value => value !== ''));
    this.table.replaceChildren(head, ...known.map(([name, values]) =>
      element('tr', {}, cell('th', { scope: 'row' }, name), ...values.map(value => cell('td', {}, value)))));
  }
}
