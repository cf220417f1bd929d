// The server's samples, each a picture with a question.

import { getJson } from './client.js';
import { element } from './elements.js';

// Fills the list; take(sample) is called for the one that is chosen. note: what the server says about its model.
export async function offerSamples(list, note, take) {
  const found = await getJson('samples').catch(() => ({ samples: [], note: '' }));
  note.textContent = found.note;
  note.hidden = !found.note;
  list.hidden = !found.samples.length;
  list.querySelector('ul').replaceChildren(...found.samples.map(sample => {
    const picture = element('img', { src: sample.picture, alt: '', loading: 'lazy', width: 64, height: 64 });
    const words = element('span', { textContent: sample.question });
    return element('li', {}, element('button', { type: 'button', onclick: () => take(sample) }, picture, words));
  }));
}
