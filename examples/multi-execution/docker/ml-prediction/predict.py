"""Classifies an image with MobileNetV2.

    predict.py classify < job.json

  in   image_base64   PNG, JPEG or GIF
  out  label, confidence (0 to 1), scores {label: score} of the five best, model_version
"""
import base64
import io
import json
import sys


def classify(job):
    import numpy
    import tensorflow as tf
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = 50_000_000
    picture = Image.open(io.BytesIO(base64.b64decode(job["image_base64"], validate=True)))
    picture = picture.convert("RGB").resize((224, 224))
    pixels = numpy.expand_dims(numpy.asarray(picture, dtype="float32"), 0)
    mobilenet = tf.keras.applications.mobilenet_v2
    model = tf.keras.applications.MobileNetV2(weights="imagenet")
    predictions = model.predict(mobilenet.preprocess_input(pixels), verbose=0)
    best = mobilenet.decode_predictions(predictions, top=5)[0]
    scores = {label: round(float(score), 4) for _, label, score in best}
    return {
        "label": best[0][1],
        "confidence": round(float(best[0][2]), 4),
        "scores": scores,
        "model_version": f"mobilenet_v2-imagenet, TensorFlow {tf.__version__}",
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["classify"]:
        sys.exit("usage: predict.py classify < job.json")
    json.dump(classify(json.load(sys.stdin)), sys.stdout)
