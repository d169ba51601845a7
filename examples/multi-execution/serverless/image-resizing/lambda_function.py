"""The AWS Lambda function image-resize-service: resizes an image.

  event   image_url (https: or data:), width, height
  result  resized_url, original_size, new_size, width, height

With the variable BUCKET the new image is stored there and resized_url is a signed address, valid for an hour; without it
resized_url is a data: URL.
"""
import base64
import hashlib
import io
import os
import urllib.request

from PIL import Image

MAX_BYTES = 20 << 20
MAX_SIDE = 4096
Image.MAX_IMAGE_PIXELS = 50_000_000


def load(url):
    if not url.startswith(("https://", "data:")):
        raise ValueError("image_url must begin with https: or data:")
    with urllib.request.urlopen(url, timeout=20) as response:  # also reads data: URLs
        data = response.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"the image is larger than {MAX_BYTES} bytes")
    return data


def store(bucket, data):
    import boto3

    client = boto3.client("s3")
    # Named after its content: a repeated call writes the same object.
    key = f"thumbnails/{hashlib.sha256(data).hexdigest()}.png"
    client.put_object(Bucket=bucket, Key=key, Body=data, ContentType="image/png")
    return client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=3600)


def handler(event, context):
    width, height = int(event["width"]), int(event["height"])
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"width and height must be 1 to {MAX_SIDE}")
    original = load(event["image_url"])
    picture = Image.open(io.BytesIO(original)).convert("RGBA").resize((width, height))
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    data = out.getvalue()
    bucket = os.environ.get("BUCKET")
    url = store(bucket, data) if bucket else "data:image/png;base64," + base64.b64encode(data).decode()
    return {"resized_url": url, "original_size": len(original), "new_size": len(data), "width": width, "height": height}
