// The model and one conversation with it: what minimind_v_hf/chat.py does in Python, by transformers.js.

import {
  AutoProcessor,
  BaseStreamer,
  DynamicCache,
  LlavaForConditionalGeneration,
  RawImage,
  StoppingCriteria,
  Tensor,
  cat,
  env,
} from "./lib/transformers.min.js";
import { readImage } from "./image.js";

const NEW_TOKENS = 512; // of the longest answer
const THREADS = 4; // more gain nothing at this size, and a telephone's slow cores hold the fast ones up

/** An error that the page explains in the visitor's language: `code` is a key of texts.js. */
export class Refusal extends Error {
  constructor(code, values = {}) {
    super(`${code} ${JSON.stringify(values)}`);
    Object.assign(this, { code, values });
  }
}

// ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────

let failure = null; // why the last file did not come: the library, which asked for it, says less

/** A `fetch` that tells how much of the large files has come. */
function watchedFetch(stage, onProgress) {
  let [loaded, total, pending] = [0, 0, 0];
  const fail = (error) => {
    failure = new Refusal("network", { reason: error.message });
    throw failure;
  };
  return async (address, options) => {
    const isLarge = /\.(onnx|onnx_data|wasm)\b/.test(address);
    pending += isLarge;
    const response = await fetch(address, options).catch(fail);
    if (!response.ok) failure = new Refusal("missing", { file: address, status: response.status });
    if (!response.ok || !isLarge) return response;
    total += Number(response.headers.get("content-length"));
    const reader = response.body.getReader();
    const counted = new ReadableStream({
      async pull(controller) {
        const { done, value } = await reader.read().catch(fail);
        if (!done) {
          loaded += value.length;
          onProgress(stage, loaded, Math.max(loaded, total)); // a compressed file is longer than announced
          controller.enqueue(value);
          return;
        }
        controller.close();
        pending -= 1;
        if (pending === 0) onProgress("start", 0, 0);
      },
    });
    return new Response(counted, response);
  };
}

/** The engine, which every model needs: ONNX Runtime, compiled to WebAssembly. Returns how many threads it has. */
async function loadEngine(device, base, onProgress) {
  const { wasm } = env.backends.onnx;
  const file = `${base.pathname}lib/ort-wasm-simd-threaded${device === "webgpu" ? ".asyncify" : ""}`;
  wasm.numThreads = self.crossOriginIsolated ? Math.min(THREADS, navigator.hardwareConcurrency) : 1;
  wasm.wasmPaths = { mjs: `${file}.mjs`, wasm: `${file}.wasm` };
  const response = await watchedFetch("engine", onProgress)(`${file}.wasm`);
  if (!response.ok) throw failure;
  wasm.wasmBinary = await response.arrayBuffer();
  return wasm.numThreads;
}

/**
 * Load what is in the folder model/.
 *
 * @param {URL} base of the page
 * @param {(stage: "engine"|"model"|"start", loaded: number, total: number) => void} onProgress in bytes
 * @param {"webgpu"|"wasm"|null} wanted a device, or null for the best that there is
 * @throws {Refusal} a file cannot be fetched
 */
export async function loadModel(base, onProgress, wanted = null) {
  let device = wanted ?? ((await navigator.gpu?.requestAdapter().catch(() => null)) ? "webgpu" : "wasm");
  Object.assign(env, {
    allowRemoteModels: false,
    allowLocalModels: true,
    localModelPath: base.pathname,
    // The address says nothing of which model is behind it, so only the browser's own cache knows what is still good
    useBrowserCache: false,
    useWasmCache: false,
    fetch: watchedFetch("model", onProgress),
  });
  const load = () => LlavaForConditionalGeneration.from_pretrained("model", { device });
  try {
    const threads = await loadEngine(device, base, onProgress);
    const processor = await AutoProcessor.from_pretrained("model");
    const model = await load().catch((error) => {
      if (device !== "webgpu" || failure) throw error;
      device = "wasm"; // which this engine can do as well
      return load();
    });
    return { conversation: new Conversation(model, processor), device, threads };
  } catch (error) {
    throw failure ?? error;
  }
}

// ── A conversation ───────────────────────────────────────────────────────────────────────────────────────────────────

/** Gives the answer as it is so far after each token, and notes when they came. */
class Answer extends BaseStreamer {
  constructor(tokenizer, onText) {
    super();
    Object.assign(this, { tokenizer, onText, ids: null, text: "" });
  }

  put([ids]) {
    if (this.ids === null) {
      this.ids = []; // what comes first is the prompt
      return;
    }
    this.ids.push(...ids);
    this.last = performance.now();
    this.first ??= this.last;
    this.text = this.tokenizer.decode(this.ids, { skip_special_tokens: true });
    this.onText(this.text.replace(/\uFFFD+$/, "")); // the rest of a character comes with the next token
  }

  end() {}

