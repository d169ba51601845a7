#!/usr/bin/env python3
"""Cleans a CSV file of orders and sums it up.

Reads JSON on stdin, writes JSON on stdout:

  in   file           CSV file with a header, below the working directory
       amount_column  column with the amount in units such as 12.50 (default amount)
       group_by       column to sum up by (default region)
       id_column      column that tells rows apart; repeated ones are left out (default order_id)
       output_file    where to write the clean rows (optional)
  out  rows_read, rows_valid, rows_rejected, rejected [{line, reason}], total_cents, average_cents,
       largest_cents, amounts_cents [integer], groups [{group, orders, total_cents}]
"""
import csv
import json
import pathlib
import sys
from decimal import Decimal, InvalidOperation

MAX_ROWS = 1_000_000
MAX_LISTED = 100


def below(name):
    """A path below the working directory; anything else is refused."""
    here = pathlib.Path.cwd().resolve()
    path = (here / name).resolve()
    if here not in path.parents:
        sys.exit(f"{name!r} is not below the working directory")
    return path


def cents(text):
    """An amount such as 1,234.50 in cents; None if it is not one."""
    try:
        value = Decimal(text.replace(",", "")) * 100
    except InvalidOperation:
        return None
    if not value.is_finite() or value != value.to_integral_value():
        return None
    return int(value)


def clean(rows, amount_column, id_column):
    """Splits rows into good ones with their cents, and rejected ones with the reason."""
    good, rejected, seen = [], [], set()
    for line, row in rows:
        row = {key: (value or "").strip() for key, value in row.items() if key is not None}
        amount = cents(row.get(amount_column, ""))
        if amount is None:
            rejected.append({"line": line, "reason": f"{amount_column} is not an amount"})
        elif amount <= 0:
            rejected.append({"line": line, "reason": f"{amount_column} is not above zero"})
        elif id_column in row and row[id_column] in seen:
            rejected.append({"line": line, "reason": f"{id_column} was there before"})
        else:
            seen.add(row.get(id_column))
            good.append((row, amount))
    return good, rejected


def main():
    job = json.load(sys.stdin)
    amount_column = job.get("amount_column") or "amount"
    group_by = job.get("group_by") or "region"
    id_column = job.get("id_column") or "order_id"
    path = below(job["file"])
    if not path.is_file():
        sys.exit(f"there is no file {job['file']!r} in the working directory")
    with path.open(newline="", encoding="utf-8-sig") as source:
        reader = csv.DictReader(source)
        names = reader.fieldnames or []
        for column in (amount_column, group_by):
            if column not in names:
                sys.exit(f"{job['file']}: no column {column!r}; the columns are {', '.join(names)}")
        rows = []
        for row in reader:
            if len(rows) == MAX_ROWS:
                sys.exit(f"{job['file']}: more than {MAX_ROWS} rows")
            rows.append((reader.line_num, row))
    good, rejected = clean(rows, amount_column, id_column)
    print(f"{len(good)} of {len(rows)} rows are good", file=sys.stderr)

    groups = {}
    for row, amount in good:
        group = groups.setdefault(row[group_by], {"group": row[group_by], "orders": 0, "total_cents": 0})
        group["orders"] += 1
        group["total_cents"] += amount
    amounts = [amount for _, amount in good]
    result = {
        "rows_read": len(rows),
        "rows_valid": len(good),
        "rows_rejected": len(rejected),
        "rejected": rejected[:MAX_LISTED],
        "total_cents": sum(amounts),
        "average_cents": round(sum(amounts) / len(amounts)) if amounts else 0,
        "largest_cents": max(amounts, default=0),
        "amounts_cents": amounts[:10_000],
        "groups": sorted(groups.values(), key=lambda g: (-g["total_cents"], g["group"])),
    }
    if job.get("output_file"):
        with below(job["output_file"]).open("w", newline="", encoding="utf-8") as target:
            writer = csv.DictWriter(target, fieldnames=names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row, _ in good)
        result["output_file"] = job["output_file"]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
