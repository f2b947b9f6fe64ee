// A file as the user gives it -> a picture that is shown, sent and kept as a thumbnail.

const SENT_AS_IS = /^image\/(jpeg|png|webp|gif|bmp|avif)$/; // what both this browser and the server read
const LONG_SIDE = 4096; // of a picture that has to be made smaller; models see at most 896
const ROOM_FOR_TEXT = 16 * 1024; // bytes of a request beside the picture
const THUMBNAIL = 128;

/**
 * Opens a picture.
 * @param {File} file
 * @param {{maxBody: number, maxPixels: number}} limits of the server, in bytes of a request and pixels
 * @throws {Error} with a line for the user
 */
export async function openPicture(file, limits) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    if (!width || !height) throw new Error("no size");
    const sent = await fit(file, image, limits);
    return { name: file.name, url, width, height, sent, shrunk: sent !== file, thumbnail: thumbnail(image) };
  } catch (error) {
    URL.revokeObjectURL(url);
    if (error instanceof TooLarge) throw error;
    throw new Error(`${file.name || "This"} is not a picture that this browser can show. Try JPEG, PNG or WebP.`);
  }
}

class TooLarge extends Error {}

/** The file itself where the server takes it; otherwise the same picture, upright, as a smaller JPEG. */
async function fit(file, image, { maxBody, maxPixels }) {
  const room = maxBody - ROOM_FOR_TEXT;
  const { naturalWidth: width, naturalHeight: height } = image;
  if (SENT_AS_IS.test(file.type) && file.size <= room && width * height <= maxPixels) return file;
  let scale = Math.min(1, LONG_SIDE / Math.max(width, height), Math.sqrt(maxPixels / (width * height)));
  for (; Math.max(width, height) * scale >= 64; scale *= 0.7) {
    const blob = await draw(image, Math.floor(width * scale) || 1, Math.floor(height * scale) || 1);
    if (blob.size <= room) return blob;
  }
  throw new TooLarge("The server does not take pictures of this size, even made smaller.");
}

function draw(image, width, height) {
  const canvas = paint(image, width, height, 0, 0, width, height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no room to draw"))), "image/jpeg", 0.92);
  });
}

function thumbnail(image) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = THUMBNAIL / Math.min(width, height); // fills the square
  const [w, h] = [width * scale, height * scale];
  return paint(image, THUMBNAIL, THUMBNAIL, (THUMBNAIL - w) / 2, (THUMBNAIL - h) / 2, w, h).toDataURL("image/jpeg", 0.8);
}

/** drawImage turns a picture upright by its EXIF orientation, as <img> does. */
function paint(image, width, height, ...place) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // transparent parts are white to the server too
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, ...place);
  return canvas;
}