  /** Tokens per second after the first token, or 0 where there are too few of them to tell. */
  get rate() {
    return this.ids.length < 8 ? 0 : (this.ids.length - 1) / ((this.last - this.first) / 1000);
  }
}

/** Ends the answer after the current token once a signal says so. */
class Aborted extends StoppingCriteria {
  constructor(signal) {
    super();
    this.signal = signal;
  }

  _call(sequences) {
    return sequences.map(() => this.signal.aborted);
  }
}

/** Lets messages in, such as the wish to stop: between two tokens nothing else would. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });

export class Conversation {
  constructor(model, processor) {
    this.model = model;
    this.processor = processor;
    const { image_token, patch_size, num_additional_image_tokens = 0 } = processor.config;
    this.imageToken = image_token;
    this.imageTokens = (height, width) =>
      Math.floor(height / patch_size) * Math.floor(width / patch_size) + num_additional_image_tokens;
    const { config } = model;
    this.positions = config.text_config.max_position_embeddings ?? Infinity;
    const forward = model.forward.bind(model);
    model.forward = (inputs) => breathe().then(() => forward(inputs));
    this.reset();
  }

  /** Forget all messages and images. */
  reset() {
    this.messages = [];
    this.images = []; // one (1, 3, height, width) each
    this.forgetCache();
  }

  forgetCache() {
    this.cache?.dispose();
    this.cache = new DynamicCache();
    this.cachedIds = [];
    this.cachedImages = 0;
  }

  /**
   * Put a question, with images before it. A question that is refused leaves the conversation as it was.
   *
   * @param {string} question
   * @param {File[]} files images
   * @param {(text: string) => void} onText given the answer so far
   * @param {AbortSignal} signal ends the answer after the current token; what was written by then stays in the conversation
   * @returns {Promise<{text: string, tokens: number, seconds: number, rate: number, stopped: boolean}>}
   * @throws {Refusal}
   */
  async ask(question, files, onText, signal) {
    const images = [...this.images];
    for (const file of files) images.push(await this.readPixels(file));
    // Images as in the training data: in front, then a line break
    const content = files.map(() => ({ type: "image" }));
    content.push({ type: "text", text: (files.length ? "\n" : "") + question.replace(/\p{Surrogate}/gu, "?") });
    const messages = [...this.messages, { role: "user", content }];
    const ids = this.tokenIds(messages, images);
    const room = this.positions - ids.length;
    if (room < 1) throw new Refusal("tooLong", { tokens: ids.length, positions: this.positions });

    // Usually all that was read is in the cache. But a template may drop earlier thoughts, and an answer may be written in
    // other tokens than the tokenizer would choose for its text.
    const isPrefix = this.cachedIds.length < ids.length && this.cachedIds.every((id, index) => id === ids[index]);
    if (!isPrefix) this.forgetCache();
    const newImages = images.slice(this.cachedImages);
    const answer = new Answer(this.processor.tokenizer, onText);
    const start = performance.now();
    let output;
    try {
      output = await this.model.generate({
        input_ids: new Tensor("int64", ids.map(BigInt), [1, ids.length]),
        attention_mask: new Tensor("int64", ids.map(() => 1n), [1, ids.length]),
        ...(newImages.length ? { pixel_values: cat(newImages, 0) } : {}),
        ...(this.cachedIds.length ? { past_key_values: this.cache } : {}),
        max_new_tokens: Math.min(NEW_TOKENS, room),
        do_sample: false,
        streamer: answer,
        stopping_criteria: new Aborted(signal),
        return_dict_in_generate: true,
      });
    } catch (error) {
      this.forgetCache(); // how far it came is not known
      throw error;
    }
    this.cache = output.past_key_values;
    this.cachedIds = [...ids, ...answer.ids.slice(0, -1).map(Number)]; // the last token was drawn, but not yet read
    this.cachedImages = images.length;
    this.images = images;
    this.messages = [...messages, { role: "assistant", content: [{ type: "text", text: answer.text }] }];
    const seconds = (performance.now() - start) / 1000;
    return { text: answer.text, tokens: answer.ids.length, seconds, rate: answer.rate, stopped: signal.aborted };
  }

  async readPixels(file) {
    const settings = this.processor.image_processor.config;
    const image = await readImage(file, settings).catch((error) => {
      if (error instanceof DOMException) throw new Refusal("unreadable", { name: file.name });
      throw error;
    });
    const { pixel_values } = await this.processor.image_processor(new RawImage(image.data, image.width, image.height, 3));
    return pixel_values;
  }

  tokenIds(messages, images) {
    const { tokenizer } = this.processor;
    const prompt = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
    // What looks like an image token in a message is marked by the template, so these are the images; LlavaProcessor of
    // transformers.js would expand the first alone
    let next = 0;
    const expanded = prompt.replaceAll(this.imageToken, () => {
      const [, , height, width] = images[next++].dims;
      return this.imageToken.repeat(this.imageTokens(height, width));
    });
    return tokenizer.encode(expanded, { add_special_tokens: false });
  }
}
