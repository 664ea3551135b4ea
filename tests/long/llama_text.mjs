// Greedy text by llama.cpp: node llama_text.mjs NODE_MODULES MODEL.gguf < {"prompt": text or ids, "new": count}
// The answer: {"prompt": ids, "tokens": new ids, "text": what these spell, "seconds": of all but the first}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, modelPath] = process.argv.slice(2);
const entry = createRequire(modules + "/").resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const job = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1 });
const model = await llama.loadModel({ modelPath, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 128, batchSize: 128, threads: 1, flashAttention: false });
const prompt = typeof job.prompt === "string" ? model.tokenize(job.prompt, false) : job.prompt;
const tokens = [];
let began = 0;
for await (const token of context.getSequence().evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
  began ||= performance.now();
  tokens.push(token);
  if (tokens.length === job.new) break;
}
const seconds = (performance.now() - began) / 1000;
console.log(JSON.stringify({ prompt: [...prompt], tokens, text: model.detokenize(tokens), seconds }));
process.exit(0);
