import json, sys

print(json.dumps({"words": len(json.load(sys.stdin)["text"].split())}))
