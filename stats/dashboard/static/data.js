// Where figures come from: the server that sent this page, or the page itself where it was written to a file.

import { Recorded } from "./recorded.js";

const carried = document.getElementById("recorded");
const recorded = carried && Recorded.open(carried.textContent);

/** Whether nothing more will come, nor anything be fetched. */
export const isFile = Boolean(carried);

/** The server does not answer. */
export class NoContact extends Error {}

/** The figures of a panel; NoContact where nobody answers, another Error with the server's words. */
export async function ask(name, parameters = {}) {
  if (recorded) return (await recorded).answer(name, parameters);
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null));
  const [answer, body] = await fetch(`api/${name}?${query}`).then(async (found) => [found, await found.json()])
    .catch(() => { throw new NoContact(); });
  if (!answer.ok) throw new Error(body.error?.message ?? `${name}: ${answer.status}`);
  return body;
}

/** stats.json as a link can offer it. */
export async function statsAddress() {
  if (!recorded) return "api/stats.json";
  return URL.createObjectURL(new Blob([(await recorded).stats], { type: "application/json" }));
}
