// What the page asks of the server that it came from.

const at = (id) => document.getElementById(id);

export function request(path, body, signal) {
  const key = at("key").value;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  return fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
}

// The chunks of a streamed answer, as they come in. Throws what the server says is wrong.
export async function* chunks(path, body, signal) {
  const response = await request(path, { ...body, stream: true, frames: true }, signal);
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: {")) continue;
      const chunk = JSON.parse(part.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
