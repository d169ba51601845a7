"""Doubles the value of every record."""
import json
import sys

data = json.load(sys.stdin)["data"]
records = data if isinstance(data, list) else data["records"]
doubled = [{**record, "value": 2 * record["value"]} for record in records]
json.dump({"result": {"records": doubled}, "data": doubled}, sys.stdout)
