// What engines.py measures of transformers.js in Node: takes its orders as JSON, and writes its answers where they say.

import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, resolve } from "node:path";

const { folder, questions, tokens, library, result } = JSON.parse(process.argv[2]);
const require = createRequire(`${resolve(library)}/`);
const { AutoProcessor, BaseStreamer, LlavaForConditionalGeneration, RawImage, env } = require("@huggingface/transformers");

class Clock extends BaseStreamer {
  times = [];
  put() {
    this.times.push(performance.now());
  }
  end() {}
}

Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(resolve(folder)) });
const model = await LlavaForConditionalGeneration.from_pretrained(basename(folder), { device: "cpu" });
const processor = await AutoProcessor.from_pretrained(basename(folder));
const { patch_size: patch, image_token: imageToken } = processor.config;

const answers = [];
for (const { image, text } of JSON.parse(await readFile(questions, "utf-8"))) {
  const clock = new Clock();
  const start = performance.now();
  const { pixel_values } = await processor.image_processor(await RawImage.read(image));
  const [, , height, width] = pixel_values.dims;
  const content = [{ type: "image" }, { type: "text", text: `\n${text}` }];
  const prompt = processor.tokenizer.apply_chat_template([{ role: "user", content }], { tokenize: false, add_generation_prompt: true });
  const count = Math.floor(height / patch) * Math.floor(width / patch);
  const inputs = processor.tokenizer(prompt.replace(imageToken, imageToken.repeat(count)), { add_special_tokens: false });
  const options = { max_new_tokens: tokens, do_sample: false, streamer: clock };
  const output = await model.generate({ ...inputs, pixel_values, ...options });
  const length = inputs.input_ids.dims[1];
  const answer = processor.tokenizer.decode(output.slice(null, [length, null])[0], { skip_special_tokens: true });
  const times = clock.times.slice(1); // the first is that of the prompt
  const gaps = times.slice(1).map((time, index) => (time - times[index]) / 1000);
  answers.push([answer, (times[0] - start) / 1000, gaps]);
}
const memory = 1024 * /VmHWM:\s*(\d+)/.exec(await readFile("/proc/self/status", "utf-8"))[1]; // the most, in bytes
await writeFile(result, JSON.stringify({ answers, memory }));
