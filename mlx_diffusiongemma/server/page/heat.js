// All steps of a reply in one picture: a column for each step, a row for each token, the colour of its doubt.

export const SURE = 2; // nats of entropy from which a token is drawn in the full colour of doubt

// How much a token is doubted, 0 to 1; the root lets small doubts be seen.
export const doubt = (nats) => Math.sqrt(Math.min(nats / SURE, 1));

export function drawHeat(canvas, frames) {
  const ends = frames.map(openPlaces).filter((places) => places.length).map((places) => [places[0], places.at(-1)]);
  const first = Math.min(...ends.map(([start]) => start));
  const rows = ends.length ? Math.max(8, Math.max(...ends.map(([, last]) => last)) + 1 - first) : 1;
  const [red, green, blue] = getComputedStyle(canvas).color.match(/[\d.]+/g).map(Number);
  const image = new ImageData(Math.max(frames.length, 1), rows);
  frames.forEach((frame, column) => {
    for (const place of openPlaces(frame)) {
      const pixel = [red, green, blue, 255 * doubt(frame.entropy[place])];
      image.data.set(pixel, 4 * ((place - first) * image.width + column));
    }
  });
  [canvas.width, canvas.height] = [image.width, rows];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The places of the canvas that are the model's to fill, up to the end of the text.
function openPlaces(frame) {
  const places = [...frame.pieces.keys()].filter((place) => isOpen(frame, place));
  const end = places.findLastIndex((place) => frame.pieces[place] !== "") + 1;
  return places.slice(0, end);
}

// Whether a place of the canvas is the model's to fill: of an edit, only the span is.
export function isOpen(frame, place) {
  return !frame.holes || frame.holes.some(([start, stop]) => start <= place && place < stop);
}
