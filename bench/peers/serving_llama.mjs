// llama.cpp, the prebuilt one of node-llama-cpp: node serving_llama.mjs NODE_MODULES MODEL.gguf < JOB; see ../serving.py.
// Tokens are drawn greedily and come one by one; sequences that run at once share each batch.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, modelPath] = process.argv.slice(2);
const entry = createRequire(modules + "/").resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));

const job = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: job.threads });
const model = await llama.loadModel({ modelPath, gpuLayers: 0 });

async function answer(sequence, request, began) {
  const tokens = [], times = [];
  for await (const token of sequence.evaluate(request.prompt, { temperature: 0, yieldEogToken: true })) {
    tokens.push(token);
    times.push((performance.now() - began) / 1000);
    if (tokens.length === request.new) break;
  }
  return { tokens, times };
}

// A slot takes the next request when it has finished one.
async function serve(sequences, requests) {
  const answers = [], began = performance.now();
  let next = 0;
  await Promise.all(sequences.map(async (sequence) => {
    while (next < requests.length) {
      const number = next++;
      await sequence.clearHistory();
      answers[number] = await answer(sequence, requests[number], began);
    }
  }));
  return { seconds: (performance.now() - began) / 1000, answers };
}

const context = await model.createContext({
  sequences: job.slots, contextSize: job.longest, batchSize: 512, threads: job.threads,
});
const all = Array.from({ length: job.slots }, () => context.getSequence());
for (const { name, requests, slots, repeats } of job.works) {
  const sequences = all.slice(0, slots);
  await serve(sequences, requests.slice(0, slots).map((one) => ({ ...one, new: 2 }))); // warm
  const runs = [];
  for (let i = 0; i < repeats; i++) runs.push(await serve(sequences, requests));
  console.log(JSON.stringify({ name, runs }));
}
process.exit(0);
