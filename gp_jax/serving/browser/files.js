// Pictures from the file chooser, from a drop anywhere on the page, and from the clipboard.

import { Failure } from './client.js';

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Failure('The file cannot be read.'));
    reader.readAsDataURL(blob);
  });
}

// A picture as it is sent: its own bytes, not scaled. Raises: Failure for what is no picture.
export async function opened(blob, name) {
  if (blob.type && !blob.type.startsWith('image/')) throw new Failure(`${name} is not a picture (${blob.type}).`);
  const image = new Image();
  image.src = await read(blob);
  await image.decode().catch(() => { throw new Failure(`${name} is not a picture that this browser can show.`); });
  return { url: image.src, name, width: image.naturalWidth, height: image.naturalHeight };
}

// Calls take(files) whenever some arrive, and complain(failure) for a drop without any.
export function receive(zone, input, take, complain) {
  input.onchange = () => {
    take([...input.files]);
    input.value = '';  // so that the same file can be chosen again
  };
  document.addEventListener('dragover', event => {
    event.preventDefault();
    zone.classList.add('over');
  });
  document.addEventListener('dragleave', event => {
    if (!event.relatedTarget) zone.classList.remove('over');
  });
  document.addEventListener('drop', event => {
    event.preventDefault();
    zone.classList.remove('over');
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
    else complain(new Failure('That is no file: save the picture first, then drop it.'));
  });
  document.addEventListener('paste', event => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    take([...event.clipboardData.files]);
  });
}
