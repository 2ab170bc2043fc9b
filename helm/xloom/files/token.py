"""Asks the endpoint for one token until it gives one or the time is up. The test pod of the chart; standard library."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

body = {"model": os.environ["MODEL"], "prompt": "Hello", "max_tokens": 1}
headers = {"Content-Type": "application/json"}
if key := os.environ.get("XLOOM_API_KEY"):
    headers["Authorization"] = f"Bearer {key}"
request = urllib.request.Request(f"{os.environ['URL']}/v1/completions", json.dumps(body).encode(), headers)
deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
while True:
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        print(f"a token from {answer['model']}: {answer['choices'][0]['text']!r}, {answer['usage']}")
        sys.exit(0)
    except urllib.error.HTTPError as error:
        said = f"{error.code} {error.read().decode(errors='replace')}"
        if error.code in (401, 403, 404):
            sys.exit(said)  # waiting mends none of these
    except (OSError, ValueError, LookupError) as error:
        said = f"{type(error).__name__}: {error}"
    if time.monotonic() > deadline:
        sys.exit(f"no token in time: {said}")
    time.sleep(min(1.0, float(os.environ["TIMEOUT_S"])))
