// The thread in which the model runs, so that the page stays responsive: takes the page's messages and answers them.

import { Refusal, loadModel } from "./model.js";

function report(message, error) {
  const { code, values } = error instanceof Refusal ? error : new Refusal("failed", { reason: String(error.message ?? error) });
  postMessage({ ...message, code, values });
}

const here = new URL(self.location.href);
const onProgress = (stage, loaded, total) => postMessage({ type: "progress", stage, loaded, total });
const loading = loadModel(new URL("./", here), onProgress, here.searchParams.get("device"));
loading.then(
  ({ device, threads }) => postMessage({ type: "ready", device, threads }),
  (error) => report({ type: "failed" }, error),
);

async function ask(conversation, { id, question, files }, signal) {
  try {
    const answer = await conversation.ask(question, files, (text) => postMessage({ type: "text", id, text }), signal);
    postMessage({ type: "answered", id, ...answer });
  } catch (error) {
    report({ type: "refused", id }, error);
  }
}

let last = loading.then(({ conversation }) => conversation); // questions are answered in order …
last.catch(() => {}); // the page knows already that there is no model
let stopping = new AbortController();
self.onmessage = ({ data }) => {
  if (data.type === "ask") stopping = new AbortController();
  else stopping.abort(); // … but stopping does not wait
  const { signal } = stopping;
  last = last.then(async (conversation) => {
    if (data.type === "ask") await ask(conversation, data, signal);
    if (data.type === "reset") conversation.reset();
    return conversation;
  });
  last.catch(() => {});
};
