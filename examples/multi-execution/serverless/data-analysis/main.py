"""The Google Cloud Function data-analysis: statistics of numbers.

  request   {"numbers": [1, 2, 3]}
  response  count, sum, mean, median, stddev (of the population), min, max
"""
import statistics

import functions_framework


@functions_framework.http
def analyze(request):
    job = request.get_json(silent=True) or {}
    numbers = job.get("numbers")
    if not isinstance(numbers, list) or not numbers:
        return {"error": "numbers is empty"}, 400
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        return {"error": "numbers must hold numbers alone"}, 400
    return {
        "count": len(numbers),
        "sum": sum(numbers),
        "mean": statistics.fmean(numbers),
        "median": statistics.median(numbers),
        "stddev": statistics.pstdev(numbers),
        "min": min(numbers),
        "max": max(numbers),
    }
