"""Says who it is and which call this is, then waits until a file is there."""
import json
import os
import sys
import time

job = json.load(sys.stdin)
with open(job["log"], "a", encoding="utf-8") as log:
    log.write(f"{os.getpid()} {os.environ['SPECQL_IDEMPOTENCY_KEY']}\n")
while not os.path.exists(job["until"]):
    time.sleep(0.01)
json.dump({"pid": os.getpid()}, sys.stdout)
