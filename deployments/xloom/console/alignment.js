/**
 * Which part of a text each of its tokens is.
 *
 * The text is the endpoint's word. Tokens need not add up to it: end-of-text and other special tokens are not in it, a
 * character may take several tokens (only the last of them has it), a stop string cuts the last token short, and a
 * parser may strip white space.
 */

/**
 * @param {string[]} tokens their texts
 * @param {string} text
 * @returns {[number, number][]} start and end of each in the text; an empty range where it is not in the text
 */
export function align(tokens, text) {
  /** @type {[number, number][]} */
  const ranges = [];
  let end = 0;
  let partial = -1; // the first of the tokens before this one that are parts of a character
  for (const token of tokens) {
    let found = lengthAt(text, end, token);
    if (partial >= 0 && found === 0 && token !== "" && !token.includes("\uFFFD")) {
      // The character is whole by now: it lies between, and belongs to the token that began it.
      const next = text.indexOf(token, end);
      if (next > end && next - end <= 8) {
        ranges[partial] = [end, next];
        for (let i = partial + 1; i < ranges.length; i++) ranges[i] = [next, next];
        end = next;
        found = token.length;
      }
    }
    if (found > 0) partial = -1;
    else if (token.includes("\uFFFD") && partial < 0) partial = ranges.length;
    ranges.push([end, end + found]);
    end += found;
  }
  if (partial >= 0 && end < text.length && text.length - end <= 8) {
    ranges[partial] = [end, text.length];
    for (let i = partial + 1; i < ranges.length; i++) ranges[i] = [text.length, text.length];
  }
  return ranges;
}

/**
 * How many characters of the text from there on are that token; 0: it does not come next.
 * @param {string} text
 * @param {number} start
 * @param {string} token
 */
function lengthAt(text, start, token) {
  if (token === "") return 0;
  if (text.startsWith(token, start)) return token.length;
  const bare = token.trim();
  if (bare === "") return 0;
  const rest = text.slice(start);
  const space = rest.length - rest.trimStart().length;
  if (rest.startsWith(bare, space)) return space + bare.length;
  return rest !== "" && token.startsWith(rest) ? rest.length : 0; // cut short by a stop string
}
