// From a file to the pixels that the encoder sees, as the Python processor reads and resizes it.
//
// A canvas resizes without a filter worth the name, and differently in each browser. Pillow's way is written out here, in its
// own fixed-point arithmetic: the same pixels come out, and so the answers are those of transformers.

const MAX_PIXELS = 89_478_485; // larger files are refused, as in image_reading_minimind_v.py
const MAX_ASPECT_RATIO = 100; // of longer images the middle is kept
const STRIP = 4_000_000; // pixels drawn at once: a whole photograph may exceed what a canvas can hold

// Pillow's numbers for its filters; each has a reach and a weight by distance
const FILTERS = {
  2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear
  3: {
    support: 2, // bicubic
    weight: (x) => {
      x = Math.abs(x);
      return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    },
  },
};
const PRECISION = 22; // bits after the point

/** For each output pixel: where its inputs begin, and their integer weights. */
function weights(inputSize, outputSize, { support, weight }) {
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: outputSize }, (_, index) => {
    const center = (index + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const end = Math.min(inputSize, Math.trunc(center + support * stretch + 0.5));
    const row = Array.from({ length: end - begin }, (_, i) => weight((begin + i - center + 0.5) * (1 / stretch)));
    const sum = row.reduce((a, b) => a + b, 0);
    const fixed = row.map((w) => Math.trunc((w / sum) * 2 ** PRECISION + (w < 0 ? -0.5 : 0.5)));
    return { begin, fixed: Int32Array.from(fixed) };
  });
}

const toByte = (sum) => Math.min(255, Math.max(0, sum >> PRECISION));

/** Resize rows of RGBA pixels, (height, width, 4), to RGB of another width, (height, columns.length, 3). */
function resizeRows(pixels, width, height, columns, output) {
  let to = 0;
  for (let y = 0; y < height; y++) {
    for (const { begin, fixed } of columns) {
      let from = (y * width + begin) * 4;
      let r = 1 << (PRECISION - 1);
      let g = r;
      let b = r;
      for (let i = 0; i < fixed.length; i++, from += 4) {
        r += pixels[from] * fixed[i];
        g += pixels[from + 1] * fixed[i];
        b += pixels[from + 2] * fixed[i];
      }
      output[to++] = toByte(r);
      output[to++] = toByte(g);
      output[to++] = toByte(b);
    }
  }
}

/** Resize columns of RGB pixels, (height, width, 3), to another height, (rows.length, width, 3). */
function resizeColumns(pixels, width, rows) {
  const output = new Uint8ClampedArray(rows.length * width * 3);
  rows.forEach(({ begin, fixed }, y) => {
    for (let x = 0; x < width * 3; x++) {
      let sum = 1 << (PRECISION - 1);
      for (let i = 0; i < fixed.length; i++) sum += pixels[(begin + i) * width * 3 + x] * fixed[i];
      output[y * width * 3 + x] = toByte(sum);
    }
  });
  return output;
}

/** Which part of an image is used, and to which size it is resized before the middle is cut out. */
export function plan(width, height, { size, crop_size, do_resize, do_center_crop }) {
  const longest = MAX_ASPECT_RATIO * Math.min(width, height);
  const part = { width: Math.min(width, longest), height: Math.min(height, longest) };
  part.left = Math.ceil((width - part.width) / 2);
  part.top = Math.ceil((height - part.height) / 2);
  let resized = part;
  if (do_resize && size.shortest_edge) {
    const [short, long] = [part.width, part.height].sort((a, b) => a - b);
    const other = Math.trunc((size.shortest_edge * long) / short);
    resized = part.width <= part.height ? { width: size.shortest_edge, height: other } : { width: other, height: size.shortest_edge };
  } else if (do_resize) {
    resized = size;
  }
  const kept = do_center_crop ? crop_size : resized;
  return { part, resized, kept };
}

/**
 * The pixels of an image file, upright, over white, resized and cut.
 *
 * @param {Blob} file of any format that the browser reads
 * @param {object} settings of preprocessor_config.json
 * @returns {Promise<{data: Uint8ClampedArray, width: number, height: number}>} RGB, (height, width, 3)
 * @throws {DOMException} the browser cannot read it
 */
export async function readImage(file, settings) {
  const filter = FILTERS[settings.resample];
  if (!filter) throw new Error(`preprocessor_config.json: resample ${settings.resample}, expected 2 or 3`);
  // Embedded colour profiles are ignored, as Pillow does
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  try {
    if (bitmap.width * bitmap.height > MAX_PIXELS) throw new DOMException("too many pixels");
    const { part, resized, kept } = plan(bitmap.width, bitmap.height, settings);
    const columns = weights(part.width, resized.width, filter);
    const narrow = new Uint8ClampedArray(part.height * resized.width * 3);
    const rowsAtOnce = Math.max(1, Math.min(part.height, Math.floor(STRIP / part.width)));
    const context = new OffscreenCanvas(part.width, rowsAtOnce).getContext("2d", { willReadFrequently: true });
    for (let y = 0; y < part.height; y += rowsAtOnce) {
      const rows = Math.min(rowsAtOnce, part.height - y);
      context.fillStyle = "white"; // transparency is over white
      context.fillRect(0, 0, part.width, rows);
      context.drawImage(bitmap, part.left, part.top + y, part.width, rows, 0, 0, part.width, rows);
      const { data } = context.getImageData(0, 0, part.width, rows);
      resizeRows(data, part.width, rows, columns, narrow.subarray(y * resized.width * 3));
    }
    const whole = resizeColumns(narrow, resized.width, weights(part.height, resized.height, filter));
    return cutMiddle(whole, resized, kept);
  } finally {
    bitmap.close();
  }
}

function cutMiddle(pixels, { width, height }, kept) {
  const left = Math.floor((width - kept.width) / 2);
  const top = Math.floor((height - kept.height) / 2);
  const data = new Uint8ClampedArray(kept.width * kept.height * 3);
  for (let y = 0; y < kept.height; y++) {
    const from = ((top + y) * width + left) * 3;
    data.set(pixels.subarray(from, from + kept.width * 3), y * kept.width * 3);
  }
  return { data, width: kept.width, height: kept.height };
}
