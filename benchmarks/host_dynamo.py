"""The real Dynamo worker as a server to measure; run by an interpreter that has Dynamo.

python host_dynamo.py '[{"path": DIR, "name": NAME}]' [spin|pace]
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop"))

import dynamo_worker
import pace
import spin

if __name__ == "__main__":
    if "spin" in sys.argv:
        spin.start()
    if "pace" in sys.argv:
        pace.start()
    asyncio.run(dynamo_worker.serve(json.loads(sys.argv[1])))
