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

async function ask(conversation, { id, question, files }) {
  try {
    const answer = await conversation.ask(question, files, (text) => postMessage({ type: "text", id, text }));
    postMessage({ type: "answered", id, ...answer });
  } catch (error) {
    report({ type: "refused", id }, error);
  }
}

let last = loading.then(({ conversation }) => conversation); // what was asked for goes on in order …
self.onmessage = async ({ data }) => {
  if (data.type !== "ask") loading.then(({ conversation }) => conversation.stop(), () => {}); // … but stopping does not wait
  last = last.then(async (conversation) => {
    if (data.type === "ask") await ask(conversation, data);
    if (data.type === "reset") conversation.reset();
    return conversation;
  });
  last.catch(() => {}); // the page knows already that there is no model
};
