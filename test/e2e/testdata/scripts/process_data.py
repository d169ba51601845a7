"""Counts the lines of one file and writes how many there are to another."""
import json
import sys

job = json.load(sys.stdin)
with open(job["input_file"], encoding="utf-8") as source:
    count = sum(1 for line in source if line.strip())
with open(job["output_file"], "w", encoding="utf-8") as target:
    target.write(f"{count}\n")
json.dump({"status": "done", "records_processed": count}, sys.stdout)
