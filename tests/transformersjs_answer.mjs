// node transformersjs_answer.mjs PACKAGE MODEL PICTURE QUESTION...
// PICTURE is an image file for the package's own processor, or a .f32 file with ready pixel values [1, 3, R, R].
// Prints one line of JSON per question: the prompt's ids, the new ids, the answer.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [packageFolder, model, picture, ...questions] = process.argv.slice(2);
const entry = createRequire(path.resolve(packageFolder, "package.json")).resolve("@huggingface/transformers");
const { AutoProcessor, PaliGemmaForConditionalGeneration, RawImage, Tensor, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = path.dirname(model) + path.sep;
const name = path.basename(model);

const processor = await AutoProcessor.from_pretrained(name);
const net = await PaliGemmaForConditionalGeneration.from_pretrained(name);
const ready = picture.endsWith(".f32");
const image = ready ? new RawImage(new Uint8ClampedArray(3), 1, 1, 3) : await RawImage.read(picture);
for (const question of questions) {
  const inputs = await processor(image, `<image>answer en ${question}`);
  if (ready) {
    inputs.pixel_values = new Tensor("float32", new Float32Array(new Uint8Array(readFileSync(picture)).buffer), inputs.pixel_values.dims);
  }
  const ids = await net.generate({ ...inputs, max_new_tokens: 8 });
  const prompt = inputs.input_ids.tolist()[0].map(Number);
  const tokens = ids.tolist()[0].slice(prompt.length).map(Number);
  const answer = processor.batch_decode([tokens], { skip_special_tokens: true })[0];
  console.log(JSON.stringify({ prompt, tokens, answer }));
}
