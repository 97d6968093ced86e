// Writes dist/: the page, the library beside it, and a model. It can be put on any static host.
//
//     npm run build                               with the model kept in model/
//     npm run build -- --model runs/model-onnx    with another, which convert/to_onnx.py wrote; --output names another folder

import { cp, mkdir, readdir, readFile, rename, rm, stat } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const here = dirname(fileURLToPath(import.meta.url));
const LIBRARY = {
  "@huggingface/transformers": ["transformers.min.js"],
  // The small build computes on the CPU alone; the other one also knows WebGPU
  "onnxruntime-web": ["", ".asyncify"].flatMap((kind) => [`ort-wasm-simd-threaded${kind}.mjs`, `ort-wasm-simd-threaded${kind}.wasm`]),
};
const SUFFIXES = { fp32: "", fp16: "_fp16", q8: "_quantized", q4: "_q4", q4f16: "_q4f16" };

const fail = (message) => {
  console.error(`build.mjs: error: ${message}`);
  process.exit(2);
};
const exists = (path) => stat(path).then(() => true, () => false);

const options = {
  model: { type: "string", default: join(here, "model") },
  output: { type: "string", default: join(here, "dist") },
};
const readOptions = () => {
  try {
    return parseArgs({ options }).values;
  } catch (error) {
    return fail(error.message);
  }
};
const values = readOptions();
// npm runs this in its own folder, and INIT_CWD is where the user is
const [model, output] = [values.model, values.output].map((path) => resolve(process.env.INIT_CWD ?? ".", path));
if (!(await exists(join(model, "onnx")))) {
  fail(`${model}: expected a folder that convert/to_onnx.py wrote, with a folder onnx in it`);
}
if (!(await exists(join(here, "node_modules")))) {
  fail("the JavaScript library is missing: npm ci --prefix examples/browser");
}
// What an earlier build wrote is replaced, and nothing else
const there = await readdir(output).catch((error) => (error.code === "ENOENT" ? [] : [output]));
if (there.length && !(await exists(join(output, "lib", "transformers.min.js")))) {
  fail(`--output ${output}: something else is there: choose another folder`);
}

const unfinished = `${output}.unfinished`;
await rm(unfinished, { recursive: true, force: true });
await cp(join(here, "page"), unfinished, { recursive: true });
// Of the precisions, those in which the page runs; without a choice in config.json, all
const { dtype, device_config } = JSON.parse(await readFile(join(model, "config.json"), "utf8"))["transformers.js_config"] ?? {};
const used = ["wasm", "webgpu"].map((device) => SUFFIXES[device_config?.[device]?.dtype ?? dtype]);
const isUsed = (path) => {
  const graph = /(_fp16|_quantized|_q4|_q4f16)?\.onnx$/.exec(path);
  return graph === null || used.includes(undefined) || used.includes(graph[1] ?? "");
};
await cp(model, join(unfinished, "model"), { recursive: true, filter: isUsed });
await mkdir(join(unfinished, "lib"));
for (const [name, files] of Object.entries(LIBRARY)) {
  for (const file of files) {
    await cp(join(here, "node_modules", name, "dist", file), join(unfinished, "lib", file));
  }
}
await rm(output, { recursive: true, force: true });
await rename(unfinished, output);
console.log(`Written to ${output}, with the model ${model}`);
