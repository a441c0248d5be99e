"""Records what vLLM's scheduler asks of a worker, for tests that run without vLLM.

    DSV4C_VLLM_PLATFORM=1 python -m tests.serve.record FOLDER FILE [--ahead]

FOLDER is what `tests.serve.check` has made; FILE gets a JSON object a line: a step each.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from dsv4c.vllm import ARCHITECTURE
from dsv4c.vllm.worker import PlanWorker
from tests.serve.server import CONTEXT

PROMPTS = [[3, 17, 5], [7, 9], list(range(20, 150)), [200, 201, 202, 203], [11], [300] * 70]
LENGTHS = [5, 9, 4, 7, 3, 6]
PARAMS = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logprobs", "prompt_logprobs", "min_tokens"),
)


class RecordingWorker(PlanWorker):  # type: ignore[misc]
    """The worker, which writes down what it is asked."""

    def execute_model(self, scheduler_output: Any) -> Any:
        asked = {
            "finished": sorted(scheduler_output.finished_req_ids),
            "new": [
                {
                    "name": new.req_id,
                    "prompt": new.prompt_token_ids,
                    "params": {name: getattr(new.sampling_params, name) for name in PARAMS},
                }
                for new in scheduler_output.scheduled_new_reqs
            ],
            "tokens": dict(scheduler_output.num_scheduled_tokens),
        }
        with Path(os.environ["DSV4C_RECORD"]).open("a") as file:
            print(json.dumps(asked), file=file)
        return super().execute_model(scheduler_output)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ahead", action="store_true")
    given = parser.parse_args()
    given.file.unlink(missing_ok=True)
    os.environ |= {"DSV4C_RECORD": str(given.file), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(given.folder / "weights"),
        tokenizer_mode="deepseek_v4",
        additional_config={"plan": str(given.folder / "plain.plan")},
        hf_overrides={"architectures": [ARCHITECTURE]},
        worker_cls="tests.serve.record.RecordingWorker",
        max_model_len=CONTEXT,
        block_size=CONTEXT,
        num_gpu_blocks_override=5,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        enforce_eager=True,
        async_scheduling=given.ahead,
    )
    ways = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], ways, use_tqdm=False)


if __name__ == "__main__":
    main()
