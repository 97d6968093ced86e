// The greedy answers of transformers.js: `node transformers_js.mjs PACKAGE < request`, for tests/test_to_onnx.py.
// A request: {folder, dtype, maxNewTokens, prompts: [{messages, images}]}; the reply: the token ids of each answer.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [, , packageFolder] = process.argv;
const entry = path.join(packageFolder, "dist", "transformers.node.mjs");
const { AutoProcessor, LlavaForConditionalGeneration, RawImage, env } = await import(pathToFileURL(entry));
const request = JSON.parse(fs.readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(request.folder);
const name = path.basename(request.folder);

const processor = await AutoProcessor.from_pretrained(name);
const model = await LlavaForConditionalGeneration.from_pretrained(name, { dtype: request.dtype });
const answers = [];
for (const { messages, images } of request.prompts) {
    const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
    const files = await Promise.all(images.map((image) => RawImage.read(image)));
    let inputs;
    if (files.length === 1) {
        inputs = await processor(files[0], prompt, { add_special_tokens: false });
    } else {
        // Its LlavaProcessor expands the first <image> alone
        const token = processor.config.image_token;
        const expanded = prompt.replaceAll(token, token.repeat(model.config.image_seq_length));
        inputs = processor.tokenizer(expanded, { add_special_tokens: false });
        if (files.length) Object.assign(inputs, await processor.image_processor(files));
    }
    const { input_ids, attention_mask, pixel_values } = inputs;
    const images_ = pixel_values ? { pixel_values } : {};
    const output = await model.generate({ input_ids, attention_mask, ...images_, max_new_tokens: request.maxNewTokens, do_sample: false });
    answers.push(output.slice(null, [input_ids.dims[1], null]).tolist()[0].map(Number));
}
process.stdout.write(JSON.stringify(answers));
