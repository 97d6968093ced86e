// A photograph from the camera, as a file.

/**
 * Open a dialog that shows the camera's view, with a button #shutter that takes the photograph and one that cancels.
 *
 * @param {HTMLDialogElement} dialog
 * @returns {Promise<File|null>} the photograph, or null if the visitor cancelled
 * @throws {DOMException} there is no camera, or the visitor does not allow it
 */
export async function photograph(dialog) {
  // On a telephone the one that looks away from the face
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
  const video = dialog.querySelector("video");
  const [cancel, shutter] = dialog.querySelectorAll("button");
  video.srcObject = stream;
  dialog.showModal();
  try {
    const isTaken = await new Promise((resolve) => {
      shutter.onclick = () => resolve(video.videoWidth > 0);
      cancel.onclick = () => resolve(false);
      dialog.onclose = () => resolve(false); // the Escape key
    });
    return isTaken ? await still(video) : null;
  } finally {
    dialog.onclose = null;
    dialog.close();
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
}

async function still(video) {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new File([await canvas.convertToBlob({ type: "image/png" })], "photograph.png", { type: "image/png" });
}
