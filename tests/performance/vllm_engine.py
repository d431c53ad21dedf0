"""One vLLM engine in a process of its own, that answers bursts of equal requests on a line of JSON each.

    python -m tests.performance.vllm_engine '{"plugin": true, "vectors": FOLDER, "eager": true, "requests": 256}'

Here belongs what runs inside that process; which engines there are and what is compared belongs in `vllm_serving.py`. The engine, its worker and
whoever asks share the process, so that its processor time is all that a burst costs.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

MODEL = "embedded:smollm2-135m-instruct"
PROMPT, VOCABULARY = 6, (20, 49_000)  # tokens of a prompt, fewer than a block of vLLM's cache, so that every burst computes its prompts anew


def main(settings: dict[str, Any]) -> None:
    engine = started(settings)
    said = os.fdopen(os.dup(1), "w", buffering=1)
    print(json.dumps({"ready": True}), file=said)
    for line in sys.stdin:
        print(json.dumps(burst(engine, json.loads(line))), file=said)


def started(settings: dict[str, Any]) -> Any:
    from vllm import LLM

    from relseek_resources.models.loading import converted

    steering = {"folder": settings["vectors"], "vectors": settings["files"], "capacity": 4096}
    return LLM(
        model=str(converted(MODEL)),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=settings["requests"],
        enforce_eager=settings["eager"],
        additional_config={"relseek": steering} if settings["plugin"] else {},
    )


def burst(engine: Any, asked: dict[str, Any]) -> dict[str, float]:
    """Answer requests, each steered as `asked["steering"]` says, with `asked["tokens"]` tokens each. Seconds, and the processor's."""
    from vllm import SamplingParams

    rng = random.Random(asked["seed"])
    prompts = [{"prompt_token_ids": [rng.randrange(*VOCABULARY) for _ in range(PROMPT)]} for _ in asked["steering"]]
    how = [
        SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, extra_args={"relseek": json.dumps(one)} if one else None)
        for one in asked["steering"]
    ]
    before, start = time.process_time(), time.perf_counter()
    replies = engine.generate(prompts, how, use_tqdm=False)
    found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - before}
    given = [len(reply.outputs[0].token_ids) for reply in replies]
    if given != [asked["tokens"]] * len(prompts):
        raise RuntimeError(f"replies of {sorted(set(given))} tokens; {asked['tokens']} were asked for")
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
