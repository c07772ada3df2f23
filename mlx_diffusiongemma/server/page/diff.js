// What changed between two texts, word by word.

// Pieces of both texts in order: { text, in: "both" | "old" | "new" }.
export function compare(old, now) {
  const [before, after] = [words(old), words(now)];
  // common[i][j]: how many words the rests from i and from j have in common, at most
  const common = Array.from({ length: before.length + 1 }, () => new Uint16Array(after.length + 1));
  for (let i = before.length - 1; i >= 0; i--) {
    for (let j = after.length - 1; j >= 0; j--) {
      const apart = Math.max(common[i + 1][j], common[i][j + 1]);
      common[i][j] = before[i] === after[j] ? common[i + 1][j + 1] + 1 : apart;
    }
  }
  const pieces = [];
  let [i, j] = [0, 0];
  while (i < before.length || j < after.length) {
    const isSame = before[i] === after[j];
    const isOld = !isSame && i < before.length && (j === after.length || common[i + 1][j] >= common[i][j + 1]);
    add(pieces, isOld ? before[i] : after[j], isSame ? "both" : isOld ? "old" : "new");
    if (isSame || isOld) i++;
    if (!isOld) j++;
  }
  return pieces;
}

function add(pieces, text, where) {
  if (pieces.at(-1)?.in === where) pieces.at(-1).text += text;
  else pieces.push({ text, in: where });
}

function words(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
}
