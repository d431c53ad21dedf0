"""Whether this replica steers, by its own measurement: run by the probes of vllm.yaml.

steers.py             fails unless a dose was measured to change the model and a dose of 0 not to
steers.py --patient   fails where the measurement says that it does not; a replica that is too busy to measure is left alone
"""

import json
import os
import sys
import urllib.error
import urllib.request

patient = sys.argv[1:] == ["--patient"]
address = os.environ.get("RELSEEK_ADDRESS", "http://127.0.0.1:8000")
asked = urllib.request.Request(f"{address}/v1/relseek/health", headers={"authorization": f"Bearer {os.environ['VLLM_API_KEY']}"})
try:
    with urllib.request.urlopen(asked, timeout=110) as answer:
        live = json.load(answer)["live"]
except urllib.error.HTTPError as error:
    try:
        live = json.load(error)["live"]
    except (ValueError, KeyError, TypeError):
        live = None
except (OSError, ValueError, KeyError, TypeError):
    live = None
sys.exit(0 if live or (patient and live is None) else 1)
