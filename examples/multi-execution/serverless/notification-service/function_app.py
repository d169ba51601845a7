"""The Azure Function notify: hands a message to a queue, from which senders take it.

  request   {"recipient": "…", "message": "…", "channel": "sms | email | push"}
  response  notification_id, status, recipient, channel

The message goes into the storage queue `notifications` of the function app's own storage account.
"""
import json
import uuid

import azure.functions as func

app = func.FunctionApp()
CHANNELS = ("sms", "email", "push")


def answer(status, body):
    return func.HttpResponse(json.dumps(body), status_code=status, mimetype="application/json")


@app.route(route="notify", methods=["POST"], auth_level=func.AuthLevel.FUNCTION)
@app.queue_output(arg_name="queue", queue_name="notifications", connection="AzureWebJobsStorage")
def notify(req: func.HttpRequest, queue: func.Out[str]) -> func.HttpResponse:
    try:
        job = req.get_json()
    except ValueError:
        return answer(400, {"error": "the body is not JSON"})
    recipient, message, channel = job.get("recipient"), job.get("message"), job.get("channel", "email")
    if not recipient or not message or channel not in CHANNELS:
        return answer(400, {"error": f"give recipient, message, and a channel of {', '.join(CHANNELS)}"})
    # A repeated call has the same key, and so the same id: senders drop what they have sent already.
    key = req.headers.get("Idempotency-Key") or str(uuid.uuid4())
    notification_id = str(uuid.uuid5(uuid.NAMESPACE_URL, key))
    queue.set(json.dumps({"id": notification_id, "recipient": recipient, "message": message, "channel": channel}))
    return answer(202, {"notification_id": notification_id, "status": "queued", "recipient": recipient, "channel": channel})
