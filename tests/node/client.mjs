// Talks to a server with OpenAI's own package, and prints what came of it as one JSON object.
// Environment: OPENAI_BASE_URL and OPENAI_API_KEY, which the package reads itself, and CHATBOT.

import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const question = {
  model: process.env.CHATBOT,
  messages: [{ role: "user", content: "How are you?" }],
  max_tokens: 8,
};

async function errorOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return { class: error.constructor.name, status: error.status, message: error.message };
  }
}

async function streamed() {
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function chunksBeforeAbort() {
  const stream = await client.chat.completions.create({ ...question, max_tokens: 512, stream: true });
  let chunks = 0;
  for await (const _ of stream) {
    chunks += 1;
    if (chunks === 2) stream.controller.abort();
  }
  return chunks;
}

async function helped() {
  const stream = client.chat.completions.stream(question);
  let text = "";
  stream.on("content", (delta) => {
    text += delta;
  });
  const completion = await stream.finalChatCompletion();
  return { text, completion };
}

const stranger = new OpenAI({ apiKey: "upchatty_wrong", maxRetries: 0 });
const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    completion: await client.chat.completions.create(question),
    chunks: await streamed(),
    helper: await helped(),
    chunks_before_abort: await chunksBeforeAbort(),
    models,
    model: await client.models.retrieve(process.env.CHATBOT),
    errors: {
      unknown: await errorOf(client.chat.completions.create({ ...question, model: "bot_unknown" })),
      invalid: await errorOf(client.chat.completions.create({ ...question, temperature: 3 })),
      stranger: await errorOf(stranger.chat.completions.create(question)),
      streamed: await errorOf(client.chat.completions.create({ ...question, messages: [], stream: true })),
    },
  }),
);
